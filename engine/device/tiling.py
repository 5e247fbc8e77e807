"""`vae_tiling=auto`: untiled where memory allows, else tiled. What was chosen is in the spec, for tiles change values.

A choice is made once, before a store exists; from then on the store's spec is the choice, so that no store mixes both.
"""

from dataclasses import replace
from pathlib import Path

import torch

from spatialprobe.engine.adapter import Adapter, plan_clip
from spatialprobe.engine.device.memory_plan import plan_memory, shapes_of
from spatialprobe.engine.device.out_of_memory import is_out_of_memory
from spatialprobe.engine.device.placement import free_bytes
from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.types import FeatureSpec

OPTION = "vae_tiling"
AUTO = "auto"


def chosen(spec: FeatureSpec, tiled: bool) -> FeatureSpec:
    return replace(spec, options=spec.options | {OPTION: tiled})


def choose(adapter: Adapter, spec: FeatureSpec, depth: int, device: torch.device, out: Path) -> bool:
    """Whether to tile: as the store at `out` does, or without one if a clip alone would not fit untiled.

    Raises ValueError for windows of any length, whose memory cannot be planned.
    """
    if (out / "spec.json").exists():
        return bool(FeatureStore.open(out).spec.options.get(OPTION))
    if spec.frames.window is None:
        raise ValueError(
            f"{OPTION}=auto needs a plan of memory, which a window of any length has not: say true or false"
        )
    plan = plan_memory(adapter, chosen(spec, False), depth, 1, spec.frames.window, out / "cache")
    return plan.running > free_bytes(device)


@torch.inference_mode()
def fit(adapter: Adapter, spec: FeatureSpec) -> FeatureSpec:
    """Encodes one clip of zeros with a loaded, untiled model; where memory runs out, tiles it. Returns what was used.

    To be called before a store of this spec exists.
    """
    if spec.options[OPTION] or spec.frames.window is None:
        return spec
    plan, _ = plan_clip(spec.frames.window, adapter, spec)
    inputs = {
        name: torch.zeros(x.shape, dtype=x.dtype, device=adapter.device) if x.is_meta else x.to(adapter.device)
        for name, x in shapes_of(adapter, plan, 1).items()
    }
    full = False
    try:
        adapter.encode(inputs, plan)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        full = True
    if full:  # outside the handler: the traceback would keep the failed pass in memory
        adapter.options[OPTION] = True
        adapter.vae.enable_tiling()
    if adapter.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(adapter.device)
    return chosen(spec, full)


def follow(adapter: Adapter, spec: FeatureSpec, there: FeatureSpec) -> FeatureSpec:
    """`spec` with the choice of a store that another process was first to make, and a loaded VAE as that says."""
    tiled = bool(there.options.get(OPTION))
    adapter.options[OPTION] = tiled
    vae = getattr(adapter, "vae", None)  # before `load` there is none
    if vae is not None:
        vae.enable_tiling() if tiled else vae.disable_tiling()
    return chosen(spec, tiled)


def advice(adapter: Adapter) -> str:
    """What is left to try when one clip alone does not fit."""
    if OPTION in adapter.OPTIONS and not adapter.options[OPTION]:
        return "; its VAE ran untiled: a new store with --option vae_tiling=true needs less"
    return ""
