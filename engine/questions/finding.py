"""What clips can be asked about points, one object and two: the candidates of each type of question, and the numbers.

Candidates are arrays, found for all views of several clips at once. It knows no words.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import combinations, permutations
from math import comb, perm
from typing import NamedTuple

import numpy as np

from spatialprobe.engine.questions import relations
from spatialprobe.engine.questions.relations import BY_NAME, difference, nearer, top
from spatialprobe.engine.questions.views import Views

MOST_TUPLES = 160  # of several objects or points that are looked at in a view
THIRD = 0.03  # of the image's width between an object's middle and the border of a third of the image
BESIDE = 5.0  # degrees from straight ahead, below which no side is named


class Found(NamedTuple):
    """M candidates."""

    row: np.ndarray  # int64 [M] of the views
    things: np.ndarray  # int64 [M, k] objects, or points; of a type that picks one, that one first
    value: np.ndarray  # [M] or [M, d] the numbers of the answer
    outcome: np.ndarray  # int64 [M] which of the type's words is right, or another class that shall come equally often


@dataclass(frozen=True, eq=False)
class Material:
    """The views, their sample points, and what several types of question need of them, computed once."""

    views: Views
    points: np.ndarray  # [R, K, 3] sample points of each view, in the lifted frame
    axes: np.ndarray  # [R, 3, 3] columns: each camera's x, y and z

    def relation(self, name: str) -> np.ndarray:
        """Values of a relation, as Relation.values."""
        if name not in self.known:
            self.known[name] = BY_NAME[name].values(self.views)
        return self.known[name]

    @cached_property
    def known(self) -> dict[str, np.ndarray]:
        return {}

    @cached_property
    def flat(self) -> np.ndarray:  # bool [R, N] objects whose centre is known as seen from above
        return self.views.seen & self.views.complete[..., 0] & self.views.complete[..., 1]

    @cached_property
    def triples(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Triples of objects [T, 3], whether all are known as seen from above [R, T], their centres [R, T, 3, 2]."""
        things = tuples(self.views.seen.shape[1], 3)
        return things, self.flat[:, things].all(2), self.views.centre[:, things, :2]

    @cached_property
    def to_points(self) -> np.ndarray:  # [R, K, 3] from the camera's centre
        return self.points - self.views.here.eye[:, None]

    @cached_property
    def ranges(self) -> np.ndarray:  # [R, K] from the camera's centre to the points
        return np.sqrt(sum(self.to_points[..., axis] ** 2 for axis in range(3)))


@lru_cache(maxsize=256)
def tuples(n: int, k: int) -> np.ndarray:  # int64 [T, k]
    """Ordered choices of k of n things: all, or a fixed sample of them."""
    if perm(n, k) <= MOST_TUPLES:
        return np.array(list(permutations(range(n), k)), np.int64).reshape(-1, k)
    rng = np.random.default_rng([n, k])
    return np.unique(rng.random((MOST_TUPLES, n)).argsort(1)[:, :k], axis=0)


@lru_cache(maxsize=256)
def sets(n: int, k: int) -> np.ndarray:  # int64 [T, k]
    """Choices of k of n things in rising order: all, or a fixed sample of them."""
    if comb(n, k) <= MOST_TUPLES:
        return np.array(list(combinations(range(n), k)), np.int64).reshape(-1, k)
    return np.unique(np.sort(tuples(n, k), axis=1), axis=0)


def at(ok: np.ndarray, things: np.ndarray, value: np.ndarray, outcome: np.ndarray | None = None) -> Found:
    """Candidates where ok [R, T] holds, of things [T, k], value [R, T] or [R, T, d] and outcome [R, T]."""
    row, column = np.nonzero(ok)
    said = np.zeros_like(row) if outcome is None else outcome[row, column]
    return Found(row, things[column], value[row, column], said)


def joined(*parts: Found) -> Found:
    return Found(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


# Any relation


def words_of_pair(name: str) -> Callable[[Material], Found]:
    """Outcome 0 where the relation holds, 1 where its opposite does."""

    def find(m: Material) -> Found:
        found = number_of_pair(name)(m)
        return found._replace(outcome=(found.value < 0).astype(np.int64))

    return find


def number_of_one(name: str) -> Callable[[Material], Found]:
    def find(m: Material) -> Found:
        value = m.relation(name)
        return each(np.isfinite(value), value)

    return find


def number_of_pair(name: str) -> Callable[[Material], Found]:
    def find(m: Material) -> Found:
        value = m.relation(name)
        row, i, j = np.nonzero(np.isfinite(value))
        return Found(row, np.stack([i, j], 1), value[row, i, j], np.zeros_like(row))

    return find


def pick(order: np.ndarray, value: np.ndarray, count: int) -> Found:
    """One of `count` things that is before (outcome 0) or after (1) all others by order [R, N, N]; value [R, N]."""
    if count == 2:
        row, i, j = np.nonzero(order > 0)
        things = np.stack([i, j], 1)
        first = Found(row, things, value[row[:, None], things], np.zeros_like(row))
        return joined(first, Found(row, things[:, ::-1], first.value[:, ::-1], np.ones_like(row)))
    things = tuples(order.shape[1], count)
    against = order[:, things[:, :1], things[:, 1:]]  # [R, T, count - 1]
    first, last = (against > 0).all(2), (against < 0).all(2)
    return at(first | last, things, value[:, things], last.astype(np.int64))


def picked_by(name: str, value: Callable[[Views], np.ndarray], count: int) -> Callable[[Material], Found]:
    return lambda m: pick(m.relation(name), value(m.views), count)


# Points


def point_numbers(m: Material) -> Found:
    return each(m.ranges > 0, m.ranges)


def point_position(m: Material) -> Found:
    """In the camera's frame."""
    x, y, z = (m.to_points[..., axis, None] for axis in range(3))
    rows = m.axes[:, None]  # [R, 1, 3, 3]
    return each(m.ranges > 0, x * rows[..., 0, :] + y * rows[..., 1, :] + z * rows[..., 2, :])


def point_heights(m: Material) -> Found:
    return each(m.points[..., 2] > 0, m.points[..., 2])


def nearest_point(count: int) -> Callable[[Material], Found]:
    return lambda m: pick(nearer(m.ranges), m.ranges, count)


def higher_point(m: Material) -> Found:
    height = m.points[..., 2]
    return pick(relations.decided(-difference(height), relations.FARTHER * relations.larger(m.ranges)), height, 2)


def points_apart(m: Material) -> Found:
    pairs = tuples(m.ranges.shape[1], 2)
    a, b = m.points[:, pairs[:, 0]], m.points[:, pairs[:, 1]]
    gap = np.sqrt(sum((a[..., axis] - b[..., axis]) ** 2 for axis in range(3)))
    return at(gap >= relations.APART * m.ranges[:, pairs].max(2), pairs, gap)


# One object


def each(ok: np.ndarray, value: np.ndarray, outcome: np.ndarray | None = None) -> Found:
    return at(ok, np.arange(ok.shape[1])[:, None], value, outcome)


def position(m: Material) -> Found:
    """To the right of the camera and ahead of it, both level."""
    here = m.views.here
    value = np.stack([here.along[:, 2], here.along[:, 3]], 2)
    clear = (np.abs(value[..., 0]) >= relations.APART * here.far) & (value[..., 1] > 0)
    return each(m.flat & clear, value)


def bearing(m: Material) -> Found:
    """Degrees to the right of where the camera looks, seen from above."""
    angle = np.degrees(np.arctan2(m.views.here.along[:, 2], m.views.here.along[:, 3]))
    return each(m.flat & (np.abs(angle) >= BESIDE), angle)


def image_third(m: Material) -> Found:
    box = m.views.box
    share = ((box[..., 0] + box[..., 2]) / 2 + 0.5) / m.views.width[:, None]
    clear = np.minimum(np.abs(share - 1 / 3), np.abs(share - 2 / 3)) >= THIRD
    return each(m.views.seen & clear, share, np.nan_to_num(np.clip(share * 3, 0, 2)).astype(np.int64))


def top_height(m: Material) -> Found:
    return each(m.views.seen & m.views.complete[..., 2], top(m.views))


def taller_than_long(m: Material) -> Found:
    height, length = m.views.extent[..., 2], m.views.extent[..., 0]
    ratio = relations.logarithm(height) - relations.logarithm(length)
    ok = m.views.seen & m.views.complete.all(2) & (np.abs(ratio) >= np.log1p(relations.LARGER))
    return each(ok, np.stack([height, length], 2), (ratio < 0).astype(np.int64))


# Two


def height_ratio(m: Material) -> Found:
    row, i, j = np.nonzero(m.relation("taller") > 0)
    height = m.views.extent[..., 2]
    return Found(row, np.stack([i, j], 1), height[row, i] / height[row, j], np.zeros_like(row))


def words_in_world(name: str) -> Callable[[Material], Found]:
    """As `words_of_pair`, of views other than the first, whose direction the words are about."""

    def find(m: Material) -> Found:
        found = words_of_pair(name)(m)
        return Found(*(x[m.views.views[found.row] != 0] for x in found))

    return find
