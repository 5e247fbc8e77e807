"""Every task through `train` on stores on disk: features that hold the answer, noise, grids, processes, wrong input."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from probe_data import CHANNELS, FRAMES, SAMPLING, K, write_labels, write_store
from study_layouts import unproject

from spatialprobe.engine.demo.scene_files import save_tensors
from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.types import FeatureSpec, FrameSelection, tensor_name
from spatialprobe.kernels.pool_features import finish
from spatialprobe.probes.labels import DL3DVLabels, Labels, ScanNetLabels
from spatialprobe.probes.loading.sampling import generator
from spatialprobe.probes.loop import evaluate, train
from spatialprobe.probes.results import Result, read_results
from spatialprobe.probes.tasks.geometry import GEOMETRY, GeometryFacts, geometry_targets
from spatialprobe.probes.tasks.instance import INSTANCE
from spatialprobe.probes.tasks.tagging import TAGGING

ALL_VIEWS = SAMPLING | {"views": 3}  # frames 0, 1, 5
SMALL = {"embed": 16, "heads": 2, "batch": 8, "epochs": 2, "warmup": 0.5, "dropout": 0.0}
TAGS = SMALL | SAMPLING | {"depth": 0, "decoder_width": 16, "decoder_heads": 2, "decoder_layers": 1}
TAGS["decoder_dropout"] = 0.0
INSTANCES = SMALL | ALL_VIEWS | {"lr": 1e-2, "dims": 8, "components": 4, "pixels": 256, "min_cluster_size": 6}
DENSE = {"features": 16, "stages": (8, 8, 8, 8), "camera_layers": 1, "refinements": 2, "out_size": "4x6"}


@pytest.fixture(scope="module")
def labels(tmp_path_factory) -> ScanNetLabels:
    """16 clips to train on and 5 others. Every pixel shows an object, since no loss says what background becomes."""
    labels = write_labels(tmp_path_factory.mktemp("labels") / "scannet", clips=21)
    for clip_id in labels.ids():
        path = labels.path(clip_id) / "instance_masks.npy"
        np.save(path, np.maximum(np.load(path), 1))
    return labels


@pytest.fixture(scope="module")
def answers(labels, tmp_path_factory) -> FeatureStore:
    return write_store(tmp_path_factory.mktemp("store") / "answers", labels)


@pytest.fixture(scope="module")
def noise(labels, tmp_path_factory) -> FeatureStore:
    return write_store(tmp_path_factory.mktemp("store") / "noise", labels, answers=False, seed=1)


def numbers(result: Result) -> list[float]:
    return [x for row in [*result.curve, result.metrics] for x in row.values()]


# -- instance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 1])
def test_instances_in_the_features_are_found(depth, answers, labels):
    (result,) = train(INSTANCE, answers, labels, depth=depth, **{**INSTANCES, "epochs": 20})
    assert result.metrics["T-mIoU"] > 0.97
    assert result.metrics["T-SR"] > 0.97
    assert result.metrics["scenes_scored"] == 5


def test_noise_finds_no_instance_better_than_chance(noise, labels):
    """A group that knows nothing of an instance covers its share of the group of everything, at most."""
    (result,) = train(INSTANCE, noise, labels, depth=1, **{**INSTANCES, "epochs": 20})
    shares = []
    for clip_id in labels.ids("val"):
        masks = labels.read(clip_id, [0, 1, 5], ("instance_masks",))["instance_masks"]
        for instance in masks.unique()[1:]:
            of_each = (masks == instance).float().mean((1, 2))
            shares.append(of_each[of_each > 0].mean().item())
    assert result.metrics["T-mIoU"] < np.mean(shares) + 0.05
    assert result.metrics["T-SR"] < 0.05


def test_each_instance_probe_of_a_grid_ends_as_it_would_alone(answers, labels):
    grid = {"lr": [1e-3, 1e-2], "seed": [1, 2], "margin": [0.5]}
    settings = {name: value for name, value in INSTANCES.items() if name not in grid} | {"depth": 1}
    together = train(INSTANCE, answers, labels, grid=grid, **settings)
    assert len({tuple(numbers(r)) for r in together}) == 4, "settings make no difference"
    for result in together:
        chosen = {"lr": result.config["lr"], "seed": result.config["seed"], "margin": 0.5}
        (alone,) = train(INSTANCE, answers, labels, **settings | chosen)
        assert alone.config == result.config
        assert numbers(alone) == pytest.approx(numbers(result), rel=2e-4, abs=1e-4)


# -- geometry ---------------------------------------------------------------------------------------------------------


CELLS, PATCH = (4, 6), 4  # tokens, and pixels of the labels along a token's side


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> DL3DVLabels:
    """Files as DL3DV-processed has them, of depths that only the features can tell: each token's is its own."""
    root = tmp_path_factory.mktemp("scenes") / "DL3DV-processed"
    size = (CELLS[0] * PATCH, CELLS[1] * PATCH)
    intrinsic = np.array([[20.0, 0, size[1] / 2], [0, 20, size[0] / 2], [0, 0, 1]])
    for number in range(24):
        rng = generator("scene", number)
        depth = np.exp(0.5 * rng.standard_normal((FRAMES, *CELLS))).repeat(PATCH, 1).repeat(PATCH, 2)
        poses = np.tile(np.eye(4), (FRAMES, 1, 1))
        poses[:, :3, 3] = rng.standard_normal((FRAMES, 3))
        tensors = {
            "depthmaps": depth[..., None],
            "pointmaps": unproject(depth, intrinsic, poses),
            "confmaps": np.ones((*depth.shape, 1)),
            "intrinsic": np.broadcast_to(intrinsic, (FRAMES, 3, 3)),
            "extrinsic": np.linalg.inv(poses)[:, :3],
        }
        save_tensors(root / "1K" / f"scene{number:02d}.sft", {k: x.astype(np.float32) for k, x in tensors.items()})
    return DL3DVLabels(root)


def depth_store(root: Path, labels: Labels, *, answers: bool) -> FeatureStore:
    """Features [3, 4, 6, 24]: noise, or constants with the logarithm of the depth that training asks for as the first
    channel, whose size LayerNorm then hardly changes."""
    about = {"family": "wan", "weights": f"content:{answers}", "layers": (3,), "pool": CELLS}
    spec = FeatureSpec(**about, frames=FrameSelection(window=FRAMES, start="start_idx"))
    store, rows = FeatureStore.create(root, spec), [(f + 3) // 4 for f in range(FRAMES)]
    signs = torch.from_numpy(generator("signs").choice([-1.0, 1.0], CHANNELS).astype(np.float32))
    for clip_id in labels.ids():
        noise = generator("features", answers, clip_id).standard_normal((3, *CELLS, CHANNELS))
        x = torch.from_numpy(noise.astype(np.float32))
        if answers:
            x = signs + 0.05 * x
            read = {name: x[None] for name, x in labels.read(clip_id, [0, 1, 5], GEOMETRY.labels).items()}
            x[..., 0] = geometry_targets(read, GEOMETRY.defaults, GeometryFacts(*CELLS))["depth"][0].log()
        tensors = finish(x, torch.float16).named(tensor_name(3))
        store.write(clip_id, tensors, torch.tensor(rows), {"grid": [3, *CELLS], "rows_kept": [0, 1, 2], "padded": 0})
    return FeatureStore.open(root)


def test_depth_in_the_features_is_read_and_noise_gives_no_more_than_one_depth_everywhere(scenes, tmp_path):
    settings = SMALL | ALL_VIEWS | DENSE | {"depth": 0, "lr": 3e-3, "warmup": 2, "batch": 2, "val": scenes.ids()[::4]}
    known, unknown = (depth_store(tmp_path / str(there), scenes, answers=there) for there in (True, False))
    (read,) = train(GEOMETRY, known, scenes, **settings | {"epochs": 24})
    (guessed,) = train(GEOMETRY, unknown, scenes, **settings | {"epochs": 6})
    depths = [scenes.read(clip_id, [0, 1, 5], ("depth",))["depth"] for clip_id in settings["val"]]
    flat = np.mean([((depth.median() - depth).abs() / depth).mean().item() for depth in depths])
    assert read.metrics["AbsRel"] < 0.2 * flat
    assert read.metrics["delta_1.25"] > 0.97
    assert guessed.metrics["AbsRel"] > 0.9 * flat
    assert guessed.metrics["delta_1.25"] < 0.5


# -- the best epoch ---------------------------------------------------------------------------------------------------


def without_head_classes_in_val(root: Path) -> ScanNetLabels:
    """Classes 0 and 1 are there in every training clip, so they are the head, and in no validation clip."""
    labels = write_labels(root, clips=8)
    for clip_id in labels.ids():
        path = labels.path(clip_id) / f"tag_pixel_counts_{K}.npy"
        counts = np.load(path)
        counts[:, :2] = 1000 * clip_id.startswith("train")
        counts[:, 5] = 1000
        np.save(path, counts)
    return labels


def test_a_score_that_is_never_a_number_is_an_error(tmp_path):
    labels = without_head_classes_in_val(tmp_path / "labels")
    store = write_store(tmp_path / "store", labels)
    with pytest.raises(ValueError, match=r"AP_head of probe 0 was NaN in all 2 epochs.*2 validation clips lack"):
        train(TAGGING, store, labels, **TAGS)
    by_map = replace(TAGGING, score="mAP")
    (result,) = train(by_map, store, labels, out=tmp_path / "out", **TAGS)
    assert all(math.isnan(row["AP_head"]) for row in result.curve)
    (again,) = train(by_map, store, labels, out=tmp_path / "out", **TAGS)  # its checkpoint holds the NaN
    assert again.metrics == pytest.approx(result.metrics, nan_ok=True)
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written[0]["metrics"]["AP_head"] is None


class Scripted:
    """A metric of known values, one per epoch; the last is of the final evaluation."""

    def __init__(self, values: list[float]):
        self.values = values

    def update(self, outputs, targets) -> None:
        pass

    def result(self) -> dict[str, float]:
        return {"AP_head": self.values.pop(0)}


@pytest.mark.parametrize(
    ("scores", "higher", "best"),
    [
        ([math.nan, 0.5, math.nan, 0.4, 0.0], True, 1),
        ([0.2, math.nan, 0.3, math.nan, 0.0], True, 2),
        ([0.2, math.nan, 0.3, 0.1, 0.0], False, 3),
        ([0.2, 0.2, 0.1, 0.2, 0.0], True, 0),  # the earliest of equals
    ],
)
def test_the_best_epoch_is_that_of_the_best_number(scores, higher, best, answers, labels):
    values = list(scores)
    task = replace(TAGGING, metrics=lambda config, facts: Scripted(values), higher_is_better=higher)
    (result,) = train(task, answers, labels, **{**TAGS, "epochs": 4})
    assert result.best_epoch == best
    assert [row["AP_head"] for row in result.curve] == pytest.approx(scores[:4], nan_ok=True)


def test_patience_counts_epochs_without_a_number(answers, labels):
    values = [math.nan, 0.1, math.nan, math.nan, 0.0]
    task = replace(TAGGING, metrics=lambda config, facts: Scripted(values))
    (result,) = train(task, answers, labels, **{**TAGS, "epochs": 9, "patience": 2})
    assert (len(result.curve), result.best_epoch) == (4, 1)
    assert result.stopped == "no better score in 2 epochs"


# -- several processes ------------------------------------------------------------------------------------------------

PROCESS = """
import sys, torch
from dataclasses import asdict, replace
sys.path.insert(0, {tests!r})
from test_probe_tasks import TAGS
from spatialprobe.engine.store import FeatureStore
from spatialprobe.probes.labels import ScanNetLabels
from spatialprobe.probes.tasks.tagging import TAGGING
from spatialprobe.probes.loop import train
torch.set_num_threads(1)
rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method={meet!r}, rank=rank, world_size=2)
calls = 0

def loss(outputs, targets, config, generator):
    global calls
    found = TAGGING.loss(outputs, targets, config, generator)
    calls += config.seed == 3
    return {{"loss": found["loss"] * (float("nan") if rank == 1 and calls == 2 and config.seed == 3 else 1)}}

results = train(replace(TAGGING, loss=loss), FeatureStore.open({store!r}), ScanNetLabels({labels!r}, classes={k}),
                out={out!r}, grid={{"seed": [1, 2, 3]}}, **{{**TAGS, "depth": 1, "batch": 4}})
print([[r.metrics, r.curve, r.stopped] for r in results])
"""


def test_two_processes_train_as_one_with_twice_the_batch(answers, labels, tmp_path):
    places = {"store": str(answers.root), "labels": str(labels.root), "out": str(tmp_path / "out"), "k": K}
    code = PROCESS.format(tests=str(Path(__file__).parent), meet=f"file://{tmp_path}/meet", **places)
    both = [
        subprocess.Popen([sys.executable, "-c", code, str(rank)], stdout=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    told = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert told[0] == told[1]
    found = read_results(tmp_path / "out" / "results.json")
    alone = train(TAGGING, answers, labels, grid={"seed": [1, 2]}, **{**TAGS, "depth": 1})
    for ours, theirs in zip(found, alone, strict=False):
        assert ours.config["batch"] == 4
        assert numbers(ours) == pytest.approx(numbers(theirs), rel=2e-4, abs=1e-5)
    # not a number in one process: its probe is stopped in both, with the clips of both
    stopped = found[2].stopped
    assert stopped.startswith("the loss is nan at step 1 (clips ")
    assert len(set(stopped.partition("clips ")[2].rstrip(")").split(", "))) == 8


# -- wrong input ------------------------------------------------------------------------------------------------------


def test_what_belongs_to_another_run_is_refused(answers, noise, labels, tmp_path):
    out = tmp_path / "out"
    train(TAGGING, answers, labels, out=out, **TAGS)
    with pytest.raises(ValueError, match=r"another folder\n  task: tagging there, instance asked$"):
        train(INSTANCE, answers, labels, out=out, depth=0, **INSTANCES)
    with pytest.raises(ValueError, match=f"another folder\n  sources: .*{answers.spec_hash}.*{noise.spec_hash}"):
        train(TAGGING, noise, labels, out=out, **TAGS)
    with pytest.raises(ValueError, match=r"probes: lr=0\.0003, threshold=200 there, lr=0\.1, threshold=9 asked$"):
        train(TAGGING, answers, labels, out=out, lr=0.1, threshold=9, **TAGS)
    with pytest.raises(ValueError, match=r"another folder\n  probes: 1 there, 2 asked$"):
        train(TAGGING, answers, labels, out=out, grid={"lr": [1, 2]}, **TAGS)
    probe = out / "probe-000.safetensors"
    with pytest.raises(ValueError, match=f"trained on features .*{answers.spec_hash}.* got .*{noise.spec_hash}"):
        evaluate(probe, noise, labels)
    with pytest.raises(ValueError, match="trained on features"):
        evaluate(probe, [answers, noise], labels)
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is of task None; known: tagging"):
        evaluate(out / "checkpoint.safetensors", answers, labels)
    clip = answers.path(answers.ids()[0])
    with pytest.raises(ValueError, match="holds no probes"):
        evaluate(clip, answers, labels)


def test_labels_of_other_classes_are_refused(answers, labels, tmp_path):
    train(TAGGING, answers, labels, out=tmp_path / "out", **TAGS)
    renamed = write_labels(tmp_path / "renamed", clips=21)
    names = renamed.root / f"class_names_{K}.json"
    names.write_text(json.dumps({"names": [f"class {k}" for k in reversed(range(K))]}))
    renamed = ScanNetLabels(renamed.root, classes=K)
    with pytest.raises(ValueError, match=r"on 6 classes \(class 0, .*have 6 classes \(class 5, .*another order"):
        evaluate(tmp_path / "out" / "probe-000.safetensors", answers, renamed)
    with pytest.raises(ValueError, match=r"another folder\n  labels: .*\n  classes: "):
        train(TAGGING, answers, renamed, out=tmp_path / "out", **TAGS)
    train(INSTANCE, answers, labels, out=tmp_path / "instance", depth=0, **INSTANCES)
    evaluate(tmp_path / "instance" / "probe-000.safetensors", answers, renamed)  # which has no classes
