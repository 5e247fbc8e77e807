"""A first answer in seconds, before any probe is trained: do neighbours in feature space share classes, and do tokens
of two views that show the same point of the scene find each other?

Neighbours are exact, by FAISS on the CPU. h x w is the token grid, C channels, H x W the label images; pixel
coordinates (u, v) have their centres at whole numbers, as in `labels`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, get_args

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from spatialprobe.probes.fusion import Fuse, fuse
from spatialprobe.probes.labels import Labels, presence_rates
from spatialprobe.probes.loading.batches import Batch, FeatureKey
from spatialprobe.probes.loading.loader import FeatureLoader, Sources
from spatialprobe.probes.metrics.tagging import tagging_scores

Pool = Literal["mean", "max"]


def nearest(
    queries: Tensor,  # [Q, C]
    base: Tensor,  # [N, C]
    k: int,
) -> tuple[Tensor, Tensor]:  # float32 [Q, k], int64 [Q, k]
    """Cosine similarity and row of the k rows of `base` nearest to each query, nearest first."""
    if not 1 <= k <= len(base):
        raise ValueError(f"k must be 1 .. {len(base)}, the rows to choose from, got {k}")
    units = [F.normalize(x.detach().float(), dim=-1).cpu().numpy() for x in (queries, base)]
    if not all(np.isfinite(x).all() for x in units):
        raise ValueError("features must be finite, got inf or NaN")
    similarity, rows = faiss.knn(*units, k, metric=faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(similarity), torch.from_numpy(rows)


# -- tagging by neighbours --------------------------------------------------------------------------------------------


def neighbour_tagging(
    sources: Sources,
    labels: Labels,
    train: Sequence[str],  # ids of the clips to find neighbours among
    test: Sequence[str],
    *,
    k: int = 20,
    temperature: float = 0.07,
    pool: Pool = "mean",
    threshold: int = 200,
    **reading: Any,  # of `read_clips`
) -> dict[str, float]:
    """The numbers of the tagging task (`tagging_scores`), each test clip scored by its k nearest training clips."""

    def read(ids: Sequence[str]) -> tuple[Tensor, Tensor]:  # [N, C], bool [N, K]
        described, present = [], []
        for batch, features in read_clips(sources, labels, ids, ("tag_pixel_counts",), **reading):
            described.append(describe(features, pool).cpu())
            present.append(batch.labels["tag_pixel_counts"].sum(1).cpu() >= threshold)
        return torch.cat(described), torch.cat(present)

    (base, known), (queries, present) = read(train), read(test)
    scores = vote(*nearest(queries, base, k), known, temperature)
    return tagging_scores(scores, present, presence_rates(labels, train).tolist(), cut=0.5)


def describe(
    features: Tensor,  # [B, S, h, w, C]
    pool: Pool = "mean",
) -> Tensor:  # float32 [B, C]
    """One vector per clip: the mean, or per channel the largest value, of all its tokens."""
    if pool not in get_args(Pool):
        raise ValueError(f"pool must be one of {', '.join(get_args(Pool))}, got {pool!r}")
    tokens = features.float().flatten(1, 3)
    return tokens.mean(1) if pool == "mean" else tokens.amax(1)


def vote(
    similarity: Tensor,  # [Q, k]
    rows: Tensor,  # int64 [Q, k], into present
    present: Tensor,  # bool [N, K]
    temperature: float = 0.07,
) -> Tensor:  # float32 [Q, K], 0 .. 1
    """Share of the neighbours that have each class, a neighbour's weight being exp(similarity / temperature).

    After the nearest-neighbour classifier of Wu et al. 2018, "Unsupervised feature learning via non-parametric
    instance discrimination", divided by the sum of the weights.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    weight = (similarity / temperature).softmax(1)
    return torch.einsum("qk,qkc->qc", weight, present[rows].float())


# -- correspondence across views --------------------------------------------------------------------------------------


@dataclass
class Seen:
    """Cells of one view's token grid whose centre another view sees too."""

    cells: Tensor  # int64 [P], in raster order
    pixels: Tensor  # float64 [P, 2], where (u, v) the other view sees them


def view_correspondence(
    sources: Sources,
    labels: Labels,  # with depth, extrinsic and intrinsic
    ids: Sequence[str],
    *,
    radii: Sequence[float] = (8, 16, 32),
    tolerance: float = 0.05,
    **reading: Any,  # of `read_clips`
) -> dict[str, float]:
    """How well tokens find their counterpart: `MatchingRecall` over all pairs of a clip's views, earlier to later."""
    recall = MatchingRecall(radii)
    for batch, features in read_clips(sources, labels, ids, ("depth", "extrinsic", "intrinsic"), **reading):
        _, views, *grid, _ = features.shape
        for clip, tokens in enumerate(features):
            for pair in combinations(range(views), 2):
                truth = {name: x[clip, list(pair)].cpu() for name, x in batch.labels.items()}
                seen = correspondences(**truth, grid=tuple(grid), tolerance=tolerance)
                recall.update(*tokens[list(pair)], seen, truth["depth"].shape[1:])
    return recall.result()


def correspondences(
    depth: Tensor,  # [2, H, W]
    extrinsic: Tensor,  # [2, 3, 4] world-to-camera
    intrinsic: Tensor,  # [2, 3, 3] pixels
    *,
    grid: tuple[int, int],  # (h, w)
    tolerance: float = 0.05,
) -> Seen:
    """Where the second view sees the points at the centres of the first view's cells.

    A cell stands for the pixel nearest its centre. It is left out where that pixel has no depth (0, negative or not
    finite), where its point falls behind the second camera or outside its image, and where the second view's depth at
    the pixel nearest to it differs from the point's by more than `tolerance` of the latter: something hides it.
    Computed in float64.
    """
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must be a share of the depth between 0 and 1, got {tolerance}")
    size = depth.shape[1:]
    depth, turn, intrinsic = depth.double(), extrinsic[:, :, :3].double(), intrinsic.double()
    u, v = cell_centres(grid, size).round().unbind(1)
    z = depth[0, v.long(), u.long()]
    local = torch.stack([u, v, torch.ones_like(u)], 1) @ intrinsic[0].inverse().mT * z[:, None]
    world = (local - extrinsic[0, :, 3].double()) @ turn[0]  # R^T (x - t)
    there = world @ turn[1].mT + extrinsic[1, :, 3].double()
    pixels, far = there @ intrinsic[1].mT, there[:, 2]
    pixels = pixels[:, :2] / pixels[:, 2:]
    column, row = pixels.round().unbind(1)
    seen = (z > 0) & (column >= 0) & (column < size[1]) & (row >= 0) & (row < size[0])
    found = depth[1, row[seen].long(), column[seen].long()]
    # NaN is in no range; behind the camera `far` is negative, and no depth is as near to it as that
    seen[seen.clone()] = (found - far[seen]).abs() <= tolerance * far[seen]
    return Seen(seen.nonzero()[:, 0], pixels[seen])


def cell_centres(grid: tuple[int, int], size: tuple[int, int]) -> Tensor:  # float64 [h * w, 2]
    """(u, v) of each cell's centre in raster order: the grid divides the image, which spans -1/2 .. W - 1/2, evenly."""
    v, u = ((torch.arange(n).double() + 0.5) * length / n - 0.5 for n, length in zip(grid, size, strict=True))
    return torch.stack(torch.meshgrid(u, v, indexing="xy"), -1).flatten(0, 1)


class MatchingRecall:
    """Share of points whose best match in the other view lies within a radius of where that view sees them.

    A token's match is the other view's token of largest cosine similarity, and lies at its cell's centre. All points of
    all pairs count alike. Beside each recall@r stand chance@r, what a cell drawn at random would get on the same
    points, and ceiling@r, what the cell nearest to the true place would: cells larger than the radius keep it below 1.
    """

    def __init__(self, radii: Sequence[float]):  # pixels of the label images
        if not radii or min(radii) <= 0:
            raise ValueError(f"radii must be one or more positive numbers of pixels, got {list(radii)}")
        self.radii = torch.tensor(radii, dtype=torch.float64)
        self._sums = torch.zeros(3, len(radii), dtype=torch.float64)  # recall, chance, ceiling
        self.points = self.pairs = 0

    def update(
        self,
        first: Tensor,  # [h, w, C]
        second: Tensor,  # [h, w, C]
        seen: Seen,
        size: tuple[int, int],  # (H, W)
    ) -> None:
        self.pairs += 1
        if not len(seen.cells):
            return
        _, match = nearest(first.flatten(0, 1)[seen.cells], second.flatten(0, 1), 1)
        distance = (seen.pixels[:, None] - cell_centres(second.shape[:2], size)).norm(dim=-1)  # [P, h * w]
        chosen, least = distance.gather(1, match), distance.amin(1, keepdim=True)
        within = [d <= self.radii for d in (chosen, least)]
        chance = (distance[..., None] <= self.radii).double().mean(1)
        self._sums += torch.stack([within[0].double().sum(0), chance.sum(0), within[1].double().sum(0)])
        self.points += len(match)

    def result(self) -> dict[str, float]:
        """recall@r, chance@r and ceiling@r for each radius r; and how many points of how many pairs of views.

        Raises ValueError if no view sees anything of another.
        """
        if not self.points:
            raise ValueError(f"none of {self.pairs} pairs of views sees a point in common: there is nothing to match")
        shares = (self._sums / self.points).tolist()
        scores = {"points": self.points, "pairs": self.pairs}
        for kind, of_radii in zip(("recall", "chance", "ceiling"), shares, strict=True):
            scores |= {f"{kind}@{r:g}": x for r, x in zip(self.radii.tolist(), of_radii, strict=True)}
        return scores


# -- reading ----------------------------------------------------------------------------------------------------------


def read_clips(
    sources: Sources,
    labels: Labels,
    ids: Sequence[str],
    wanted: Sequence[str],
    *,
    keys: Sequence[FeatureKey] | None = None,  # one per source; None where each source holds one
    fusion: Fuse = "norm",
    **loading: Any,  # views, sampling, batch, threads, ... of FeatureLoader
) -> Iterator[tuple[Batch, Tensor]]:  # float32 [B, S, h, w, C]
    """Clips in batches, with the same views each time, and their features, fused where there are several sources."""
    loader = FeatureLoader(sources, labels, wanted=wanted, ids=ids, keys=keys, train=False, **loading)
    if len(loader.keys) != len(loader.sources):
        raise ValueError(f"keys must be one per source, got {loader.keys} of {len(loader.sources)} sources")
    for batch in loader:
        yield batch, fuse([batch.features[key] for key in sorted(loader.keys)], fusion).values
