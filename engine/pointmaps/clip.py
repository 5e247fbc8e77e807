"""The points of one clip: which frames each row sees, their labels read and averaged one by one, the whole written.

What is wrong with a clip is a ClipError; other clips are not known here.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from spatialprobe.engine.pipeline.each_clip import Lost
from spatialprobe.engine.pipeline.timing import Clock
from spatialprobe.engine.pointmaps.encode import PointSums, check_rigid, sum_frame, to_camera, token_shares
from spatialprobe.engine.pointmaps.options import LAYER, PointLabels, PointOptions
from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.types import STORE_DTYPES, ClipError, FeatureSpec, tensor_name
from spatialprobe.kernels.pool_features import Finished, finish

Grid = tuple[tuple[int, int], tuple[int, int]]  # of rows, then of columns: the model's tokens, and those stored


@dataclass
class ClipPoints:
    features: Finished  # [T, H, W, C]
    rows: Tensor  # int64 [F], as in the store that the points are like
    provenance: dict[str, Any]


def make_clip(
    clip_id: str, labels: PointLabels, like: FeatureStore, spec: FeatureSpec, options: PointOptions, clock: Clock
) -> ClipPoints | Lost:
    """A clip's points for every row of `like`, or what is wrong with it."""
    stage = "features"
    try:
        with like.open_clip(clip_id) as clip:
            rows, (length, height, width, _) = clip.rows, clip.shape(like.spec.tensors()[0])
        source = like.provenance(clip_id)
        grid, stage = ((source["grid"][1], height), (source["grid"][2], width)), "labels"
        seen, reader = frames_of_rows(rows, length, source["padded"]), ClipReader(clip_id, labels, options, clock)
        reader.look_around(sorted({f for frames in seen for f in frames}))
        means = torch.stack([reader.row(frames, grid) for frames in seen])
        with clock.host("pack"):
            features = finish(means, STORE_DTYPES[spec.dtype])
        if not means[..., -2].any():
            raise ClipError("no pixel of its frames has depth (a confidence above 0)")
        if not features.mean.isfinite().all():
            raise ClipError(f"its points reach {float(features.peak.max()):.6g}, more than {spec.dtype} holds")
    except (ValueError, OSError) as error:
        return Lost.by(stage, error)
    provenance = {name: source[name] for name in ("index", "padded", "grid", "rows_kept") if name in source}
    provenance |= {"unit": reader.unit, "valid": round(float(means[..., -2].mean()), 6)}
    return ClipPoints(features, torch.tensor(rows), provenance | {"labels_read": reader.digest.hexdigest()})


def frames_of_rows(rows: Sequence[int], length: int, padded: int | None) -> list[list[int]]:
    """The frames that each of `length` rows sees; of one that stands for no frame, none.

    A frame that pads a short clip is the last real one again, and is named so, for labels have no more than that.
    """
    last = len(rows) - 1 - (padded or 0)
    return [[min(f, last) for f, row in enumerate(rows) if row == r] for r in range(length)]


class ClipReader:
    """Reads a clip's labels frame by frame. `look_around` comes first."""

    def __init__(self, clip_id: str, labels: PointLabels, options: PointOptions, clock: Clock):
        self.clip_id, self.labels, self.options, self.clock = clip_id, labels, options, clock
        self.digest = sha256()  # of the points and confidence that were read
        self.unit, self.first = 1.0, None  # a unit's length in that of the labels; the first frame's pose

    def look_around(self, frames: Sequence[int]) -> None:
        """Finds out what all frames have in common. Raises ValueError for poses that are not rigid."""
        if self.options.frame == "first":
            self.first = self._read(0, ("extrinsic",))["extrinsic"]
        if self.options.unit != "clip":
            return
        total = pixels = 0
        for frame in frames:
            read = self._read(frame, self.options.labels)
            there = (read["confidence"] > 0) & read["points"].isfinite().all(-1)
            away = to_camera(read["points"][there], read["extrinsic"]).double().norm(dim=-1)
            total, pixels = total + float(away.sum()), pixels + away.numel()
        if pixels and not total > 0:
            raise ValueError("all its points lie in the cameras, so they have no scale")
        self.unit = total / pixels if pixels else 1.0

    def row(self, frames: Sequence[int], grid: Grid) -> Tensor:  # float32 [H, W, C]
        """The points of the frames that a row sees, as its tokens' means."""
        sums: Tensor | float = 0.0
        for frame, times in sorted(Counter(frames).items()):
            read = self._read(frame, self.options.labels)
            for name in ("points", "confidence"):
                self.digest.update(read[name].contiguous().numpy())
            with self.clock.host("average"):
                points = self._placed(read["points"], read.get("extrinsic")) / self.unit
                rows, columns = (token_shares(side, *of) for side, of in zip(points.shape[:2], grid, strict=True))
                sums = sums + times * sum_frame(points, read["confidence"], (rows, columns), self.options.bands)
        if isinstance(sums, float):
            return torch.zeros(grid[0][1], grid[1][1], self.options.channels)
        return PointSums(sums, len(frames)).means()

    def _placed(self, points: Tensor, extrinsic: Tensor | None) -> Tensor:  # [Y, X, 3]
        pose = {"world": None, "first": self.first, "camera": extrinsic}[self.options.frame]
        return points if pose is None else to_camera(points, pose)

    def _read(self, frame: int, wanted: Sequence[str]) -> dict[str, Tensor]:
        """One frame's labels, without their first dimension."""
        with self.clock.host("read labels"):
            read = self.labels.read(self.clip_id, [frame], wanted)
        if "extrinsic" in read:
            check_rigid(read["extrinsic"], [frame])
        return {name: x[0] for name, x in read.items()}


def write(clip_id: str, made: ClipPoints, store: FeatureStore, clock: Clock) -> None:
    with clock.host("write"):
        nbytes = store.write(clip_id, made.features.named(tensor_name(LAYER)), made.rows, made.provenance)
    clock.add("write", nbytes=nbytes)
