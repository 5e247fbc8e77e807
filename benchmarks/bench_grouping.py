"""Exact HDBSCAN against the packages that do the same, on scenes like an instance head's, in one interleaved run.

    python benchmarks/bench_grouping.py            about three minutes on two quiet cores
    python benchmarks/bench_grouping.py --big      also N = 99,456: some minutes more
    python benchmarks/bench_grouping.py --record   writes results/grouping-cpu.json

Every contender runs once per round, in turn, so that what else the machine does hits all alike. Wall time and CPU
seconds are medians over the rounds; ratios are of CPU seconds, because a contender's threads may hide on idle cores.
Each exact contender's spanning tree or labels are compared with ours: they differ only in the order of equal edges.
"""

# ruff: noqa: E402  (thread counts are read when libraries load)
import os

for _variable in ("OMP", "OPENBLAS", "MKL", "NUMBA", "RAYON"):
    os.environ[f"{_variable}_NUM_THREADS"] = "1"

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from spatialprobe.probes import _grouping
from spatialprobe.probes.grouping import group, group_scenes, principal_components, temporal_overlap

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from grouping_reference import labels_with_ties_merged, same_partition
from grouping_scenes import make_scene

RESULTS = Path(__file__).parent / "results"
MIN_CLUSTER_SIZE, MIN_SAMPLES = 30, 5  # of the study


# Contenders: each takes the embeddings, runs on one thread and returns labels and, if it can, (ends, weights)


def hdbscan_package(**options) -> Callable:
    import hdbscan

    def run(x):
        found = hdbscan.HDBSCAN(
            MIN_CLUSTER_SIZE, MIN_SAMPLES, core_dist_n_jobs=1, gen_min_span_tree=True, **options
        ).fit(x)
        return found.labels_, (found._min_spanning_tree[:, :2].astype(int), found._min_spanning_tree[:, 2])

    return run


def scikit_learn() -> Callable:
    from sklearn.cluster import HDBSCAN as Theirs

    def run(x):
        found = Theirs(MIN_CLUSTER_SIZE, min_samples=MIN_SAMPLES + 1, n_jobs=1, copy=True).fit(x)
        return found.labels_, (None, found._single_linkage_tree_["value"])

    return run


def quitefastmst_with_hdbscans_tree() -> Callable:
    import quitefastmst
    from hdbscan._hdbscan_linkage import label
    from hdbscan.hdbscan_ import _tree_to_labels

    quitefastmst.omp_set_num_threads(1)

    def run(x):
        weights, ends, *_ = quitefastmst.mst_euclid(x, MIN_SAMPLES)
        edges = np.column_stack([ends, weights]).astype(np.float64)
        return _tree_to_labels(None, label(edges[np.argsort(weights)]), MIN_CLUSTER_SIZE)[0], (ends, weights)

    return run


def fast_hdbscan_exact() -> Callable:
    import numba
    from fast_hdbscan.boruvka import parallel_boruvka
    from fast_hdbscan.hdbscan import clusters_from_spanning_tree
    from fast_hdbscan.numba_kdtree import build_kdtree

    numba.set_num_threads(1)
    no_weights = np.empty(1, dtype=np.float32)

    def run(x):
        tree = build_kdtree(x)
        edges, *_ = parallel_boruvka(tree, 1, min_samples=MIN_SAMPLES, sample_weights=no_weights, reproducible=False)
        return clusters_from_spanning_tree(edges, min_cluster_size=MIN_CLUSTER_SIZE)[0], (None, edges[:, 2])

    return run


def fast_hdbscan_public() -> Callable:
    import fast_hdbscan

    return lambda x: (fast_hdbscan.fast_hdbscan(x, min_samples=MIN_SAMPLES, min_cluster_size=MIN_CLUSTER_SIZE)[0], None)


def hdbscan_rs() -> Callable:
    from hdbscan_rs import HDBSCAN as Theirs

    return lambda x: (np.asarray(Theirs(min_cluster_size=MIN_CLUSTER_SIZE, min_samples=MIN_SAMPLES + 1).fit_predict(
        x.astype(np.float64))), None)  # fmt: skip


def ours(n_jobs: int) -> Callable:
    return lambda x: (group(x, n_jobs=n_jobs), None)


@dataclass(frozen=True)
class Contender:
    make: Callable[[], Callable]
    exact: bool
    largest: dict[int, int] = field(
        default_factory=lambda: {8: 10**6, 32: 20000}
    )  # by dims; slower ones would take hours


CONTENDERS = {
    "ours, 1 thread": Contender(lambda: ours(1), True),
    "ours, 2 threads": Contender(lambda: ours(2), True),
    "hdbscan, best": Contender(hdbscan_package, False),
    "hdbscan, exact": Contender(
        lambda: hdbscan_package(algorithm="boruvka_kdtree", approx_min_span_tree=False), True, {8: 20000, 32: 20000}
    ),
    "scikit-learn": Contender(scikit_learn, True, {8: 20000, 32: 20000}),
    "fast_hdbscan, exact": Contender(fast_hdbscan_exact, True),
    "fast_hdbscan, shortcut": Contender(fast_hdbscan_public, False, {8: 0, 32: 20000}),
    "quitefastmst + hdbscan's tree": Contender(quitefastmst_with_hdbscans_tree, True),
    "hdbscan-rs": Contender(hdbscan_rs, False),
}


def embeddings(points: int, dims: int, level: str = "mid", seed: int = 0) -> np.ndarray:
    x = make_scene(points, level=level, seed=seed).embeddings
    return x if dims == 32 else principal_components(x, dims)


def race(points: int, dims: int, rounds: int) -> dict:
    """All contenders that can take the size, in turn, `rounds` times."""
    x = embeddings(points, dims)
    runners = {}
    for name, contender in CONTENDERS.items():
        if points > contender.largest[dims]:
            continue
        try:
            runners[name] = contender.make()
        except ImportError as error:
            say(f"  {name} is not installed: {error}")
            continue
        runners[name](embeddings(1536, dims, seed=7))  # compiles, starts threads
    wall, cpu, results = ({name: [] for name in runners} for _ in range(3))
    for _ in range(rounds):
        for name, run in runners.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            result = run(x)
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - start_cpu)
            results[name] = result
    return {
        "points": points,
        "dims": dims,
        "dtype": str(x.dtype),
        "rounds": rounds,
        "contenders": {
            name: {"wall_s": statistics.median(wall[name]), "cpu_s": statistics.median(cpu[name])}
            | agreement(x, results[name], results["ours, 1 thread"][0], CONTENDERS[name].exact)
            for name in runners
        },
    }


def agreement(x: np.ndarray, result: tuple, our_labels: np.ndarray, exact: bool) -> dict:
    """How many points' labels differ (renamed as well as can be); of exact contenders, whether the tree is ours."""
    labels, tree = result
    agreed = {"points_that_differ": int((best_renaming(labels, our_labels) != our_labels).sum())}
    if not exact:
        return agreed
    if tree is None:
        assert np.array_equal(labels, our_labels), "threads changed the labels"
        return agreed
    their_ends, their_weights = tree
    parameters = _grouping.Parameters(min_cluster_size=MIN_CLUSTER_SIZE, min_samples=MIN_SAMPLES)
    ends, weights, core = _grouping.spanning_tree(x, "euclidean", parameters)
    single = 1e-5 if x.dtype == np.float32 else 1e-10  # some compute in float32 what comes in float32
    np.testing.assert_allclose(np.sort(their_weights), weights, rtol=single, atol=1e-7)
    if their_ends is not None:
        exact_weights = mutual_reachability(x, np.asarray(their_ends, int), core)
        np.testing.assert_allclose(np.sort(exact_weights), weights, rtol=1e-12)
        merged = labels_with_ties_merged(ends, weights, MIN_CLUSTER_SIZE)
        snapped = weights[np.clip(np.searchsorted(weights, exact_weights * (1 - 1e-13)), 0, len(weights) - 1)]
        theirs = labels_with_ties_merged(np.asarray(their_ends, int), snapped, MIN_CLUSTER_SIZE)
        assert same_partition(merged, theirs), "another partition although equal edges merge at once"
        agreed["same_partition_with_ties_merged"] = True
    return agreed


def mutual_reachability(x: np.ndarray, ends: np.ndarray, core: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    distances = np.sqrt(((x[ends[:, 0]] - x[ends[:, 1]]) ** 2).sum(1))
    return np.maximum(distances, np.maximum(core[ends[:, 0]], core[ends[:, 1]]))


def best_renaming(labels: np.ndarray, ours: np.ndarray) -> np.ndarray:
    """Each of their clusters under the name of the cluster of ours that it shares most points with."""
    renamed = np.full_like(labels, -1)
    for name in np.unique(labels[labels >= 0]):
        renamed[labels == name] = np.bincount(ours[labels == name] + 1).argmax() - 1
    return renamed


# What the numbers are to be held against


def peak_multiply_adds() -> float:
    """Fused float32 multiply-adds per second of one core, as its BLAS reaches them."""
    a = np.random.default_rng(0).normal(size=(1024, 1024)).astype(np.float32)
    seconds = []
    for _ in range(20):
        start = time.process_time()
        a @ a
        seconds.append(time.process_time() - start)
    return 1024**3 / min(seconds)


def two_threads(points: int, dims: int, rounds: int) -> dict:
    """One scene on two threads, and a batch of eight on a pool of two, against one; wall time."""
    x = embeddings(points, dims)
    scenes = [x] * 8
    work = {
        "scene_1": lambda: group(x), "scene_2": lambda: group(x, n_jobs=2),
        "batch_1": lambda: group_scenes(scenes, n_jobs=1), "batch_2": lambda: group_scenes(scenes, n_jobs=2),
    }  # fmt: skip
    wall = {name: [] for name in work}
    for _ in range(rounds):
        for name, run in work.items():
            start = time.perf_counter()
            run()
            wall[name].append(time.perf_counter() - start)
    medians = {f"{name}_wall_s": statistics.median(seconds) for name, seconds in wall.items()}
    return {"points": points, "dims": dims, "load_average": os.getloadavg()[0]} | medians


def fresh_process(points: int, dims: int) -> dict:
    """Import seconds beyond numpy's and peak memory beyond the input's, in a new process."""
    code = f"""
import time, numpy as np
start = time.perf_counter()
from spatialprobe.probes.grouping import group
imported = time.perf_counter() - start
x = np.load({str(RESULTS / ".embeddings.npy")!r})
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024
open("/proc/self/clear_refs", "w").write("5")  # resets the peak
before = status("VmRSS")
group(x)
print(imported, status("VmHWM") - before)
"""
    RESULTS.mkdir(exist_ok=True)
    np.save(RESULTS / ".embeddings.npy", embeddings(points, dims))
    runs = [subprocess.check_output([sys.executable, "-c", code], text=True).split() for _ in range(5)]
    (RESULTS / ".embeddings.npy").unlink()
    return {
        "points": points, "dims": dims,
        "import_s": statistics.median(float(run[0]) for run in runs),
        "peak_extra_mb": max(float(run[1]) for run in runs),
    }  # fmt: skip


def quality(scenes: int) -> dict:
    """What the published clustering's approximation (hdbscan's default) changes in T-mIoU, and what the order of equal
    edges changes (hdbscan's exact option against ours)."""
    import hdbscan

    changes, of_ties, differing = [], [], []
    for seed in range(scenes):
        scene = make_scene(12480, level=("easy", "mid", "hard")[seed % 3], seed=seed)
        x = principal_components(scene.embeddings)

        def miou(labels, truth=scene.truth):
            return temporal_overlap(labels.reshape(truth.shape), truth).miou

        default, exact = (
            hdbscan.HDBSCAN(MIN_CLUSTER_SIZE, MIN_SAMPLES, core_dist_n_jobs=1, approx_min_span_tree=a).fit_predict(x)
            for a in (True, False)
        )
        ours = group(x)
        changes.append(abs(miou(ours) - miou(default)))
        of_ties.append(abs(miou(ours) - miou(exact)))
        differing.append(int((best_renaming(default, ours) != ours).sum()))
    return {
        "points": 12480, "dims": 8, "scenes": scenes, "median_change": statistics.median(changes),
        "largest_change": max(changes), "changes": [round(c, 4) for c in changes],
        "changes_by_ties_alone": [round(c, 4) for c in of_ties],
        "median_points_that_differ": statistics.median(differing), "largest_points_that_differ": max(differing),
    }  # fmt: skip


def overlap_in_numpy(predicted: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """T-mIoU and T-SR as one would write them in numpy: masks, logical operations, sums."""
    clusters, instances = np.unique(predicted[predicted >= 0]), np.unique(truth[truth != 0])
    cluster_masks = np.stack([(predicted == c).any(0).ravel() for c in clusters])
    means, success = [], []
    for g in instances:
        mask = truth == g
        together = mask.any(0).ravel()
        shared = (cluster_masks & together).sum(1)
        best = predicted == clusters[np.argmax(shared / (cluster_masks | together).sum(1))]
        views = mask.any((1, 2))
        ious = (mask & best)[views].sum((1, 2)) / (mask | best)[views].sum((1, 2))
        means.append(ious.mean())
        success.append((ious >= 0.5).all())
    return float(np.mean(means)), float(np.mean(success))


def race_overlap(rounds: int) -> dict:
    scene = make_scene(12480)
    labels = group(principal_components(scene.embeddings)).reshape(scene.truth.shape)
    rows, columns = np.arange(480) * 30 // 480, np.arange(832) * 52 // 832
    fine = truth_at_pixels(scene.truth)
    upsampled = np.ascontiguousarray(labels[:, rows][:, :, columns])
    timings: dict[str, list[float]] = {"ours": [], "ours, labels on the token grid": [], "numpy": []}
    for _ in range(rounds):
        for name, run in (
            ("ours", lambda: temporal_overlap(upsampled, fine)),
            ("ours, labels on the token grid", lambda: temporal_overlap(labels, fine)),
            ("numpy", lambda: overlap_in_numpy(upsampled, fine)),
        ):
            start = time.process_time()
            result = run()
            timings[name].append(time.process_time() - start)
            if name == "numpy":
                found = temporal_overlap(labels, fine)
                np.testing.assert_allclose([found.miou, found.success_rate], result, rtol=1e-12)
    return {"shape": [8, 480, 832], "dtypes": [str(labels.dtype), str(fine.dtype)]} | {
        f"{name}, cpu_s": statistics.median(seconds) for name, seconds in timings.items()
    }


def truth_at_pixels(truth: np.ndarray) -> np.ndarray:
    """Masks [8, 480, 832] with ragged borders: every pixel reads a cell up to half a cell away."""
    rng = np.random.default_rng(0)
    shift = np.cumsum(rng.integers(-1, 2, (2, 480, 832)), axis=2) // 4 % 16 - 8
    y = np.clip((np.arange(480)[:, None] + shift[0]) // 16, 0, 29)
    x = np.clip((np.arange(832)[None] + shift[1]) // 16, 0, 51)
    return truth[:, y, x].astype(np.uint16)


def race_components(rounds: int) -> dict:
    from sklearn.decomposition import PCA

    x = embeddings(12480, 32)
    timings: dict[str, list[float]] = {"ours": [], "scikit-learn": []}
    for _ in range(rounds):
        for name, run in (
            ("ours", lambda: principal_components(x)),
            ("scikit-learn", PCA(8, random_state=0).fit_transform),
        ):
            start = time.process_time()
            run() if name == "ours" else run(x)
            timings[name].append(time.process_time() - start)
    return {"points": 12480, "dims": [32, 8]} | {f"{k}, cpu_s": statistics.median(v) for k, v in timings.items()}


# The report


def machine() -> dict:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").open() if line.startswith("model name")), "?"
    )
    packages = ("numpy", "scikit-learn", "hdbscan", "fast_hdbscan", "quitefastmst", "hdbscan-rs", "numba")
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "cpu": model, "cores": len(os.sched_getaffinity(0)), "instruction_set": _grouping.instruction_sets()[0],
        "load_average": os.getloadavg()[0], "python": platform.python_version(), "versions": versions,
    }  # fmt: skip


def say(line: str) -> None:
    print(line, flush=True)


def report_race(result: dict, peak: float) -> None:
    points, dims = result["points"], result["dims"]
    floor = points**2 * dims / 2 / peak
    mine = result["contenders"]["ours, 1 thread"]
    say(f"\nN={points:,} D={dims} {result['dtype']}, medians of {result['rounds']}")
    say(f"  {'':32}{'wall s':>9}{'CPU s':>9}{'CPU/ours':>10}  points that differ")
    for name, row in result["contenders"].items():
        row["cpu_ratio"], row["wall_ratio"] = row["cpu_s"] / mine["cpu_s"], row["wall_s"] / mine["wall_s"]
        differ = str(row["points_that_differ"])
        if row.get("same_partition_with_ties_merged"):
            differ += " (same partition with ties merged)"
        say(f"  {name:32}{row['wall_s']:9.4f}{row['cpu_s']:9.4f}{row['cpu_ratio']:10.1f}  {differ}")
    result["floor_s"], result["floor_share"] = floor, floor / mine["cpu_s"]
    share = f"{100 * result['floor_share']:.0f}% of ours"
    say(f"  arithmetic floor N^2 D/2 at {peak / 1e9:.0f} GFMA/s: {floor:.4f} s, {share}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--big", action="store_true", help="also N = 99,456")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scenes", type=int, default=15, help="for the change in T-mIoU")
    parser.add_argument("--record", action="store_true", help="write results/grouping-cpu.json")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    peak = peak_multiply_adds()
    result: dict = {"machine": machine(), "peak_gfma_per_s": peak / 1e9, "races": []}
    sizes = [(6144, 8, options.rounds), (12480, 8, options.rounds), (12480, 32, min(options.rounds, 3))]
    if options.big:
        sizes += [(49920, 8, 2), (99456, 8, 2)]
    for points, dims, rounds in sizes:
        result["races"].append(race(points, dims, rounds))
        report_race(result["races"][-1], peak)
    for name, measured in (
        ("two_threads", [two_threads(12480, dims, 15) for dims in (8, 32)]),
        ("fresh_process", [fresh_process(12480, dims) for dims in (8, 32)]),
        ("quality", quality(options.scenes)),
        ("temporal_overlap", race_overlap(options.rounds)),
        ("principal_components", race_components(options.rounds)),
    ):
        result[name] = measured
        for row in measured if isinstance(measured, list) else [measured]:
            say(
                f"\n{name}: "
                + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
            )
    if options.record:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "grouping-cpu.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
