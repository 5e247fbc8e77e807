"""Where the objects of a clip are as each of several views sees them, and which of them a view sees well enough.

Lengths are in the table's unit. It knows boxes and cameras, no masks and no points.
"""

from dataclasses import dataclass

import numpy as np

from spatialprobe.engine.lifting.objects import ObjectTable

PIXEL_SHARE = 0.002  # of the image: smaller objects are not asked about
WHOLE = 0.5  # share of its outline that is the object's own end: below it, it is mostly occluded or cut
NOT_OBJECTS = frozenset(("wall", "floor", "ceiling", "otherstructure"))  # of ScanNet's names: no box holds them well
STEEP = 0.2  # length of the viewing direction seen from above, below which a view has no "ahead" on the floor
AHEAD = 0.1  # of the distance: what is less in front of a camera's plane has no side that it is seen on

DIRECTIONS = ("right", "forward", "level right", "level forward")  # the image's own, and with the horizon made level


@dataclass(frozen=True, eq=False)
class Viewpoint:
    """The objects from S cameras, whether these see them or not."""

    eye: np.ndarray  # [S, 3]
    direction: np.ndarray  # [S, 4, 3] unit vectors as DIRECTIONS; the level ones NaN where a view is steep
    along: np.ndarray  # [S, 4, N] from the eye to the centre of each box, along each direction
    reach: np.ndarray  # [S, 4, N] half of each box's extent along each direction
    far: np.ndarray  # [S, N] from the eye to the centre of each box
    slope: np.ndarray  # [S, N] how far right of the image's middle the centre is seen, per length ahead; NaN behind


@dataclass(frozen=True, eq=False)
class Views:
    """The objects of a clip in S of its views, each with another view from whose position questions may be asked."""

    table: ObjectTable
    views: np.ndarray  # int64 [S]
    others: np.ndarray  # int64 [S]
    seen: np.ndarray  # bool [S, N] whether a view sees an object well enough to be asked about it
    nearest: np.ndarray  # [S, N] from the camera to the nearest point seen; NaN where not seen
    here: Viewpoint
    there: Viewpoint  # of `others`


def seen_well(table: ObjectTable) -> np.ndarray:  # bool [N, V]
    """Large enough, mostly whole, and a thing with a box."""
    things = np.array([tag not in NOT_OBJECTS for tag in table.tags], bool)
    large = table.pixels >= PIXEL_SHARE * table.size[0] * table.size[1]
    return large & (table.whole >= WHOLE) & np.isfinite(table.nearest) & things[:, None]


def look(
    table: ObjectTable,
    views: np.ndarray,  # int64 [S]
    others: np.ndarray | None = None,  # int64 [S]; by default the clip's last view
) -> Views:
    """The geometry that every relation is measured on, for S views at once."""
    views = np.asarray(views, np.int64)
    others = np.full_like(views, len(table.frames) - 1) if others is None else np.asarray(others, np.int64)
    seen = seen_well(table).T[views]
    nearest = np.where(seen, table.nearest.T[views], np.nan)
    both = from_cameras(table, table.poses[np.concatenate([views, others])])
    n = len(views)
    here, there = (Viewpoint(*(x[part] for x in both)) for part in (slice(n), slice(n, None)))
    return Views(table, views, others, seen, nearest, here, there)


def from_cameras(
    table: ObjectTable,
    poses: np.ndarray,  # [S, 4, 4]
) -> tuple[np.ndarray, ...]:
    """The fields of a Viewpoint."""
    eye, right, forward = poses[:, :3, 3], poses[:, :3, 0], poses[:, :3, 2]
    flat = np.hypot(forward[:, 0], forward[:, 1])
    ahead = forward[:, :2] / np.where(flat < STEEP, np.nan, flat)[:, None]
    direction = np.zeros((len(poses), 4, 3))
    direction[:, 0], direction[:, 1] = right, forward
    direction[:, 2, 0], direction[:, 2, 1], direction[:, 3, :2] = ahead[:, 1], -ahead[:, 0], ahead
    offset = table.centre - eye[:, None]  # [S, N, 3]
    along = direction @ offset.swapaxes(1, 2)
    reach = np.abs(direction @ half_axes(table).reshape(-1, 3).T).reshape(len(poses), 4, -1, 3).sum(3)
    far = np.sqrt((offset**2).sum(2))
    ahead = along[:, 1]
    slope = along[:, 0] / np.where(ahead > AHEAD * far, ahead, np.nan)
    return eye, direction, along, reach, far, slope


def half_axes(table: ObjectTable) -> np.ndarray:  # [N, 3, 3]
    """Vectors from each box's centre to the middles of its sides +x, +y and +z, in the lifted frame."""
    cos, sin, axes = np.cos(table.yaw), np.sin(table.yaw), np.zeros((len(table.yaw), 3, 3))
    axes[:, 0, 0] = axes[:, 1, 1] = cos
    axes[:, 0, 1], axes[:, 1, 0], axes[:, 2, 2] = sin, -sin, 1
    return axes * (table.extent / 2)[:, :, None]
