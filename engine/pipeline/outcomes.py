"""What became of a run's clips: counted, recorded in the folder that the run fills, and told to whoever watches."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.types import ClipError, ClipRef, ShortClip


@dataclass
class Report:
    """What became of a run's clips."""

    asked: int  # clips of the listing, after shard and limit
    present: int  # of these, in the store before the run
    written: int = 0
    elsewhere: int = 0  # written by other processes meanwhile
    failed: int = 0
    skipped: int = 0  # shorter than their window, with short="skip"
    batch_size: int = 0  # after halving, if memory ran out
    interrupted: bool = False
    stopped: str = ""  # why it ended early, a full disk or too little memory; why a write failed while it ended
    failures: dict[str, str] = field(default_factory=dict)  # clip id -> stage and reason, of this run
    timing: dict = field(default_factory=dict)  # Clock.summary()


# (clip id, "written" | "failed" | "skipped", with " elsewhere" if another process did it, reason)
Progress = Callable[[str, str, str], None]


def run_file(shard: str | None) -> str:
    """Where a run's report is kept: run.json, of shard "0/4" run-0of4.json."""
    return f"run-{shard.replace('/', 'of')}.json" if shard else "run.json"


class TakenOver(Exception):
    """Another process has taken a clip over, because this one seemed to be gone."""


@dataclass
class Outcomes:
    """Counts what became of clips, in the report, the store's `failed.jsonl` and the progress."""

    report: Report
    store: FeatureStore
    progress: Progress
    release: Callable[[str], None] = lambda clip_id: None  # of a clip's lease, once it is settled
    again: Callable[[ClipRef], None] | None = None  # looks later at a clip that was taken over

    def unreadable(self, ref: ClipRef, stage: str, error: ClipError) -> None:
        """Settles a clip that will never reach the device."""
        if isinstance(error, ShortClip) and self.store.spec.frames.short == "skip":
            self.skipped(ref, str(error))
        else:
            self.failed(ref, stage, str(error))

    def settle_write(self, ref: ClipRef, future: Future) -> None:
        """A bad clip is settled; a full disk ends the run."""
        try:
            future.result()
        except ClipError as error:
            self.failed(ref, "features", str(error))
        except TakenOver:
            self.again(ref)
        else:
            self.report.written += 1
            self._settled(ref, "written", "")

    def skipped(self, ref: ClipRef, reason: str) -> None:
        self.report.skipped += 1
        self._settled(ref, "skipped", reason)

    def failed(self, ref: ClipRef, stage: str, reason: str) -> None:
        self.report.failed += 1
        self.report.failures[ref.id] = f"{stage}: {reason}"
        self.store.record_failure(ref.id, stage, reason)
        self._settled(ref, "failed", reason)

    def elsewhere(self, ref: ClipRef, outcome: str, reason: str) -> None:
        """Counts a clip that another process settled. What failed there has failed here too."""
        if outcome == "failed":
            self.report.failures[ref.id] = reason
        name = "elsewhere" if outcome == "written" else outcome
        setattr(self.report, name, getattr(self.report, name) + 1)
        self.progress(ref.id, f"{outcome} elsewhere", reason)

    def _settled(self, ref: ClipRef, outcome: str, reason: str) -> None:
        self.progress(ref.id, outcome, reason)  # with its line in the log, before others can take it
        self.release(ref.id)
