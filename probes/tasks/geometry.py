"""3D geometry: depth, points in the first view's coordinates, and cameras of the sampled views of a clip.

Quantities are those of `labels`, except that a clip's truth is re-based to its first view and scaled so that the mean
distance of that view's valid points from its camera is 1. h x w is the size at which truth and prediction meet.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spatialprobe.probes.backbone import Tokens
from spatialprobe.probes.geometry import encode_cameras, rebase
from spatialprobe.probes.heads.camera import CameraDecoder
from spatialprobe.probes.heads.dense import DenseDecoder
from spatialprobe.probes.labels import Labels
from spatialprobe.probes.metrics.geometry import Auc, GeometryMetrics
from spatialprobe.probes.task import ProbeConfig, ProbeTask

Weight = Literal["learned", "labels"]

OPTIONS = {
    "out_size": None,  # (h, w), or "hxw"; None: the labels' size
    "features": 256,  # channels of the dense decoders
    "stages": (256, 512, 1024, 1024),
    "camera_layers": 4,
    "refinements": 4,
    "weight": "learned",  # of a pixel's error: see confident_error; "labels" is what the study's code does
    "alpha": 0.2,  # of the learned confidence: DUSt3R's and VGGT's
    "auc": "pair",  # or "batch": see GeometryMetrics
}
DECAY = 0.6  # of the weight of each refinement but the last, from the one after it
TRANSLATION, ROTATION, VIEW = 1.0, 1.0, 0.5  # weights within the camera loss
SCALES = (1e-3, 1e3)  # bounds of the mean distance by which points are divided


@dataclass(frozen=True)
class GeometryFacts:
    """Size at which truth and prediction meet, in pixels."""

    height: int
    width: int


def geometry_facts(labels: Labels, ids: Sequence[str], config: ProbeConfig) -> GeometryFacts:
    """The option out_size, or the size of the first clip's depth. Raises ValueError for options out of range."""
    options = config.options
    if options["weight"] not in get_args(Weight) or options["auc"] not in get_args(Auc):
        choices = f"weight must be one of {', '.join(get_args(Weight))} and auc one of {', '.join(get_args(Auc))}"
        raise ValueError(f"{choices}, got {options['weight']!r} and {options['auc']!r}")
    if not options["alpha"] > 0:
        raise ValueError(f"alpha must be more than 0, got {options['alpha']}")
    if options["out_size"] is not None:
        return GeometryFacts(*parse_out_size(options["out_size"]))
    if not ids:
        raise ValueError("geometry needs at least 1 training clip, got none")
    return GeometryFacts(*labels.read(ids[0], [0], ("depth",))["depth"].shape[1:])


def parse_out_size(value: str | Sequence[int]) -> tuple[int, int]:
    """(56, 98) of "56x98" or a pair, height first."""
    sides = value.split("x") if isinstance(value, str) else value
    if not isinstance(sides, Sequence) or len(sides) != 2 or not all(str(n).isdecimal() and int(n) for n in sides):
        raise ValueError(f"out_size must be HEIGHTxWIDTH like 56x98, or two positive integers, got {value!r}")
    return int(sides[0]), int(sides[1])


# -- head -------------------------------------------------------------------------------------------------------------


class GeometryHead(nn.Module):
    """Two dense decoders and a camera head, in float32 also where the rest is not, as the study's are."""

    def __init__(self, width: int, config: ProbeConfig, facts: GeometryFacts):
        super().__init__()
        options, size = config.options, (facts.height, facts.width)
        dense = {"depth": config.depth, "features": options["features"], "stages": options["stages"]}
        self.depth, self.points = DenseDecoder(width, 2, size, **dense), DenseDecoder(width, 4, size, **dense)
        self.camera = CameraDecoder(
            width,
            readout=config.depth == 0,
            refinements=options["refinements"],
            layers=options["camera_layers"],
            heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            layer_scale=config.layer_scale,
        )

    def forward(self, tokens: Tokens) -> dict[str, Tensor]:
        """depth [B, S, h, w], points [B, S, h, w, 3], depth_confidence and points_confidence [B, S, h, w] (from 1),
        poses [B, S, refinements, 9] (`CameraDecoder`)."""
        with torch.autocast(tokens.pairs[0].device.type, enabled=False):
            tokens = Tokens([x.float() for x in tokens.pairs], tokens.grid)
            depth, points = self.depth(tokens), self.points(tokens)
            return {
                "depth": depth[..., 0].exp(),
                "depth_confidence": 1 + depth[..., 1].exp(),
                "points": inverse_log(points[..., :3]),
                "points_confidence": 1 + points[..., 3].exp(),
                "poses": self.camera(tokens),
            }


def inverse_log(x: Tensor) -> Tensor:
    """sign(x) (exp(|x|) - 1)."""
    return x.sign() * x.abs().expm1()


# -- truth ------------------------------------------------------------------------------------------------------------


def geometry_targets(
    labels: dict[str, Tensor],  # depth, confidence [B, S, H, W]; points; extrinsic; intrinsic: see `labels`
    config: ProbeConfig,
    facts: GeometryFacts,
) -> dict[str, Tensor]:
    """Re-based and scaled depth [B, S, h, w], points [B, S, h, w, 3], extrinsic [B, S, 3, 4] and pose [B, S, 9]
    (`encode_cameras`); confidence [B, S, h, w]; valid bool [B, S, h, w]; scaled bool [B].

    Of another size, each pixel takes everything from the label pixel under its centre, so that no edge is blurred.
    Valid: confidence and depth are positive and all is finite; elsewhere depth, points and confidence are 0. A clip
    whose first view has no valid point has no scale: it keeps its own, and has no valid pixel in any view.
    """
    depth, confidence, points = (_resized(labels[name], facts) for name in ("depth", "confidence", "points"))
    extrinsic, points = rebase(labels["extrinsic"], points)
    valid = (depth > 0) & depth.isfinite() & (confidence > 0) & confidence.isfinite() & points.isfinite().all(-1)
    points = torch.where(valid[..., None], points, 0)
    scale = mean_distance(points[:, :1], valid[:, :1])
    scaled = scale > 0
    scale, valid = torch.where(scaled, scale, 1), valid & scaled[:, None, None, None]
    extrinsic = torch.cat([extrinsic[..., :3], extrinsic[..., 3:] / scale[:, None, None, None]], -1)
    return {
        "depth": torch.where(valid, depth / scale[:, None, None, None], 0),
        "points": torch.where(valid[..., None], points / scale[:, None, None, None, None], 0),
        "confidence": torch.where(valid, confidence, 0),
        "valid": valid,
        "extrinsic": extrinsic,
        "pose": encode_cameras(extrinsic, labels["intrinsic"], labels["depth"].shape[2:4]),
        "scaled": scaled,
    }


def _resized(x: Tensor, facts: GeometryFacts) -> Tensor:  # [B, S, H, W, ...] -> [B, S, h, w, ...]
    if x.shape[2:4] == (facts.height, facts.width):
        return x
    rows, columns = (
        (2 * torch.arange(n, device=x.device) + 1) * full // (2 * n)
        for n, full in ((facts.height, x.shape[2]), (facts.width, x.shape[3]))
    )
    return x[:, :, rows[:, None], columns]


def mean_distance(
    points: Tensor,  # [B, S, H, W, 3]
    valid: Tensor,  # bool [B, S, H, W]
) -> Tensor:  # [B]
    """Of each clip's valid points from the origin; 0 without any."""
    distance = torch.where(valid, points.norm(dim=-1), 0).flatten(1).sum(1)
    return distance / valid.flatten(1).sum(1).clamp(min=1)


# -- loss -------------------------------------------------------------------------------------------------------------


def geometry_loss(
    outputs: dict[str, Tensor], targets: dict[str, Tensor], config: ProbeConfig, generator: torch.Generator
) -> dict[str, Tensor]:
    """The parts points, depth and camera, and their sum, loss. Nothing in it is random.

    Points are compared after prediction and truth are divided by their clip's mean distance over valid pixels, so that
    their scale is free; depth and cameras as they are, so that theirs is not. Clips without a scale count for nothing.
    """
    options, valid = config.options, targets["valid"]
    learned = options["weight"] == "learned"
    predicted, true = (
        side["points"] / mean_distance(side["points"], valid).clamp(*SCALES)[:, None, None, None, None]
        for side in (outputs, targets)
    )
    errors = {"points": (predicted - true).norm(dim=-1), "depth": (outputs["depth"] - targets["depth"]).abs()}
    parts = {
        name: confident_error(
            error,
            outputs[f"{name}_confidence"] if learned else targets["confidence"],
            valid,
            alpha=options["alpha"] if learned else 0.0,
        )
        for name, error in errors.items()
    }
    parts["camera"] = camera_loss(outputs["poses"], targets["pose"], targets["scaled"])
    return {"loss": parts["points"] + parts["depth"] + parts["camera"], **parts}


def confident_error(
    error: Tensor,  # [B, S, h, w]
    confidence: Tensor,  # [B, S, h, w]
    valid: Tensor,  # bool [B, S, h, w]
    *,
    alpha: float = 0.2,
) -> Tensor:  # scalar
    """Mean over the batch's valid pixels of confidence * error - alpha * log(confidence); 0 without any.

    DUSt3R's confidence-aware loss (Wang et al. 2024), with its alpha, which is VGGT's too: confidence is learned, worth
    alpha / error. With alpha 0 and the labels' confidence it is the published study's loss, which learns none.
    """
    each = confidence * error
    if alpha:
        each = each - alpha * confidence.log()
    return torch.where(valid, each, 0).sum() / valid.sum().clamp(min=1)


def camera_loss(
    poses: Tensor,  # [B, S, refinements, 9]
    truth: Tensor,  # [B, S, 9]
    counted: Tensor,  # bool [B], clips
) -> Tensor:  # scalar
    """Mean over n refinements of .6^(n - 1 - i) times the Huber losses (delta 1) of translation, quaternion and angles
    of view, each a mean over numbers, views and counted clips, weighted 1, 1 and .5; 0 without a clip.

    The quaternion is compared as four numbers with the true one of w >= 0, as in VGGT, so its sign matters.
    """
    refinements = poses.shape[2]
    error = F.huber_loss(poses, truth[:, :, None].expand_as(poses), reduction="none")
    error = torch.where(counted[:, None, None, None], error, 0).mean(1).sum(0) / counted.sum().clamp(min=1)
    parts = zip((TRANSLATION, ROTATION, VIEW), error.split([3, 4, 2], -1), strict=True)
    per_refinement = sum(weight * part.mean(-1) for weight, part in parts)
    decay = DECAY ** torch.arange(refinements - 1, -1, -1, device=poses.device)
    return (per_refinement * decay).mean()


GEOMETRY = ProbeTask(
    name="geometry",
    labels=("depth", "points", "confidence", "extrinsic", "intrinsic"),
    defaults=ProbeConfig(
        embed=1024, depth=4, dropout=0.1, lr=1e-4, weight_decay=0.05, warmup=10, epochs=60, batch=10, views=4,
        options=OPTIONS,
    ),
    score="last",
    higher_is_better=True,
    facts=geometry_facts,
    head=GeometryHead,
    targets=geometry_targets,
    loss=geometry_loss,
    metrics=lambda config, facts: GeometryMetrics(config.options["auc"]),
    shown="AUC@30",
    facts_type=GeometryFacts,
)  # fmt: skip
