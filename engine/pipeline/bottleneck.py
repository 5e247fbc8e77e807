"""Which stage holds a run back, and what would widen it: read from the clock's summary. Knows no model."""

import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

NOTABLE = 0.1  # share of a run's time below which a stage holds nothing back
LOADING = {  # what loader threads do, and what would make each shorter, beside more threads
    "decode": "smaller sources",
    "prepare": "--resize device",
    "read latents": "a faster disk for --latents",
}
WRITING = {"write": "--pool, a smaller --store-dtype or a faster disk", "write latents": "a faster disk for latents"}
DEVICE = {
    "blocks": "fewer --steps, or a larger --batch or --compile where it is not full yet",
    "encode": "--latents, where clips come back for other layers, steps or models",
    "upload": "smaller sources, or --resize host",
    "resize": "--resize host",
    "finish": "--pool",
}
LAUNCHES = 0.8  # of a block's time: from there on the device is taken to wait for launches
OTHERWISE = {"prepare": "smaller sources", "encode": "more GPUs"}  # where that cannot be had
CALLING = {  # what the thread that drives the device does meanwhile
    "stage": "--resize host where sources are larger than the model's input",
    "noise": "fewer --steps",
}


@dataclass(frozen=True)
class HeldBack:
    stage: str  # the longest of those that the run waited for
    share: float  # of the run's time
    advice: str


def held_back(
    timing: dict[str, Any],
    *,
    loaders: int,
    writers: int,
    cannot: Collection[str] = (),  # stages of OTHERWISE whose usual advice this run cannot take
    here: Collection[str] = (),  # of "loaders" and "writers", whose work the calling thread did itself
    cores: int | None = None,
) -> HeldBack | None:
    """What took most of a run's time, `timing` being `Clock.summary()`. None where no stage took a notable part.

    A run's time is that of the calling thread: it waits for loaders, for writers, or drives the device.
    """
    total, seconds = timing["seconds"], {name: stage["seconds"] for name, stage in timing["stages"].items()}
    if total <= 0:
        return None
    cores = cores or os.cpu_count() or 1
    shares = {
        "loaders": seconds.get("wait for loaders", 0.0) / total,
        "writers": seconds.get("wait for writers", 0.0) / total,
        "device": timing["busy"],
        "calling": sum(seconds.get(name, 0.0) for name in CALLING) / total,
    }
    side = max(shares, key=shares.__getitem__)
    if shares[side] < NOTABLE:
        return None
    stages = {"loaders": LOADING, "writers": WRITING, "device": DEVICE, "calling": CALLING}[side]
    present = {name: seconds[name] for name in stages if seconds.get(name, 0.0) > 0}
    stage = max(present, key=present.__getitem__) if present else next(iter(stages))
    advice = OTHERWISE[stage] if stage in cannot else stages[stage]
    if stage == "blocks" and "launches" in timing:
        advice = of_blocks(**timing["launches"])
    if side in ("loaders", "writers"):
        threads = loaders if side == "loaders" else writers
        more = f"more --{side} ({threads} on {cores} cores)" if threads < cores else f"more cores ({threads} --{side})"
        advice = f"{'more processes (--devices)' if side in here else more} or {advice}"
    return HeldBack(stage, shares[side], advice)


def of_blocks(launch_ms: float, block_ms: float) -> str:
    """What would shorten blocks of which a launch takes so long, and one until the device is through."""
    share = launch_ms / block_ms
    known = f"launching is {share:.0%} of a block's time"
    if share >= LAUNCHES:
        return f"a larger --batch, or --compile graphs ({known})"
    return f"fewer --steps, or --compile where it is off ({known})"


def held_back_line(timing: dict[str, Any], **about: Any) -> str:
    """One line for people. `about` as for `held_back`."""
    found = held_back(timing, **about)
    if found is None:
        return "held back by no stage in particular"
    return f"held back by {found.stage} ({found.share:.0%} of the time): {found.advice}"
