"""T-mIoU, T-SR and principal components against slow definitions and scikit-learn."""

import grouping_reference as reference
import numpy as np
import pytest
from grouping_scenes import make_scene
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from spatialprobe.probes.grouping import group, principal_components, temporal_overlap


def assert_equal_overlap(found, expected):
    assert found.instances == expected[2]
    np.testing.assert_allclose([found.miou, found.success_rate], expected[:2], rtol=1e-12)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_overlap_equals_the_definition(data):
    views, h, w = (data.draw(st.integers(1, 6)) for _ in range(3))
    up_h, up_w = data.draw(st.integers(h, 3 * h)), data.draw(st.integers(w, 3 * w))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    ids = rng.integers(-(2**40), 2**40, 4) if data.draw(st.booleans()) else np.array([0, 1, 2, 7])
    predicted = rng.choice(np.append(ids, -1), (views, h, w))
    truth_ids = np.abs(ids) % 200
    truth = rng.choice(truth_ids, (views, up_h, up_w)).astype(
        data.draw(st.sampled_from(["u1", "u2", "i4", "i8", "i2"]))
    )
    ignore, threshold = int(rng.choice(truth_ids)), data.draw(st.sampled_from([0.0, 0.2, 0.5, 1.0]))
    rows, columns = np.arange(up_h) * h // up_h, np.arange(up_w) * w // up_w
    upsampled = predicted[:, rows][:, :, columns]
    expected = reference.temporal_overlap(upsampled, truth, ignore, threshold)
    assert_equal_overlap(temporal_overlap(predicted, truth, ignore=ignore, threshold=threshold), expected)
    assert_equal_overlap(temporal_overlap(upsampled, truth, ignore=ignore, threshold=threshold), expected)


def test_overlap_of_a_scene():
    scene = make_scene(6144, seed=1)
    labels = group(principal_components(scene.embeddings)).reshape(scene.truth.shape)
    assert_equal_overlap(temporal_overlap(labels, scene.truth), reference.temporal_overlap(labels, scene.truth))
    perfect = temporal_overlap(scene.truth, scene.truth)
    assert (perfect.miou, perfect.success_rate) == (1.0, 1.0)
    nothing = temporal_overlap(np.full_like(labels, -1), scene.truth)
    assert (nothing.miou, nothing.success_rate, nothing.instances) == (0.0, 0.0, perfect.instances)


def test_a_scene_without_instances_has_no_score():
    empty = temporal_overlap(np.zeros((1, 2, 2), np.int64), np.zeros((1, 2, 2), np.uint16))
    assert np.isnan(empty.miou)
    assert np.isnan(empty.success_rate)
    assert empty.instances == 0


MAPS = np.zeros((2, 3, 4), np.int64)


@pytest.mark.parametrize(
    ("predicted", "truth", "options", "match"),
    [
        (MAPS[0], MAPS, {}, "predicted: wanted 3 dimensions .* got 2"),
        (MAPS[:1], MAPS, {}, r"predicted: wanted the truth's views .* \[2, 3, 4\], got \[1, 3, 4\]"),
        (MAPS, MAPS[:, :2], {}, r"predicted: wanted .* no finer than its own, \[2, 2, 4\], got \[2, 3, 4\]"),
        (MAPS, MAPS[:, :0], {}, r"truth: wanted .* nothing empty, got \[2, 0, 4\]"),
        (MAPS * 1.0, MAPS, {}, "predicted: wanted integers .* got float64"),
        (MAPS, MAPS.astype(np.uint64), {}, "truth: wanted integers .* got uint64"),
        (MAPS, MAPS, {"threshold": 1.5}, r"threshold: wanted a number in \[0, 1\], got 1.5"),
        (MAPS, MAPS, {"ignore": 0.0}, "ignore: wanted an integer"),
    ],
)
def test_bad_label_maps_are_refused(predicted, truth, options, match):
    with pytest.raises(ValueError, match=match):
        temporal_overlap(predicted, truth, **options)


def test_too_many_pairs_are_refused():
    labels = np.arange(12000).reshape(1, 100, 120)
    with pytest.raises(ValueError, match=r"wanted at most 2\*\*27 pairs .* got 12000 clusters and 11999 instances"):
        temporal_overlap(labels, labels)


@pytest.mark.parametrize(("n", "dims", "components"), [(50, 1, 1), (300, 8, 8), (500, 13, 3), (400, 64, 8), (9, 32, 8)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_principal_components_equal_scikit_learn(n, dims, components, dtype):
    rng = np.random.default_rng(n)
    x = (rng.normal(size=(n, dims)) @ rng.normal(size=(dims, dims)) + 3).astype(dtype)
    expected = PCA(components, svd_solver="full").fit_transform(x.astype(np.float64))
    found = principal_components(x, components)
    assert found.dtype == dtype
    tolerance = 1e-6 if dtype == np.float32 else 1e-10
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())
    np.testing.assert_array_equal(found, principal_components(x, components, n_jobs=3))


@pytest.mark.parametrize(("components", "match"), [(0, "at least 1, got 0"), (5, r"columns \(4\), got 5")])
def test_bad_component_counts_are_refused(components, match):
    with pytest.raises(ValueError, match=match):
        principal_components(np.ones((10, 4)), components)
