"""How near predicted points, depth and cameras of a clip come to the true ones, whatever predicts them.

Points and depth are scored where the truth is valid; what "most confident" means is the truth's confidence. Cameras are
scored by the pairs of a clip's views.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from spatialprobe.probes.geometry import compose, decode_extrinsic, inverse, line_angle, rotation_angle, umeyama

Auc = Literal["pair", "batch"]

CONFIDENT = 0.75  # quantile of a clip's confidence from which pixels count as the most confident quarter
RATIOS = (1.25, 1.25**2, 1.25**3)  # of predicted and true depth
ANGLES = (5, 15, 30)  # degrees below which a pair counts as right
AUC_DEGREES = (30, 10, 5, 3)
PUBLISHED_BIN = 30 / 31  # degrees: 31 bins over 0 .. 30, of which the published code sums the first 30
SHORTEST = 1e-5  # of a clip's mean point distance: a baseline below has no direction, float32 makes up this much


class GeometryMetrics:
    """Collects clips; all computing is in float64. Clips with nothing to score count for nothing.

    The most confident quarter: pixels with a confidence of at least the .75 quantile of the clip's valid pixels, ties
    included (equal confidence everywhere: all of them). What is scored, each a mean over clips:
    - point_error: `point_error`, in units of the first view's mean point distance;
    - AbsRel, delta_1.25, delta_1.25^2, delta_1.25^3: `depth_scores` on that quarter.
    Over pairs of views:
    - RRA@5, @15, @30 and RTA@...: share with a relative rotation (translation) off by less than so many degrees;
    - AUC@30, @10, @5, @3: `area_under_curve` of the larger of both angles.

    `auc="pair"`: relative poses are E_j E_i^-1. Pairs without a true baseline have no translation to predict: RTA
    leaves them out, and their AUC is that of the rotation. `auc="batch"` is the published code's arithmetic, for
    comparison with its tables: poses E_i^-1 E_j of the world-to-camera matrices (the same angles only for pairs with
    the first view), bins of 30/31 degrees, translation off by 90 degrees without a true baseline. Its mean over batches
    weighs them by their clips, which is the mean over all pairs, since all clips have equally many views.

    A prediction that is not finite where it is scored: error infinite, share 0; a pair's angles then are wrong.
    """

    def __init__(self, auc: Auc = "pair"):
        if auc not in get_args(Auc):
            raise ValueError(f"auc must be one of {', '.join(get_args(Auc))}, got {auc!r}")
        self.auc = auc
        self._clips: list[list[float]] = []  # point error, AbsRel, share within each of RATIOS
        self._rotation: list[Tensor] = []  # float64 [P], degrees
        self._translation: list[Tensor] = []  # NaN where there is none to predict

    def update(self, outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> None:
        """A batch: "points" [B, S, h, w, 3], "depth" [B, S, h, w] and "poses" [B, S, refinements, 9] of a head;
        "points", "depth", "confidence", "valid" and "extrinsic" of `geometry_targets`."""
        for i, valid in enumerate(targets["valid"]):
            if valid.any():
                confidence = targets["confidence"][i][valid].double()
                chosen = most_confident(confidence)
                points = [side["points"][i][valid].double() for side in (outputs, targets)]
                depth = [side["depth"][i][valid][chosen].double() for side in (outputs, targets)]
                self._clips.append([point_error(*points, confidence, chosen), *depth_scores(*depth)])
        predicted = decode_extrinsic(outputs["poses"][:, :, -1].double())
        rotation, translation = pair_errors(predicted, targets["extrinsic"].double(), self.auc)
        self._rotation.append(rotation.flatten().cpu())
        self._translation.append(translation.flatten().cpu())

    def result(self) -> dict[str, float]:
        """The numbers above, NaN where no clip or pair has any; clips_scored and pairs_scored say of how many."""
        if not self._rotation:
            raise ValueError("geometry metrics need at least 1 clip, got none")
        names = ("point_error", "AbsRel", "delta_1.25", "delta_1.25^2", "delta_1.25^3")
        clips = torch.tensor(self._clips, dtype=torch.float64).view(-1, len(names))
        rotation, translation = torch.cat(self._rotation), torch.cat(self._translation)
        there = ~translation.isnan()
        error = torch.where(there, rotation.maximum(translation), rotation)
        width = PUBLISHED_BIN if self.auc == "batch" else 1.0
        return {
            **dict(zip(names, clips.mean(0).tolist(), strict=True)),
            **{f"RRA@{a}": _share(rotation < a) for a in ANGLES},
            **{f"RTA@{a}": _share(translation[there] < a) for a in ANGLES},
            **{f"AUC@{a}": area_under_curve(error, a, width) for a in AUC_DEGREES},
            "clips_scored": len(clips),
            "pairs_scored": len(error),
        }


# -- points and depth -------------------------------------------------------------------------------------------------


def most_confident(confidence: Tensor) -> Tensor:  # [N] -> bool [N]
    """At least the .75 quantile, interpolated as numpy's percentile does."""
    above = math.ceil(CONFIDENT * (len(confidence) - 1))  # of equal use: pixels are at it or below the quantile
    return confidence >= confidence.kthvalue(above + 1).values


def point_error(
    predicted: Tensor,  # [N, 3]
    truth: Tensor,  # [N, 3]
    confidence: Tensor,  # [N], more than 0
    chosen: Tensor,  # bool [N], at least one
) -> float:
    """Mean distance weighted by confidence, after the similarity transform that fits the `chosen` points best."""
    if not predicted.isfinite().all():
        return math.inf
    aligned = umeyama(predicted[chosen], truth[chosen]).apply(predicted)
    return ((aligned - truth).norm(dim=1) * confidence).sum().div(confidence.sum()).item()


def depth_scores(
    predicted: Tensor,  # [N], 0 or more
    truth: Tensor,  # [N], more than 0
) -> list[float]:
    """Mean of |p - t| / t, and the shares with max(p / t, t / p) below 1.25, its square and its cube.

    p is scaled first so that the medians (the lower one of two) agree. Raises ValueError without pixels.
    """
    if not len(predicted):
        raise ValueError("depth scores need at least 1 pixel, got none")
    if not predicted.isfinite().all():
        return [math.inf] + [0.0] * len(RATIOS)
    p = predicted.clamp(min=torch.finfo(torch.float32).tiny)  # exp of a large negative number is 0
    p = p * (truth.median() / p.median())
    ratio = torch.maximum(p / truth, truth / p)
    return [((p - truth).abs() / truth).mean().item(), *(_share(ratio < r) for r in RATIOS)]


# -- pairs of cameras -------------------------------------------------------------------------------------------------


def pair_errors(
    predicted: Tensor,  # [B, S, 3, 4]
    truth: Tensor,  # [B, S, 3, 4]
    auc: Auc = "pair",
) -> tuple[Tensor, Tensor]:  # [B, S (S - 1) / 2] each
    """Degrees by which relative rotation (0 .. 180) and direction of translation up to sign (0 .. 90) are off.

    Pairs in the order of itertools.combinations. See `GeometryMetrics` for `auc`; with "pair", translation is NaN where
    the true baseline is shorter than 1e-5, in units of the first view's mean point distance. A prediction without a
    baseline is off by 90, one that is not finite by 180 and 90.
    """
    i, j = torch.triu_indices(truth.shape[1], truth.shape[1], offset=1, device=truth.device)
    if auc == "batch":
        guess, true = (compose(inverse(x[:, i]), x[:, j]) for x in (predicted, truth))
    else:
        guess, true = (compose(x[:, j], inverse(x[:, i])) for x in (predicted, truth))
    rotation = rotation_angle(guess[..., :3], true[..., :3]).nan_to_num(nan=180.0)
    translation = line_angle(guess[..., 3], true[..., 3]).nan_to_num(nan=90.0)
    if auc == "pair":
        translation = torch.where(true[..., 3].norm(dim=-1) < SHORTEST, math.nan, translation)
    return rotation, translation


def area_under_curve(error: Tensor, degrees: int, width: float = 1.0) -> float:  # [P]
    """Mean over k = 1 .. degrees of the share of errors below k * width: the cumulative histogram's mean."""
    return sum(_share(error < k * width) for k in range(1, degrees + 1)) / degrees


def _share(right: Tensor) -> float:  # bool; NaN of none
    return right.double().mean().item()
