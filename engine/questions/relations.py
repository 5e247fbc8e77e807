"""What can be said of one object or of two, each as one vectorised measurement: one table for questions and probes.

It knows no words. All margins are relative, so that what is not in metres is decided as well. Horizontal sides: the
length of an object is the longer horizontal side of its upright box, the width the shorter. Distances between two
objects are between the centres of their boxes, the distance from the camera is to the nearest point seen. The world's
frame is the lifted one: its north is where the clip's first view looks, seen from above, its east the right of that.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from spatialprobe.engine.questions.views import Viewpoint, Views

APART = 0.05  # of the distance to the farther one, which centres must lie apart beyond half the larger object
SIDEWAYS = 0.05  # of the distance ahead, which the directions of left and right must differ by: 3 degrees
FARTHER = 0.1  # of the smaller distance
LARGER = 0.15  # of the smaller size
BIGGER = 0.5  # of the smaller volume
HOUR = 0.1  # hours from the half hour at which a clock direction would be rounded to the other side
ROUNDED = 0.25  # of the value: a number given as wrong is at least so far from the right one
LEVEL = 0.1  # of the larger height: centres closer in height are level, and not asked about


class Margin(NamedTuple):
    """Below it a qualitative answer is undecided; numbers given as wrong answers differ by at least as much."""

    value: float
    of: str


@dataclass(frozen=True)
class Relation:
    """A property of one object, or a relation of object i to object j."""

    name: str
    level: int  # 1 one object, 2 two, 3 several steps
    kind: Literal["qualitative", "quantitative"]
    arity: Literal[1, 2]
    metric: bool  # whether it needs metres
    upright: bool  # whether it needs a known "up"
    complete: str  # axes of a box that must have been seen whole: letters of "xyz"
    unit: str  # of a quantity: "m", or "h" of a clock's face (12 is ahead of the camera; it wraps round); else ""
    margin: Margin
    of: Callable[[Views], np.ndarray]  # [R, N] or [R, N, N], NaN where undecided; does not look at what is seen

    def values(self, views: Views) -> np.ndarray:  # float64 [R, N] or [R, N, N]
        """For each view; qualitative: > 0 means yes. NaN: not to be asked (not well seen, not complete, undecided)."""
        usable = views.seen
        if (self.metric and not views.metric) or (self.upright and not views.upright):
            return np.full(usable.shape + usable.shape[1:] * (self.arity - 1), np.nan)
        if self.complete:
            usable = usable & views.complete[..., ["xyz".index(axis) for axis in self.complete]].all(2)
        if self.arity == 2:
            usable = usable[:, :, None] & usable[:, None, :] & ~np.eye(usable.shape[1], dtype=bool)
        return np.where(usable, self.of(views), np.nan)


def difference(x: np.ndarray) -> np.ndarray:  # [..., N] -> [..., N, N], what j has more than i
    return x[..., None, :] - x[..., :, None]


def larger(x: np.ndarray) -> np.ndarray:  # [..., N] -> [..., N, N]
    return np.maximum(x[..., None, :], x[..., :, None])


def decided(value: np.ndarray, bar: np.ndarray | float) -> np.ndarray:
    return np.where(np.abs(value) >= bar, value, np.nan)


def agreeing(first: np.ndarray, *others: np.ndarray) -> np.ndarray:
    """`first` where all have its sign, else NaN."""
    same = np.ones(first.shape, bool)
    for other in others:
        same &= first * other > 0
    return np.where(same, first, np.nan)


def before(of: Viewpoint, direction: int) -> np.ndarray:  # [R, N, N]
    """How much earlier i comes along a direction: each centre lies beyond the other's side, and APART."""
    bar = larger(of.reach[:, direction]) + APART * larger(of.far)
    return decided(difference(of.along[:, direction]), bar)


def left_of(of: Viewpoint) -> np.ndarray:
    """Left in the image, left with the horizon made level, and at another angle: a rolled camera leaves no doubt."""
    return agreeing(before(of, 2), before(of, 0), decided(difference(of.slope), SIDEWAYS))


def in_front_of(of: Viewpoint) -> np.ndarray:
    return agreeing(before(of, 3), before(of, 1))


def above(views: Views) -> np.ndarray:
    """The centre of the upper lies above the top of the lower, whose own centre lies below the bottom of the upper."""
    bar = larger(views.extent[..., 2] / 2) + APART * larger(views.here.far)
    return decided(-difference(views.centre[..., 2]), bar)


def along_world(axis: int) -> Callable[[Views], np.ndarray]:
    def value(views: Views) -> np.ndarray:
        reach = np.abs(views.half[..., 0, axis]) + np.abs(views.half[..., 1, axis])
        return decided(-difference(views.centre[..., axis]), larger(reach) + APART * larger(views.here.far))

    return value


def logarithm(x: np.ndarray) -> np.ndarray:
    """Of lengths that may be 0; NaN stays."""
    return np.log(np.maximum(x, 1e-12))


def nearer(distance: np.ndarray) -> np.ndarray:  # [..., N] -> [..., N, N], as a logarithm of the ratio
    return decided(difference(logarithm(distance)), np.log1p(FARTHER))


def top(views: Views) -> np.ndarray:  # [R, N]
    return views.centre[..., 2] + views.extent[..., 2] / 2


def reaches_higher(views: Views) -> np.ndarray:
    return decided(-difference(top(views)), APART * larger(views.here.far))


def side(axis: int) -> Callable[[Views], np.ndarray]:
    return lambda views: views.extent[..., axis]


def volume(views: Views) -> np.ndarray:  # [R, N]
    return views.extent[..., 0] * views.extent[..., 1] * views.extent[..., 2]


def larger_by(size: Callable[[Views], np.ndarray], share: float) -> Callable[[Views], np.ndarray]:
    return lambda views: decided(-difference(logarithm(size(views))), np.log1p(share))


def centres_apart(views: Views) -> np.ndarray:
    return np.sqrt(sum(difference(views.centre[..., axis]) ** 2 for axis in range(3)))


def horizontally_apart(views: Views) -> np.ndarray:
    return np.hypot(difference(views.centre[..., 0]), difference(views.centre[..., 1]))


def vertical_distance(views: Views) -> np.ndarray:
    return decided(np.abs(difference(views.centre[..., 2])), LEVEL * larger(views.extent[..., 2]))


def clock(views: Views) -> np.ndarray:
    """The hour at which j lies from i: 12 is the way the camera looks, 3 to its right, seen from above."""
    right, ahead = difference(views.here.along[:, 2]), difference(views.here.along[:, 3])
    hours = np.arctan2(right, ahead) * (6 / np.pi) % 12
    clear = (np.hypot(right, ahead) >= larger(views.extent[..., 0]) / 2) & (abs(hours % 1 - 0.5) >= HOUR)
    return np.where(clear, hours, np.nan)


BEYOND = Margin(APART, "of the distance to the farther one, beyond half the larger extent")
HIGHER = Margin(APART, "of the distance to the farther one")
SIZE = Margin(LARGER, "of the smaller")
VOLUME = Margin(BIGGER, "of the smaller volume")
TIMES = Margin(FARTHER, "of the smaller")
VALUE = Margin(ROUNDED, "of the value")
ON_FACE = Margin(HOUR, "h from the half hour")

RELATIONS = (
    # name, level, kind, arity, metric, upright, complete, unit, margin, of
    Relation("distance_from_camera", 1, "quantitative", 1, True, False, "", "m", VALUE, lambda v: v.nearest),
    Relation("height", 1, "quantitative", 1, True, True, "z", "m", VALUE, side(2)),
    Relation("width", 1, "quantitative", 1, True, True, "y", "m", VALUE, side(1)),
    Relation("length", 1, "quantitative", 1, True, True, "xy", "m", VALUE, side(0)),
    Relation("left_of", 2, "qualitative", 2, False, False, "xy", "", BEYOND, lambda v: left_of(v.here)),
    Relation("above", 2, "qualitative", 2, False, True, "z", "", BEYOND, above),
    Relation("in_front_of", 2, "qualitative", 2, False, False, "xy", "", BEYOND, lambda v: in_front_of(v.here)),
    Relation("north_of", 2, "qualitative", 2, False, True, "xy", "", BEYOND, along_world(1)),
    Relation("east_of", 2, "qualitative", 2, False, True, "xy", "", BEYOND, along_world(0)),
    Relation("nearer", 2, "qualitative", 2, False, False, "", "", TIMES, lambda v: nearer(v.nearest)),
    Relation("reaches_higher", 2, "qualitative", 2, False, True, "z", "", HIGHER, reaches_higher),
    Relation("taller", 2, "qualitative", 2, False, True, "z", "", SIZE, larger_by(side(2), LARGER)),
    Relation("wider", 2, "qualitative", 2, False, True, "y", "", SIZE, larger_by(side(1), LARGER)),
    Relation("longer", 2, "qualitative", 2, False, True, "xy", "", SIZE, larger_by(side(0), LARGER)),
    Relation("bigger", 2, "qualitative", 2, False, True, "xyz", "", VOLUME, larger_by(volume, BIGGER)),
    Relation("distance", 2, "quantitative", 2, True, False, "xyz", "m", VALUE, centres_apart),
    Relation("horizontal_distance", 2, "quantitative", 2, True, True, "xy", "m", VALUE, horizontally_apart),
    Relation("vertical_distance", 2, "quantitative", 2, True, True, "z", "m", VALUE, vertical_distance),
    Relation("clock", 2, "quantitative", 2, False, True, "xy", "h", ON_FACE, clock),
    Relation("left_of_from_last", 3, "qualitative", 2, False, False, "xy", "", BEYOND, lambda v: left_of(v.there)),
    Relation("nearer_from_last", 3, "qualitative", 2, False, False, "xyz", "", TIMES, lambda v: nearer(v.there.far)),
)  # fmt: skip
BY_NAME = {relation.name: relation for relation in RELATIONS}
