"""Whether depth and poses can be of one scene and in the unit they are said to be in. It knows no objects."""

from itertools import pairwise

import numpy as np

from spatialprobe.engine.types import ClipError

ROOMS = (0.05, 300.0)  # metres from a camera to the middle one of the points it sees
JOURNEY = 30.0  # times that, between two cameras of a clip
VIEWS, POINTS, FEWEST = 9, 500, 50  # that are compared, of each view, and that two views must have in common
APART = 0.25  # median relative difference between what two views say of one point: teachers differ by a tenth


def check_units(depth: np.ndarray, poses: np.ndarray, metric: bool) -> None:  # [V, H, W], [V, 4, 4] camera to world
    """Raises ClipError for "metres" that cannot be metres, and for depth and poses that cannot be in one unit."""
    some = depth[:: 1 + len(depth) // VIEWS]
    middle = float(np.median(some[some > 0]))
    if metric and not ROOMS[0] <= middle <= ROOMS[1]:
        raise ClipError(
            f"depth cannot be in metres: half of the points are farther than {middle:.3g}, wanted {ROOMS[0]:g} .. "
            f"{ROOMS[1]:g}; if its scale is not known, say --scale free"
        )
    moved = float(np.linalg.norm(poses[:, :3, 3] - poses[0, :3, 3], axis=1).max())
    if moved > JOURNEY * middle:
        raise ClipError(
            f"depth and poses cannot be in one unit: the camera moves by {moved:.3g}, past what is {middle:.3g} away"
        )


def check_agreement(
    depth: np.ndarray,  # [V, H, W]
    intrinsic: np.ndarray,  # [V, 3, 3]
    poses: np.ndarray,  # [V, 4, 4] camera to world
) -> float:
    """By what share of the depth views differ about one point; 0 where they have none in common.

    Raises ClipError if points of one view are not where the next one sees them: units, poses or frames differ.
    """
    chosen = np.unique(np.linspace(0, len(depth) - 1, VIEWS).round().astype(int))
    found = [apart(depth, intrinsic, poses, i, j) for i, j in pairwise(chosen)]
    found = [x for x in found if x is not None]
    differ = float(np.median(found)) if found else 0.0
    if differ > APART:
        raise ClipError(
            f"depth and poses do not agree: what one view shows, another has at a depth that differs by "
            f"{differ:.0%}; are they in one unit, and of the same frames?"
        )
    return differ


def apart(depth: np.ndarray, intrinsic: np.ndarray, poses: np.ndarray, i: int, j: int) -> float | None:
    """Median relative difference of depth at points of view i in view j; None if they have too few in common.

    The arrays are those of `check_agreement`.
    """
    v, u = np.nonzero(depth[i] > 0)
    step = 1 + len(v) // POINTS
    v, u = v[::step], u[::step]
    rays = np.linalg.inv(intrinsic[i]) @ np.stack([u, v, np.ones_like(u)])
    world = poses[i, :3, :3] @ (rays * depth[i, v, u]) + poses[i, :3, 3:]
    there = poses[j, :3, :3].T @ (world - poses[j, :3, 3:])
    pixels = intrinsic[j] @ there[:, there[2] > 0]
    z = pixels[2]
    u, v = pixels[:2] / z
    inside = (u >= 0) & (u < depth.shape[2] - 1) & (v >= 0) & (v < depth.shape[1] - 1)
    inverse = interpolated(depth[j], u[inside], v[inside])
    ratio = (z[inside] * inverse)[inverse > 0]
    return float(np.median(np.abs(ratio - 1))) if len(ratio) >= FEWEST else None


def interpolated(depth: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:  # float32 [H, W], [P], [P] -> [P]
    """Inverse depth between four pixels, which is linear on planes; 0 where one of them has none."""
    left, top = u.astype(int), v.astype(int)
    corners = [(0, 0), (0, 1), (1, 0), (1, 1)]
    around = np.stack([depth[top + y, left + x] for y, x in corners]).astype(np.float64)
    x, y = u - left, v - top
    weight = np.stack([(1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x])
    known = (around > 0).all(0)
    return np.where(known, (weight / np.where(around > 0, around, 1)).sum(0), 0)
