"""Every type of question, in one table: its level, what its answer is made of, what it needs, and its margin.

The words are in phrasing.py and phrasing_steps.py, by the same names.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from spatialprobe.engine.lifting.objects import ObjectTable
from spatialprobe.engine.questions import finding, steps
from spatialprobe.engine.questions.finding import Found, Material
from spatialprobe.engine.questions.relations import (
    BEYOND,
    FARTHER,
    HIGHER,
    ON_FACE,
    ROUNDED,
    SIZE,
    TIMES,
    VALUE,
    VOLUME,
    Margin,
    side,
    top,
    volume,
)

LEVELS = ("pixels", "one object", "two objects", "several steps")  # what a question is about, by its level
Kind = Literal["words", "pick", "number", "vector", "order"]

# What a type may need, word by word -> whether a table has it
NEEDS: dict[str, Callable[[ObjectTable], bool]] = {
    "metric": lambda table: table.metric,
    "upright": lambda table: table.upright,
    "floor": lambda table: table.floor is not None,
    "other": lambda table: len(table.frames) > 1,  # shows another view too, as the second image
    "first": lambda table: len(table.frames) > 1,  # shows the clip's first view too, as the second image
}


@dataclass(frozen=True, eq=False)
class QuestionType:
    name: str
    level: int  # of LEVELS
    kind: Kind  # of the answer: one of some words, one of the things, a number, several numbers, the things in order
    needs: str  # words of NEEDS
    margin: Margin
    find: Callable[[Material], Found]
    words: tuple[tuple[str, str], ...] = ()  # by outcome: the short answer, and what stands in a sentence
    unit: str = ""  # of numbers: a key of numbers.UNITS
    leak: str = ""  # one of describe.ATTRIBUTES, which would give the answer away
    paired: bool = False  # asked only of clips in which every outcome is found
    points: bool = False  # about points, not objects

    def fits(self, table: ObjectTable) -> bool:
        return all(NEEDS[word](table) for word in self.needs.split())


def both(*words: str) -> tuple[tuple[str, str], ...]:
    return tuple((word, word) for word in words)


SIDES = (("to the left", "to the left of"), ("to the right", "to the right of"))
LEFT_RIGHT = both("left", "right")
YES_NO = lambda yes, no: (("yes", yes), ("no", no))  # noqa: E731
CLOSER, CLOSEST = both("closer to", "farther from"), both("closest to", "farthest from")
BETWEEN = Margin(steps.OFF_LINE - steps.ON_LINE, "of the distance between the outer two, sideways")
DEGREES = Margin(steps.TURNED, "degrees from straight ahead and behind")
T, number, pair, picked = QuestionType, finding.number_of_one, finding.number_of_pair, finding.picked_by
nearest, LONG, WIDE, TALL = (lambda views: views.nearest), side(0), side(1), side(2)

TYPES = (
    # name, level, kind, needs, margin, find
    T("nearer_point", 0, "pick", "", TIMES, finding.nearest_point(2), CLOSER, points=True),
    T("nearest_point", 0, "pick", "", TIMES, finding.nearest_point(3), CLOSEST, points=True),
    T("higher_point", 0, "pick", "upright", Margin(FARTHER, "of the distance to the farther one"),
      finding.higher_point, both("higher", "lower"), points=True),
    T("point_distance", 0, "number", "metric", VALUE, finding.point_numbers, unit="m", points=True),
    T("point_position", 0, "vector", "metric", VALUE, finding.point_position, unit="xyz", points=True),
    T("points_apart", 0, "number", "metric", VALUE, finding.points_apart, unit="m", points=True),
    T("point_height", 0, "number", "metric upright floor", VALUE, finding.point_heights, unit="m", points=True),
    T("distance_from_camera", 1, "number", "metric", VALUE, number("distance_from_camera"), unit="m"),
    T("height", 1, "number", "metric upright", VALUE, number("height"), unit="m"),
    T("width", 1, "number", "metric upright", VALUE, number("width"), unit="m"),
    T("length", 1, "number", "metric upright", VALUE, number("length"), unit="m"),
    T("top_height", 1, "number", "metric upright floor", VALUE, finding.top_height, unit="m"),
    T("position", 1, "vector", "metric upright", VALUE, finding.position, unit="level"),
    T("bearing", 1, "number", "upright", Margin(finding.BESIDE, "degrees from straight ahead"), finding.bearing,
      unit="side"),
    T("image_third", 1, "words", "", Margin(finding.THIRD, "of the image's width"), finding.image_third,
      both("left", "middle", "right"), leak="side"),
    T("taller_than_long", 1, "words", "upright", SIZE, finding.taller_than_long,
      YES_NO("taller than", "not as tall as"), leak="height", paired=True),
    T("left_right", 2, "words", "", BEYOND, finding.words_of_pair("left_of"), SIDES, leak="side"),
    T("above_below", 2, "words", "upright", BEYOND, finding.words_of_pair("above"), both("above", "below")),
    T("front_behind", 2, "words", "", BEYOND, finding.words_of_pair("in_front_of"),
      (("in front", "in front of"), ("behind", "behind")), leak="distance"),
    T("north_south", 2, "words", "upright first", BEYOND, finding.words_in_world("north_of"),
      (("north", "north of"), ("south", "south of"))),
    T("east_west", 2, "words", "upright first", BEYOND, finding.words_in_world("east_of"),
      (("east", "east of"), ("west", "west of"))),
    T("nearer", 2, "pick", "", TIMES, picked("nearer", nearest, 2), CLOSER, leak="distance"),
    T("reaches_higher", 2, "pick", "upright", HIGHER,
      picked("reaches_higher", top, 2), both("higher", "lower"), leak="height"),
    T("taller", 2, "pick", "upright", SIZE, picked("taller", TALL, 2), both("taller", "shorter"), leak="height"),
    T("wider", 2, "pick", "upright", SIZE, picked("wider", WIDE, 2), both("wider", "narrower"), leak="height"),
    T("longer", 2, "pick", "upright", SIZE, picked("longer", LONG, 2), both("greater", "smaller"), leak="height"),
    T("bigger", 2, "pick", "upright", VOLUME, picked("bigger", volume, 2), both("bigger", "smaller"),
      leak="height"),
    T("distance", 2, "number", "metric", VALUE, pair("distance"), unit="m"),
    T("horizontal_distance", 2, "number", "metric upright", VALUE, pair("horizontal_distance"), unit="m"),
    T("vertical_distance", 2, "number", "metric upright", VALUE, pair("vertical_distance"), unit="m"),
    T("clock", 2, "number", "upright", ON_FACE, pair("clock"), unit="h", leak="side"),
    T("height_ratio", 2, "number", "upright", Margin(ROUNDED, "of the value"), finding.height_ratio, unit="times",
      leak="height"),
    T("left_right_there", 3, "words", "other", BEYOND, steps.left_right_there, SIDES, leak="side"),
    T("nearer_there", 3, "pick", "other", TIMES, steps.nearer_there, CLOSER, leak="distance"),
    T("camera_moved", 3, "number", "metric other", VALUE, steps.camera_moved, unit="m"),
    T("camera_turned", 3, "words", "upright other", Margin(steps.CAMERA_TURNED, "degrees"), steps.camera_turned,
      LEFT_RIGHT),
    T("count_nearer", 3, "number", "", TIMES, steps.count("nearer", nearest), unit="count", leak="distance"),
    T("count_taller", 3, "number", "upright", SIZE, steps.count("taller", TALL), unit="count", leak="height"),
    T("count_within", 3, "number", "metric", TIMES, steps.count_within, unit="count"),
    T("nearest_to", 3, "pick", "", TIMES, steps.nearest_to, CLOSEST),
    T("tallest_of", 3, "pick", "upright", SIZE, picked("taller", TALL, 3), both("tallest", "shortest"), leak="height"),
    T("biggest_of", 3, "pick", "upright", VOLUME, picked("bigger", volume, 3),
      both("biggest", "smallest"), leak="height"),
    T("in_order", 3, "order", "", TIMES, steps.in_order, leak="distance"),
    T("between", 3, "words", "upright", BETWEEN, steps.between, YES_NO("between", "not between"), paired=True),
    T("equilateral", 3, "words", "upright", Margin(steps.UNLIKE - steps.ALIKE, "of the shortest side"),
      steps.equilateral, YES_NO("form", "do not form"), paired=True),
    T("fits_between", 3, "words", "upright", Margin(steps.FITS, "of the smaller"), steps.fits_between,
      YES_NO("would fit", "would not fit"), paired=True),
    T("facing_side", 3, "words", "upright", DEGREES, steps.facing_side, LEFT_RIGHT),
    T("facing_turn", 3, "number", "upright", DEGREES, steps.facing_turn, unit="deg"),
    T("facing_clock", 3, "number", "upright", ON_FACE, steps.facing_clock, unit="h"),
    T("path_length", 3, "number", "metric upright", VALUE, steps.path_length, unit="m"),
)  # fmt: skip
BY_TYPE = {kind.name: kind for kind in TYPES}
