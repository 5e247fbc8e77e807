"""Where a run's time goes: seconds and bytes per stage, from any thread, on the CPU or by CUDA events."""

import resource
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

DEVICE_STAGES = ("upload", "resize", "encode", "blocks", "finish")  # these are what `busy` counts; they never overlap


class Clock:
    def __init__(self, device: torch.device):
        self.device = device
        self.started = time.perf_counter()
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = defaultdict(float)
        self._bytes: dict[str, int] = defaultdict(int)
        self._events: list[tuple[str, str | None, torch.cuda.Event, torch.cuda.Event]] = []
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def add(self, stage: str, *, seconds: float = 0.0, nbytes: int = 0) -> None:
        with self._lock:
            self._seconds[stage] += seconds
            self._bytes[stage] += nbytes

    def share(self, stage: str) -> float:
        """Seconds of a stage so far, of the seconds since the clock was made."""
        with self._lock:
            return self._seconds[stage] / max(time.perf_counter() - self.started, 1e-9)

    @contextmanager
    def host(self, stage: str) -> Iterator[None]:
        """Times work of the calling thread."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, seconds=time.perf_counter() - start)

    def waiting(self, stage: str, items: Iterable) -> Iterator:
        """The items, timing how long each is waited for."""
        items, end = iter(items), object()
        while True:
            with self.host(stage):
                item = next(items, end)
            if item is end:
                return
            yield item
            del item  # or it would be in memory until the next one is there

    @contextmanager
    def on_device(self, stage: str, out_of: str | None = None) -> Iterator[None]:
        """Times work queued on the device, without waiting for it. `out_of` is a stage it runs within, and shortens."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            yield
            self._add_nested(stage, out_of, time.perf_counter() - start)
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(self.device)  # events would go to the current device, which may be another
        begin.record(stream)
        yield
        end.record(stream)
        self._events.append((stage, out_of, begin, end))
        if len(self._events) > 1000:
            self._settle(500)

    def _settle(self, count: int) -> None:
        """Reads the first `count` pairs of events; waits for those that have not happened yet."""
        for stage, out_of, begin, end in self._events[:count]:
            end.synchronize()
            self._add_nested(stage, out_of, begin.elapsed_time(end) / 1e3)
        del self._events[:count]

    def _add_nested(self, stage: str, out_of: str | None, seconds: float) -> None:
        self.add(stage, seconds=seconds)
        if out_of is not None:
            self.add(out_of, seconds=-seconds)

    def summary(self) -> dict:
        """{"seconds", "busy", "peak_memory_bytes", "stages": {name: {"seconds", "gb_per_s"}}}.

        Loader and writer stages sum over their threads, so they can exceed the run's seconds. `busy` is the share of
        the run that the device's stages took: on CUDA an upper bound, since a stage also counts its wait for launches.
        Peak memory is the device's; on the CPU it is the process's.
        """
        self._settle(len(self._events))
        total = time.perf_counter() - self.started
        stages = {}
        for name, seconds in self._seconds.items():
            stages[name] = {"seconds": round(seconds, 4)}
            if self._bytes[name] and seconds > 0:
                stages[name]["gb_per_s"] = round(self._bytes[name] / seconds / 1e9, 4)
        busy = sum(self._seconds[name] for name in DEVICE_STAGES)
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "seconds": round(total, 4),
            "busy": round(busy / total, 4) if total else 0.0,
            "peak_memory_bytes": peak,
            "stages": stages,
        }
