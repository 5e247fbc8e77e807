"""How well clusters of token embeddings follow the instances of a scene: T-mIoU and T-SR, mean over scenes.

S views, h x w tokens, H x W pixels of the masks, D dimensions. Which head made the embeddings is not known here.
"""

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from statistics import fmean

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from spatialprobe.probes.grouping import group, principal_components, temporal_overlap

MOST_THREADS = 16  # by default; every waiting scene holds its masks in memory


@dataclass(frozen=True)
class Grouping:
    """How a scene's tokens become groups; the defaults are the published protocol's."""

    components: int = 8  # principal components of the embeddings that are clustered
    min_cluster_size: int = 30  # tokens, over all views
    min_samples: int = 5

    def __post_init__(self):
        for name, least in (("components", 1), ("min_cluster_size", 2), ("min_samples", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")

    def labels(
        self,
        embeddings: ArrayLike,  # float [S, h, w, D]
    ) -> np.ndarray:
        """Groups int64 [S, h, w] of a scene's tokens, all views together; -1 is noise.

        Raises ValueError for values that are not finite, and for fewer tokens than components or min_samples.
        """
        embeddings = np.asarray(embeddings)
        flat = embeddings.reshape(-1, embeddings.shape[-1])
        scores = principal_components(flat, self.components)
        found = group(scores, min_cluster_size=self.min_cluster_size, min_samples=self.min_samples)
        return found.reshape(embeddings.shape[:-1])


@dataclass(frozen=True)
class SceneScore:
    miou: float  # T-mIoU in [0, 1]
    success_rate: float  # T-SR in [0, 1]
    clusters: int
    noise: float  # share of tokens in no cluster


class InstanceMetrics:
    """T-mIoU and T-SR of every scene, clustered on threads while the caller goes on: C++ holds no GIL.

    At most `backlog` scenes wait, then `update` waits for the oldest. Scores are kept in the order of the scenes and do
    not depend on the number of threads. What `update` is given is read later: it must not be written to.
    """

    def __init__(self, grouping: Grouping, *, threads: int | None = None, backlog: int | None = None):
        threads = min(os.cpu_count() or 1, MOST_THREADS) if threads is None else threads
        backlog = 2 * threads if backlog is None else backlog
        if threads < 1 or backlog < 1:
            raise ValueError(f"threads and backlog must be at least 1, got {threads} and {backlog}")
        self.grouping, self.backlog, self.pool = grouping, backlog, _pool(threads)
        self.scores: list[SceneScore | None] = []  # of the scenes done
        self._waiting: deque[Future[SceneScore | None]] = deque()

    def update(self, outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> None:
        """Adds the scenes of a batch: `embeddings` [B, S, h, w, D] and `instances` int [B, S, H, W], 0 is none.

        An error in a scene is raised by a later `update` or by `result`.
        """
        embeddings = outputs["embeddings"].detach().float().cpu().numpy()
        for tokens, truth in zip(embeddings, targets["instances"].cpu().numpy(), strict=True):
            if len(self._waiting) >= self.backlog:
                self.scores.append(self._waiting.popleft().result())
            self._waiting.append(self.pool.submit(score_scene, tokens, truth, self.grouping))

    def result(self) -> dict[str, float]:
        """Means over the scenes that have an instance: T-mIoU, T-SR, clusters (their number) and noise (share of tokens
        in none); NaN if there is no such scene. scenes_scored of scenes says how many the means are of.

        Waits for all scenes. Raises ValueError if there were none.
        """
        while self._waiting:
            self.scores.append(self._waiting.popleft().result())
        if not self.scores:
            raise ValueError("instance metrics need at least 1 scene, got none")
        scored = [score for score in self.scores if score is not None]
        names = {"T-mIoU": "miou", "T-SR": "success_rate", "clusters": "clusters", "noise": "noise"}
        means = {k: fmean(getattr(s, v) for s in scored) if scored else float("nan") for k, v in names.items()}
        return means | {"scenes_scored": len(scored), "scenes": len(self.scores)}


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """One for the whole process: the probes of a grid are measured at the same time."""
    return ThreadPoolExecutor(threads, thread_name_prefix="grouping")


def score_scene(
    embeddings: ArrayLike,  # float [S, h, w, D]
    truth: ArrayLike,  # int [S, H, W], instance ids, 0 is none
    grouping: Grouping,
) -> SceneScore | None:
    """None for a scene without an instance, which says nothing about the embeddings and is not clustered."""
    truth = np.asarray(truth)
    if not truth.any():
        return None
    labels, size = grouping.labels(embeddings), truth.shape[1:]
    coarse = labels.shape[1] <= size[0] and labels.shape[2] <= size[1]  # then they are upsampled as they are read
    overlap = temporal_overlap(labels if coarse else resize_nearest(labels, size), truth)
    return SceneScore(overlap.miou, overlap.success_rate, int(labels.max()) + 1, float((labels < 0).mean()))


def resize_nearest(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`labels` [S, h, w] at H x W pixels: pixel (y, x) shows cell (floor(y h / H), floor(x w / W)).

    The rule of `temporal_overlap`, and of torch's mode "nearest" but for the rounding of its scale.
    """
    (height, width), (h, w) = size, labels.shape[1:]
    return labels[:, np.arange(height)[:, None] * h // height, np.arange(width) * w // width]
