"""The pass over clips that `targets`, `lift` and `points` make: loader threads read, the calling thread may predict,
writer threads store. It knows what becomes of a clip, an interrupt and a full disk, and nothing of what is made."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from spatialprobe.engine.durable import StoreFull
from spatialprobe.engine.queues import Behind, ahead
from spatialprobe.engine.report import Outcomes, Progress, Report
from spatialprobe.engine.timing import Clock
from spatialprobe.engine.types import ClipError, ClipRef, first_line


class Lost(NamedTuple):
    """A clip of which nothing can be made: in which stage, and why."""

    stage: str
    error: ClipError

    @classmethod
    def by(cls, stage: str, error: Exception) -> "Lost":
        """By any error, as one line."""
        return cls(stage, error if isinstance(error, ClipError) else ClipError(first_line(error)))


def each_clip(
    refs: Sequence[ClipRef],
    place: Any,  # a store or folder with `ids` and `record_failure`, which clips are written to
    load: Callable[[ClipRef], Any],  # in a loader thread: what is made of a clip, or Lost
    write: Callable[[ClipRef, Any], None],  # in a writer thread; may raise ClipError
    *,
    clock: Clock,
    predict: Callable[[Any], Any] = lambda loaded: loaded,  # in the calling thread, clip by clip
    loaders: int = 2,
    writers: int = 2,
    behind: int | None = None,  # clips being written or waiting for it; None: two per writer
    progress: Progress = lambda clip_id, outcome, reason: None,
) -> Report:
    """Makes every clip of `refs` that `place` lacks. What is lost is in its `failed.jsonl`; the run goes on."""
    done = set(place.ids())
    todo = [ref for ref in refs if ref.id not in done]
    outcomes = Outcomes(Report(asked=len(refs), present=len(refs) - len(todo), batch_size=1), place, progress)
    loading, writing = ThreadPoolExecutor(loaders, "load"), ThreadPoolExecutor(writers, "write")
    writes = Behind(writing, 2 * writers if behind is None else behind, outcomes.settle_write)
    try:
        arriving = clock.waiting("wait for loaders", ahead(loading, load, todo, loaders + 1))
        for ref, loaded in zip(todo, arriving, strict=True):
            if isinstance(loaded, Lost):
                outcomes.unreadable(ref, *loaded)
            else:
                writes.put(ref, write, ref, predict(loaded))
            del loaded  # or it would be in memory until the next one is there
            writes.wait()
        writes.wait(0)
    except KeyboardInterrupt:
        outcomes.report.interrupted = True
        writes.settle_rest()
    except (StoreFull, MemoryError, torch.OutOfMemoryError) as error:
        outcomes.report.stopped = first_line(error)
        writes.settle_rest()
    finally:
        loading.shutdown(cancel_futures=True)
        writing.shutdown()
    outcomes.report.timing = clock.summary()
    return outcomes.report
