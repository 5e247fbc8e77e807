"""The candidates of one type, drawn for each clip without repetition and with every outcome as often as any other."""

from typing import Any

import numpy as np

from spatialprobe.engine.questions.describe import Named
from spatialprobe.engine.questions.finding import Material
from spatialprobe.engine.questions.forms import shuffled
from spatialprobe.engine.questions.numbers import SMALLEST, Random, rounded
from spatialprobe.engine.questions.types import QuestionType

Candidate = tuple[int, list[int], Any, int]  # row of the views, things, value, outcome


class Candidates:
    """Of a type, in all clips that are looked at together."""

    def __init__(self, kind: QuestionType, material: Material, named: Named):
        self.kind, self.found = kind, kind.find(material)
        found, keep = self.found, None
        if not kind.points and kind.leak in named.lacking:
            keep = named.known[kind.leak][found.row[:, None], found.things].all(1)
        if kind.unit == "m":
            large = found.value >= SMALLEST
            keep = large if keep is None else keep & large
        rows = np.arange(len(found.row)) if keep is None else np.flatnonzero(keep)
        clips = int(material.views.clip[-1]) + 1
        self.outcomes = max(len(kind.words), int(found.outcome.max(initial=0)) + 1)
        group = material.views.clip[found.row[rows]] * self.outcomes + found.outcome[rows]
        self.rows = rows[np.argsort(group.astype(np.int16), kind="stable")]  # by clip, then by outcome
        self.starts = [0, *np.cumsum(np.bincount(group, minlength=clips * self.outcomes)).tolist()]

    def of_clip(self, clip: int) -> "Pool":
        first = clip * self.outcomes
        ranges = [(self.starts[g], self.starts[g + 1]) for g in range(first, first + self.outcomes)]
        return Pool(self, [r for r in ranges if r[0] < r[1] or self.kind.paired])


class Pool:
    """Of a type, in one clip."""

    def __init__(self, candidates: Candidates, ranges: list[tuple[int, int]]):
        self.of, self.ranges = candidates, ranges  # of the candidates of each outcome
        self.left = min((stop - start for start, stop in ranges), default=0)  # rounds that have every outcome once
        self.round: list[int] = []  # outcomes to come
        self.used: set[int] = set()

    def draw(self, random: Random) -> Candidate | None:
        """Another candidate, or None: the candidates of some outcome are used up."""
        if not self.round:
            if not self.left:
                return None
            self.left -= 1
            self.round = shuffled(range(len(self.ranges)), random)
        start, stop = self.ranges[self.round.pop()]
        place = start + int(random() * (stop - start))
        while place in self.used:
            place = start + int(random() * (stop - start))
        self.used.add(place)
        i, found = self.of.rows.item(place), self.of.found
        return found.row.item(i), found.things[i].tolist(), rounded(found.value[i].tolist()), found.outcome.item(i)
