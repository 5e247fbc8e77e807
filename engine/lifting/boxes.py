"""A gravity-aligned box of what several views saw of an object, and which of its axes were seen to end at both ends.

It knows surface points with normals, and edges of outlines. What no view saw, it does not guess: a box is of what was
seen, and `complete` says along which axes that is all there is, as far as views of a solid thing can say so.
"""

from dataclasses import dataclass

import numpy as np

TRIMMED = 1e-3  # share of the points beyond each end of an axis: a stray point is not where the object ends
UPRIGHT = 0.3  # vertical part of a normal below which a surface counts as upright
MANY = 20_000  # points, from which a yaw is no better found than from all
WALLS = 0.03  # share of the points on upright surfaces from which a box's yaw may be taken
ALIGNED = 0.4  # of these within 0.15 radians of it or of a right angle to it
LOOSE = 1.2  # how much larger than the smallest rectangle one of those surfaces' yaw may be
FACING = 0.8  # cosine between a normal, or a step along a surface, and the direction of an end
REACH = 1.5  # pixel footprints, or steps along the surface, from an end within which an edge or a face is at it
FACE_SHARE = 0.2  # of the points at an end, that look that way if it is a face
SLACK = 0.1  # of the extent, or a pixel: an end that is not known so well was not seen
ASTRAY = 3.0  # times the difference of two views, by which many views draw an extent out
WHOLE = 0.8  # of the outline in the view that shows it best: with less, a part may be hidden
FEWEST, FEWEST_SHARE = 3, 0.002  # edges, or points of a face, that show an end; of the edges also this share


@dataclass(frozen=True)
class Seen:
    """What the views saw of one object: N points on its surface, M edges of its outline. Lifted frame."""

    points: np.ndarray  # float32 [N, 3]
    normals: np.ndarray  # float32 [N, 3] towards the camera, NaN where not known
    broad: np.ndarray  # float32 [B, 3] normals over several pixels, of some of the points
    pixel: np.ndarray  # float32 [N] width of a pixel at the point's distance
    rays: np.ndarray  # float32 [N, 3] from the camera to the point: along it the point is astray if its depth is wrong
    edges: np.ndarray  # float32 [M, 3] points of the object at its outline
    ends: np.ndarray  # bool [M] whether the object itself ends there
    touches: np.ndarray  # bool [M] whether it ends at another surface
    along: np.ndarray  # float32 [M, 3] a pixel's step on the surface outwards, NaN where not known
    edge_pixel: np.ndarray  # float32 [M]
    whole: float  # share of ends on its outline, in the view that shows most of it
    differ: float  # share of the depth by which views differ about one point


@dataclass(frozen=True)
class Box:
    centre: np.ndarray  # float64 [3]
    extent: np.ndarray  # float64 [3] along its own x (the longer horizontal side), y, z
    yaw: float  # radians in [-pi/2, pi/2)
    complete: np.ndarray  # bool [3]


def box_of(seen: Seen) -> Box:
    """The box of at least one point."""
    points = np.concatenate([seen.points, seen.edges])
    yaw = yaw_of(points[:: 1 + len(points) // MANY, :2].astype(np.float64), seen.broad)
    low, high = trimmed(turned(points, yaw))
    if high[1] - low[1] > high[0] - low[0]:
        yaw += np.pi / 2
        low, high = trimmed(turned(points, yaw))
    complete, low, high = axes_seen(seen, yaw, low, high)
    if high[1] - low[1] > high[0] - low[0]:  # by less than the sides' ends are known
        yaw, complete = yaw + np.pi / 2, complete[[1, 0, 2]]
        low, high = np.array([low[1], -high[0], low[2]]), np.array([high[1], -low[0], high[2]])
    centre = turned((low + high)[None] / 2, -yaw)[0]
    return Box(centre, high - low, float((yaw + np.pi / 2) % np.pi - np.pi / 2), complete)


def turned(points: np.ndarray, yaw: float) -> np.ndarray:  # [N, 3] of the frame -> [N, 3] of a box of that yaw
    c, s = np.cos(yaw), np.sin(yaw)
    return points @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]], points.dtype)


def trimmed(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # [N, 3] -> float64 [3], [3]
    """Low and high of each axis, without the outermost thousandth of the points at each end."""
    k = int(np.ceil(TRIMMED * len(points))) if len(points) >= 20 else 0
    ordered = np.partition(points, (k, len(points) - 1 - k), axis=0)
    return ordered[k].astype(np.float64), ordered[len(points) - 1 - k].astype(np.float64)


def yaw_of(
    points: np.ndarray,  # float64 [N, 2]
    normals: np.ndarray,  # float32 [M, 3]
) -> float:
    """That of upright surfaces at right angles, where most upright ones are; else of the smallest rectangle.

    A corner seen from one side is a triangle from above, and its smallest rectangles are two.
    """
    hull = convex_hull(without_strays(points))
    rectangle = smallest_rectangle(hull)
    upright = normals[np.abs(normals[:, 2]) < UPRIGHT].astype(np.float64)  # NaN is not below
    if len(upright) < max(WALLS * len(normals), 10):
        return rectangle
    angle = np.arctan2(upright[:, 1], upright[:, 0]) % (np.pi / 2)
    counts = np.bincount((angle * (180 / np.pi)).astype(int), minlength=90)[:90]
    nearby = sum(np.roll(counts, shift) for shift in (-1, 0, 1))
    yaw = np.radians(np.argmax(nearby) + 0.5)
    for width in (0.1, 0.05, 0.15):  # radians
        off = (angle - yaw + np.pi / 4) % (np.pi / 2) - np.pi / 4
        near = off[np.abs(off) < width]
        yaw += float(np.median(near))
    aligned = len(near) >= len(upright) * ALIGNED and area_at(hull, yaw) <= LOOSE * area_at(hull, rectangle)
    return float(yaw) if aligned else rectangle


def without_strays(points: np.ndarray) -> np.ndarray:  # [N, 2] -> [n, 2]
    """Points that `trimmed` leaves in each of 8 directions."""
    for angle in np.arange(4) * np.pi / 8:
        c, s = np.cos(angle), np.sin(angle)
        across = points @ np.array([[c, -s], [s, c]])
        low, high = trimmed(across)
        points = points[((across >= low) & (across <= high)).all(1)]
    return points


def area_at(hull: np.ndarray, yaw: float) -> float:  # [n, 2]
    """Of the rectangle of that yaw about the points."""
    c, s = np.cos(yaw), np.sin(yaw)
    return float(np.ptp(hull @ (c, s)) * np.ptp(hull @ (-s, c)))


def smallest_rectangle(hull: np.ndarray) -> float:  # float64 [n, 2] -> radians
    """Angle of a side of the rectangle of least area about a convex hull: it has a side in common with it."""
    if len(hull) < 3:
        side = hull[-1] - hull[0]
        return float(np.arctan2(side[1], side[0]))
    sides = np.roll(hull, -1, axis=0) - hull
    angles = np.unique(np.arctan2(sides[:, 1], sides[:, 0]) % (np.pi / 2))
    x = hull @ np.stack([np.cos(angles), np.sin(angles)])  # [n, angles]
    y = hull @ np.stack([-np.sin(angles), np.cos(angles)])
    return float(angles[np.argmin(np.ptp(x, axis=0) * np.ptp(y, axis=0))])


def convex_hull(points: np.ndarray) -> np.ndarray:  # float64 [N, 2] -> [n, 2] counter-clockwise
    """Of the outermost points in 192 directions, by Andrew's monotone chain: a box's corners are among them."""
    angles = np.arange(96) * np.pi / 96
    reach = np.stack([np.cos(angles), np.sin(angles)], 1) @ points.T  # [96, N]
    outermost = np.concatenate([reach.argmax(1), reach.argmin(1)])
    candidates = np.unique(points[outermost], axis=0)
    if len(candidates) < 3:
        return candidates
    chains = []
    for ordered in (candidates.tolist(), candidates[::-1].tolist()):
        chain: list[list[float]] = []
        for x, y in ordered:
            while len(chain) > 1 and _turn(chain[-2], chain[-1], x, y) <= 0:
                chain.pop()
            chain.append([x, y])
        chains += chain[:-1]
    return np.array(chains)


def _turn(a: list[float], b: list[float], x: float, y: float) -> float:
    return (b[0] - a[0]) * (y - a[1]) - (b[1] - a[1]) * (x - a[0])


def axes_seen(
    seen: Seen, yaw: float, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # bool [3], float64 [3], [3]
    """Axes of the box whose two ends are where the object ends, if it has no part that nobody saw; low and high, each
    in the middle of where the end may be: the last pixel's step on a slanted surface may be much longer than a pixel.

    An end was seen if a face of the object looks that way there, or if its surface runs that way and stops: edges of
    its outline there are ends, and no more than a third of them are cut by the image or by something nearer. A part
    that nobody saw may reach in any direction, so no axis is complete where there may be one: if the outline is cut
    in large part in every view, if it is cut at an end that was seen nowhere, or if the object neither stands on
    anything nor hangs from anything. Nor is an axis along which depth is astray by more than a tenth of the extent.
    """
    none = np.zeros(3, bool), low, high
    if seen.whole < WHOLE:
        return none
    normals, along = turned(seen.normals, yaw), turned(seen.along, yaw)
    inside, edges_inside = turned(seen.points, yaw), turned(seen.edges, yaw)
    length = np.linalg.norm(along, axis=1)
    reach, edge_reach = REACH * seen.pixel, REACH * np.fmax(seen.edge_pixel, length)
    fewest = max(FEWEST, FEWEST_SHARE * len(seen.edges))
    observed, held, ends = np.zeros((3, 2), bool), False, np.stack([low, high], 1)
    for d in range(3):
        for e, (end, sign) in enumerate(((low[d], -1), (high[d], 1))):
            there = sign * (end - inside[:, d]) < reach
            face = int((there & (sign * normals[:, d] > FACING)).sum())
            here = (sign * along[:, d] > FACING * length) & (sign * (end - edges_inside[:, d]) < edge_reach)
            ending = int((here & seen.ends).sum())
            cut = int(here.sum()) - ending
            facing = face >= max(FEWEST, FACE_SHARE * there.sum())
            stops = ending >= fewest and ending >= 2 * cut
            if stops and not facing:  # it is before the next pixel of every edge, with a tenth of them astray
                beyond = sign * (edges_inside[:, d] + along[:, d] - end)[here & seen.ends]
                slack = max(float(np.quantile(beyond, 0.1)), 0) / 2
                ends[d, e] += sign * slack
                stops = slack <= SLACK * (high[d] - low[d]) or slack <= np.median(seen.pixel)
            observed[d, e] = facing or stops
            held |= d == 2 and (here & seen.touches).sum() >= FEWEST
            if not observed[d, e] and (cut or d == 2):
                return none
    astray = ASTRAY * seen.differ * np.abs(turned(seen.rays, yaw)).mean(0)
    known = astray <= SLACK * (high - low)
    return observed.all(1) & held & known, ends[:, 0], ends[:, 1]
