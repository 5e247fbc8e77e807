"""torch.compile of the blocks, each by itself, so that blocks that are alike share one compiled program.

What is compiled is a block's `forward`, not its call: hooks stay outside of the program, and one added later costs
nothing. Programs are kept on disk by inductor and found again by later runs. Nothing of this was timed on a GPU.
"""

import os
import platform
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from spatialprobe.engine.pipeline.timing import Clock
from spatialprobe.engine.types import COMPILE

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
PROGRAMS = 64  # of one forward, for shapes and kinds of blocks; with fullgraph, torch raises beyond it
_asked_for = os.environ.get(VARIABLE)  # the user's, before `use_cache` sets it


def check_compile(mode: str, device: torch.device, offload: str) -> None:
    """Raises ValueError for a way to compile that is unknown or cannot be had there."""
    if mode not in COMPILE:
        raise ValueError(f"compile must be one of {', '.join(COMPILE)}, got {mode!r}")
    if mode == "graphs" and device.type != "cuda":
        raise ValueError(f"compile graphs records CUDA graphs: it needs a CUDA device, got {device.type}")
    if mode != "none" and offload != "none":
        raise ValueError(f"compile {mode} needs blocks that stay on one device, got offload {offload}")


def check_thread(mode: str) -> None:
    """Raises ValueError for CUDA graphs in a thread of ours, with a torch that keeps them for one thread (2.11)."""
    if mode != "graphs":
        return
    from torch._inductor import cudagraph_trees

    if not hasattr(cudagraph_trees, "_initialize_tls"):  # which newer ones do in each thread that wants graphs
        raise ValueError(f"compile graphs cannot be had live with torch {torch.__version__}: take compile blocks")


def compiled(run: Callable, mode: str) -> Callable:
    """A block's forward, compiled when it first runs and again for each new shape; `run` itself for "none".

    "graphs" also records CUDA graphs, for models of which launches take longer than kernels.
    """
    if mode == "none":
        return run
    use_cache()
    torch._dynamo.config.recompile_limit = max(PROGRAMS, torch._dynamo.config.recompile_limit)
    options = {"mode": "reduce-overhead"} if mode == "graphs" else {}
    return torch.compile(run, fullgraph=True, dynamic=False, **options)


def new_pass(mode: str) -> None:
    """To be called before the blocks run again from the first: what CUDA graphs put out before may be overwritten."""
    if mode == "graphs":
        torch.compiler.cudagraph_mark_step_begin()


def full_batch(clips: list, size: int, mode: str) -> list:
    """The clips, the last repeated to `size` of them if they are compiled: a shape of its own would be compiled too."""
    return clips if mode == "none" else clips + [clips[-1]] * (size - len(clips))


# -- programs on disk ------------------------------------------------------------------------------------------------


def use_cache() -> Path:
    """Sets and returns the folder of compiled programs, of this machine's kind.

    It is the user's, and not the store's, since what lies in it is run: a store may come from somebody else. Stores of
    one model share it, whatever their layers and steps. `TORCHINDUCTOR_CACHE_DIR` names another place.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spatialprobe" / "inductor"
    folder = Path(_asked_for or base) / _machine()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.environ[VARIABLE] = str(folder)
    return folder


def _machine() -> str:
    """A name for what programs are made for: home folders are shared by machines of several kinds."""
    about = [torch.__version__, platform.machine()]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        about += [line for line in lines if line.startswith(("flags", "Features"))][:1]
    except OSError:
        about.append(platform.processor())
    if torch.cuda.is_available():
        about += [torch.cuda.get_device_name(), str(torch.version.cuda)]
    return sha256("|".join(about).encode()).hexdigest()[:12]


# -- what it took ----------------------------------------------------------------------------------------------------


class CompileTimes:
    """From when it is made until `stop`, counts what torch compiles in this process. Counts nothing for "none"."""

    def __init__(self, mode: str):
        self.seconds, self.programs, self.again = 0.0, 0, 0
        self._counts, self._started, self._hits = mode != "none", 0.0, 0
        if self._counts:
            from torch._dynamo.callback import callback_handler

            self._hits = _cache_hits()
            callback_handler.register_start_callback(self._start)
            callback_handler.register_end_callback(self._end)

    def stop(self) -> None:
        if self._counts:
            from torch._dynamo.callback import callback_handler

            callback_handler.remove_start_callback(self._start)
            callback_handler.remove_end_callback(self._end)

    def _start(self, args: Any) -> None:
        self._started = time.perf_counter()
        if args.callback_trigger.name == "DYNAMO":
            self.programs += 1
            # "3/1": code number 3, compiled before: for another shape or another kind of block
            self.again += not str(args.compile_id).strip("[]").endswith("/0")

    def _end(self, args: Any) -> None:
        self.seconds += time.perf_counter() - self._started

    def summary(self) -> dict[str, float | int]:
        """Seconds, programs, those of them for code that had been compiled before, and those found on disk."""
        return {
            "seconds": round(self.seconds, 4),
            "programs": self.programs,
            "recompiled": self.again,
            "from_cache": _cache_hits() - self._hits,
        }

    def told_apart(self, clock: Clock) -> dict:
        """The clock's summary with a stage "compile", taken out of "blocks", in which it happened, and what it did."""
        if not self._counts:
            return clock.summary()
        clock.add("compile", seconds=self.seconds)
        clock.add("blocks", seconds=-self.seconds)
        return clock.summary() | {"compile": self.summary()}


def _cache_hits() -> int:
    """Programs that were found on disk so far: as a whole, or else their graph."""
    from torch._dynamo.utils import counters

    whole, graph = counters["aot_autograd"]["autograd_cache_hit"], counters["inductor"]["fxgraph_cache_hit"]
    return max(whole, graph)
