"""A clip's depth, cameras, masks and names, out of the labels of one folder or of two, made to go together.

It knows labels by what they say of themselves. Frames without depth or without a pose are left out, and named.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from spatialprobe.engine.clips.cameras import check_centre, resized_intrinsic
from spatialprobe.engine.clips.decode import describe_cut, window_cut
from spatialprobe.engine.types import ClipError, FrameSelection, parse_query

SAME_ASPECT = 0.05  # how far the masks' aspect may be from the depth's
CAMERA = ("extrinsic", "intrinsic")


class Source(Protocol):
    """Labels, as of probes/labels/base.py."""

    root: Path
    names: tuple[str, ...]  # of what `read` can read
    selection: FrameSelection
    metric: bool
    up: tuple[float, float, float] | None
    cameras_of: Path | None
    identity_is_no_pose: bool

    def ids(self) -> list[str]: ...

    def path(self, clip_id: str) -> Path: ...

    def frames(self, clip_id: str) -> int: ...

    def padded(self, clip_id: str) -> int: ...

    def object_names(self, clip_id: str) -> dict[int, str]: ...

    def read(self, clip_id: str, frames: Sequence[int], wanted: Sequence[str]) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Sources:
    """Where masks, depth and cameras are read."""

    data: Source
    depth: Source
    names: Mapping[str, Mapping[int, str]] | None = None  # of each clip, instead of the data's

    def __post_init__(self):
        for of, wanted in ((self.data, "instance_masks"), (self.depth, "depth")):
            if wanted not in of.names:
                hint = "" if wanted != "depth" or of is not self.data else "; give --depth, `engine targets` makes it"
                raise ValueError(f"{of.root} has no {wanted}, it has {', '.join(of.names)}{hint}")
        if "extrinsic" not in self.data.names and "extrinsic" not in self.depth.names:
            raise ValueError(f"neither {self.data.root} nor {self.depth.root} has extrinsic")
        cuts = window_cut(self.data.selection), window_cut(self.depth.selection)
        if cuts[0] != cuts[1]:
            raise ValueError(
                f"masks are of frames at {describe_cut(cuts[0])}, depth of those at {describe_cut(cuts[1])}"
            )

    @cached_property
    def cameras(self) -> Source:
        """Whose cameras are taken: those of the depth, if it has any, since it was made with them or from them."""
        if self.depth is self.data or "extrinsic" not in self.data.names:
            return self.depth
        if "extrinsic" not in self.depth.names:
            return self.data
        try:
            self.depth.read(self.depth.ids()[0], [0], CAMERA)
        except ValueError:  # of `engine targets` without --cameras
            return self.data
        return self.depth

    @property
    def up(self) -> tuple[float, float, float] | None:
        """Of the cameras' world."""
        of = self.cameras.cameras_of
        copied = self.cameras is not self.data and of is not None and of.resolve() == self.data.root.resolve()
        return self.data.up if copied else self.cameras.up

    @property
    def metric(self) -> bool:
        return self.depth.metric and self.cameras.metric


@dataclass
class Arrays:
    """A clip's views, as `lift` takes them."""

    frames: np.ndarray  # int64 [V]
    depth: np.ndarray  # float32 [V, H, W], 0 where it is not known
    extrinsic: np.ndarray  # float32 [V, 3, 4]
    intrinsic: np.ndarray  # float32 [V, 3, 3] of the depth's pixels
    masks: np.ndarray  # int32 [V, H, W]
    names: Mapping[int, str]
    left_out: dict[str, list[int]]  # why -> frames


def read_arrays(sources: Sources, clip_id: str, query: str) -> Arrays:
    """Raises ClipError, or what labels raise, for a clip that cannot be lifted."""
    names = sources.data.object_names(clip_id) if sources.names is None else sources.names.get(clip_id, {})
    if not names:
        raise ClipError("what its objects are called is not known: give --names, or for ScanNet its aggregation.json")
    frames = np.array(parse_query(query, common_frames(sources, clip_id)))
    wanted = ("depth", "confidence") if "confidence" in sources.depth.names else ("depth",)
    read = sources.depth.read(clip_id, frames.tolist(), wanted)
    known = read["depth"].isfinite() & (read["depth"] > 0) & (read.get("confidence", read["depth"]) > 0)
    depth = torch.where(known, read["depth"], 0).numpy()
    if not depth.any():
        raise ClipError("its depth is nowhere positive and finite")
    shown = depth.any((1, 2))
    masks = sources.data.read(clip_id, frames.tolist(), ("instance_masks",))["instance_masks"].numpy()
    if not masks.any():
        raise ClipError("its masks show no object")
    if not set(np.unique(masks).tolist()) & set(names):
        raise ClipError(f"none of its objects has a name, only {', '.join(map(str, sorted(names)[:5]))} have")
    extrinsic, intrinsic, posed = read_cameras(sources, clip_id, frames, depth.shape[1:], masks.shape[1:])
    left_out = {"no depth": frames[~shown].tolist(), "no pose": frames[shown & ~posed].tolist()}
    kept = shown & posed
    if not kept.any():
        raise ClipError("no frame has both depth and a pose")
    masks = resized_masks(masks[kept], depth.shape[1:])
    return Arrays(frames[kept], depth[kept], extrinsic[kept], intrinsic[kept], masks, names, left_out)


def common_frames(sources: Sources, clip_id: str) -> int:
    """How many frames of the window there are. Masks may go on after the depth's window, depth may be padded."""
    masks, depth = sources.data.frames(clip_id), sources.depth.frames(clip_id)
    if masks > depth and depth == sources.depth.selection.window:
        return depth
    real = depth - sources.depth.padded(clip_id)
    if masks not in (depth, real):
        raise ClipError(f"there are masks of {masks} frames and depth of {depth}")
    return min(masks, depth)


def read_cameras(
    sources: Sources, clip_id: str, frames: np.ndarray, size: tuple[int, int], mask_size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # [V, 3, 4], [V, 3, 3], bool [V]
    """Cameras of images of `size`, and which frames have a pose."""
    of = sources.cameras
    intrinsic = of.read(clip_id, frames.tolist(), ("intrinsic",))["intrinsic"]
    if of is not sources.depth:
        check_centre(intrinsic, mask_size)
        intrinsic = resized_intrinsic(intrinsic, mask_size, size)
    try:
        extrinsic = of.read(clip_id, frames.tolist(), ("extrinsic",))["extrinsic"].numpy()
    except ValueError:  # a frame whose pose is not finite
        extrinsic = np.stack([one_pose(of, clip_id, f) for f in frames.tolist()])
        if np.isnan(extrinsic).all():
            raise
    posed = np.isfinite(extrinsic).all((1, 2))
    unknown = (extrinsic == np.eye(3, 4)).all((1, 2))
    if of.identity_is_no_pose:
        posed &= ~unknown
    return extrinsic, intrinsic.numpy(), posed


def one_pose(of: Source, clip_id: str, frame: int) -> np.ndarray:  # [3, 4], NaN where it is not finite
    try:
        return of.read(clip_id, [frame], ("extrinsic",))["extrinsic"][0].numpy()
    except ValueError:
        return np.full((3, 4), np.nan, np.float32)


def resized_masks(masks: np.ndarray, size: tuple[int, int]) -> np.ndarray:  # [V, h, w] -> [V, H, W]
    """By nearest neighbour. Raises ClipError for masks of another aspect."""
    of = masks.shape[1:]
    if of == size:
        return masks
    if abs(of[0] * size[1] / (of[1] * size[0]) - 1) > SAME_ASPECT:
        raise ClipError(f"masks of {of[0]}x{of[1]} pixels are not of depth of {size[0]}x{size[1]}")
    v, u = (((np.arange(to) + 0.5) * n / to).astype(int) for to, n in zip(size, of, strict=True))
    return masks[:, v[:, None], u]
