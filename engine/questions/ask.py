"""From the object tables of clips to their questions. Those of a clip depend on its table, the seed and the settings,
not on the clips it is asked about together with."""

import hashlib
from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from random import Random as Generator
from typing import Any, NamedTuple

import numpy as np

from spatialprobe.engine.lifting.objects import SHAPES, ObjectTable
from spatialprobe.engine.questions.describe import Named, noun
from spatialprobe.engine.questions.finding import Material
from spatialprobe.engine.questions.forms import FORMS, Composed, compose, shuffled
from spatialprobe.engine.questions.numbers import NEAR, Random
from spatialprobe.engine.questions.pool import Candidates
from spatialprobe.engine.questions.settings import Settings
from spatialprobe.engine.questions.types import NEEDS, QuestionType
from spatialprobe.engine.questions.views import seen_well, stack
from spatialprobe.engine.types import ClipError

MOST_VIEWS = 6  # of a clip that its questions are about
MOST_OBJECTS = 24  # of a clip that its questions are about, and all that are called the same
MOST_POINTS = 16  # of a view's sample points that are asked about
OBJECTS_STEP = 4  # clips are filled up to a multiple of so many objects, to be looked at together


class Question(NamedTuple):
    """A candidate and how it was put into words."""

    kind: QuestionType
    form: str
    said: Composed
    view: int  # index of the table's frames
    other: int | None  # of the second image
    things: list[int]  # objects, as positions in the table; or the view's sample points
    names: list[str]
    value: Any  # the numbers behind the answer, rounded
    outcome: int


class Asked(NamedTuple):
    table: ObjectTable  # that `things` are positions in: of the objects that were looked at
    questions: list[Question]
    wanted: list[int]  # by level; a clip that has too few candidates of a level has fewer questions


class Chosen(NamedTuple):
    """What of a clip its questions are about, and the generator that goes on drawing."""

    table: ObjectTable
    views: np.ndarray  # int64 [r]
    others: np.ndarray  # int64 [r]
    random: Random


def ask(table: ObjectTable, settings: Settings) -> Asked:
    """The questions about a clip. Raises ClipError if no view sees an object well."""
    return next(ask_together([choose(table, settings)], settings))


def choose(table: ObjectTable, settings: Settings) -> Chosen:
    """The views and objects to ask about. Raises ClipError if no view sees an object well."""
    digest = hashlib.sha256(f"{settings.seed} {table.clip}".encode()).digest()
    random = Generator(int.from_bytes(digest[:16], "big")).random
    if not len(table.tags):
        raise ClipError("there are no objects")
    good = np.flatnonzero(seen_well(table).any(0)).tolist()
    if not good:
        raise ClipError(f"none of its {len(table.tags)} objects is seen well in any of {len(table.frames)} views")
    views = np.array(sorted(shuffled(good, random)[:MOST_VIEWS]))
    last = len(table.frames) - 1
    others = np.array([(view + 1 + int(random() * last)) % (last + 1) for view in views.tolist()])
    return Chosen(of_interest(table, views, random), views, others, random)


def of_interest(table: ObjectTable, views: np.ndarray, random: Random) -> ObjectTable:
    """The table of MOST_OBJECTS of its objects, and those they might be mistaken for."""
    if len(table.tags) <= MOST_OBJECTS:
        return table
    seen = np.flatnonzero(seen_well(table)[:, views].any(1)).tolist()
    nouns = [noun(tag) for tag in table.tags]
    alike = {nouns[i] for i in shuffled(seen, random)[:MOST_OBJECTS]}
    visible = (table.pixels[:, views] > 0).any(1)
    keep = [i for i, word in enumerate(nouns) if word in alike and visible[i]]
    arrays = {name: x[keep] for name, x in table.arrays().items() if SHAPES[name][1].startswith("N")}
    return replace(table, tags=tuple(table.tags[i] for i in keep), **arrays)


def together(chosen: Chosen) -> tuple:
    """Clips that are equal in this can be looked at together."""
    table = chosen.table
    objects = -(-len(table.tags) // OBJECTS_STEP) * OBJECTS_STEP
    return objects, min(table.sample_ids.shape[1], MOST_POINTS), *(has(table) for has in NEEDS.values())


def ask_together(clips: Sequence[Chosen], settings: Settings) -> Iterator[Asked]:
    """The questions of clips that `together` says are alike, in their order."""
    objects, points, *_ = together(clips[0])
    tables = [clip.table for clip in clips]
    views = stack(tables, [clip.views for clip in clips], [clip.others for clip in clips], objects)
    material = Material(
        views,
        points=np.concatenate([clip.table.sample_points[clip.views, :points] for clip in clips]),
        axes=np.concatenate([clip.table.poses[clip.views, :3, :3] for clip in clips]),
    )
    named = Named(views, [table.tags for table in tables])
    kinds = [
        [kind for kind in settings.types_of(level) if kind.fits(tables[0])] if share else []
        for level, share in enumerate(settings.levels)
    ]
    candidates = {k.name: Candidates(k, material, named) for of_level in kinds for k in of_level}
    row = 0
    for c, clip in enumerate(clips):
        wanted = level_counts(settings, clip.random)
        yield Asked(clip.table, ask_clip(settings, clip, c, row, wanted, kinds, candidates, named), wanted)
        row += len(clip.views)


def ask_clip(
    settings: Settings,
    clip: Chosen,
    c: int,  # which of the clips that are looked at together
    first: int,  # its first row of the views
    wanted: Sequence[int],
    kinds: Sequence[Sequence[QuestionType]],  # by level
    candidates: dict[str, Candidates],
    named: Named,
) -> list[Question]:
    """For each level types in equal parts, of those that the clip has candidates of; truths in equal parts."""
    random, questions, truths = clip.random, [], []
    borders = list(accumulate(settings.forms[:-1]))
    views, others, pixels = clip.views.tolist(), clip.others.tolist(), clip.table.sample_pixels
    for level, count in enumerate(wanted):
        usable, pools = list(kinds[level]), {}
        while count and usable:
            at = int(random() * len(usable))
            kind = usable[at]
            pool = pools.get(kind.name) or pools.setdefault(kind.name, candidates[kind.name].of_clip(c))
            candidate = pool.draw(random)
            if candidate is None:
                usable.pop(at)
                continue
            row, things, value, outcome = candidate
            view, other = views[row - first], others[row - first]
            if kind.points:
                names = ["the point at ({}, {})".format(*pixels[view, i].tolist()) for i in things]
            else:
                names = named.names(kind.leak, row, things)
            form, truth = FORMS[bisect(borders, random())], True
            if form == "truth":
                truths = truths or ([True, False] if random() < 0.5 else [False, True])
                truth = truths.pop()
            said = compose(kind, form, names, value, outcome, truth, clip.table.size, random)
            other = other if "other" in kind.needs else 0 if "first" in kind.needs else None
            questions.append(Question(kind, form, said, view, other, things, names, value, outcome))
            count -= 1
    return questions


def level_counts(settings: Settings, random: Random) -> list[int]:
    """How many questions of each level: whole numbers whose expectation is exactly the share asked for."""
    start, total, counts = random(), 0.0, []
    for share in settings.levels:
        before, total = total, total + share * settings.per_clip
        counts.append(int(round(total, NEAR) + start) - int(round(before, NEAR) + start))
    return counts
