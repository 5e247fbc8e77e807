"""What is true of a demo scene, worked out from its description alone: boxes, parts, poses, intrinsics.

Rays, boxes and angles are computed here anew, in the scene's own world; nothing is taken from the lifted frame, from
the renderer, or from the code that asks. Questions are read as the JSON that users get.
"""

import re
from functools import cache
from itertools import combinations

import numpy as np

from spatialprobe.engine.demo.scenes import Scene

UP = np.array([0, 0, 1.0])


class SceneTruth:
    def __init__(self, scene: Scene):
        self.scene, self.things = scene, {thing.id: thing for thing in scene.objects}
        self.cast = cache(self.cast)

    # -- rays

    def rays(self, frame: int) -> np.ndarray:  # [H, W, 3] world directions, camera z = 1
        k, pose = self.scene.intrinsic, self.scene.poses[frame]
        v, u = np.mgrid[: self.scene.height, : self.scene.width].astype(float)
        local = np.stack([(u - k[0, 2]) / k[0, 0], (v - k[1, 2]) / k[1, 1], np.ones_like(u)], -1)
        return local @ pose[:3, :3].T

    def cast(self, frame: int) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """Ray parameters [H, W] where each ray leaves the room, and where it enters each object (inf: never)."""
        rays, eye = self.rays(frame), self.scene.poses[frame][:3, 3]
        low, high = -np.array(self.scene.room) / 2 * (1, 1, 0), np.array(self.scene.room) / (2, 2, 1)
        with np.errstate(divide="ignore"):
            leave = np.where(rays > 0, (high - eye) / rays, (low - eye) / rays).min(-1)
        enter = {}
        for thing in self.scene.objects:
            nearest = np.full(leave.shape, np.inf)
            for part in thing.parts:
                turn = rotation(part.yaw)  # part's axes as columns
                origin, along = (eye - part.centre) @ turn, rays @ turn
                with np.errstate(divide="ignore"):
                    a, b = ((sign * np.array(part.size) / 2 - origin) / along for sign in (-1, 1))
                first, last = np.minimum(a, b).max(-1), np.maximum(a, b).min(-1)
                nearest = np.minimum(nearest, np.where((first <= last) & (first > 0), first, np.inf))
            enter[thing.id] = nearest
        return leave, enter

    def visible(self, frame: int, thing: int) -> np.ndarray:  # bool [H, W]
        leave, enter = self.cast(frame)
        others = [t for i, t in enter.items() if i != thing]
        return (enter[thing] < leave) & (enter[thing] < np.min(others, axis=0, initial=np.inf))

    def whole(self, frame: int, thing: int) -> float:
        """Share of the pixels an object would cover alone that show it; 0 if it touches the border of the image."""
        alone = np.isfinite(self.cast(frame)[1][thing])
        if alone[[0, -1]].any() or alone[:, [0, -1]].any() or not alone.any():
            return 0.0
        return float(self.visible(frame, thing).sum() / alone.sum())

    def point(self, frame: int, u: int, v: int) -> np.ndarray:  # [3] world
        leave, enter = self.cast(frame)
        t = min(leave[v, u], *(e[v, u] for e in enter.values()))
        return self.eye(frame) + t * self.rays(frame)[v, u]

    def nearest(self, frame: int, thing: int) -> float:
        seen = self.visible(frame, thing)
        return float((self.cast(frame)[1][thing] * np.linalg.norm(self.rays(frame), axis=-1))[seen].min())

    def middle(self, frame: int, thing: int) -> float:
        """Of an object in the image, from 0 at the left border to 1 at the right."""
        columns = np.flatnonzero(self.visible(frame, thing).any(0))
        return ((columns[0] + columns[-1]) / 2 + 0.5) / self.scene.width

    # -- boxes and directions

    def eye(self, frame: int) -> np.ndarray:
        return self.scene.poses[frame][:3, 3]

    def centre(self, thing: int) -> np.ndarray:
        return np.array(self.things[thing].centre)

    def sides(self, thing: int) -> tuple[float, float, float]:
        """Length, width, height."""
        x, y, z = self.things[thing].size
        return max(x, y), min(x, y), z

    def top(self, thing: int) -> float:
        return self.centre(thing)[2] + self.sides(thing)[2] / 2

    def volume(self, thing: int) -> float:
        return float(np.prod(self.things[thing].size))

    def ahead(self, frame: int) -> np.ndarray:
        forward = self.scene.poses[frame][:3, 2] * (1, 1, 0)
        return forward / np.linalg.norm(forward)

    def corners(self, thing: int) -> np.ndarray:  # [4, 2] seen from above
        x, y, _ = self.things[thing].size
        return (
            np.array([[-x, -y], [x, -y], [x, y], [-x, y]]) / 2 @ rotation(self.things[thing].yaw)[:2, :2].T
            + (self.centre(thing)[:2])
        )

    def gap(self, a: int, b: int) -> float:
        """Between two footprints, by their edges."""
        return min(
            segment_distance(p[i], p[i - 1], q) for p, other in ((self.corners(a), b), (self.corners(b), a))
            for i in range(4) for q in self.corners(other)
        )  # fmt: skip

    def turn(self, at: np.ndarray, ahead: np.ndarray, to: np.ndarray) -> float:
        """Degrees to the right from looking along `ahead` to looking at `to`, for someone at `at`."""
        right = np.cross(ahead, UP)
        offset = to - at
        return float(np.degrees(np.arctan2(offset @ right / np.linalg.norm(ahead[:2]), offset @ ahead /
                                           np.linalg.norm(ahead[:2]))))  # fmt: skip

    # -- answers

    def answer(self, q: dict) -> object:
        """The right answer of a record: a short word, a name, a number or several, or names in order."""
        return getattr(self, f"answer_{q['type']}")(q, q["frames"][0], [o["id"] for o in q.get("objects", ())])

    def extreme(self, q: dict, values: list[float], largest: bool) -> str:
        names = [o["name"] for o in q["objects"]] if "objects" in q else [
            f"the point at ({u}, {v})" for u, v in q["points"]
        ]  # fmt: skip
        agree(q, values)
        return names[int(np.argmax(values) if largest else np.argmin(values))]

    def points(self, q: dict, frame: int) -> list[np.ndarray]:
        return [self.point(frame, u, v) for u, v in q["points"]]

    def answer_nearer_point(self, q, frame, ids):
        ranges = [np.linalg.norm(p - self.eye(frame)) for p in self.points(q, frame)]
        return self.extreme(q, ranges, q["word"].startswith("farth"))

    answer_nearest_point = answer_nearer_point

    def answer_higher_point(self, q, frame, ids):
        return self.extreme(q, [p[2] for p in self.points(q, frame)], q["word"] == "higher")

    def answer_point_distance(self, q, frame, ids):
        return float(np.linalg.norm(self.points(q, frame)[0] - self.eye(frame)))

    def answer_point_position(self, q, frame, ids):
        return (self.points(q, frame)[0] - self.eye(frame)) @ self.scene.poses[frame][:3, :3]

    def answer_points_apart(self, q, frame, ids):
        a, b = self.points(q, frame)
        return float(np.linalg.norm(a - b))

    def answer_point_height(self, q, frame, ids):
        return float(self.points(q, frame)[0][2])

    def answer_distance_from_camera(self, q, frame, ids):
        return self.nearest(frame, ids[0])

    def answer_length(self, q, frame, ids):
        return self.sides(ids[0])[0]

    def answer_width(self, q, frame, ids):
        return self.sides(ids[0])[1]

    def answer_height(self, q, frame, ids):
        return self.sides(ids[0])[2]

    def answer_top_height(self, q, frame, ids):
        return self.top(ids[0])

    def answer_position(self, q, frame, ids):
        offset, ahead = self.centre(ids[0]) - self.eye(frame), self.ahead(frame)
        return np.array([offset @ np.cross(ahead, UP), offset @ ahead])

    def answer_bearing(self, q, frame, ids):
        return self.turn(self.eye(frame), self.ahead(frame), self.centre(ids[0]))

    def answer_image_third(self, q, frame, ids):
        return ("left", "middle", "right")[int(self.middle(frame, ids[0]) * 3)]

    def answer_taller_than_long(self, q, frame, ids):
        length, _, height = self.sides(ids[0])
        agree(q, [height, length])
        return "yes" if height > length else "no"

    def answer_left_right(self, q, frame, ids):
        bearings = [self.turn(self.eye(frame), self.ahead(frame), self.centre(i)) for i in ids]
        return "to the left" if bearings[0] < bearings[1] else "to the right"

    def answer_left_right_there(self, q, frame, ids):
        return self.answer_left_right(q, q["frames"][1], ids)

    def answer_above_below(self, q, frame, ids):
        return "above" if self.centre(ids[0])[2] > self.centre(ids[1])[2] else "below"

    def answer_front_behind(self, q, frame, ids):
        depth = [(self.centre(i) - self.eye(frame)) @ self.ahead(frame) for i in ids]
        return "in front" if depth[0] < depth[1] else "behind"

    def answer_north_south(self, q, frame, ids):
        offset = self.centre(ids[0]) - self.centre(ids[1])
        return "north" if offset @ self.ahead(q["frames"][1]) > 0 else "south"

    def answer_east_west(self, q, frame, ids):
        offset = self.centre(ids[0]) - self.centre(ids[1])
        return "east" if offset @ np.cross(self.ahead(q["frames"][1]), UP) > 0 else "west"

    def answer_nearer(self, q, frame, ids):
        return self.extreme(q, [self.nearest(frame, i) for i in ids], q["word"] == "farther from")

    def answer_nearer_there(self, q, frame, ids):
        far = [np.linalg.norm(self.centre(i) - self.eye(q["frames"][1])) for i in ids]
        return self.extreme(q, far, q["word"] == "farther from")

    def answer_reaches_higher(self, q, frame, ids):
        return self.extreme(q, [self.top(i) for i in ids], q["word"] == "higher")

    def answer_taller(self, q, frame, ids):
        return self.extreme(q, [self.sides(i)[2] for i in ids], q["word"] in ("taller", "tallest"))

    answer_tallest_of = answer_taller

    def answer_wider(self, q, frame, ids):
        return self.extreme(q, [self.sides(i)[1] for i in ids], q["word"] == "wider")

    def answer_longer(self, q, frame, ids):
        return self.extreme(q, [self.sides(i)[0] for i in ids], q["word"] == "greater")

    def answer_bigger(self, q, frame, ids):
        return self.extreme(q, [self.volume(i) for i in ids], q["word"] in ("bigger", "biggest"))

    answer_biggest_of = answer_bigger

    def answer_distance(self, q, frame, ids):
        return float(np.linalg.norm(self.centre(ids[0]) - self.centre(ids[1])))

    def answer_horizontal_distance(self, q, frame, ids):
        return float(np.linalg.norm((self.centre(ids[0]) - self.centre(ids[1]))[:2]))

    def answer_vertical_distance(self, q, frame, ids):
        return float(abs(self.centre(ids[0])[2] - self.centre(ids[1])[2]))

    def answer_clock(self, q, frame, ids):
        return self.turn(self.centre(ids[0]), self.ahead(frame), self.centre(ids[1])) / 30 % 12

    def answer_height_ratio(self, q, frame, ids):
        return self.sides(ids[0])[2] / self.sides(ids[1])[2]

    def answer_camera_moved(self, q, frame, ids):
        return float(np.linalg.norm(self.eye(frame) - self.eye(q["frames"][1])))

    def answer_camera_turned(self, q, frame, ids):
        angle = self.turn(np.zeros(3), self.ahead(frame), self.ahead(q["frames"][1]))
        return "right" if angle > 0 else "left"

    def answer_count_nearer(self, q, frame, ids):
        return sum(self.nearest(frame, i) < self.nearest(frame, ids[3]) for i in ids[:3])

    def answer_count_taller(self, q, frame, ids):
        return sum(self.sides(i)[2] > self.sides(ids[3])[2] for i in ids[:3])

    def answer_count_within(self, q, frame, ids):
        radius = max(metres(text) for text in re.findall(r"[\d.]+ c?m\b", q["question"]))
        return sum(np.linalg.norm(self.centre(i) - self.centre(ids[3])) < radius for i in ids[:3])

    def answer_nearest_to(self, q, frame, ids):
        far = [np.linalg.norm(self.centre(i) - self.centre(ids[3])) for i in ids[:3]]
        return self.extreme(q, far, q["word"] == "farthest from")

    def answer_in_order(self, q, frame, ids):
        names = {o["id"]: o["name"] for o in q["objects"]}
        return ", then ".join(names[i] for i in sorted(ids, key=lambda i: self.nearest(frame, i)))

    def answer_between(self, q, frame, ids):
        a, b, c = (self.centre(i)[:2] for i in ids)
        way = np.linalg.norm(a - b) + np.linalg.norm(a - c)  # by the detour, which is small between them
        return "yes" if way < 1.15 * np.linalg.norm(b - c) else "no"

    def answer_equilateral(self, q, frame, ids):
        sides = [np.linalg.norm((self.centre(i) - self.centre(j))[:2]) for i, j in combinations(ids, 2)]
        agree(q | {"value": sorted(q["value"])}, sorted(sides))
        return "yes" if max(sides) <= 1.15 * min(sides) + 1e-9 else "no"

    def answer_fits_between(self, q, frame, ids):
        width, gap = self.sides(ids[0])[1], self.gap(ids[1], ids[2])
        agree(q, [width, gap])
        return "yes" if gap > width else "no"

    def facing(self, ids: list[int]) -> float:
        a, b, c = (self.centre(i) for i in ids)
        return self.turn(a, (b - a) * (1, 1, 0), c)

    def answer_facing_side(self, q, frame, ids):
        return "right" if self.facing(ids) > 0 else "left"

    def answer_facing_turn(self, q, frame, ids):
        return abs(self.facing(ids))

    def answer_facing_clock(self, q, frame, ids):
        return self.facing(ids) / 30 % 12

    def answer_path_length(self, q, frame, ids):
        a, b, c = (self.centre(i)[:2] for i in ids)
        return float(np.linalg.norm(a - b) + np.linalg.norm(b - c))


def agree(q: dict, numbers: list[float]) -> None:
    """The record's numbers behind an answer in words."""
    assert np.allclose(q["value"], numbers, rtol=1e-3, atol=2e-3), (q, numbers)


def rotation(yaw: float) -> np.ndarray:
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def segment_distance(a: np.ndarray, b: np.ndarray, p: np.ndarray) -> float:
    share = np.clip((p - a) @ (b - a) / ((b - a) @ (b - a)), 0, 1)
    return float(np.linalg.norm(a + share * (b - a) - p))


def metres(text: str) -> float:
    """Of "45 cm" or "1.20 m"."""
    number, unit = text.split()
    return float(number) / {"cm": 100, "m": 1}[unit]
