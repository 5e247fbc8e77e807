"""What became of a run's clips: counted, recorded in the store, and told to whoever watches."""

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
    failed: int = 0
    skipped: int = 0  # shorter than their window, with short="skip"
    batch_size: int = 0  # after halving, if memory ran out
    interrupted: bool = False
    stopped: str = ""  # why the run ended early: a full disk, or too little memory
    failures: dict[str, str] = field(default_factory=dict)  # clip id -> stage and reason, of this run
    timing: dict = field(default_factory=dict)  # Clock.summary()


Progress = Callable[[str, str, str], None]  # (clip id, "written" | "failed" | "skipped", reason)


@dataclass
class Outcomes:
    """Counts what became of clips, in the report, the store's `failed.jsonl` and the progress."""

    report: Report
    store: FeatureStore
    progress: Progress

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
        else:
            self.report.written += 1
            self.progress(ref.id, "written", "")

    def skipped(self, ref: ClipRef, reason: str) -> None:
        self.report.skipped += 1
        self.progress(ref.id, "skipped", reason)

    def failed(self, ref: ClipRef, stage: str, reason: str) -> None:
        self.report.failed += 1
        self.report.failures[ref.id] = f"{stage}: {reason}"
        self.store.record_failure(ref.id, stage, reason)
        self.progress(ref.id, "failed", reason)
