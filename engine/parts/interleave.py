"""Windows that are too long for a model, dealt out to two halves of every second frame. Pure geometry.

Frame 0 begins both halves, odd frames go to the first and even ones to the second: of 97 frames, 0, 1, 3, ..., 95 and
0, 2, 4, ..., 96. A model encodes and runs each half on its own; the rows of the second follow those of the first, as in
the published dumps. Frames past the end of the window repeat its last one.
"""

from collections.abc import Callable

HALVES = 2


def longest(length: int) -> int:
    """Frames of a window that fills both halves of `length` frames."""
    return 1 + HALVES * (length - 1)


def half_of(frame: int) -> int:
    """The half whose row stands for a frame of the window; frame 0, which is in both, counts as the first's."""
    return (frame - 1) % HALVES if frame else 0


def half_frames(half: int, length: int, window: int) -> list[int]:
    """The frames of the window that a half of `length` frames shows, in order."""
    return [min(frame, window - 1) for frame in (0, *range(1 + half, longest(length), HALVES))]


def halves_for(query: tuple[int, ...]) -> tuple[int, ...]:
    """The halves that see these frames: another need not run."""
    return tuple(sorted({half_of(frame) for frame in query}))


def interleaved_rows(
    window: int,
    halves: tuple[int, ...],  # those that run
    rows: int,  # T of one half
    row_of: Callable[[int], int],  # place in a half -> row of that half
) -> tuple[int, ...]:  # [F]
    """Row of both halves' 2T that stands for each frame of the window; -1 for those of a half that does not run."""
    places = [0 if f == 0 else 1 + (f - 1) // HALVES for f in range(window)]
    return tuple(rows * half_of(f) + row_of(place) if half_of(f) in halves else -1 for f, place in enumerate(places))
