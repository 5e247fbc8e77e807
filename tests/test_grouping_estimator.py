"""The Python face of the grouping: scikit-learn's conventions, no copies, no waiting, and what it refuses."""

import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.utils.estimator_checks import parametrize_with_checks

from spatialprobe.probes import _grouping
from spatialprobe.probes.grouping import HDBSCAN, _embeddings, group, group_scenes, principal_components

POINTS = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)


@parametrize_with_checks([HDBSCAN()])
def test_scikit_learn_estimator_checks(estimator, check):
    check(estimator)


def test_parameters_round_trip():
    estimator = HDBSCAN(7, metric="cosine", n_jobs=2)
    assert clone(estimator).get_params() == estimator.get_params()
    assert estimator.set_params(alpha=2.0) is estimator
    assert repr(estimator) == "HDBSCAN(min_cluster_size=7, alpha=2.0, metric='cosine', n_jobs=2)"
    with pytest.raises(ValueError, match=r"wanted parameters among min_cluster_size, .* got eps"):
        estimator.set_params(eps=1)


def test_group_is_the_estimator_with_the_protocols_parameters():
    x = np.concatenate([POINTS * 0.05, POINTS * 0.05 + 3])
    np.testing.assert_array_equal(group(x), HDBSCAN(min_cluster_size=30, min_samples=5).fit_predict(x))
    assert set(group(x)) >= {0, 1}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_contiguous_floats_are_not_copied(dtype):
    x = POINTS.astype(dtype)
    x.flags.writeable = False
    assert _embeddings(x) is x


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: np.asfortranarray(x),
        lambda x: np.repeat(x, 2, 0)[::2],
        lambda x: x.astype(">f4"),
        lambda x: x.astype(object),
        lambda x: x.tolist(),
        lambda x: np.frombuffer(b"0" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape),  # misaligned
    ],
)
def test_other_layouts_are_converted(convert):
    np.testing.assert_array_equal(group(convert(POINTS), min_cluster_size=5), group(POINTS, min_cluster_size=5))


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int64, np.float16, np.bool_])
def test_other_numbers_are_taken_as_float64(dtype):
    x = (POINTS * 3).astype(dtype)
    np.testing.assert_array_equal(group(x, min_cluster_size=5), group(x.astype(np.float64), min_cluster_size=5))


def test_other_threads_run_meanwhile():
    x = np.random.default_rng(0).normal(size=(20000, 16)).astype(np.float32)
    done = threading.Event()

    def work():
        group(x)
        done.set()

    worker = threading.Thread(target=work)
    worker.start()
    turns = 0
    while not done.wait(0.001):
        turns += 1
    worker.join()
    assert turns > 20  # with the GIL held throughout, one or two


def test_import_needs_numpy_only_and_little_time():
    code = (
        "import sys, time, numpy; t = time.process_time(); import spatialprobe.probes.grouping;"
        "print(time.process_time() - t, *({'sklearn', 'scipy', 'torch', 'pandas'} & set(sys.modules)))"
    )
    seconds, *loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert not loaded
    assert float(seconds) < 0.2


# Bad input


def with_value(value, row=13, column=1, dtype=np.float32):
    x = POINTS.astype(dtype)
    x[[row, 50], column] = value
    return x


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (with_value(np.nan), "wanted finite values.*got NaN first in row 13, column 1"),
        (with_value(np.inf), r"got infinity \(inf\) first in row 13"),
        (with_value(-np.inf, dtype=np.float64), r"got infinity \(inf\) first in row 13"),
        (with_value(1e200, dtype=np.float64), "at most 1e150, got a larger value first in row 13"),
        (POINTS[0], r"wanted 2 dimensions \[N, D\], got 1"),
        (POINTS[None], r"wanted 2 dimensions \[N, D\], got 3"),
        (np.float32(1), r"wanted 2 dimensions \[N, D\], got 0"),
        (POINTS[:0], "wanted at least 1 row, got 0 rows"),
        (POINTS[:, :0], r"0 feature\(s\) \(shape=\(200, 0\)\)"),
        (POINTS.astype(complex), "Complex data not supported"),
        (np.array([["a", "b"]]), "wanted numbers, got dtype <U1"),
        (np.array([[1, "b"]], dtype=object), "wanted numbers, got an object that is none"),
    ],
)
def test_bad_embeddings_are_refused(x, match):
    for call in (group, lambda x: group_scenes([POINTS, x]), lambda x: principal_components(x, 1), HDBSCAN().fit):
        with pytest.raises(ValueError, match=match):
            call(x)


def test_bad_scene_is_named():
    with pytest.raises(ValueError, match="scene 2: embeddings: wanted finite"):
        group_scenes([POINTS, POINTS, with_value(np.nan)])


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"min_cluster_size": 1}, "min_cluster_size: wanted an integer of at least 2, got 1"),
        ({"min_cluster_size": -5}, "min_cluster_size: wanted an integer of at least 2, got -5"),
        ({"min_cluster_size": 2.5}, "min_cluster_size: wanted an integer of at least 2, got 2.5"),
        ({"min_samples": 0}, "min_samples: wanted an integer of at least 1, got 0"),
        ({"min_samples": 201}, r"min_samples: wanted at most the number of rows \(200\), got 201"),
        ({"min_samples": 10**30}, "min_samples: wanted at most the number of rows"),
        ({"min_samples": True}, "min_samples: wanted an integer"),
        ({"cluster_selection_epsilon": -0.1}, "cluster_selection_epsilon: wanted a finite number >= 0, got -0.1"),
        ({"cluster_selection_epsilon": np.nan}, "cluster_selection_epsilon: wanted a finite number >= 0, got nan"),
        ({"cluster_selection_epsilon": "1"}, "cluster_selection_epsilon: wanted a number, got '1'"),
        ({"max_cluster_size": 0}, "max_cluster_size: wanted an integer of at least 1, got 0"),
        ({"alpha": 0.0}, "alpha: wanted a number in .* got 0"),
        ({"alpha": -1.0}, "alpha: wanted a number in .* got -1"),
        ({"alpha": np.inf}, "alpha: wanted a number in .* got inf"),
        ({"cluster_selection_method": "mass"}, "cluster_selection_method: wanted one of eom, leaf, got 'mass'"),
        ({"metric": "manhattan"}, "metric: wanted one of euclidean, cosine, got 'manhattan'"),
        ({"n_jobs": 0}, "n_jobs: wanted None, -1 or 1 to 4096, got 0"),
        ({"n_jobs": -2}, "n_jobs: wanted None, -1 or 1 to 4096, got -2"),
    ],
)
def test_bad_parameters_are_refused(parameters, match):
    with pytest.raises(ValueError, match=match):
        HDBSCAN(**parameters).fit(POINTS)


def test_zero_rows_have_no_direction():
    x = POINTS.copy()
    x[4] = 0
    with pytest.raises(
        ValueError, match="rows of norm above 1e-145 for the cosine metric, got a smaller norm first in row 4"
    ):
        group(x, metric="cosine")


ARRAYS = [POINTS, POINTS[:0], POINTS.T, POINTS[::2], POINTS.astype(np.float64), POINTS.astype(">f8"), [POINTS]]
MAPS = [np.zeros((2, 3, 4), np.int64), np.zeros((2, 3, 4), np.uint16)[:, :, ::2], np.zeros((3, 0, 2), int)]
PARAMETERS = _grouping.Parameters(min_cluster_size=5, min_samples=5)
JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5), st.binary(max_size=5),
    st.sampled_from(ARRAYS), st.sampled_from(MAPS),
    st.sampled_from(["euclidean", "cosine", "eom", "leaf", "auto", "prim", PARAMETERS]),
)  # fmt: skip


@settings(max_examples=600, deadline=None, derandomize=True)
@given(
    st.sampled_from(["cluster", "cluster_batch", "spanning_tree", "labels_of_tree", "principal_components",
                     "temporal_overlap", "Parameters"]),
    st.lists(JUNK, max_size=6),
    st.dictionaries(st.sampled_from(["threads", "min_cluster_size", "min_samples", "alpha", "search", "metric"]), JUNK,
                    max_size=3),
)  # fmt: skip
def test_junk_given_to_the_binding_raises(name, arguments, keywords):
    try:
        getattr(_grouping, name)(*arguments, **keywords)
    except (ValueError, TypeError):
        pass  # TypeError: no overload takes such arguments; the module's own functions convert before they call


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_any_edges_given_to_the_tree_code_are_refused_or_labelled(data):
    m = data.draw(st.integers(0, 12))
    ends = data.draw(st.lists(st.tuples(st.integers(-1, m + 1), st.integers(-1, m + 1)), min_size=m, max_size=m))
    weights = sorted(data.draw(st.lists(st.floats(-1, 10), min_size=m, max_size=m)))
    parameters = _grouping.Parameters(min_cluster_size=2, min_samples=1)
    try:
        labels, _ = _grouping.labels_of_tree(np.array(ends, np.int64).reshape(-1, 2), np.array(weights), parameters)
    except ValueError as error:
        assert str(error).startswith("edges: wanted")
    else:
        assert len(labels) == m + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 10**400}, "alpha: wanted a number that fits 64 bits"),
        ({"cluster_selection_epsilon": 10**400}, "cluster_selection_epsilon: wanted a number that fits"),
        ({"n_jobs": np.array([1, 2])}, "n_jobs: wanted None, -1 or 1 to 4096"),
        ({"n_jobs": -1.0}, "n_jobs: wanted"),
        ({"allow_single_cluster": "False"}, "allow_single_cluster: wanted True or False"),
        ({"allow_single_cluster": np.array([1, 2])}, "allow_single_cluster: wanted True or False"),
    ],
)
def test_odd_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        HDBSCAN(**arguments).fit(np.random.default_rng(0).normal(size=(20, 3)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1.0, 2.0], [3.0]], "wanted a matrix"),
        (np.array([[10**400, 1], [2, 3]], dtype=object), "wanted numbers"),
        (np.random.default_rng(0).normal(size=(300, 2)) * 1e-161, "largest magnitude of at least 1e-30"),
    ],
)
def test_odd_embeddings_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        HDBSCAN().fit(values)


@pytest.mark.parametrize("scenes", [None, 5])
def test_scenes_must_be_a_list(scenes):
    with pytest.raises(ValueError, match="scenes: wanted a list"):
        group_scenes(scenes)


@pytest.mark.parametrize("scale", [1e-29, 1e-20, 1.0, 1e38, 1e80, 1e140])
def test_principal_components_at_any_scale(scale):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 8)) @ rng.normal(size=(8, 8))
    scaled = principal_components(x * scale, 2) / scale
    np.testing.assert_allclose(scaled, principal_components(x, 2), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("shape", "count", "message"),
    [
        ((5, 3), 4, r"columns \(3\), got 4"),
        ((2, 3), 3, r"rows \(2\) and columns \(3\), got 3"),
        ((5, 513), 2, "at most 512 columns, got 513"),
        ((5, 3), 10**30, "got 1000000000000000000000000000000"),
    ],
)
def test_too_many_components_or_columns(shape, count, message):
    with pytest.raises(ValueError, match=message):
        principal_components(np.ones(shape), count)
