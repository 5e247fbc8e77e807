"""What the CPU's allocator gives out and takes back while code runs: the reference of `LiveBytes`.

What kernels allocate inside is left out: those of a CPU unroll convolutions and reorder weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile

from spatialprobe.engine.device.live_bytes import ONE_KERNEL

# "aten::to.dtype" -> "aten::to": the profiler does not tell overloads
COMPOSITES = {
    name.split(".")[0] for name in torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd")
}
KERNELS = {func.overloadpacket._qualified_op_name for func in ONE_KERNEL}


class Allocated:
    """Has what `run_once` calls of a `LiveBytes`."""

    def __init__(self, live: int):
        self.live = live  # bytes that are there before

    def see(self, *tensors: object) -> None:
        """The allocator has seen them."""

    @contextmanager
    def phase(self, peaks: dict[str, int], name: str) -> Iterator[None]:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
            yield
        peak, inside = self.live, 0  # `inside`: when the kernel that runs ends
        for event in sorted(run.profiler.kineto_results.events(), key=lambda e: (e.start_ns(), e.name() == "[memory]")):
            if event.name() != "[memory]":
                if event.start_ns() >= inside and is_kernel(event.name()):
                    inside = event.start_ns() + event.duration_ns()
                continue
            if event.start_ns() > inside:
                peak = max(peak, self.live)  # all that the kernel before has left is there
            self.live += event.nbytes()
            if event.start_ns() > inside:
                peak = max(peak, self.live)
        peaks[name] = max(peaks.get(name, 0), peak, self.live)


def is_kernel(name: str) -> bool:
    """Whether a profiled operation is one to `LiveBytes`: none that torch makes of others."""
    return name.startswith("aten::") and (name in KERNELS or name not in COMPOSITES)
