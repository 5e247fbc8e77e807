"""`engine points`: the point maps of labelled clips as one more store, row by row and token by token beside another's.

Loader threads read labels and average them, writers store. Which features the points will be joined to is not known.
"""

import json
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from spatialprobe.engine.clips.decode import describe_cut, window_cut
from spatialprobe.engine.files.durable import StoreFull
from spatialprobe.engine.job import select_shard
from spatialprobe.engine.pipeline.each_clip import each_clip
from spatialprobe.engine.pipeline.outcomes import Report, run_file
from spatialprobe.engine.pipeline.progress import RunLog
from spatialprobe.engine.pipeline.timing import Clock
from spatialprobe.engine.pointmaps.clip import make_clip, write
from spatialprobe.engine.pointmaps.encode import channel_names
from spatialprobe.engine.pointmaps.options import FRAMES, LAYER, UNITS, PointLabels, PointOptions
from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.types import ClipRef, FeatureSpec


def run_points(
    labels: PointLabels,
    like: FeatureStore,  # whose clips, rows and token grid the points get
    out: str | Path,
    options: PointOptions,
    *,
    dtype: str = "float16",  # key of STORE_DTYPES
    loaders: int = 2,
    writers: int = 2,
    shard: str | None = None,  # "i/n": every n-th clip from the i-th
    retry_failed: bool = False,
) -> tuple[Report, FeatureStore]:
    """Writes the points of every clip of `like` that has labels and that the store `out` lacks.

    Raises ValueError for labels and features that do not belong together, and for a place that holds something else,
    before anything is written. What goes wrong with one clip is in the report and in `failed.jsonl`.
    """
    check_labels(labels, like, options)
    spec, out = points_spec(labels, like.spec, like.spec_hash, options, dtype), Path(out)
    ids = sorted(set(like.ids()) & set(labels.ids()))
    if not ids:
        raise ValueError(f"none of the {len(like)} clips in {like.root} has labels in {labels.root}")
    ids = select_shard(ids, shard, None)
    FeatureStore.check_place(out, spec)
    if retry_failed:
        failed = FeatureStore.open(out).failures()
        ids = [clip_id for clip_id in ids if clip_id in failed]
    about = {
        "model": "points",
        "labels": str(labels.root),
        "like": str(like.root),
        "channels": f"{', '.join(channel_names(options.bands))}; relative to {FRAMES[options.frame]}",
        "unit": UNITS[options.unit],
    }
    store, started = FeatureStore.create(out, spec, about), datetime.now(UTC)
    with RunLog(store.root / "log.jsonl", total=len(ids)) as log:
        clock = Clock(torch.device("cpu"))
        report = each_clip(
            [ClipRef(clip_id, str(labels.root)) for clip_id in ids],
            store,
            lambda ref: make_clip(ref.id, labels, like, spec, options, clock),
            lambda ref, made: write(ref.id, made, store, clock),
            clock=clock,
            loaders=loaders,
            writers=writers,
            progress=log.clip,
        )
    job = {"labels": str(labels.root), "like": str(like.root), "out": str(out), "shard": shard} | asdict(options)
    record = {"started": started.isoformat(timespec="seconds"), "spec": store.spec_hash, "job": job} | asdict(report)
    try:
        store.write_record(run_file(shard), json.dumps(record, indent=1))
    except StoreFull as error:
        report.stopped = report.stopped or str(error)
    return report, store


def check_labels(labels: PointLabels, like: FeatureStore, options: PointOptions) -> None:
    """Raises ValueError unless the labels have what is needed, for the frames and the image that `like` is of."""
    if missing := [name for name in options.labels if name not in labels.names]:
        raise ValueError(
            f"points need {', '.join(options.labels)}; {labels.root} has no {', '.join(missing)}, "
            f"it has {', '.join(labels.names)}"
        )
    known, wanted = window_cut(labels.selection), window_cut(like.spec.frames)
    if known != wanted:
        raise ValueError(
            f"labels in {labels.root} are of frames at {describe_cut(known)}, features in {like.root} of those at "
            f"{describe_cut(wanted)}"
        )
    if like.spec.options.get("crop"):
        raise ValueError(f"tokens of {like.root} are of the middle of each image (crop true), labels of all of it")
    if options.unit == "metres" and not labels.metric:
        raise ValueError(f"lengths in {labels.root} are not metres: each clip has a scale of its own, so say unit clip")


def points_spec(
    labels: PointLabels, like: FeatureSpec, like_hash: str, options: PointOptions, dtype: str
) -> FeatureSpec:
    """`like` is in it by its hash, which stands for the rows and the grid; the labels are by their place."""
    return FeatureSpec(
        family="points",
        weights=f"labels:{Path(labels.root).resolve()}",
        layers=(LAYER,),
        frames=like.frames,
        pool=like.pool,
        dtype=dtype,
        compute_dtype="float32",
        device="cpu",
        options=asdict(options) | {"like": like_hash},
        versions={name: version(name) for name in ("spatialprobe", "torch")},
    )
