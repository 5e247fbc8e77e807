"""Which frames of a clip a probe sees, and in which order clips come: the published protocol's rule, from named seeds.

Nothing here depends on threads, ranks, or which other clips there are.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from spatialprobe.engine.types import parse_query


@dataclass(frozen=True)
class FrameSampling:
    """S views of a window: frame 0, then frames at random distances, each lowered to the query frame at or below it.

    View i is drawn at i * gap + the i-th smallest of S - 1 numbers, uniform over 0 .. slack, where slack is what the
    gaps leave of the context. The defaults are the published study's: of 81 frames the first 76, lowered to 1 + 4k.
    A clip shorter than the context uses all its frames.
    """

    context: int = 76  # frames from the start of the window, of which views are drawn
    gap: int = 5  # frames between two draws, at least
    query: str = "0,1:76:4"  # frames that a view may be, as `FrameSelection.query`; each must have features

    def __post_init__(self):
        if self.context < 1 or self.gap < 1:
            raise ValueError(f"context and gap must be at least 1 frame, got {self.context} and {self.gap}")
        self.candidates(self.context)

    def candidates(self, frames: int) -> tuple[int, ...]:
        """The frames that a view of a clip of `frames` frames may be, ascending.

        Raises ValueError if 0 is not one of them, or if they lie so far apart that two draws could meet in one.
        """
        return _candidates(self.query, min(self.context, frames), self.gap)

    def sample(self, views: int, frames: int, rng: np.random.Generator) -> list[int]:
        """`views` distinct frames, ascending, of a window of `frames`. Raises ValueError if so many do not fit."""
        context, allowed = min(self.context, frames), np.array(self.candidates(frames))
        slack = context - 1 - (views - 1) * self.gap
        if views < 1 or slack < 0:
            most = (context - 1) // self.gap + 1
            raise ValueError(f"{context} frames hold 1 .. {most} views {self.gap} frames apart, got {views} views")
        extra = np.sort(rng.integers(0, slack + 1, views - 1))
        drawn = np.concatenate([[0], np.arange(1, views) * self.gap + extra])
        return allowed[np.searchsorted(allowed, drawn, side="right") - 1].tolist()


@cache
def _candidates(query: str, context: int, gap: int) -> tuple[int, ...]:
    frames = parse_query(query, context)
    apart = np.diff([*frames, context])
    if frames[0] != 0 or apart.max() > gap:
        raise ValueError(
            f"query must begin at frame 0 and name one of any {gap} frames in a row of the first {context} "
            f"(gap {gap}, context {context}), got {query!r}: {list(frames)}"
        )
    return frames


STUDY = FrameSampling()


def generator(*names: object) -> np.random.Generator:
    """Random numbers that depend on these names alone, such as (seed, epoch, clip id)."""
    return np.random.default_rng(np.frombuffer(_digest(names), "<u4"))


def shuffled(ids: Sequence[str], seed: int, epoch: int) -> list[str]:
    """`ids` in the epoch's order. Whether one clip comes before another does not depend on the rest of the list."""
    return sorted(ids, key=lambda clip_id: _digest((seed, epoch, clip_id)))


def _digest(names: Sequence[object]) -> bytes:
    return hashlib.sha256("|".join(map(str, names)).encode()).digest()
