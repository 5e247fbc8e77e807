"""`engine targets`: a teacher's labels for clips. Loader threads decode, the calling thread predicts, writers store."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from spatialprobe.engine.clips.cameras import check_centre, resized_intrinsic, unproject
from spatialprobe.engine.clips.decode import describe_cut, load_clip, window_cut
from spatialprobe.engine.clips.images import resize
from spatialprobe.engine.clips.sources import list_clips
from spatialprobe.engine.files.durable import StoreFull
from spatialprobe.engine.job import Job, select_shard
from spatialprobe.engine.pipeline.each_clip import Lost, each_clip
from spatialprobe.engine.pipeline.outcomes import Report
from spatialprobe.engine.pipeline.progress import RunLog
from spatialprobe.engine.pipeline.timing import Clock
from spatialprobe.engine.resolve import device_of
from spatialprobe.engine.targets.folder import TargetFolder, TargetSpec
from spatialprobe.engine.targets.teachers import Maps, Size, Teacher, open_teacher
from spatialprobe.engine.types import COMPUTE_DTYPES, Clip, ClipError, ClipRef, FrameSelection, parse_query
from spatialprobe.engine.words import ALL, parse_size

WINDOW = 81  # frames, the study's
LONGER_SIDE, CELL = 518, 14  # pixels of the study's maps, multiples of VGGT's patch
SOURCE_FRAMES = window_cut(FrameSelection())  # of labels whose frame f is the source's frame f


class Cameras(Protocol):
    """Labels with "extrinsic", "intrinsic" and "images": the last says which pixels the intrinsics are of."""

    selection: FrameSelection  # its start and stride say which source frame is which label's

    def read(self, clip_id: str, frames: Sequence[int], wanted: Sequence[str]) -> dict[str, Tensor]: ...


@dataclass
class Decoded:
    clip: Clip
    size: Size  # of the maps
    shown: tuple[int, ...]  # frames of the window that the teacher looks at
    cameras: dict[str, Tensor]  # extrinsic [F, 3, 4] and intrinsic [F, 3, 3] of maps of `size`; empty if unknown


def run_targets(job: Job, cameras: Cameras | None = None, *, retry_failed: bool = False) -> tuple[Report, Path]:
    """Makes the labels that `job.out` lacks. Of a job it reads the clips, frames, model, device and places.

    `cameras`, of the folder named in `job.targets`, gives poses. Raises ValueError for a job that cannot be done,
    before anything is written.
    """
    teacher, device, out = open_teacher(job.model, job.revision), device_of(job.device), Path(job.out)
    dtype = job.compute_dtype or "float32"
    if dtype not in COMPUTE_DTYPES:
        raise ValueError(f"compute_dtype must be one of {', '.join(COMPUTE_DTYPES)}, got {dtype!r}")
    if unknown := sorted(job.options.keys() - {"size"}):
        raise ValueError(f"targets take the option size alone, got {', '.join(unknown)}")
    spec = TargetSpec(
        teacher=teacher.config["model_type"],
        weights=teacher.checkpoint.identity,
        frames=FrameSelection(
            window=WINDOW if job.window is None else None if job.window == ALL else job.window,
            start=job.start,
            stride=job.stride,
            query=job.query or ":",
            short=job.short,
        ),
        size=parse_size("size", job.options["size"]) if "size" in job.options else None,
        cameras=None if cameras is None else str(Path(job.targets).resolve()),
        intrinsic_size=getattr(cameras, "intrinsic_size", None),
        compute_dtype=dtype,
        device=device.type,
        versions={name: version(name) for name in ("spatialprobe", "torch", "transformers", "pillow", "av")},
    )
    if cameras is not None:
        check_cameras(cameras, spec.frames)
    refs = select_shard(list_clips(job.clips, job.layout), job.shard, job.limit)
    TargetFolder.check_place(out, spec)
    if retry_failed:
        failed = TargetFolder.failed(out)
        refs = [ref for ref in refs if ref.id in failed]
    teacher.load(device, COMPUTE_DTYPES[dtype])
    folder, started = TargetFolder(out, spec), datetime.now(UTC)
    with RunLog(out / "log.jsonl", total=len(refs)) as log:
        clock = Clock(teacher.device)
        report = each_clip(
            refs,
            folder,
            lambda ref: decode(ref, spec, cameras, clock),
            lambda ref, made: write(ref.id, *made, folder, clock),
            clock=clock,
            predict=lambda decoded: (decoded, predict(decoded, teacher, clock)),
            writers=job.writers,
            progress=log.clip,
        )
    report.batch_size = teacher.AUTO_FRAMES
    record = {"started": started.isoformat(timespec="seconds"), "job": asdict(job)} | asdict(report)
    try:
        folder.record_report(job.shard, record)
    except StoreFull as error:
        report.stopped = report.stopped or str(error)
    return report, out


def decode(ref: ClipRef, spec: TargetSpec, cameras: Cameras | None, clock: Clock) -> Decoded | Lost:
    """A clip with all frames of its window, or what is wrong with it."""
    stage = "decode"
    try:
        with clock.host("decode"):
            clip = load_clip(ref, spec.frames)
        size = spec.size or map_size(tuple(clip.frames.shape[2:]))
        shown, known, stage = parse_query(spec.frames.query, clip.window), {}, "cameras"
        if cameras is not None:
            known = scaled_cameras(cameras, clip, size)
    except (ClipError, ValueError, OSError) as error:
        return Lost.by(stage, error)
    return Decoded(clip, size, shown, known)


def map_size(source: Size) -> Size:
    """The longer side 518 pixels, as the study's, and both sides whole patches of 14."""
    scale = LONGER_SIDE / max(source)
    return tuple(max(CELL, round(side * scale / CELL) * CELL) for side in source)


def check_cameras(cameras: Cameras, frames: FrameSelection) -> None:
    """Raises ValueError unless it is known which of the labels' frames a frame of the window is."""
    known, wanted = window_cut(cameras.selection), window_cut(frames)
    if known not in (SOURCE_FRAMES, wanted):
        raise ValueError(f"cameras are of frames at {describe_cut(known)}, targets of those at {describe_cut(wanted)}")


def scaled_cameras(cameras: Cameras, clip: Clip, size: Size) -> dict[str, Tensor]:
    """Poses of the window's frames, padding included, and intrinsics for maps of `size`."""
    if window_cut(cameras.selection) == SOURCE_FRAMES:
        frames = clip.index.tolist()
    else:
        frames = [min(f, clip.window - clip.padded - 1) for f in range(clip.window)]
    read = cameras.read(clip.id, frames, ("extrinsic", "intrinsic"))
    shape = cameras.read(clip.id, frames[:1], ("images",))["images"].shape[2:]
    check_centre(read["intrinsic"], shape)
    return {"extrinsic": read["extrinsic"], "intrinsic": resized_intrinsic(read["intrinsic"], shape, size)}


@torch.inference_mode()
def predict(decoded: Decoded, teacher: Teacher, clock: Clock) -> Maps:
    """What the teacher says of the frames shown, on the CPU: as many maps as the window has frames, the others 0."""
    clip, depth, focal = decoded.clip, torch.zeros(decoded.clip.window, *decoded.size), None
    for at in range(0, len(decoded.shown), teacher.AUTO_FRAMES):
        frames = list(decoded.shown[at : at + teacher.AUTO_FRAMES])
        with clock.host("prepare"):
            pixels = teacher.prepare(clip.frames[frames])
        with clock.on_device("blocks"):
            maps = teacher.maps(pixels, tuple(clip.frames.shape[2:]), decoded.size)
        depth[frames] = maps.depth.cpu()
        if maps.focal is not None:
            focal = torch.zeros(clip.window) if focal is None else focal
            focal[frames] = maps.focal.cpu()
    return Maps(depth, focal)


def file_tensors(decoded: Decoded, maps: Maps) -> dict[str, Tensor]:
    """The tensors of a clip's file. Frames that were not shown have depth and confidence 0."""
    clip, size, cameras = decoded.clip, decoded.size, decoded.cameras
    seen = (maps.depth > 0) & maps.depth.isfinite()
    depth = torch.where(seen, maps.depth, 0)
    images = resize(clip.frames, size, Image.Resampling.BICUBIC)
    tensors = {
        "images": images.permute(0, 3, 1, 2).contiguous(),
        "depthmaps": depth[..., None],
        "confmaps": seen.float(),
        "start_idx": clip.index[0].clone(),
    }
    if cameras:
        return tensors | cameras | {"pointmaps": unproject(depth, **cameras)}
    if maps.focal is not None:
        tensors["intrinsic"] = centred_camera(maps.focal, size)
    return tensors


def centred_camera(focal: Tensor, size: Size) -> Tensor:  # [F] -> [F, 3, 3]
    """Square pixels, the principal point in the middle of the image; pixel centres are whole numbers."""
    intrinsic = torch.eye(3).repeat(len(focal), 1, 1)
    intrinsic[:, 0, 0] = intrinsic[:, 1, 1] = focal
    intrinsic[:, 0, 2], intrinsic[:, 1, 2] = (size[1] - 1) / 2, (size[0] - 1) / 2
    return intrinsic


@torch.inference_mode()
def write(clip_id: str, decoded: Decoded, maps: Maps, folder: TargetFolder, clock: Clock) -> None:
    """Makes a clip's file. Raises ClipError for one in which the teacher sees nothing."""
    with clock.host("pack"):
        tensors = file_tensors(decoded, maps)
    shown = list(decoded.shown)
    if not tensors["confmaps"][shown].any():
        raise ClipError("the teacher's depth is nowhere positive and finite")
    provenance: dict[str, Any] = {
        "index": decoded.clip.index.tolist(),
        "padded": decoded.clip.padded,
        "shown": shown,
        "source_size": list(decoded.clip.frames.shape[2:]),
        "valid": round(float(tensors["confmaps"][shown].mean()), 6),
    }
    if not math.isfinite(float(tensors["depthmaps"].sum())):
        raise ClipError("the teacher's depth overflows")
    with clock.host("write"):
        nbytes = folder.write(clip_id, tensors, provenance)
    clock.add("write", nbytes=nbytes)
