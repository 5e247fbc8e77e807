"""`engine ask`: questions about every clip of a folder of object tables, a part of the clips at a time."""

import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from spatialprobe.engine.files.clipfile import all_files
from spatialprobe.engine.files.durable import StoreFull
from spatialprobe.engine.job import select_shard
from spatialprobe.engine.lifting.folder import SPEC as LIFT_SPEC
from spatialprobe.engine.lifting.folder import SUFFIX, read_table
from spatialprobe.engine.lifting.objects import ObjectTable
from spatialprobe.engine.pipeline.outcomes import Progress, Report
from spatialprobe.engine.pipeline.progress import RunLog
from spatialprobe.engine.processes.leases import Leases
from spatialprobe.engine.processes.sharing import POLL, look_again
from spatialprobe.engine.questions.ask import Chosen, ask_together, choose, together
from spatialprobe.engine.questions.folder import Failure, QuestionFolder, QuestionSpec
from spatialprobe.engine.questions.lines import chat_lines, record_lines
from spatialprobe.engine.questions.settings import Settings
from spatialprobe.engine.questions.types import BY_TYPE
from spatialprobe.engine.types import ClipError, first_line

TOGETHER = 32  # clips that are looked at together, if they have at most
TOGETHER_OBJECTS = 24  # objects; the pairs of more objects take more memory

Read = Callable[[Path], ObjectTable]


@dataclass
class AskJob:
    """What was asked for."""

    lifted: str
    out: str
    settings: Settings
    images: str | None = None  # pattern of image paths for the chat format, or None for no chat format
    shard: str | None = None  # every n-th part from the i-th
    limit: int | None = None  # clips


def run_ask(job: AskJob, *, retry_failed: bool = False) -> tuple[Report, Path, dict]:
    """Makes the parts that `job.out` lacks; with `retry_failed` again those in which a clip failed.

    Returns the report, the folder, and its summary. Raises ValueError for a job that cannot be done, before anything
    is written.
    """
    root, out = Path(job.lifted), Path(job.out)
    ids = clip_ids(root)[: job.limit]
    if job.images is not None:
        check_images(job.images)
    spec = QuestionSpec(
        settings=job.settings,
        clips=len(ids),
        clip_ids=hashlib.sha256("\n".join(ids).encode()).hexdigest(),
        lifted=json.loads((root / LIFT_SPEC).read_text()),
        images=job.images,
        version=version("spatialprobe"),
    )
    parts = select_shard(list(range(-(-len(ids) // spec.part_clips))), job.shard, None)
    QuestionFolder.check_place(out, spec)
    if retry_failed:
        QuestionFolder.check_retry(out)
    folder = QuestionFolder(out, spec)
    with RunLog(out / "log.jsonl", total=len(parts), unit="part") as log:
        report = ask_parts(root, ids, parts, folder, read_table, retry_failed=retry_failed, progress=log.clip)
    summary = folder.summary(range(-(-len(ids) // spec.part_clips)))
    try:
        folder.record_report(job.shard, {"job": asdict(job)} | asdict(report))
        folder.write_record("summary.json", json.dumps(summary, indent=1))
    except StoreFull as error:
        report.stopped = report.stopped or str(error)
    return report, out, summary


def clip_ids(root: Path) -> list[str]:
    """Clips of a folder of object tables, sorted. Raises ValueError for a folder that is none."""
    if not (root / LIFT_SPEC).is_file():
        raise ValueError(f"{root} is no folder of lifted clips: it has no {LIFT_SPEC}; `engine lift` makes one")
    ids = sorted(name.removesuffix(SUFFIX) for name, _ in all_files(root) if name.endswith(SUFFIX))
    if not ids:
        raise ValueError(f"{root} holds no lifted clip")
    return ids


def check_images(pattern: str) -> None:
    try:
        paths = [pattern.format(clip=clip, frame=frame) for clip, frame in (("a", 1), ("a", 2), ("b", 2))]
        if len(set(paths)) < 3:
            raise ValueError("it lacks one of them")
    except (ValueError, LookupError, AttributeError) as error:
        raise ValueError(
            f"images must be a path with {{clip}} and {{frame}} in it, got {pattern!r}: {error}"
        ) from error


def ask_parts(
    root: Path,
    ids: Sequence[str],
    parts: Sequence[int],
    folder: QuestionFolder,
    read: Read,
    *,
    retry_failed: bool = False,
    progress: Progress = lambda name, outcome, reason: None,
) -> Report:
    """Parts of `ids` that the folder lacks, one after another; what another process makes is left to it.

    Counts clips, not questions. A part that was taken over, because this process was stopped for a minute, is written
    by both, with the same bytes.
    """
    size = folder.spec.part_clips
    clips = {part: ids[part * size : (part + 1) * size] for part in parts}
    before = {part: folder.stamp(part) for part in parts}
    todo = [part for part in parts if before[part] is None or (retry_failed and folder.counts(part)["failed"])]
    asked, missing = (sum(len(clips[part]) for part in of) for of in (parts, todo))
    report = Report(asked=asked, present=asked - missing)
    try:
        with closing(Leases(folder.root / "leases")) as leases:
            for part in in_turn(todo, folder, leases):
                elsewhere = folder.stamp(part) not in (None, before[part])
                if elsewhere:
                    failures = folder.failures_of(part)
                else:
                    made = ask_part(root, clips[part], folder.spec, read)
                    texts = ["".join(text[i] for i in clips[part] if i in text) for text in made.texts]
                    failures = made.failures
                    folder.write_part(part, texts, made.counts(), failures)
                count(report, len(clips[part]), failures, elsewhere)
                outcome = ("failed" if failures else "written") + (" elsewhere" if elsewhere else "")
                progress(folder.name(part), outcome, f"{len(failures)} clips failed" if failures else "")
    except KeyboardInterrupt:
        report.interrupted = True
    except (StoreFull, MemoryError) as error:
        report.stopped = first_line(error)
    return report


def in_turn(parts: list[int], folder: QuestionFolder, leases: Leases) -> Iterator[int]:
    """Each part while this process has its lease. What others have comes again until they are done with it."""
    while parts:
        later = []
        for part in parts:
            if leases.claim(folder.name(part), sys.maxsize) is None:
                later.append(part)
                continue
            look_again(folder.root)
            yield part
            leases.release(folder.name(part))
        if later == parts:
            time.sleep(POLL)
        parts = later


def count(report: Report, clips: int, failures: list[Failure], elsewhere: bool) -> None:
    """Adds a part to the report. What failed elsewhere has failed here too."""
    report.failures |= {clip_id: f"{stage}: {reason}" for clip_id, stage, reason in failures}
    report.failed += len(failures)
    if elsewhere:
        report.elsewhere += clips - len(failures)
    else:
        report.written += clips - len(failures)


@dataclass
class Part:
    """What was made of some clips."""

    texts: list[dict[str, str]]  # records and, if wanted, chats: clip id -> lines
    failures: list[Failure] = field(default_factory=list)
    wanted: Counter = field(default_factory=Counter)  # level -> questions
    questions: Counter = field(default_factory=Counter)  # (type, form, truth) -> questions

    def counts(self) -> dict:
        """How many clips, and questions by level, type, form and truth; and how many of each level were wanted."""
        by: dict[str, Counter] = {name: Counter() for name in ("levels", "types", "forms", "truths")}
        for (kind, form, truth), count in self.questions.items():
            by["levels"][str(BY_TYPE[kind].level)] += count
            by["types"][kind] += count
            by["forms"][form] += count
            if truth is not None:
                by["truths"][str(truth).lower()] += count
        clips = {"asked": len(self.texts[0]), "failed": len(self.failures)}
        sums = {name: dict(sorted(counter.items())) for name, counter in (by | {"wanted": self.wanted}).items()}
        return {"clips": clips} | sums | {"failed": [clip_id for clip_id, *_ in self.failures]}


def ask_part(root: Path, ids: Sequence[str], spec: QuestionSpec, read: Read) -> Part:
    """Lines of the clips' questions, and what is wrong with clips that have none."""
    chosen: dict[str, Chosen] = {}
    part = Part([{}] if spec.images is None else [{}, {}])
    for clip_id in ids:
        stage = "read"
        try:
            table = read(root / f"{clip_id}{SUFFIX}")
            if table.clip != clip_id:
                raise ClipError(f"the file says that it is of clip {table.clip}")
            stage = "ask"
            chosen[clip_id] = choose(table, spec.settings)
        except (ClipError, ValueError, OSError) as error:
            part.failures.append((clip_id, stage, first_line(error)))
    for names in alike(chosen):
        for name, asked in zip(names, ask_together([chosen[name] for name in names], spec.settings), strict=True):
            part.texts[0][name] = "".join(record_lines(asked))  # at once: text costs the collector nothing
            if spec.images is not None:
                part.texts[1][name] = "".join(chat_lines(asked, spec.images))
            part.wanted.update({str(level): count for level, count in enumerate(asked.wanted)})
            part.questions.update((q.kind.name, q.form, q.said.truth) for q in asked.questions)
    return part


def alike(chosen: dict[str, Chosen]) -> Iterator[list[str]]:
    """Clips that can be looked at together, at most so many that memory stays flat."""
    groups: dict[tuple, list[str]] = {}
    for clip_id, clip in chosen.items():
        groups.setdefault(together(clip), []).append(clip_id)
    for (objects, *_), names in groups.items():
        most = max(1, int(TOGETHER * min(1.0, (TOGETHER_OBJECTS / max(objects, 1)) ** 2)))
        yield from (names[at : at + most] for at in range(0, len(names), most))
