"""Where the objects of clips are as views of them see it, and which objects a view sees well enough to be asked about.

R views of one clip or of several, N objects each: a clip that has fewer is filled up with objects that no view sees.
Lengths are in the tables' unit. It knows boxes and cameras, no masks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spatialprobe.engine.lifting.objects import ObjectTable

PIXEL_SHARE = 0.002  # of the image: smaller objects are not asked about
# Of its outline that is the object's own end, as of a square that is cut in half: below it an object is mostly occluded
# or cut. Of the objects above it in rendered rooms, one in twelve still shows less than half of itself.
WHOLE = 2 / 3
NOT_OBJECTS = frozenset(("wall", "floor", "ceiling", "otherstructure"))  # of ScanNet's names: no box holds them well
STEEP = 0.2  # length of the viewing direction seen from above, below which a view has no "ahead" on the floor
AHEAD = 0.1  # of the distance: what is less in front of a camera's plane has no side that it is seen on


@dataclass(frozen=True, eq=False)
class Viewpoint:
    """The objects from R cameras, whether these see them or not."""

    eye: np.ndarray  # [R, 3]
    # [R, 4, 3] unit vectors: right and forward of the image, and with the horizon made level, NaN where a view is steep
    direction: np.ndarray
    along: np.ndarray  # [R, 4, N] from the eye to the centre of each box, along each direction
    reach: np.ndarray  # [R, 4, N] half of each box's extent along each direction
    far: np.ndarray  # [R, N] from the eye to the centre of each box
    slope: np.ndarray  # [R, N] how far right of the image's middle the centre is seen, per length ahead; NaN behind


@dataclass(frozen=True, eq=False)
class Views:
    """The objects as R views see them, each with another view of its clip from where questions may be asked."""

    clip: np.ndarray  # int64 [R] which of the tables
    views: np.ndarray  # int64 [R] index of the table's frames
    others: np.ndarray  # int64 [R]
    metric: bool  # of all tables
    upright: bool
    width: np.ndarray  # [R] of the image, pixels
    centre: np.ndarray  # [R, N, 3]
    extent: np.ndarray  # [R, N, 3]
    half: np.ndarray  # [R, N, 3, 3] from each box's centre to the middles of its sides +x, +y and +z
    complete: np.ndarray  # bool [R, N, 3]
    visible: np.ndarray  # bool [R, N] whether a view shows anything of an object
    seen: np.ndarray  # bool [R, N] whether it shows it well enough to be asked about
    nearest: np.ndarray  # [R, N] from the camera to the nearest point seen; NaN where not visible
    box: np.ndarray  # [R, N, 4] as ObjectTable's
    here: Viewpoint
    there: Viewpoint  # of `others`


def seen_well(table: ObjectTable) -> np.ndarray:  # bool [N, V]
    """Large enough, mostly whole, and a thing with a box."""
    things = np.array([tag not in NOT_OBJECTS for tag in table.tags], bool)
    large = table.pixels >= PIXEL_SHARE * table.size[0] * table.size[1]
    return large & (table.whole >= WHOLE) & np.isfinite(table.nearest) & things[:, None]


def look(
    table: ObjectTable,
    views: np.ndarray,  # int64 [R]
    others: np.ndarray | None = None,  # int64 [R]; by default the clip's last view
) -> Views:
    """Views of one clip."""
    views = np.asarray(views, np.int64)
    others = np.full_like(views, len(table.frames) - 1) if others is None else np.asarray(others, np.int64)
    return stack([table], [views], [others], len(table.tags))


def stack(
    tables: Sequence[ObjectTable],
    views: Sequence[np.ndarray],  # of each table int64 [r]
    others: Sequence[np.ndarray],
    n: int,  # objects, of the table that has most at least
) -> Views:
    """Views of several clips, whose tables agree on `metric` and `upright`. No row depends on another."""
    if len({(table.metric, table.upright) for table in tables}) > 1:
        raise ValueError("tables that are looked at together must agree on metric and upright")
    clip = np.repeat(np.arange(len(tables)), [len(v) for v in views])
    rows, stop = len(clip), 0
    centre, extent, yaw = np.zeros((rows, n, 3)), np.zeros((rows, n, 3)), np.zeros((rows, n))
    complete, visible, seen = np.zeros((rows, n, 3), bool), np.zeros((rows, n), bool), np.zeros((rows, n), bool)
    nearest, box, poses = np.full((rows, n), np.nan), np.full((rows, n, 4), np.nan), np.zeros((2, rows, 4, 4))
    for table, shown, another in zip(tables, views, others, strict=True):
        start, stop, k = stop, stop + len(shown), len(table.tags)
        at = (slice(start, stop), slice(k))
        centre[at], extent[at], yaw[at], complete[at] = table.centre, table.extent, table.yaw, table.complete
        visible[at], seen[at] = (table.pixels > 0).T[shown], seen_well(table).T[shown]
        nearest[at], box[at] = table.nearest.T[shown], table.box[:, shown].swapaxes(0, 1)
        poses[:, start:stop] = table.poses[shown], table.poses[another]
    nearest[~np.isfinite(nearest)] = np.nan  # not visible, or without depth
    complete &= extent > 0  # nothing ends twice at one place
    half = half_axes(extent, yaw)
    width = np.array([table.size[1] for table in tables], float)[clip]
    here, there = (viewpoint(centre, half, pose) for pose in poses)
    return Views(
        clip, np.concatenate(views), np.concatenate(others), tables[0].metric, tables[0].upright, width, centre,
        extent, half, complete, visible, seen, nearest, box, here, there,
    )  # fmt: skip


def viewpoint(
    centre: np.ndarray,  # [R, N, 3]
    half: np.ndarray,  # [R, N, 3, 3]
    poses: np.ndarray,  # [R, 4, 4]
) -> Viewpoint:
    # Products are summed by hand: those of a matrix product change with its shape, in the last bits.
    eye, right, forward = poses[:, :3, 3], poses[:, :3, 0], poses[:, :3, 2]
    flat = np.hypot(forward[:, 0], forward[:, 1])
    ahead = forward[:, :2] / np.where(flat < STEEP, np.nan, flat)[:, None]
    direction = np.zeros((len(poses), 4, 3))
    direction[:, 0], direction[:, 1] = right, forward
    direction[:, 2, 0], direction[:, 2, 1], direction[:, 3, :2] = ahead[:, 1], -ahead[:, 0], ahead
    offset = centre - eye[:, None]  # [R, N, 3]
    x, y, z = (direction[:, :, None, axis] for axis in range(3))  # [R, 4, 1]
    along = x * offset[:, None, :, 0] + y * offset[:, None, :, 1] + z * offset[:, None, :, 2]
    reach = (
        np.abs(x * half[:, None, :, 0, 0] + y * half[:, None, :, 0, 1])
        + np.abs(x * half[:, None, :, 1, 0] + y * half[:, None, :, 1, 1])
        + np.abs(z * half[:, None, :, 2, 2])
    )
    far = np.sqrt(offset[..., 0] ** 2 + offset[..., 1] ** 2 + offset[..., 2] ** 2)
    depth = along[:, 1]
    slope = along[:, 0] / np.where(depth > AHEAD * far, depth, np.nan)
    return Viewpoint(eye, direction, along, reach, far, slope)


def half_axes(extent: np.ndarray, yaw: np.ndarray) -> np.ndarray:  # [..., N, 3], [..., N] -> [..., N, 3, 3]
    """Vectors from each box's centre to the middles of its sides +x, +y and +z, in the lifted frame."""
    cos, sin, axes = np.cos(yaw), np.sin(yaw), np.zeros((*yaw.shape, 3, 3))
    axes[..., 0, 0] = axes[..., 1, 1] = cos
    axes[..., 0, 1], axes[..., 1, 0], axes[..., 2, 2] = sin, -sin, 1
    return axes * (extent / 2)[..., None]
