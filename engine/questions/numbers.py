"""Numbers of answers as text, and wrong ones beside them that are plausible and clear of the margin.

Every number is rounded to NEAR before anything is said, so that the text is the stored number at the precision said.
"""

from collections.abc import Callable
from typing import NamedTuple

NEAR = 4  # decimals that are stored
SMALLEST = 0.1  # metres: shorter lengths are not asked about, nor could four of them differ by whole centimetres
WRONG_RATIO = (1.3, 1.5)  # between neighbours of a row of numbers, one of which is right; > 1 + relations.ROUNDED
WRONG_DEGREES = (25.0, 40.0)  # between neighbours
WRONG_HOURS = ((2, 5, 8), (3, 6, 9), (4, 7, 10))  # added to the right hour

Random = Callable[[], float]  # uniform in [0, 1)
Number = float | list[float]


def length(metres: float) -> str:
    """Whole centimetres below a metre, else metres to the centimetre."""
    centimetres = round(metres * 100)
    return f"{centimetres} cm" if centimetres < 100 else f"{metres:.2f} m"


def degrees(angle: float) -> str:
    return "1 degree" if round(angle) == 1 else f"{round(angle)} degrees"


def to_side(angle: float) -> str:
    return f"{degrees(abs(angle))} to the {'right' if angle > 0 else 'left'}"


def level(sideways_ahead: list[float]) -> str:
    sideways, ahead = sideways_ahead
    return f"{length(abs(sideways))} to the {'right' if sideways > 0 else 'left'} and {length(ahead)} ahead"


def coordinates(xyz: list[float]) -> str:
    x, y, z = (round(value, 2) + 0.0 for value in xyz)  # no "-0.00"
    return f"({x:.2f}, {y:.2f}, {z:.2f}) m"


def hour(hours: float) -> str:
    return f"{(round(hours) - 1) % 12 + 1} o'clock"


def row(value: float, random: Random) -> list[float]:
    """Three wrong values: with the right one neighbours in a geometric row, in which its place is random."""
    ratio = WRONG_RATIO[0] + random() * (WRONG_RATIO[1] - WRONG_RATIO[0])
    place = int(random() * 4)
    return [value * ratio ** (k - place) for k in range(4) if k != place]


def steps(value: float, random: Random) -> list[float]:
    """As `row`, for angles from 0 to 180 degrees: evenly spaced."""
    step = WRONG_DEGREES[0] + random() * (WRONG_DEGREES[1] - WRONG_DEGREES[0])
    places = [p for p in range(4) if value - p * step >= 1 and value + (3 - p) * step <= 180]
    place = places[int(random() * len(places))]
    return [value + (k - place) * step for k in range(4) if k != place]


def sides(angle: float, random: Random) -> list[float]:
    """The other side, and a larger or smaller angle on both."""
    step = WRONG_DEGREES[0] + random() * (WRONG_DEGREES[1] - WRONG_DEGREES[0])
    size = abs(angle) - step if abs(angle) - step >= 5 and random() < 0.5 else abs(angle) + step
    return [-angle, size, -size]


def hours(value: float, random: Random) -> list[float]:
    return [(round(value) + more) % 12 for more in WRONG_HOURS[int(random() * 3)]]


def along_ray(xyz: list[float], random: Random) -> list[list[float]]:
    """The same direction at other distances."""
    return [[x * factor for x in xyz] for factor in row(1.0, random)]


def counts(value: float, random: Random) -> list[float]:
    return [float(n) for n in range(4) if n != value]


class Unit(NamedTuple):
    text: Callable[..., str]
    wrong: Callable[..., list]  # (value, random) -> three others
    symbol: str  # in the record


UNITS = {
    "m": Unit(length, row, "m"),
    "xyz": Unit(coordinates, along_ray, "m"),
    "level": Unit(level, along_ray, "m"),
    "side": Unit(to_side, sides, "degrees"),
    "deg": Unit(degrees, steps, "degrees"),
    "h": Unit(hour, hours, "h"),
    "times": Unit("{:.1f} times".format, row, ""),
    "count": Unit("{:.0f}".format, counts, ""),
}


def rounded(value: Number) -> Number:
    """No -0.0 either."""
    return [round(x, NEAR) + 0.0 for x in value] if isinstance(value, list) else round(value, NEAR) + 0.0
