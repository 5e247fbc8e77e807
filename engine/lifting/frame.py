"""Where up is and where the floor is: the lifted frame of a clip, from its poses and points of what its views saw.

Up is given, or that of a floor found by RANSAC (Fischler and Bolles 1981) with hypotheses of one point and its normal,
or that of the first camera. Ceilings, tables and beds are not floors: a floor has nearly nothing beneath it.
"""

from dataclasses import dataclass

import numpy as np

from spatialprobe.engine.lifting.objects import Gravity
from spatialprobe.engine.lifting.outline import view_of

VIEWS, POINTS = 9, 2000  # that the floor is looked for in, and points of each
HYPOTHESES = 400
NEAR, NEARER = 0.02, 0.01  # of the points' median distance: a plane's points while it is sought, and when it is refined
LEVEL = np.cos(np.radians(20))  # between a floor's normal and that of a point on it
TILT = np.cos(np.radians(45))  # between a floor's normal and the first camera's up
ENOUGH = 0.05  # share of the points below the cameras that makes a plane a floor
BENEATH = 0.03  # most of them that may lie beneath it
STRAIGHT_DOWN = np.sin(np.radians(5))  # horizontal part of the first look below which it has no direction


@dataclass(frozen=True)
class Frame:
    matrix: np.ndarray  # float64 [4, 4] world to lifted frame
    gravity: Gravity
    floor: float | None  # as of ObjectTable


@dataclass(frozen=True)
class Plane:
    normal: np.ndarray  # float64 [3] unit, up
    height: float  # normal . x of its points
    share: float  # of the points below the cameras that lie on it


def lifted_frame(
    points: np.ndarray,  # float64 [P, 3] of the world
    normals: np.ndarray,  # float64 [P, 3] towards the cameras
    poses: np.ndarray,  # float64 [V, 4, 4] camera to world
    up: np.ndarray | None,  # [3] of the world; None: not known
) -> Frame:
    """The frame as `objects` says. Deterministic: hypotheses are drawn from a fixed seed."""
    head = -poses[0, :3, 1]  # up in the first image
    scale = float(np.median(np.linalg.norm(points - poses[:, :3, 3].mean(0), axis=1)))
    gravity: Gravity = "floor"
    if up is not None:
        up, gravity = np.asarray(up, float) / np.linalg.norm(up), "poses"
        level = points[normals @ up > LEVEL]
        hypotheses = [(up, float(h)) for h in (level @ up)[:: 1 + len(level) // HYPOTHESES]]
    else:
        chosen = np.random.default_rng(0).permutation(np.flatnonzero(normals @ head > TILT))[:HYPOTHESES]
        hypotheses = [(normals[i], float(normals[i] @ points[i])) for i in chosen]
    floor = best_plane(points, normals, poses[:, :3, 3], hypotheses, scale, fixed=up is not None)
    if up is None and floor is not None and floor.normal @ head > TILT:
        up = floor.normal
    elif up is None:
        up, gravity, floor = head, "camera", None
    return Frame(frame_matrix(poses[0], up, floor), gravity, None if floor is None else floor.share)


def frame_matrix(pose: np.ndarray, up: np.ndarray, floor: Plane | None) -> np.ndarray:  # float64 [4, 4]
    """World to lifted. A first camera that looks straight down looks, seen from above, where its image's top is."""
    look = pose[:3, 2] - (pose[:3, 2] @ up) * up
    if np.linalg.norm(look) < STRAIGHT_DOWN:
        top = -pose[:3, 1] if pose[:3, 2] @ up < 0 else pose[:3, 1]
        look = top - (top @ up) * up
    forward = look / np.linalg.norm(look)
    matrix, below = np.eye(4), pose[:3, 3].copy()
    if floor is not None:
        below -= (below @ up - floor.height) * up
    matrix[:3, :3] = np.cross(forward, up), forward, up
    matrix[:3, 3] = -matrix[:3, :3] @ below
    return matrix


def best_plane(
    points: np.ndarray,  # [P, 3]
    normals: np.ndarray,  # [P, 3]
    centres: np.ndarray,  # [V, 3]
    hypotheses: list[tuple[np.ndarray, float]],
    scale: float,
    *,
    fixed: bool,  # keep the hypotheses' normal
) -> Plane | None:
    """The plane of most points among those that are below all cameras and have nearly nothing beneath them."""
    best, found = 0, None
    for normal, height in hypotheses:
        below, on, beneath = split(points, normals, centres, normal, height, NEAR * scale)
        if on.sum() > best and beneath <= BENEATH * below and height < (centres @ normal).min() - NEAR * scale:
            best, found = int(on.sum()), (normal, height)
    if found is None:
        return None
    normal, height = found
    for near in (NEAR, NEARER, NEARER):
        below, on, _ = split(points, normals, centres, normal, height, near * scale)
        if on.sum() < 3:
            return None
        if not fixed:
            middle = points[on].mean(0)
            fitted = np.linalg.svd(points[on] - middle, full_matrices=False)[2][2]
            normal = fitted if fitted @ normal > 0 else -fitted
        height = float(np.median(points[on] @ normal))
    below, on, _ = split(points, normals, centres, normal, height, NEAR * scale)
    share = float(on.sum() / max(below, 1))
    return Plane(normal, height, share) if share >= ENOUGH else None


def split(
    points: np.ndarray, normals: np.ndarray, centres: np.ndarray, normal: np.ndarray, height: float, near: float
) -> tuple[int, np.ndarray, int]:
    """How many points are below the lowest camera, which [P] are on the plane, and how many are beneath it."""
    level = points @ normal
    on = (np.abs(level - height) < near) & (normals @ normal > LEVEL)
    return int((level < (centres @ normal).min()).sum()), on, int((level < height - 2 * near).sum())


def surface_sample(
    depth: np.ndarray,  # float32 [V, H, W]
    intrinsic: np.ndarray,  # float64 [V, 3, 3]
    poses: np.ndarray,  # float64 [V, 4, 4] camera to world
) -> tuple[np.ndarray, np.ndarray]:  # float64 [P, 3], [P, 3]
    """Points and normals of some pixels of some views, in the world."""
    points, normals = [], []
    for f in np.unique(np.linspace(0, len(depth) - 1, VIEWS).round().astype(int)):
        view = view_of(depth[f], np.zeros(depth[f].shape, np.int32), intrinsic[f], poses[f])
        solid = np.flatnonzero(view.solid & (view.objects == 0))
        at = solid[:: 1 + len(solid) // POINTS]
        points.append(view.points(at).astype(np.float64))
        normals.append(view.normals(at, view.broad).astype(np.float64))
    points, normals = np.concatenate(points), np.concatenate(normals)
    known = np.isfinite(normals).all(1)
    return points[known], normals[known]
