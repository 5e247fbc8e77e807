"""What the device is given of a batch: pixels that were resized on the host or are resized there, or latents from disk.

The ways differ in speed alone: the state that `encode` returns is the same bits.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spatialprobe.engine.adapter import Adapter, Inputs
from spatialprobe.engine.pipeline.latents import LatentFolder, Latents, source_identity
from spatialprobe.engine.pipeline.timing import Clock
from spatialprobe.engine.types import Clip, ClipRef, Plan

RESIZE = ("auto", "host", "device")
WAITING = 0.1  # share of a run that is spent waiting for loaders, from which on they are worth relieving


def check_resize(resize: str, adapter: Adapter) -> None:
    if resize not in RESIZE:
        raise ValueError(f"resize must be one of {', '.join(RESIZE)}, got {resize!r}")
    if resize == "device" and not adapter.PREPARES_ON_DEVICE:
        raise ValueError(f"resize must be host or auto for a {type(adapter).__name__}: its own processor resizes")


@dataclass
class Fed:
    """What a loader has of a clip for the device: one of the three."""

    inputs: Inputs | None = None  # pixels, ready
    clip: Clip | None = None  # pixels, to be resized on the device
    kept: Latents | None = None  # from disk
    made: Latents = field(default_factory=dict)  # latents that go to disk, in host memory once the batch is copied
    source: str = ""  # what names the clip's latents; without, they are not kept

    def let_go(self) -> None:
        """Of all but `made`, which is still to be written."""
        self.inputs = self.clip = self.kept = None


class Feeder:
    """Decides how a clip comes to the device, in loader threads, and brings it there, in the calling one."""

    def __init__(self, adapter: Adapter, clock: Clock, *, resize: str = "auto", latents: LatentFolder | None = None):
        check_resize(resize, adapter)
        self.adapter, self.clock, self.resize, self.latents = adapter, clock, resize, latents
        self.device = torch.device(adapter.device)

    # -- loader threads ---------------------------------------------------------------------------------------------

    def from_disk(self, ref: ClipRef) -> tuple[Fed, dict[str, Any] | None]:
        """A clip's latents and what they say about it; None if there are none."""
        if self.latents is None:
            return Fed(), None
        try:
            fed = Fed(source=source_identity(ref))
        except (OSError, ValueError):  # decoding will say what is wrong
            return Fed(), None
        with self.clock.host("read latents"):
            found = self.latents.read(ref, fed.source)
        if found is None:
            return fed, None
        fed.kept = found.tensors
        return fed, found.about

    def take(self, fed: Fed, clip: Clip, plan: Plan) -> None:
        """Resizes a decoded clip, or leaves that to the device."""
        if self._on_device(clip, plan):
            fed.clip = clip
            return
        with self.clock.host("prepare"):
            fed.inputs = self.adapter.prepare(clip, plan)

    def _on_device(self, clip: Clip, plan: Plan) -> bool:
        if self.resize != "auto":
            return self.resize == "device"
        if self.device.type != "cuda" or not self.adapter.PREPARES_ON_DEVICE:
            return False
        fewer = clip.frames.nbytes <= len(plan.shown) * 3 * plan.size[0] * plan.size[1]
        return fewer or self.clock.share("wait for loaders") > WAITING

    # -- the calling thread -----------------------------------------------------------------------------------------

    def state(self, batch: list[Fed], plan: Plan, copy: Callable[[Tensor], Tensor]) -> Any:
        """`adapter.encode` of a batch. `copy` brings latents to the host, for `made`."""
        if self.latents is None:
            inputs = self._inputs(batch, plan)
            with self.clock.on_device("encode"):
                return self.adapter.encode(inputs, plan)
        fresh = [fed for fed in batch if fed.kept is None]
        made: list[Latents] = []
        if fresh:
            inputs = self._inputs(fresh, plan)
            with self.clock.on_device("encode"):
                together = self.adapter.latents(inputs, plan)
            made = [{name: x[i : i + 1] for name, x in together.items()} for i in range(len(fresh))]
            for fed, own in zip(fresh, made, strict=True):
                fed.made = {name: copy(x[0]) for name, x in own.items()} if fed.source else {}
        each = iter(made)
        with self.clock.on_device("upload"):
            parts = [next(each) if fed.kept is None else self._uploaded(fed.kept) for fed in batch]
        with self.clock.on_device("encode"):
            return self.adapter.state({name: torch.cat([x[name] for x in parts]) for name in parts[0]}, plan)

    def _uploaded(self, kept: Latents) -> Latents:
        return {name: stage([x], self.device).to(self.device, non_blocking=True) for name, x in kept.items()}

    def _inputs(self, batch: list[Fed], plan: Plan) -> Inputs:
        if all(fed.clip is None for fed in batch):
            return self._upload([fed.inputs for fed in batch])
        alone = [self._upload([fed.inputs]) if fed.clip is None else self._resized(fed.clip, plan) for fed in batch]
        return {name: torch.cat([x[name] for x in alone]) for name in alone[0]}

    def _upload(self, inputs: list[Inputs]) -> Inputs:
        with self.clock.host("stage"):
            staged = {name: stage([x[name] for x in inputs], self.device) for name in inputs[0]}
        with self.clock.on_device("upload"):
            return {name: x.to(self.device, non_blocking=True) for name, x in staged.items()}

    def _resized(self, clip: Clip, plan: Plan) -> Inputs:
        frames = self._upload([{"frames": clip.frames.permute(0, 2, 3, 1)}])["frames"][0]
        with self.clock.on_device("resize"):
            there = Clip(clip.id, frames.permute(0, 3, 1, 2), clip.index, clip.padded, clip.window)
            inputs = self.adapter.prepare(there, plan)
            return {name: x[None].to(self.device) for name, x in inputs.items()}


def stage(tensors: list[Tensor], device: torch.device) -> Tensor:
    """The tensors as one, in memory that the device can fetch by itself. One alone is not copied on the CPU."""
    if device.type != "cuda":
        return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)
    shape = (len(tensors), *tensors[0].shape)
    pinned = torch.empty(shape, dtype=tensors[0].dtype, pin_memory=True)  # a caching allocator: buffers are reused
    return torch.stack(tensors, out=pinned)
