"""`engine lift`: clips with depth, cameras and masks become point maps and object tables. Loader threads read and lift,
writer threads store; at most a few clips are in memory."""

import json
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spatialprobe.engine.files.durable import StoreFull
from spatialprobe.engine.job import select_shard
from spatialprobe.engine.lifting.folder import POINT_DTYPES, LiftFolder, LiftSpec, file_tensors, table_words
from spatialprobe.engine.lifting.lift import Lifted, lift
from spatialprobe.engine.lifting.reading import Arrays, Source, Sources, read_arrays
from spatialprobe.engine.pipeline.each_clip import Lost, each_clip
from spatialprobe.engine.pipeline.outcomes import Report
from spatialprobe.engine.pipeline.progress import RunLog
from spatialprobe.engine.pipeline.timing import Clock
from spatialprobe.engine.types import ClipError, ClipRef, parse_query

Up = tuple[float, float, float]


@dataclass
class LiftJob:
    """What was asked for, beside the labels."""

    out: str
    points: str = "float16"  # key of POINT_DTYPES
    query: str = ":"  # frames of the window
    up: Up | str | None = None  # of the cameras' world, or "floor": look for it; None: as the labels say
    metric: bool | None = None  # None: as the labels say
    names: str | None = None  # JSON file {clip: {id: name}}
    intrinsic_size: tuple[int, int] | None = None  # that the data's labels were opened with
    loaders: int = 2
    writers: int = 2
    shard: str | None = None
    limit: int | None = None


@dataclass
class Made:
    """A clip that is lifted, ready to be written."""

    arrays: Arrays
    lifted: Lifted


def run_lift(data: Source, depth: Source | None, job: LiftJob, *, retry_failed: bool = False) -> tuple[Report, Path]:
    """Lifts the clips of `data` that `job.out` lacks, with the depth of `depth`, or its own.

    Raises ValueError for a job that cannot be done, before anything is written.
    """
    names = None if job.names is None else read_name_file(Path(job.names))
    sources, out = Sources(data, depth or data, names), Path(job.out)
    parse_query(job.query, 1_000_000)
    spec = spec_of(sources, job)
    for name, count in (("loaders", job.loaders), ("writers", job.writers)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    refs = [ClipRef(i, str(data.path(i))) for i in data.ids()]
    if not refs:
        raise ValueError(f"{data.root} has no clip")
    refs = select_shard(refs, job.shard, job.limit)
    LiftFolder.check_place(out, spec)
    if retry_failed:
        failed = LiftFolder.failed(out)
        refs = [ref for ref in refs if ref.id in failed]
    folder, started = LiftFolder(out, spec), datetime.now(UTC)
    with RunLog(out / "log.jsonl", total=len(refs)) as log:
        clock = Clock(torch.device("cpu"))
        report = each_clip(
            refs,
            folder,
            lambda ref: make(ref, sources, spec, clock),
            lambda ref, made: write(ref.id, made, folder, clock),
            clock=clock,
            loaders=job.loaders,
            writers=job.writers,
            behind=job.writers,
            progress=log.clip,
        )
    record = {"started": started.isoformat(timespec="seconds"), "job": asdict(job)} | asdict(report)
    try:
        folder.record_report(job.shard, record)
    except StoreFull as error:
        report.stopped = report.stopped or str(error)
    return report, out


def spec_of(sources: Sources, job: LiftJob) -> LiftSpec:
    """The job with what labels say filled in."""
    up = sources.up if job.up is None else None if job.up == "floor" else job.up
    if up is not None and not (np.isfinite(up).all() and np.linalg.norm(up) > 0 and len(up) == 3):
        raise ValueError(f"up must be 3 numbers that are not all 0, or floor, got {job.up}")
    metric = sources.metric if job.metric is None else job.metric
    return LiftSpec(
        data=str(sources.data.root.resolve()),
        depth=str(sources.depth.root.resolve()),
        frames=replace(sources.depth.selection, query=job.query),
        metric=metric,
        up=None if up is None else tuple(float(x) for x in up),
        names=None if job.names is None else str(Path(job.names).resolve()),
        intrinsic_size=job.intrinsic_size,
        points=job.points,
        versions={name: version(name) for name in ("spatialprobe", "numpy")},
    )


def read_name_file(path: Path) -> dict[str, dict[int, str]]:
    """Names of objects by clip and id. Raises ValueError for a file of other things."""
    try:
        names = json.loads(path.read_text(encoding="utf-8-sig"))
        return {clip: {int(i): str(name) for i, name in of.items()} for clip, of in names.items()}
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} must hold names as {{clip: {{id: name}}}}: {error}") from error


def make(ref: ClipRef, sources: Sources, spec: LiftSpec, clock: Clock) -> Made | Lost:
    """A lifted clip, or in which stage what went wrong."""
    stage = "read"
    try:
        with clock.host("read"):
            arrays = read_arrays(sources, ref.id, spec.frames.query)
        stage = "lift"
        with clock.host("lift"):
            lifted = lift(
                ref.id,
                arrays.depth,
                arrays.extrinsic,
                arrays.intrinsic,
                arrays.masks,
                arrays.names,
                frames=arrays.frames,
                up=None if spec.up is None else np.array(spec.up),
                metric=spec.metric,
                points=POINT_DTYPES[spec.points],
            )
        if not lifted.table.tags:
            raise ClipError(f"none of its objects {', '.join(map(str, lifted.unseen))} has a surface")
    except (ClipError, ValueError, OSError) as error:
        return Lost.by(stage, error)
    return Made(arrays, lifted)


def write(clip_id: str, made: Made, folder: LiftFolder, clock: Clock) -> None:
    lifted, arrays = made.lifted, made.arrays
    provenance: dict[str, Any] = table_words(lifted.table) | {
        "index": arrays.frames.tolist(),
        "left_out": {why: frames for why, frames in arrays.left_out.items() if frames},
        "unseen": lifted.unseen,
        "unnamed": lifted.unnamed,
    }
    with clock.host("write"):
        nbytes = folder.write(clip_id, file_tensors(lifted, arrays.masks), provenance)
    clock.add("write", nbytes=nbytes)
