"""Procedural surfaces for demo scenes: colours and patterns that do not shimmer when the camera moves.

A pattern is a function of (u, v) in periods, an offset [2, N] in metres that makes equal finishes differ, and `span`,
the periods that one pixel covers. It is 0 .. 1 and fades to its mean where its period nears two pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Colour = tuple[float, float, float]  # red, green, blue in 0 .. 1


def square(x: np.ndarray, span: np.ndarray) -> np.ndarray:
    """A square wave of period 1 and values -1 .. 1 with edges about `span` wide."""
    edge = np.clip(np.sin(2 * np.pi * x) / np.maximum(2 * np.pi * span, 0.05), -1, 1)
    return edge * np.clip(2 - 4 * span, 0, 1)


def line(x: np.ndarray, width: float, span: np.ndarray) -> np.ndarray:
    """1 on lines `width` wide at every whole x, and 0 between them."""
    span = np.maximum(span, 0.01)
    away = np.abs((x + 0.5) % 1 - 0.5)
    return np.clip((width / 2 - away) / span + 0.5, 0, 1) * np.minimum(1, width / span) * np.clip(2 - 2 * span, 0, 1)


def waves(x: np.ndarray, y: np.ndarray, span: np.ndarray) -> np.ndarray:
    """Smooth noise, -1 .. 1: five plane waves of periods from 1 down to 0.4."""
    total = np.zeros_like(x)
    for angle, frequency, phase in (
        (0.3, 1.0, 0.1),
        (1.5, 1.2, 2.0),
        (2.6, 1.5, 4.1),
        (0.9, 1.9, 1.3),
        (2.1, 2.5, 5.2),
    ):
        along = np.cos(angle) * x + np.sin(angle) * y
        total += np.sin(2 * np.pi * frequency * along + phase) * np.clip(2 - 4 * frequency * span, 0, 1)
    return total / 5


def plain(u: np.ndarray, v: np.ndarray, offset: np.ndarray, span: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * waves(u + offset[0], v + offset[1], span)


def checker(u: np.ndarray, v: np.ndarray, offset: np.ndarray, span: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * square(u + offset[0], span) * square(v + offset[1], span)


def stripes(u: np.ndarray, v: np.ndarray, offset: np.ndarray, span: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * square(u + offset[0], span)


def noise(u: np.ndarray, v: np.ndarray, offset: np.ndarray, span: np.ndarray) -> np.ndarray:
    return (
        0.5 + 0.35 * waves(u + offset[0], v + offset[1], span) + 0.3 * waves(2.7 * u, 2.7 * v + offset[0], 2.7 * span)
    )


def wood(u: np.ndarray, v: np.ndarray, offset: np.ndarray, span: np.ndarray) -> np.ndarray:
    """Grain along u: waves that wander slowly across it."""
    bend = 0.5 * waves(0.11 * u + offset[0], 0.3 * v + offset[1], 0.1 * span)
    fine = np.sin(2 * np.pi * (v + 2 * bend + offset[1])) * np.clip(2 - 4 * span, 0, 1)
    return 0.5 + 0.32 * fine + 0.3 * bend


def planks(u: np.ndarray, v: np.ndarray, offset: np.ndarray, span: np.ndarray) -> np.ndarray:
    """Boards one period wide and eight long, each of its own brightness, with dark joints."""
    row = np.floor(v)
    along = u / 8 + 0.37 * (row % 5)
    board = np.sin(12.9898 * np.floor(along) + 78.233 * row) * 0.5 + 0.5
    joint = np.maximum(line(v, 0.05, span), line(along, 0.006, span / 8))
    grain = wood(3 * u, 3 * v, offset + board, 3 * span) - 0.5
    return np.clip(0.55 * board + 0.3 * grain + joint, 0, 1)


def tiles(u: np.ndarray, v: np.ndarray, offset: np.ndarray, span: np.ndarray) -> np.ndarray:
    """Square tiles, each of its own brightness, with darker joints."""
    tile = np.sin(12.9898 * np.floor(u) + 78.233 * np.floor(v)) * 0.5 + 0.5
    return np.clip(0.35 * tile + np.maximum(line(u, 0.035, span), line(v, 0.035, span)), 0, 1)


def landscape(u: np.ndarray, v: np.ndarray, offset: np.ndarray, span: np.ndarray) -> np.ndarray:
    """Sky above hills, for windows and pictures."""
    x = u + offset[0]
    far, near = 0.13 * np.sin(4 * x) + 0.05 * np.sin(9 * x + 1), 0.08 * np.sin(3 * x + 2) - 0.22
    edge = np.maximum(span, 0.02)
    return 0.55 * np.clip((far - v) / edge + 0.5, 0, 1) + 0.45 * np.clip((near - v) / edge + 0.5, 0, 1)


PATTERNS: dict[str, Callable[..., np.ndarray]] = {
    pattern.__name__: pattern for pattern in (plain, checker, stripes, noise, wood, planks, tiles, landscape)
}


@dataclass(frozen=True)
class Finish:
    """How a surface looks. The pattern blends from the first colour to the second."""

    pattern: str  # key of PATTERNS
    colours: tuple[Colour, Colour]
    period: float = 0.1  # metres
    offset: tuple[float, float] = (0.0, 0.0)  # metres, so that equal finishes do not look alike
    glow: float = 0.0  # 0 is lit by the lamp only, 1 shows its full colour whatever the light

    def __post_init__(self):
        if self.pattern not in PATTERNS:
            raise ValueError(f"pattern must be one of {', '.join(PATTERNS)}, got {self.pattern!r}")
        if self.period <= 0:
            raise ValueError(f"period must be positive metres, got {self.period}")


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """`a` moved towards `b` by `share` of the way."""
    return tuple(x + (y - x) * share for x, y in zip(a, b, strict=True))
