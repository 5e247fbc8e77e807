"""How well relations between objects are answered: balanced accuracy of yes and no, how far off lengths and hours are.

Which features the answers came from is not known here. R relations, K answers.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import pi
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Kind = Literal["yes_or_no", "length", "hour"]

RANGES = {"within_50_200": (1 / 2, 2.0), "within_67_150": (2 / 3, 3 / 2), "within_90_110": (0.9, 1.1)}  # of the truth
WITHIN = 0.25  # of the truth, either way
RADIANS = pi / 6  # of an hour


@dataclass(frozen=True)
class Asked:
    """What a relation's answers are scored as."""

    name: str
    level: int
    kind: Kind


class RelationMetrics:
    """Collects scores; `result` is `relation_scores` of all answers."""

    def __init__(self, relations: Sequence[Asked]):
        self.relations = tuple(relations)
        self._found: list[tuple[Tensor, Tensor, Tensor]] = []

    def update(self, outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> None:
        scores, asked = chosen_scores(outputs, targets)
        found = (targets["relation"][asked], scores.detach().float(), targets["answer"][asked])
        self._found.append(tuple(x.cpu() for x in found))

    def result(self) -> dict[str, float]:
        if not self._found:
            raise ValueError("relation metrics need at least 1 clip, got none")
        return relation_scores(self.relations, *(torch.cat(x) for x in zip(*self._found, strict=True)))


def chosen_scores(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Of every row that asks something its relation's scores [K, 2], and which rows these are, bool [B, S, P]."""
    asked = targets["relation"] >= 0
    relation = targets["relation"][asked]
    return outputs["scores"][asked][torch.arange(len(relation), device=relation.device), relation], asked


def relation_scores(
    relations: Sequence[Asked],  # [R]
    relation: Tensor,  # int64 [K], which one each answer is of
    scores: Tensor,  # float32 [K, 2], see SCORED
    truth: Tensor,  # float32 [K], 1 or 0, a length, or hours
) -> dict[str, float]:
    """Numbers of SCORED per relation ("<number>/<relation>"), their means over a level ("<number>/level<k>") and all.

    A relation is scored if its answers are lengths or hours, or both yes and no; relations_scored of relations says
    how many are, `answers` of how many rows. A mean over no relation is NaN, and a level without any has no entry.
    """
    per_relation: dict[str, dict[int, float]] = {name: {} for names, _ in SCORED.values() for name in names}
    for index, asked in enumerate(relations):
        of_it, (names, score) = relation == index, SCORED[asked.kind]
        if not of_it.any() or (found := score(scores[of_it].double(), truth[of_it].double())) is None:
            continue
        for name, value in zip(names, found, strict=True):
            per_relation[name][index] = value
    out: dict[str, float] = {}
    for name, values in per_relation.items():
        out[name] = _mean(values.values())
        for level in sorted({relations[index].level for index in values}):
            out[f"{name}/level{level}"] = _mean(x for index, x in values.items() if relations[index].level == level)
        out |= {f"{name}/{relations[index].name}": x for index, x in values.items()}
    scored = {index for values in per_relation.values() for index in values}
    return out | {"relations_scored": len(scored), "relations": len(relations), "answers": len(relation)}


def yes_or_no_scores(scores: Tensor, truth: Tensor) -> tuple[float, ...] | None:
    """Mean of the shares of yes and of no that are found, yes from logit 0 on; None where only one of them is true."""
    yes, said = truth > 0.5, scores[:, 0] >= 0
    if not yes.any() or yes.all():
        return None
    return ((said[yes].double().mean() + (~said[~yes]).double().mean()).item() / 2,)


def length_scores(scores: Tensor, truth: Tensor) -> tuple[float, ...]:
    """Shares whose ratio to the truth is in each of RANGES, and that are off by at most WITHIN; median relative error.

    SpatialVLM (arXiv 2401.12168) counts by the first three, SpatialRGPT (arXiv 2406.01584) by the fourth.
    """
    ratio = scores[:, 0].exp() / truth
    off = (ratio - 1).abs()
    counted = [(ratio >= low) & (ratio <= high) for low, high in RANGES.values()] + [off <= WITHIN]
    return *(hit.double().mean().item() for hit in counted), float(np.median(off.numpy()))


def hour_scores(scores: Tensor, truth: Tensor) -> tuple[float, ...]:
    """Shares whose hour on the clock's face is the right one, and that are at most one hour off, around the face."""
    hours = torch.atan2(scores[:, 0], scores[:, 1]) / RADIANS
    apart = (hours - truth).remainder(12)
    off = torch.minimum(apart, 12 - apart)
    same = (hours.round() - truth.round()).remainder(12) == 0
    return same.double().mean().item(), (off <= 1).double().mean().item()


SCORED = {  # kind -> its numbers, and what makes them; of the two scores a row has
    "yes_or_no": (("balanced_accuracy",), yes_or_no_scores),  # the first is the logit of yes
    "length": ((*RANGES, "within_25", "median_relative_error"), length_scores),  # the first is the length's logarithm
    "hour": (("same_hour", "within_one_hour"), hour_scores),  # sine and cosine of the hour's angle, of any length
}


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else float("nan")
