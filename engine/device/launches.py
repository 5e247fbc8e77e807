"""Whether launching a block's kernels takes longer than running them, which is what CUDA graphs are for.

Measured once in a run, of one block in one of its first passes: how long the host takes to launch it, and how long it
is until the device is through. Not known of blocks that lie elsewhere, or that are graphs already.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from spatialprobe.engine.types import FeatureSpec

CALL = 3  # the first ones compile, choose kernels and allocate


class LaunchTimes:
    """Hooks on a block, to be set before any that do work of their own."""

    def __init__(self, blocks: Sequence[nn.Module], spec: FeatureSpec, device: torch.device):
        self._device, self._calls, self._started, self._hooks = device, 0, 0.0, []
        self.launched = self.through = 0.0  # seconds; 0 until measured
        if device.type == "cuda" and spec.offload == "none" and spec.compile != "graphs":
            block = blocks[min(1, len(blocks) - 1)]  # the first may see its input laid out otherwise
            self._hooks = [block.register_forward_pre_hook(self._before), block.register_forward_hook(self._after)]

    def _before(self, block: nn.Module, args: Any) -> None:
        self._calls += 1
        if self._calls == CALL:
            torch.cuda.synchronize(self._device)
            self._started = time.perf_counter()

    def _after(self, block: nn.Module, args: Any, output: Any) -> None:
        if self._calls == CALL:
            self.launched = time.perf_counter() - self._started
            torch.cuda.synchronize(self._device)
            self.through = time.perf_counter() - self._started
            self.remove()

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def summary(self) -> dict[str, dict[str, float]]:
        """{"launches": {"launch_ms", "block_ms"}}, or nothing where it was not measured."""
        if not self.through:
            return {}
        times = {"launch_ms": self.launched, "block_ms": self.through}
        return {"launches": {name: round(1e3 * seconds, 4) for name, seconds in times.items()}}
