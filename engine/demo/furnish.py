"""Puts furniture into a room: nothing touches anything else, leaves the room or stands in the camera's way.

Positions are metres in the room's frame: x and y from its centre, z up from its floor.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from spatialprobe.engine.demo.furniture import KINDS, Part

CAMERA_CLEARANCE = 0.5  # metres from the camera's path to any object, seen from above
OBJECT_GAP = 0.04  # metres between two objects, seen from above or upright
MAX_OBJECTS = 10


@dataclass(frozen=True)
class SceneObject:
    """A thing with a name. Its box is the smallest in its own turned frame that holds all of its parts."""

    id: int  # its instance id in masks, from 1
    kind: str  # what it is more closely, e.g. "nightstand", whose tag is "cabinet"
    tag: str  # one of CLASS_NAMES_20 (scenes.py)
    centre: tuple[float, float, float]  # metres, world
    size: tuple[float, float, float]  # metres, full extents along its own x (width), y (depth), z (height)
    yaw: float  # radians about +z; at 0 its front looks towards world -y
    parts: tuple[Part, ...]  # in the world


def furnish(
    rng: np.random.Generator, room: tuple[float, float, float], eyes: np.ndarray, kinds: tuple[str, ...]
) -> list[SceneObject]:
    """Places the kinds in order, each at the first drawn spot where it fits; one that finds no spot is left out."""
    placed: list[SceneObject] = []
    for kind in kinds[:MAX_OBJECTS]:
        parts = KINDS[kind].build(rng)
        low = np.min([np.subtract(p.centre, np.divide(p.size, 2)) for p in parts], axis=0)
        high = np.max([np.add(p.centre, np.divide(p.size, 2)) for p in parts], axis=0)
        size, middle = tuple((high - low).tolist()), (low + high) / 2
        for x, y, yaw in spots(rng, kind, size, room, placed):
            centre = (float(x), float(y), KINDS[kind].lift + size[2] / 2)
            thing = SceneObject(len(placed) + 1, kind, KINDS[kind].tag, centre, size, float(yaw), ())
            if fits(thing, room, eyes, placed):
                placed.append(replace(thing, parts=tuple(put(p, thing, middle) for p in parts)))
                break
    return placed


def spots(
    rng: np.random.Generator,
    kind: str,
    size: tuple[float, float, float],
    room: tuple[float, float, float],
    placed: list[SceneObject],
) -> Iterator[tuple[float, float, float]]:
    """Up to 60 candidate (x, y, yaw) for an object of this size; none if its anchor is missing."""
    place, (w, d, _) = KINDS[kind].place, size
    wall_gap = 0.003 if KINDS[kind].stuck else 0.03
    anchors = [o for o in placed if o.kind == KINDS[kind].anchor]
    for _ in range(60 if anchors or not KINDS[kind].anchor else 0):
        if place == "free":
            yield rng.uniform(-0.3, 0.3) * room[0], rng.uniform(-0.15, 0.25) * room[1], rng.uniform(-0.5, 0.5)
        elif place == "wall":
            turn = rng.choice([0, 0, 1, -1])  # quarter turns: the back wall, seen head-on, twice as often
            length, reach = (room[0], room[1]) if turn == 0 else (room[1], room[0])
            near_end = -0.5 if turn == 0 else -0.1  # the near part of a side wall is out of view
            side, out = rng.uniform(near_end, 0.5) * (length - w - 0.1), (reach - d) / 2 - wall_gap
            yield {0: (side, out), 1: (-out, side), -1: (out, side)}[int(turn)] + (turn * np.pi / 2,)
        else:
            yield beside(rng, place, size, anchors[rng.integers(len(anchors))])


def beside(
    rng: np.random.Generator, place: str, size: tuple[float, float, float], anchor: SceneObject
) -> tuple[float, float, float]:
    """A spot at `anchor`: to its left or right with backs in line, or before one of its sides, facing it."""
    (w, d, _), (aw, ad, _) = size, anchor.size
    if place == "beside":
        x, y, turn = rng.choice([-1, 1]) * ((aw + w) / 2 + rng.uniform(0.05, 0.12)), (ad - d) / 2, 0.0
    else:
        quarter = 0 if place == "front" else rng.integers(4)
        reach, along = (ad, aw) if quarter % 2 == 0 else (aw, ad)
        x, y = rng.uniform(-0.2, 0.2) * along, -(reach + d) / 2 - rng.uniform(0.08, 0.3)
        for _ in range(quarter):
            x, y = -y, x
        turn = np.pi + quarter * np.pi / 2 + rng.uniform(-0.15, 0.15)
    c, s = np.cos(anchor.yaw), np.sin(anchor.yaw)
    return anchor.centre[0] + c * x - s * y, anchor.centre[1] + s * x + c * y, anchor.yaw + turn


def put(part: Part, thing: SceneObject, middle: np.ndarray) -> Part:
    """A part of an object at its place in the world; `middle` [3] is the object's centre in the frame of its parts."""
    x, y, z = np.subtract(part.centre, middle).tolist()
    c, s = np.cos(thing.yaw), np.sin(thing.yaw)
    centre = (thing.centre[0] + c * x - s * y, thing.centre[1] + s * x + c * y, thing.centre[2] + z)
    return Part(tuple(float(v) for v in centre), part.size, thing.yaw + part.yaw, part.finish)


def fits(thing: SceneObject, room: tuple[float, float, float], eyes: np.ndarray, placed: list[SceneObject]) -> bool:
    """Whether `thing` is inside the room, clear of the camera's path (eyes [N, 3]) and of every placed object."""
    reach = np.abs(footprint(thing)).max(axis=0)
    top = thing.centre[2] + thing.size[2] / 2
    if reach[0] > room[0] / 2 or reach[1] > room[1] / 2 or top > room[2]:
        return False
    if footprint_distance(thing, eyes[:, :2]).min() < CAMERA_CLEARANCE:
        return False
    return not any(boxes_touch(thing, other, OBJECT_GAP) for other in placed)


def footprint(thing: SceneObject, grow: float = 0.0) -> np.ndarray:  # float64 [4, 2] metres
    """Corners of the object's box seen from above, in order around it; `grow` moves every side outwards."""
    c, s = np.cos(thing.yaw), np.sin(thing.yaw)
    half = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * (np.array(thing.size[:2]) / 2 + grow)
    return half @ np.array([[c, s], [-s, c]]) + thing.centre[:2]


def footprint_distance(thing: SceneObject, points: np.ndarray) -> np.ndarray:  # [N, 2] metres -> [N] metres
    """How far points on the floor are from the object's box seen from above; 0 below it."""
    c, s = np.cos(thing.yaw), np.sin(thing.yaw)
    x, y = points[:, 0] - thing.centre[0], points[:, 1] - thing.centre[1]
    beyond_x, beyond_y = np.abs(c * x + s * y) - thing.size[0] / 2, np.abs(c * y - s * x) - thing.size[1] / 2
    return np.hypot(np.maximum(beyond_x, 0), np.maximum(beyond_y, 0))


def boxes_touch(a: SceneObject, b: SceneObject, gap: float) -> bool:
    """Whether two upright boxes are less than `gap` metres apart along every axis of separation, `a` grown by it."""
    if abs(a.centre[2] - b.centre[2]) >= (a.size[2] + b.size[2]) / 2 + gap:
        return False
    corners_a, corners_b = footprint(a, gap), footprint(b)
    for yaw in (a.yaw, b.yaw):
        for axis in ((np.cos(yaw), np.sin(yaw)), (-np.sin(yaw), np.cos(yaw))):
            along_a, along_b = corners_a @ axis, corners_b @ axis
            if along_a.max() <= along_b.min() or along_b.max() <= along_a.min():
                return False
    return True
