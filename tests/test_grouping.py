"""Exactness of the grouping: against brute force, against itself on other machines, against other packages."""

import grouping_reference as reference
import hdbscan
import numpy as np
import pytest
import quitefastmst
from grouping_scenes import make_scene
from hdbscan._hdbscan_linkage import label as link_edges
from hdbscan.hdbscan_ import _tree_to_labels
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sklearn.cluster import HDBSCAN as SklearnHDBSCAN

from spatialprobe.probes import _grouping
from spatialprobe.probes.grouping import HDBSCAN, group, group_scenes, principal_components

SETS = _grouping.instruction_sets()


def bounded(examples):
    """The same examples in every run, and no more time than they take."""
    return settings(
        max_examples=examples, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
    )


def tree(x, min_samples=5, *, metric="euclidean", threads=1, alpha=1.0, search="boruvka", instruction_set="auto"):
    parameters = _grouping.Parameters(
        min_cluster_size=5, min_samples=min_samples, alpha=alpha, search=search, instruction_set=instruction_set
    )
    return _grouping.spanning_tree(np.ascontiguousarray(x), metric, parameters, threads)


def assert_identical(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


def blobs(n, dims, seed=0, dtype=np.float32):
    """Clusters of very different density, and some noise."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(7, dims))
    spread = 10.0 ** rng.uniform(-3, 0, 7)
    of = rng.integers(0, 7, n)
    x = centres[of] + rng.normal(size=(n, dims)) * spread[of, None] / np.sqrt(dims)
    return x.astype(dtype)


@st.composite
def point_sets(draw, largest=500):
    """Blobs, lattices (all ties), duplicates, clusters far below float32's grain, offsets that float32 cannot carry."""
    n, dims = draw(st.integers(1, largest)), draw(st.sampled_from([1, 2, 3, 4, 7, 8, 9, 12, 15, 16, 17, 32, 33, 64]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["blobs", "lattice", "uniform", "tight", "offset", "constant"]))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    if kind == "lattice":
        x = rng.integers(0, draw(st.integers(2, 6)), (n, dims)).astype(np.float64)
    elif kind == "constant":
        x = np.full((n, dims), rng.normal())
    elif kind == "uniform":
        x = rng.uniform(size=(n, dims))
    else:
        x = blobs(n, dims, int(rng.integers(2**31)), np.float64)
        if kind == "tight":
            x = rng.integers(0, 3, (n, 1)) + 1e-9 * x
        if kind == "offset":
            x = 1e5 + x
    if draw(st.booleans()):
        x = x[rng.integers(0, max(1, n // draw(st.sampled_from([1, 3, 20]))), n)]
    return x.astype(dtype)


# A: against brute force


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("dims", [1, 2, 5, 8, 9, 15, 16, 31, 32, 64])
def test_core_distances_and_weights_equal_brute_force(dims, dtype):
    x = blobs(700, dims, dims, dtype)
    ends, weights, core = tree(x)
    distances = reference.pairwise_distances(x)
    expected_core = reference.core_distances(distances, 5)
    np.testing.assert_allclose(core, expected_core, rtol=1e-12, atol=0)
    np.testing.assert_allclose(weights, reference.spanning_tree(distances, expected_core)[1], rtol=1e-12, atol=0)
    mutual = np.maximum(distances[ends[:, 0], ends[:, 1]], np.maximum(core[ends[:, 0]], core[ends[:, 1]]))
    np.testing.assert_allclose(weights, mutual, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("metric", "alpha"), [("cosine", 1.0), ("euclidean", 1.5), ("euclidean", 0.6), ("cosine", 2.0)]
)
@pytest.mark.parametrize("dims", [3, 8, 24])
def test_metric_and_alpha_equal_brute_force(metric, alpha, dims):
    x = blobs(600, dims, dims, np.float64)
    _, weights, core = tree(x, 4, metric=metric, alpha=alpha)
    distances = reference.pairwise_distances(x, metric)
    expected_core = reference.core_distances(distances, 4)
    np.testing.assert_allclose(core, expected_core, rtol=1e-12, atol=0)
    expected = reference.spanning_tree(distances, expected_core, alpha)[1]
    np.testing.assert_allclose(weights, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("min_samples", [1, 2, 7, 8, 9, 29, 30, 100, 599])
def test_min_samples_of_any_size(min_samples):
    x = blobs(600, 8, 3)
    distances = reference.pairwise_distances(x)
    expected_core = reference.core_distances(distances, min_samples)
    _, weights, core = tree(x, min_samples)
    np.testing.assert_allclose(core, expected_core, rtol=1e-12, atol=0)
    np.testing.assert_allclose(weights, reference.spanning_tree(distances, expected_core)[1], rtol=1e-12, atol=0)


@bounded(80)
@given(point_sets(), st.sampled_from([1, 2, 3, 5, 8, 20]), st.sampled_from([1.0, 1.0, 1.4]))
@example(np.zeros((300, 3), np.float32), 5, 1.0)
@example(np.repeat(np.arange(60, dtype=np.float32).reshape(-1, 1), 6, 0), 5, 1.0)
def test_any_points_equal_brute_force(x, min_samples, alpha):
    min_samples = min(min_samples, len(x))
    ends, weights, core = tree(x, min_samples, alpha=alpha)
    distances = reference.pairwise_distances(x)
    expected_core = reference.core_distances(distances, min_samples)
    np.testing.assert_allclose(core, expected_core, rtol=1e-12, atol=0)
    expected_ends, expected = reference.spanning_tree(distances, expected_core, alpha)
    np.testing.assert_allclose(weights, expected, rtol=1e-12, atol=0)
    if np.array_equal(x, np.round(x)) and alpha == 1.0:  # all arithmetic is exact, so are the ties
        np.testing.assert_array_equal(ends, expected_ends)


# B: the same bits for every search, thread count, instruction set and run


@bounded(120)
@given(
    point_sets(largest=1500), st.sampled_from([1, 3, 5, 8, 12, 40]), st.sampled_from([1.0, 0.7]), st.sampled_from(SETS),
    st.integers(1, 4), st.sampled_from(["euclidean", "cosine"]),
)  # fmt: skip
def test_tiled_search_is_prim_bit_for_bit(x, min_samples, alpha, instruction_set, threads, metric):
    if metric == "cosine" and (np.abs(x).max(1) == 0).any():
        x = x + 1
    options = {"min_samples": min(min_samples, len(x)), "alpha": alpha, "metric": metric}
    prim = tree(x, search="prim", **options)
    assert_identical(tree(x, threads=threads, instruction_set=instruction_set, **options), prim)


def scene_like_inputs():
    scene = make_scene(6144, seed=1)
    grid = np.stack(np.meshgrid(*[np.arange(15.0)] * 3), -1).reshape(-1, 3)
    return {
        "D=32": scene.embeddings,
        "D=8": principal_components(scene.embeddings),
        "lattice": grid.astype(np.float32),
        "duplicates": scene.embeddings[np.random.default_rng(0).integers(0, 900, 6144)],
        "rounded": np.round(principal_components(scene.embeddings).astype(np.float64), 1),
    }


@pytest.mark.parametrize("name", scene_like_inputs())
def test_threads_instruction_sets_and_runs_agree(name):
    x = scene_like_inputs()[name]
    first = tree(x)
    labels = group(x)
    for instruction_set in SETS:
        for threads in (1, 2, 5):
            assert_identical(tree(x, threads=threads, instruction_set=instruction_set), first)
    for n_jobs in (1, 2, 3, -1):
        np.testing.assert_array_equal(group(x, n_jobs=n_jobs), labels)


def test_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match=r"instruction_set: wanted one of auto, .* got mmx"):
        tree(blobs(20, 2), instruction_set="mmx")


def test_permuted_rows_give_the_same_partition_when_ties_merge():
    x = principal_components(make_scene(1536, seed=2).embeddings)
    order = np.random.default_rng(0).permutation(len(x))
    ends, weights, _ = tree(x)
    permuted_ends, permuted_weights, _ = tree(x[order])
    np.testing.assert_array_equal(weights, permuted_weights)
    labels = reference.labels_with_ties_merged(ends, weights, 30)
    permuted = reference.labels_with_ties_merged(permuted_ends, permuted_weights, 30)
    assert reference.same_partition(labels[order], permuted)


# C: from tree to labels as the hdbscan package does it


@bounded(150)
@given(
    point_sets(largest=400), st.integers(2, 40), st.integers(1, 10), st.sampled_from(["eom", "leaf"]), st.booleans(),
    st.sampled_from([0.0, 0.0, 0.05, 0.5, 2.0]), st.sampled_from([None, 10, 60]),
)  # fmt: skip
def test_labels_and_probabilities_equal_hdbscans_tree_code(
    x, min_cluster_size, min_samples, method, single, epsilon, max_cluster_size
):
    if len(x) < max(min_cluster_size, min_samples, 2):
        return
    ends, weights, _ = tree(x, min_samples)
    with np.errstate(all="ignore"):  # hdbscan divides infinities where points coincide
        expected, probabilities, *_ = _tree_to_labels(
            None, link_edges(np.column_stack([ends, weights])), min_cluster_size, method, single, False, epsilon, 0.0,
            max_cluster_size or 0,
        )  # fmt: skip
    found = HDBSCAN(
        min_cluster_size, min_samples, epsilon, max_cluster_size, cluster_selection_method=method,
        allow_single_cluster=single,
    ).fit(x)  # fmt: skip
    np.testing.assert_array_equal(found.labels_, expected)
    np.testing.assert_array_equal(found.probabilities_, probabilities)


@pytest.mark.parametrize("dims", [8, 32])
@pytest.mark.parametrize("method", ["eom", "leaf"])
def test_scene_labels_equal_hdbscans_tree_code(dims, method):
    x = make_scene(6144, seed=5).embeddings
    x = principal_components(x) if dims == 8 else x
    ends, weights, _ = tree(x)
    expected, probabilities, *_ = _tree_to_labels(
        None, link_edges(np.column_stack([ends, weights])), 30, cluster_selection_method=method
    )
    found = HDBSCAN(30, 5, cluster_selection_method=method).fit(x)
    np.testing.assert_array_equal(found.labels_, expected)
    np.testing.assert_array_equal(found.probabilities_, probabilities)
    assert found.labels_.max() > 5


# D: the same partition as other exact packages when equal edges merge at once


@pytest.mark.parametrize(("dims", "level"), [(8, "easy"), (8, "mid"), (8, "hard"), (32, "mid")])
def test_partition_equals_hdbscan_exact_and_quitefastmst(dims, level):
    x = make_scene(1536, level=level, seed=3).embeddings.astype(np.float64)
    x = principal_components(x) if dims == 8 else x
    ends, weights, _ = tree(x)
    labels = reference.labels_with_ties_merged(ends, weights, 10)
    exact = hdbscan.HDBSCAN(
        min_cluster_size=10,
        min_samples=5,
        algorithm="boruvka_kdtree",
        approx_min_span_tree=False,
        gen_min_span_tree=True,
    ).fit(x)
    other = exact._min_spanning_tree
    assert reference.same_partition(labels, with_our_weights(x, other[:, :2].astype(int), other[:, 2], weights, 10))
    distances, indices, *_ = quitefastmst.mst_euclid(x, 5)
    assert reference.same_partition(labels, with_our_weights(x, indices, distances, weights, 10))
    assert labels.max() > 3


def with_our_weights(x, ends, weights, ours, min_cluster_size):
    """Their edges, whose sorted weights must be ours but for rounding; equal edges are told apart by our bits."""
    order = np.argsort(weights)
    np.testing.assert_allclose(weights[order], ours, rtol=1e-7)
    distances = reference.pairwise_distances(x)
    core = tree(x)[2]
    mutual = np.maximum(distances[ends[:, 0], ends[:, 1]], np.maximum(core[ends[:, 0]], core[ends[:, 1]]))
    mutual = ours[np.clip(np.searchsorted(ours, mutual * (1 - 1e-13)), 0, len(ours) - 1)]  # to the last bit
    return reference.labels_with_ties_merged(ends, mutual, min_cluster_size)


def test_scikit_learn_counts_the_point_itself():
    x = principal_components(make_scene(1536, seed=4).embeddings.astype(np.float64))
    theirs = SklearnHDBSCAN(min_cluster_size=20, min_samples=6, copy=True).fit(x)
    weights = tree(x, min_samples=5)[1]
    np.testing.assert_allclose(theirs._single_linkage_tree_["value"], weights, rtol=1e-9)


# The rest of the face


def test_scenes_on_a_pool_equal_one_by_one():
    scenes = [blobs(n, 8, n) for n in (1, 7, 300, 2000, 64, 65, 1000)] + [blobs(500, 3, 1, np.float64)]
    for n_jobs in (1, 2, 7):
        for found, scene in zip(group_scenes(scenes, min_samples=None, n_jobs=n_jobs), scenes, strict=True):
            np.testing.assert_array_equal(found, group(scene, min_samples=None))
    assert group_scenes([]) == []


def test_fewer_points_than_a_cluster_are_noise():
    for n in (1, 2, 29):
        np.testing.assert_array_equal(group(blobs(n, 4), min_samples=None), np.full(n, -1))
    np.testing.assert_array_equal(group(blobs(29, 4), min_samples=29), np.full(29, -1))


@pytest.mark.parametrize("scale", [1e-100, 1e-30, 1e30, 1e120])
def test_scale_by_a_power_of_two_changes_nothing(scale):
    x = blobs(800, 5, 1, np.float64)
    scale = 2.0 ** np.round(np.log2(scale))
    ends, weights, core = tree(x)
    assert_identical(tree(x * scale), (ends, weights * scale, core * scale))


def test_offsets_cost_no_precision():
    x = np.round(blobs(800, 5, 1, np.float64) * 2**20) / 2**20
    assert_identical(tree(x + 2.0**20), tree(x))
