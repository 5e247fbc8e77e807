"""A clip's depth, cameras and masks become point maps and an object table: pure, one view after the other.

It knows nothing of files and datasets. Depth 0 is no depth; an object id that has no name is not in the table.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spatialprobe.engine.lifting.agreement import check_agreement, check_units
from spatialprobe.engine.lifting.boxes import Box, Seen, box_of
from spatialprobe.engine.lifting.frame import lifted_frame, surface_sample
from spatialprobe.engine.lifting.objects import ObjectTable
from spatialprobe.engine.lifting.outline import Outline, View, outline_of, view_of
from spatialprobe.engine.types import ClipError

SAMPLES = 32  # pixels of each view that questions about pixels may ask about
MOST_POINTS = 15_000  # of the objects in a view, for boxes; outlines are kept whole
IMAGE_CUTS = 0.02  # of an object's outline: with more on the image's border, that view does not show all of it
POINT_PARTS = ("points", "normals", "broad", "pixel", "rays")  # of Seen, an entry per point
EDGE_PARTS = ("edges", "ends", "touches", "along", "edge_pixel")  # an entry per edge of the outline
RIGID = 1e-3  # how far from orthonormal a rotation may be: poses are float32, some datasets' are rounded


@dataclass
class Lifted:
    table: ObjectTable
    points: Tensor | None  # [V, H, W, 3] lifted frame, NaN where depth is not known
    unseen: list[int]  # named ids without any surface: no depth, or single pixels
    unnamed: list[int]


@dataclass
class Sights:
    """What views saw of N objects: counts of each view, and points and edges of all views, each with its object."""

    pixels: np.ndarray  # as of ObjectTable
    whole: np.ndarray
    nearest: np.ndarray
    box: np.ndarray
    cut: np.ndarray  # float64 [N, V] share of the outline on the image's border
    parts: list[dict[str, np.ndarray]]  # of each view; "row" and "edge_row" say which object


def lift(
    clip: str,
    depth: np.ndarray,  # float32 [V, H, W], 0 where it is not known; at least one pixel of each view is
    extrinsic: np.ndarray,  # [V, 3, 4] world-to-camera
    intrinsic: np.ndarray,  # [V, 3, 3] pixels
    masks: np.ndarray,  # int [V, H, W], 0 for no object
    names: Mapping[int, str],
    *,
    frames: np.ndarray,  # int64 [V] of the window
    up: np.ndarray | None = None,  # [3] of the world; None: look for the floor
    metric: bool = True,  # whether lengths are metres
    points: torch.dtype | None = torch.float16,  # of the point maps; None: none are made
) -> Lifted:
    """The object table of a clip, and its point maps. Raises ClipError for input that is none."""
    check(depth, extrinsic, intrinsic, masks, frames)
    intrinsic = intrinsic.astype(np.float64)
    world = camera_to_world(extrinsic)
    check_units(depth, world, metric)
    differ = check_agreement(depth, intrinsic, world)
    frame = lifted_frame(*surface_sample(depth, intrinsic, world), world, up)
    poses = frame.matrix @ world
    present = np.zeros(int(masks.max(initial=0)) + 1, bool)
    present[masks] = True
    ids = np.flatnonzero(present[1:]) + 1
    named = np.array([i for i in ids.tolist() if i in names], np.int64)
    sights, maps, samples = look(clip, depth, intrinsic, poses, masks, named, frames, points)
    seen = gather(sights, differ)
    there = [n for n in range(len(named)) if len(seen[n].points)]
    boxes = [box_of(seen[n]) for n in there]
    table = ObjectTable(
        clip,
        depth.shape[1:],
        metric,
        frame.gravity,
        frame.floor,
        tuple(names[int(i)] for i in named[there]),
        frames=frames,
        poses=poses,
        intrinsic=intrinsic,
        ids=named[there],
        **box_columns(boxes),
        **{name: getattr(sights, name)[there] for name in ("pixels", "whole", "nearest", "box")},
        **samples,
    )
    unseen, unnamed = set(named.tolist()) - set(table.ids.tolist()), set(ids.tolist()) - set(named.tolist())
    return Lifted(table, maps, sorted(unseen), sorted(unnamed))


def box_columns(boxes: Sequence[Box]) -> dict[str, np.ndarray]:
    """Boxes as the arrays of an ObjectTable."""
    return {
        "centre": np.array([box.centre for box in boxes]).reshape(-1, 3),
        "extent": np.array([box.extent for box in boxes]).reshape(-1, 3),
        "yaw": np.array([box.yaw for box in boxes], float),
        "complete": np.array([box.complete for box in boxes], bool).reshape(-1, 3),
    }


def check(
    depth: np.ndarray, extrinsic: np.ndarray, intrinsic: np.ndarray, masks: np.ndarray, frames: np.ndarray
) -> None:
    """Raises ClipError for arrays that do not go together, poses that are not rigid, and cameras that are none."""
    views = len(depth)
    if depth.ndim != 3 or masks.shape != depth.shape:
        raise ClipError(f"masks {list(masks.shape)} are not of the depth's shape {list(depth.shape)}")
    if extrinsic.shape != (views, 3, 4) or intrinsic.shape != (views, 3, 3) or frames.shape != (views,):
        raise ClipError(f"cameras {list(extrinsic.shape)} and {list(intrinsic.shape)} are not of {views} views")
    turn = extrinsic[:, :, :3].astype(np.float64)
    off = np.abs(turn @ turn.transpose(0, 2, 1) - np.eye(3)).max((1, 2))
    rigid = (off <= RIGID) & (np.linalg.det(turn) > 0) & np.isfinite(extrinsic).all((1, 2))
    if not rigid.all():
        bad = int(np.argmin(rigid))
        raise ClipError(f"the pose of frame {frames[bad]} is not rigid: its rotation is off by {off[bad]:.3g}")
    focal = intrinsic[:, (0, 1), (0, 1)]
    if not (focal > 0).all() or not np.isfinite(intrinsic).all():
        raise ClipError(f"focal lengths must be positive, got {focal.min(0).tolist()}")
    if masks.max(initial=0) > np.iinfo(np.uint16).max or masks.min(initial=0) < 0:
        raise ClipError(f"object ids must be 0 .. 65535, got {masks.min()} .. {masks.max()}")
    empty = ~(depth > 0).any((1, 2))
    if not views or empty.any():
        raise ClipError(f"frame {frames[int(np.argmax(empty))] if views else 0} has no depth")


def camera_to_world(extrinsic: np.ndarray) -> np.ndarray:  # [V, 3, 4] -> float64 [V, 4, 4]
    turn = extrinsic[:, :, :3].astype(np.float64).transpose(0, 2, 1)
    poses = np.tile(np.eye(4), (len(extrinsic), 1, 1))
    poses[:, :3, :3] = turn
    poses[:, :3, 3] = -(turn @ extrinsic[:, :, 3:].astype(np.float64))[..., 0]
    return poses


def look(
    clip: str,
    depth: np.ndarray,  # [V, H, W]
    intrinsic: np.ndarray,  # [V, 3, 3]
    poses: np.ndarray,  # [V, 4, 4] camera to lifted frame
    masks: np.ndarray,  # [V, H, W]
    ids: np.ndarray,  # [N] objects of the table
    frames: np.ndarray,  # [V]
    dtype: torch.dtype | None,  # of the point maps; None: none are made
) -> tuple[Sights, Tensor | None, dict[str, np.ndarray]]:
    """What each view saw of the objects, its point map, and its sampled pixels, points and ids by name."""
    shape = len(ids), len(depth)
    sights = Sights(
        np.zeros(shape, np.int64), np.zeros(shape), np.full(shape, np.inf), np.full((*shape, 4), np.nan),
        np.ones(shape), [],
    )  # fmt: skip
    row_of = np.full(int(masks.max(initial=0)) + 2, -1, np.int16)  # the last is of what lies outside the image
    row_of[ids] = np.arange(len(ids))
    maps, samples = None if dtype is None else torch.empty((*depth.shape, 3), dtype=dtype), []
    for f in range(len(depth)):
        view = view_of(depth[f], masks[f], intrinsic[f], poses[f])
        sights.parts.append(see(sights, f, view, outline_of(view), row_of))
        samples.append(sample(view, f"{clip}\n{frames[f]}"))
        if maps is not None:
            point_map(depth[f], view, maps[f])
    if maps is not None and not fits(depth, intrinsic, poses, torch.finfo(dtype).max) and maps.isinf().any():
        raise ClipError(f"points do not fit into {dtype}: say --points float32")
    columns = (np.stack(column) for column in zip(*samples, strict=True))
    return sights, maps, dict(zip(("sample_pixels", "sample_points", "sample_ids"), columns, strict=True))


def fits(depth: np.ndarray, intrinsic: np.ndarray, poses: np.ndarray, most: float) -> bool:
    """Whether no point can have a coordinate above `most`, by the longest ray of the images' corners."""
    height, width = depth.shape[1:]
    corners = np.array([[0, 0, 1], [width, 0, 1], [0, height, 1], [width, height, 1]], float).T
    longest = np.linalg.norm(np.linalg.inv(intrinsic) @ corners, axis=1).max()
    return depth.max() * longest + np.abs(poses[:, :3, 3]).max() < most


def see(
    sights: Sights,
    f: int,
    view: View,
    outline: Outline,
    row_of: np.ndarray,  # int16, row of each id, -1 for ids that are not wanted
) -> dict[str, np.ndarray]:
    """Fills in one view's counts, and returns its points and edges, each with its object's row."""
    count = len(sights.pixels)
    rows = row_of[view.objects]
    at = np.flatnonzero(rows >= 0)
    at = at[np.argsort(rows[at], kind="stable")]
    pixels = np.bincount(rows[at], minlength=count)
    shown = np.flatnonzero(pixels)
    sights.pixels[:, f] = pixels
    if len(at):
        starts = (np.cumsum(pixels) - pixels)[shown]
        u, v = view.places(at)
        edges = [np.minimum.reduceat(x, starts) for x in (u, v)] + [np.maximum.reduceat(x, starts) for x in (u, v)]
        sights.box[shown, f] = np.stack(edges, 1)
        sights.nearest[shown, f] = np.minimum.reduceat(view.distances(at), starts)
    edge_rows = row_of[view.objects[outline.at]]
    wanted = edge_rows >= 0
    edge_rows, outline = edge_rows[wanted], outline.only(wanted)
    total = np.bincount(edge_rows, minlength=count)
    for name, which in (("whole", outline.ends), ("cut", outline.framed)):
        part = np.bincount(edge_rows, which, minlength=count)
        getattr(sights, name)[:, f] = np.where(total > 0, part / np.maximum(total, 1), name == "cut")
    at = np.flatnonzero(view.solid & (rows >= 0))
    at = at[:: 1 + len(at) // MOST_POINTS]
    return {
        "row": rows[at],
        "points": view.points(at),
        "normals": view.normals(at),
        "broad": view.normals(at, view.broad),
        "pixel": (view.footprint / view.inverse[at]).astype(np.float32),
        "rays": view.points(at) - view.centre.astype(np.float32),
        "edge_row": edge_rows,
        "edges": view.points(outline.at),
        "ends": outline.ends,
        "touches": outline.touches,
        "along": outline.along,
        "edge_pixel": (view.footprint / view.inverse[outline.at]).astype(np.float32),
    }


def gather(sights: Sights, differ: float) -> list[Seen]:
    """What all views saw, object by object."""
    joined = {name: np.concatenate([part[name] for part in sights.parts]) for name in sights.parts[0]}
    count, split = len(sights.pixels), {}
    for key, names in (("row", POINT_PARTS), ("edge_row", EDGE_PARTS)):
        order = np.argsort(joined[key], kind="stable")
        stops = np.cumsum(np.bincount(joined[key], minlength=count))[:-1] if count else []
        for name in names:
            split[name] = np.split(joined[name][order], stops)
    return [
        Seen(**{name: parts[n] for name, parts in split.items()}, whole=best_whole(sights, n), differ=differ)
        for n in range(count)
    ]


def best_whole(sights: Sights, n: int) -> float:
    """Of the views that show the object large and not cut by the image: the largest share of ends on its outline."""
    large = sights.pixels[n] >= sights.pixels[n].max() / 2
    shows = large & (sights.cut[n] <= IMAGE_CUTS)
    return float(sights.whole[n, shows].max(initial=0))


def point_map(depth: np.ndarray, view: View, out: Tensor) -> None:  # [H, W] -> [H, W, 3], in place
    rays = (view.turn @ view.camera).astype(np.float32)
    known = torch.from_numpy(np.where(depth > 0, depth, np.float32(np.nan)))
    u, v = torch.arange(depth.shape[1]), torch.arange(depth.shape[0])[:, None]
    for i in range(3):
        across, down = u * float(rays[i, 0]), v * float(rays[i, 1]) + float(rays[i, 2])
        out[..., i] = (across + down) * known + float(view.centre[i])


def sample(view: View, seed: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # int64 [K, 2], float64 [K, 3], [K]
    """K pixels whose neighbours, and theirs, are on their surface; drawn by `seed`. Where none is, any with depth."""
    inner = (view.joined == 15) & view.solid
    for step in (1, view.stride):
        inner[step:-step] &= inner[: -2 * step] & inner[2 * step :]
    chosen = np.flatnonzero(inner)
    if not len(chosen):
        chosen = np.flatnonzero(view.inverse > 0)
    rng = np.random.default_rng(zlib.crc32(seed.encode()))
    at = chosen[rng.choice(len(chosen), SAMPLES, replace=len(chosen) < SAMPLES)]
    return np.stack(view.places(at), 1), view.points(at).astype(np.float64), view.objects[at].astype(np.int64)
