"""Instance grouping: exact HDBSCAN over a scene's embeddings, and how well the clusters follow instances across views.

The computing is in C++ (csrc/); this module turns Python arguments into checked arrays. It knows nothing of features,
probes or torch.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from spatialprobe.probes import _grouping

Metric = Literal["euclidean", "cosine"]
SMALLEST = 1e-30  # below, squares and inverses of distances leave the range of the numbers they are kept in
MOST_COLUMNS = 512  # of principal_components, which costs D^3
LARGEST = 2**62  # larger counts mean the same; the C++ side holds them in 64 bits


class HDBSCAN:
    """Exact HDBSCAN (Campello, Moulavi and Sander 2013) with scikit-learn's conventions.

    `min_samples` does not count the point itself, as in the `hdbscan` package (scikit-learn's counts it); None means
    `min_cluster_size`. Labels are a function of the data and these parameters alone: not of `n_jobs`, of the machine or
    of the run. Equal edges of the spanning tree are ordered by (weight, smaller row, larger row).

    Args:
        min_cluster_size: fewest points of a cluster, at least 2.
        min_samples: which nearest other point gives the core distance, at least 1.
        cluster_selection_epsilon: clusters that split below this distance are merged; 0 turns it off.
        max_cluster_size: larger clusters are not selected by "eom"; None for no limit.
        alpha: distances are divided by it before they are compared with core distances.
        cluster_selection_method: "eom" (excess of mass) or "leaf".
        allow_single_cluster: whether all points may be one cluster.
        metric: "euclidean", or "cosine" (1 - cosine similarity, computed as half the squared distance of unit vectors).
        n_jobs: threads; None is one, -1 is one per available core.

    Attributes:
        labels_: int64 [N], -1 is noise.
        probabilities_: float64 [N], strength of membership, 0 for noise.
        n_features_in_: D.
        feature_names_in_: names of the columns, where the input had string names.
    """

    def __init__(
        self,
        min_cluster_size: int = 5,
        min_samples: int | None = None,
        cluster_selection_epsilon: float = 0.0,
        max_cluster_size: int | None = None,
        alpha: float = 1.0,
        cluster_selection_method: Literal["eom", "leaf"] = "eom",
        allow_single_cluster: bool = False,
        metric: Metric = "euclidean",
        n_jobs: int | None = None,
    ):
        self.min_cluster_size = min_cluster_size
        self.min_samples = min_samples
        self.cluster_selection_epsilon = cluster_selection_epsilon
        self.max_cluster_size = max_cluster_size
        self.alpha = alpha
        self.cluster_selection_method = cluster_selection_method
        self.allow_single_cluster = allow_single_cluster
        self.metric = metric
        self.n_jobs = n_jobs

    def fit(
        self,
        X: ArrayLike,  # [N, D]
        y: object = None,  # ignored
    ) -> "HDBSCAN":
        """Clusters the rows of X; float32 and float64 in C order are read in place."""
        embeddings = _embeddings(X)
        parameters = self._parameters()
        self.labels_, self.probabilities_ = _grouping.cluster(
            embeddings, _metric(self.metric), parameters, _threads(self.n_jobs), self.min_samples is not None
        )
        self.n_features_in_ = embeddings.shape[1]
        names = [str(name) for name in getattr(X, "columns", []) if isinstance(name, str)]
        if len(names) == self.n_features_in_:
            self.feature_names_in_ = np.array(names, dtype=object)
        elif hasattr(self, "feature_names_in_"):
            del self.feature_names_in_
        return self

    def fit_predict(self, X: ArrayLike, y: object = None) -> np.ndarray:
        """Labels int64 [N] of the rows of X, -1 is noise."""
        return self.fit(X).labels_

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments."""
        return {name: getattr(self, name) for name in _PARAMETERS}

    def set_params(self, **params: Any) -> "HDBSCAN":
        """Sets some of the constructor's arguments."""
        unknown = sorted(set(params) - set(_PARAMETERS))
        if unknown:
            raise ValueError(f"HDBSCAN: wanted parameters among {', '.join(_PARAMETERS)}, got {', '.join(unknown)}")
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        changed = [f"{k}={v!r}" for k, v in self.get_params().items() if v is not _DEFAULTS[k] and v != _DEFAULTS[k]]
        return f"HDBSCAN({', '.join(changed)})"

    def __sklearn_tags__(self) -> Any:
        # Only scikit-learn calls this, so it is loaded already: importing it above would take a second.
        from sklearn.utils import InputTags, Tags, TargetTags

        return Tags(
            estimator_type="clusterer",
            target_tags=TargetTags(required=False),
            transformer_tags=None,
            classifier_tags=None,
            regressor_tags=None,
            input_tags=InputTags(),
        )

    def _parameters(self) -> _grouping.Parameters:
        min_cluster_size = _count("min_cluster_size", self.min_cluster_size, least=2)
        return _grouping.Parameters(
            min_cluster_size=min_cluster_size,
            min_samples=min_cluster_size if self.min_samples is None else _count("min_samples", self.min_samples, 1),
            cluster_selection_epsilon=_number("cluster_selection_epsilon", self.cluster_selection_epsilon),
            max_cluster_size=0
            if self.max_cluster_size is None
            else _count("max_cluster_size", self.max_cluster_size, 1),
            alpha=_number("alpha", self.alpha),
            cluster_selection_method=_choice(
                "cluster_selection_method", self.cluster_selection_method, ("eom", "leaf")
            ),
            allow_single_cluster=_switch("allow_single_cluster", self.allow_single_cluster),
        )


_DEFAULTS = dict(zip(HDBSCAN.__init__.__code__.co_varnames[1:], HDBSCAN.__init__.__defaults__, strict=True))
_PARAMETERS = tuple(_DEFAULTS)


def group(
    embeddings: ArrayLike,  # [N, D]
    *,
    min_cluster_size: int = 30,
    min_samples: int | None = 5,
    metric: Metric = "euclidean",
    n_jobs: int | None = None,
) -> np.ndarray:
    """Instance labels int64 [N] of a scene's embeddings, -1 is noise; the defaults are the published protocol's.

    Fewer rows than `min_cluster_size` are all noise, but fewer than `min_samples` are an error. Runs to its end, also
    when interrupted.
    """
    return HDBSCAN(min_cluster_size, min_samples, metric=metric, n_jobs=n_jobs).fit_predict(embeddings)


def group_scenes(
    scenes: Sequence[ArrayLike],  # of [N, D], which may differ
    *,
    min_cluster_size: int = 30,
    min_samples: int | None = 5,
    metric: Metric = "euclidean",
    n_jobs: int | None = -1,
) -> list[np.ndarray]:
    """`group` of every scene, each on one thread of a pool of `n_jobs`; the result does not depend on their number."""
    if not isinstance(scenes, Sequence | np.ndarray):
        raise ValueError(f"scenes: wanted a list of matrices [N, D], got {type(scenes).__name__}")
    estimator = HDBSCAN(min_cluster_size, min_samples)
    results = _grouping.cluster_batch(
        [_embeddings(scene) for scene in scenes],
        _metric(metric),
        estimator._parameters(),
        _threads(n_jobs),
        min_samples is not None,
    )
    return [labels for labels, _ in results]


def principal_components(
    embeddings: ArrayLike,  # [N, D]
    components: int = 8,
    *,
    n_jobs: int | None = None,
) -> np.ndarray:
    """Scores [N, components] on the first principal components, in the input's dtype and with scikit-learn's signs.

    Computed in float64, O(N D^2 + D^3): for D up to a few hundred.
    """
    array, count = _embeddings(embeddings), _count("components", components, least=1)
    if array.shape[1] > MOST_COLUMNS:
        raise ValueError(f"embeddings: wanted at most {MOST_COLUMNS} columns, got {array.shape[1]}")
    rows, columns = array.shape
    if array.size and count > min(rows, columns):
        wanted = f"1 to the smaller of rows ({rows}) and columns ({columns})"
        raise ValueError(f"components: wanted {wanted}, got {components}")
    largest = _largest(array)
    exponent = int(np.frexp(largest)[1])
    if abs(exponent) < 128 or not largest <= 1e150:  # what is larger, or no number, is refused below
        scores = _grouping.principal_components(array, min(count, 2**31 - 1), _threads(n_jobs))
    else:  # squares of such values leave the range of float64
        scaled = np.ldexp(array.astype(np.float64), -exponent)
        scores = np.ldexp(_grouping.principal_components(scaled, count, _threads(n_jobs)), exponent)
    return scores.astype(array.dtype, copy=False)


@dataclass(frozen=True)
class TemporalOverlap:
    """How well the clusters of a scene follow its instances from view to view."""

    miou: float  # T-mIoU, in [0, 1]; NaN without instances
    success_rate: float  # T-SR, in [0, 1]; NaN without instances
    instances: int  # that the two are means over


def temporal_overlap(
    predicted: ArrayLike,  # int [S, h, w], labels; negative is noise
    truth: ArrayLike,  # int [S, H, W], instance ids
    *,
    ignore: int = 0,
    threshold: float = 0.5,
) -> TemporalOverlap:
    """T-mIoU and T-SR of one scene (S views).

    Each true instance (an id other than `ignore`) is matched with the cluster of best IoU between the masks OR-ed over
    views. T-mIoU is the mean over instances of the mean IoU over the views that show the instance; T-SR is the share of
    instances with an IoU of at least `threshold` in all of those. Predictions on a coarser grid are upsampled by
    nearest neighbour as they are read: pixel (y, x) shows cell (floor(y h / H), floor(x w / W)).
    """
    miou, success_rate, instances = _grouping.temporal_overlap(
        _label_maps("predicted", predicted, (np.int32, np.int64)),
        _label_maps("truth", truth, (np.uint8, np.uint16, np.int32, np.int64)),
        _integer("ignore", ignore),
        _number("threshold", threshold),
    )
    return TemporalOverlap(miou, success_rate, instances)


def _embeddings(values: ArrayLike) -> np.ndarray:
    """A C-contiguous float32 or float64 matrix; the same memory where it is one already."""
    if hasattr(values, "toarray"):
        raise ValueError(f"embeddings: wanted a dense array, got a sparse {type(values).__name__}; use .toarray()")
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"embeddings: wanted a matrix [N, D], got rows of different lengths: {error}") from error
    if array.ndim != 2:
        raise ValueError(
            f"embeddings: wanted 2 dimensions [N, D], got {array.ndim} with shape {array.shape}. Reshape your data"
        )
    if array.dtype.kind == "c":
        raise ValueError(f"embeddings: wanted real numbers, got {array.dtype}. Complex data not supported")
    if array.dtype.kind not in "fiubO":
        raise ValueError(f"embeddings: wanted numbers, got dtype {array.dtype}")
    if array.dtype not in (np.float32, np.float64):
        array = _to_float64(array)
    if not array.flags.c_contiguous or not array.flags.aligned:
        array = np.array(array, order="C")
    largest = _largest(array)
    if 0 < largest < SMALLEST:
        raise ValueError(f"embeddings: wanted a largest magnitude of at least {SMALLEST} (or 0), got {largest:.3g}")
    return array


def _largest(array: np.ndarray) -> float:
    """The largest magnitude; NaN if there is one, which the C++ side names by its row."""
    return float(max(array.max(), -array.min())) if array.size else 0.0


def _to_float64(array: np.ndarray) -> np.ndarray:
    try:
        with np.errstate(over="ignore"):
            return array.astype(np.float64)
    # An object that is no number at all stays the TypeError that scikit-learn's conventions want.
    except (ValueError, OverflowError) as error:
        raise ValueError(f"embeddings: wanted numbers, got an object that is none: {error}") from error


def _label_maps(name: str, values: ArrayLike, dtypes: tuple[type, ...]) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype.kind not in "iu" or array.dtype == np.uint64:
        raise ValueError(f"{name}: wanted integers of at most 63 bits, got {array.dtype}")
    if array.dtype not in dtypes:
        array = array.astype(np.int64)
    return np.require(array, requirements=["C", "A"])


def _metric(metric: object) -> str:
    return _choice("metric", metric, ("euclidean", "cosine"))


def _choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: wanted one of {', '.join(choices)}, got {value!r}")
    return value


def _integer(name: str, value: object) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or abs(int(value)) > LARGEST:
        raise ValueError(f"{name}: wanted an integer of at most 62 bits, got {value!r}")
    return int(value)


def _count(name: str, value: object, least: int) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: wanted an integer of at least {least}, got {value!r}")
    return min(int(value), LARGEST)


def _number(name: str, value: object) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ValueError(f"{name}: wanted a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: wanted a number that fits 64 bits, got one of {len(str(value))} digits") from None


def _switch(name: str, value: object) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}: wanted True or False, got {value!r}")
    return bool(value)


def _threads(n_jobs: object) -> int:
    if n_jobs is None:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not isinstance(n_jobs, Integral) or isinstance(n_jobs, bool) or not (n_jobs == -1 or 1 <= n_jobs <= 4096):
        raise ValueError(f"n_jobs: wanted None, -1 or 1 to 4096, got {n_jobs!r}")
    return cores if n_jobs == -1 else int(n_jobs)
