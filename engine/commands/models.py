"""`engine models`: the presets as a table."""

import argparse
from collections.abc import Callable

from spatialprobe.engine.presets import FAMILIES, LEFT_OUT, PRESETS, TEACHERS


def add_command(command: Callable[..., argparse.ArgumentParser]) -> None:
    command("models", models, "presets, their token grids and the layers the study used")


def models(args: argparse.Namespace) -> int:
    print(
        f"{'preset':<24}{'blocks':>7}{'channels':>9}  {'tokens':<10}{'pool':<7}{'step':>5}{'memory':>9}{'clip':>9}"
        "  layers the study used"
    )
    for name, p in PRESETS.items():
        layers = ", ".join(f"{task} {layer}" for task, layer in p.layers.items()) or "-"
        step, pool = FAMILIES[p.family].default_step, "x".join(map(str, p.pool)) if p.pool else "-"
        memory = p.memory_gb(max(p.layers.values(), default=p.blocks - 1))
        print(
            f"{name:<24}{p.blocks:>7}{p.channels:>9}  {'x'.join(map(str, p.grid)):<10}{pool:<7}"
            f"{'-' if step is None else step:>5}{memory:>6.1f} GB{p.clip_bytes / 1e6:>6.0f} MB  {layers}"
        )
    print(
        "memory: weights in bfloat16 up to the study's last layer, or of all blocks; clip: float16, one layer and step"
    )
    print("encoders, of which the study had none: by default the block three quarters of the way up, and the last")
    print(f"for engine targets: {', '.join(TEACHERS)}")
    for name, why in LEFT_OUT.items():
        print(f"left out: {name}, {why}")
    return 0
