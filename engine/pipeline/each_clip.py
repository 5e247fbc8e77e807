"""The pass over clips that `targets`, `lift` and `points` make: loader threads read, the calling thread may predict,
writer threads store. Runs on one folder share its clips. What becomes of a clip, an interrupt and a full disk is known
here, and nothing of what is made."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from spatialprobe.engine.files.durable import StoreFull
from spatialprobe.engine.files.spec_folder import ClipFolder
from spatialprobe.engine.pipeline.outcomes import Outcomes, Progress, Report, TakenOver
from spatialprobe.engine.pipeline.queues import Behind, ahead
from spatialprobe.engine.pipeline.timing import Clock
from spatialprobe.engine.processes.sharing import Sharing, positions
from spatialprobe.engine.store import FeatureStore
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
    place: FeatureStore | ClipFolder,  # which clips are written to
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
    """Makes every clip of `refs` that `place` lacks, and that no other process makes there.

    What is lost is in its `failed.jsonl`; the run goes on.
    """
    since = positions(place.root)  # before the listing: what fails elsewhere from here on has failed meanwhile
    done = set(place.ids())
    todo = [ref for ref in refs if ref.id not in done]
    report = Report(asked=len(refs), present=len(refs) - len(todo), batch_size=1)
    try:
        sharing = Sharing(place, since=since)
    except StoreFull as error:  # not even room to say who works on what
        report.stopped = first_line(error)
        return report

    def write_own(ref: ClipRef, made: Any) -> None:
        if not sharing.holds(ref.id):
            raise TakenOver(ref.id)
        write(ref, made)

    outcomes = Outcomes(report, place, progress, sharing.release, sharing.again)
    loading, writing = ThreadPoolExecutor(loaders, "load"), ThreadPoolExecutor(writers, "write")
    writes = Behind(writing, 2 * writers if behind is None else behind, outcomes.settle_write)
    with sharing:
        try:
            for turn in sharing.turns(todo, outcomes):
                arriving = ahead(loading, lambda ref: (ref, load(ref)), turn, loaders + 1)
                for ref, loaded in clock.waiting("wait for loaders", arriving):
                    if isinstance(loaded, Lost):
                        outcomes.unreadable(ref, *loaded)
                    else:
                        writes.put(ref, write_own, ref, predict(loaded))
                    del loaded  # or it would be in memory until the next one is there
                    writes.wait()
                writes.wait(0)
        except KeyboardInterrupt:
            report.interrupted, report.stopped = True, writes.settle_rest()
        except (StoreFull, MemoryError, torch.OutOfMemoryError) as error:
            report.stopped = "; ".join(filter(None, (first_line(error), writes.settle_rest())))
        finally:
            loading.shutdown(cancel_futures=True)
            writing.shutdown()
    report.timing = clock.summary()
    return report
