"""Scores of N clips for K classes against which classes are there: average precision, how common classes fare, F1.

Where scores come from is not known here: a probe's logits, or a vote of neighbours.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

GROUPS = ("head", "mid", "tail")


class TaggingMetrics:
    """Collects a probe's logits; `result` is `tagging_scores` of all clips, with .5 of probability at logit 0."""

    def __init__(self, rates: Sequence[float]):  # [K], how often each class is there in training
        self.rates = rates
        self._logits: list[Tensor] = []
        self._present: list[Tensor] = []

    def update(self, outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> None:
        self._logits.append(outputs["logits"].detach().float().cpu())
        self._present.append(targets["present"].cpu())

    def result(self) -> dict[str, float]:
        if not self._logits:
            raise ValueError("tagging metrics need at least 1 clip, got none")
        return tagging_scores(torch.cat(self._logits), torch.cat(self._present), self.rates, cut=0.0)


def tagging_scores(
    scores: Tensor,  # [N, K], any scale
    present: Tensor,  # bool [N, K]
    rates: Sequence[float],  # [K], how often each class is there in training
    *,
    cut: float,  # a class counts as predicted from this score on
) -> dict[str, float]:
    """The published study's numbers, each a share of 1, of the classes that at least one of the clips has.

    mAP: mean of `average_precision` over these classes; mAP_chance: what random scores are expected to get.
    AP_head, AP_mid, AP_tail: the same mean over each of `frequency_groups`, NaN where none of its classes is there.
    MidRatio: AP_mid / mAP. OF1: F1 of all N * K answers at once. CF1: mean of each class's own F1 (elsewhere the name
    stands for the F1 of the mean precision and the mean recall). classes_scored of classes says how many classes the
    means are of.

    Raises ValueError if no class is there in any clip, for NaN scores, and for shapes that do not fit.
    """
    if scores.shape != present.shape or scores.ndim != 2 or scores.shape[1] != len(rates):
        wanted = f"[N, {len(rates)}] for {len(rates)} rates"
        raise ValueError(f"scores and present must be {wanted}, got {list(scores.shape)} and {list(present.shape)}")
    if scores.isnan().any():
        raise ValueError(
            f"scores must be numbers, got NaN for {int(scores.isnan().any(1).sum())} of {len(scores)} clips"
        )
    scored = present.any(0)
    if not scored.any():
        raise ValueError(f"none of the {len(rates)} classes is there in any of {len(scores)} clips: nothing to score")
    precision = average_precision(scores, present)
    groups = frequency_groups(rates)
    means = {f"AP_{name}": precision[groups[name]].nanmean().item() for name in GROUPS}
    overall = precision[scored].mean().item()
    hits, answers = _hits_and_answers(scores, present, cut)
    return {
        "mAP": overall,
        **means,
        "MidRatio": means["AP_mid"] / overall,
        "OF1": (2 * hits.sum() / answers.sum()).item(),
        "CF1": (2 * hits[scored] / answers[scored]).mean().item(),
        "mAP_chance": chance_precision(len(scores), present.sum(0)[scored]).mean().item(),
        "classes_scored": int(scored.sum()),
        "classes": len(rates),
    }


def average_precision(
    scores: Tensor,  # [N, K]
    present: Tensor,  # bool [N, K]
) -> Tensor:  # float64 [K]
    """Per class the sum over its positives of the precision at their score, each worth 1 / positives: no interpolation.

    Clips of equal score come in together, so their order does not matter (as in scikit-learn's
    `average_precision_score`; the study's takes them one by one). NaN for a class that no clip has.
    """
    order = scores.argsort(dim=0, descending=True)
    ranked, hit = scores.gather(0, order), present.gather(0, order).double()
    place = torch.arange(len(scores), device=scores.device)[:, None]
    precision = hit.cumsum(0) / (place + 1)
    last = torch.ones_like(present)
    last[:-1] = ranked[:-1] != ranked[1:]
    end = torch.where(last, place, len(scores)).flip(0).cummin(0).values.flip(0)  # last place with the same score
    return (precision.gather(0, end) * hit).sum(0) / hit.sum(0)


def chance_precision(
    clips: int,  # N
    positives: Tensor,  # int [K], 1 .. N
) -> Tensor:  # float64 [K]
    """Expected average precision of scores in random order, all different: above positives / N, most for few clips.

    With E[positive at i and at j] = p (p - 1) / (N (N - 1)), the sum over places i of (1 / i) (1 + (i - 1) (p - 1) /
    (N - 1)) / N.
    """
    harmonic = (1 / torch.arange(1, clips + 1).double()).sum()
    others = (positives.cpu().double() - 1) / max(clips - 1, 1)
    return (harmonic + others * (clips - harmonic)) / clips


def frequency_groups(rates: Sequence[float]) -> dict[str, Tensor]:  # [K] -> name: int64 classes
    """Classes from the most to the least common: the first K // 3 are head, the next K // 3 mid, the others tail.

    That is 6, 6 and 8 of 20 classes, and 66, 66 and 68 of 200. Head and mid get one each where K // 3 is 0. Equally
    common classes stay in their order.
    """
    order = torch.as_tensor(rates, dtype=torch.float64).argsort(descending=True, stable=True)
    third = max(1, len(rates) // 3)
    return dict(zip(GROUPS, (order[:third], order[third : 2 * third], order[2 * third :]), strict=True))


def _hits_and_answers(scores: Tensor, present: Tensor, cut: float) -> tuple[Tensor, Tensor]:  # float64 [K] each
    """True positives, and predictions plus positives: F1 is twice the first by the second."""
    predicted = scores >= cut
    return (predicted & present).sum(0).double(), (predicted.sum(0) + present.sum(0)).double()
