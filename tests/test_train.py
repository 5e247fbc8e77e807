"""The training loop on stores on disk: grids against single runs, a killed run against a whole one, answers, noise."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from probe_data import CHANNELS, SAMPLING, K, write_labels, write_store

from spatialprobe.engine.store import FeatureStore
from spatialprobe.probes.checkpoint import load, load_probe
from spatialprobe.probes.fusion import Stored, fuse
from spatialprobe.probes.labels import ScanNetLabels
from spatialprobe.probes.loading.batches import Batch, FeatureKey
from spatialprobe.probes.loading.loader import FeatureLoader
from spatialprobe.probes.loop import evaluate, train
from spatialprobe.probes.probe import Probe
from spatialprobe.probes.results import read_results, table
from spatialprobe.probes.setup import grid_configs, sampling_of, split
from spatialprobe.probes.tasks.geometry import GEOMETRY
from spatialprobe.probes.tasks.tagging import TAGGING, TagFacts, asymmetric_loss
from spatialprobe.probes.training import Diverged, features_of, learning_rate, targets_of

SMALL = SAMPLING | {
    "embed": 16, "heads": 2, "depth": 1, "batch": 4, "epochs": 2, "warmup": 0.5, "lr": 3e-3, "dropout": 0.1,
    "decoder_width": 16, "decoder_heads": 2, "decoder_layers": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def labels(tmp_path_factory) -> ScanNetLabels:
    return write_labels(tmp_path_factory.mktemp("labels") / "scannet", clips=24)


@pytest.fixture(scope="module")
def store(labels, tmp_path_factory) -> FeatureStore:
    steps = {"layers": (1, 3), "steps": (500, 749)}
    return write_store(tmp_path_factory.mktemp("store") / "wan", labels, **steps)


@pytest.fixture(scope="module")
def other(labels, tmp_path_factory) -> FeatureStore:
    return write_store(tmp_path_factory.mktemp("store") / "other", labels, answers=False, seed=1, dtype="int8")


def beside(grid) -> dict:
    """SMALL, but for what the grid sets."""
    return {name: value for name, value in SMALL.items() if name not in grid}


def numbers(result) -> list[float]:
    return [x for row in [*result.curve, result.metrics] for x in row.values()]


# -- grids ----------------------------------------------------------------------------------------------------------


def test_each_probe_of_a_grid_ends_as_it_would_alone(store, labels):
    grid = {"lr": [1e-3, 1e-2], "seed": [1, 2], "layer": [1, 3], "step": [749]}
    together = train(TAGGING, store, labels, grid=grid, **beside(grid))
    assert len(together) == 8
    assert len({tuple(numbers(r)) for r in together}) == 8, "settings make no difference"
    for result in together[::3]:
        chosen = {name: result.config[name] for name in grid}
        (alone,) = train(TAGGING, store, labels, **{**SMALL, **chosen})
        assert alone.config == result.config
        assert numbers(alone) == pytest.approx(numbers(result), rel=2e-4, abs=1e-5)


def test_a_grid_may_mix_widths_depths_and_positions(store, labels):
    grid = {"embed": [8, 16], "depth": [0, 1], "position": ["none", "1d"]}
    results = train(TAGGING, store, labels, grid=grid, layer=1, step=749, **beside(grid))
    assert [(r.config["embed"], r.config["depth"], r.config["position"]) for r in results] == [
        (e, d, p) for e in (8, 16) for d in (0, 1) for p in ("none", "1d")
    ]
    assert all(math.isfinite(x) for r in results for x in numbers(r))
    assert "none" in table(results)
    assert table(results).count("\n") == 8


def test_stores_are_fused_on_channels(store, other, labels):
    wide = {"layer": 1, "step": 749} | SMALL
    normed, plain = (train(TAGGING, [store, other], labels, fuse=how, **wide)[0] for how in ("norm", "concat"))
    (single,) = train(TAGGING, store, labels, **wide)
    assert len({normed.metrics["loss"], plain.metrics["loss"], single.metrics["loss"]}) == 3
    assert [s["spec"] for s in normed.sources] == [store.spec_hash, other.spec_hash]
    assert normed.keys == [[0, 1, 749], [1, 3, None]]


def test_targets_and_features_are_shared_only_where_they_are_the_same():
    counts = torch.tensor([[[150, 900], [100, 0]]], dtype=torch.int32)
    part = lambda seed: Stored(torch.randn(1, 2, 1, 1, 3) + seed, torch.ones(1, 2, 1, 1), torch.ones(1, 2, 1, 1))  # noqa: E731
    keys = (FeatureKey(0, 1), FeatureKey(1, 1))
    batch = Batch(["a"], torch.zeros(1, 2), {key: part(i) for i, key in enumerate(keys)}, {"tag_pixel_counts": counts})
    facts, trainees = TagFacts(("x", "y"), (0.5, 0.5)), []
    for threshold, how in ((200, "norm"), (900, "concat"), (901, "norm"), (200, "concat")):
        config = TAGGING.defaults.with_settings(threshold=threshold, fuse=how)
        probe = SimpleNamespace(task=TAGGING, config=config, facts=facts)
        trainees.append(SimpleNamespace(probe=probe, config=config, keys=keys))
    targets, features = targets_of(batch, trainees), features_of(batch, trainees)
    assert [x["present"].tolist() for x in targets] == [
        [[True, True]],
        [[False, True]],
        [[False, False]],
        [[True, True]],
    ]
    assert targets[0] is targets[3]
    assert features[0] is features[2]
    assert features[1] is features[3]
    for found, how in zip(features, ("norm", "concat"), strict=False):
        assert torch.equal(found.data, fuse([batch.features[key] for key in keys], how).data)


# -- against a plain loop -------------------------------------------------------------------------------------------


def test_a_probe_is_trained_as_a_plain_loop_of_adamw_trains_it(store, labels, tmp_path):
    settings = {**SMALL, "depth": 0, "decoder_dropout": 0.0, "epochs": 3, "weight_decay": 2.0, "lr": 1e-2, "seed": 7}
    (result,) = train(TAGGING, store, labels, layer=1, step=749, out=tmp_path, **settings)
    config, ids, key = TAGGING.defaults.with_settings(**settings), labels.ids("train"), FeatureKey(0, 1, 749)
    probe = Probe(TAGGING, config, CHANNELS, TAGGING.facts(labels, ids, config))
    torch.manual_seed(7)
    assert torch.equal(probe.input.weight, torch.nn.Linear(CHANNELS, config.embed).weight)
    optimizer = torch.optim.AdamW(probe.parameters(), betas=(0.9, 0.95), weight_decay=2.0)
    loader = FeatureLoader(
        store, labels, ids=ids, wanted=TAGGING.labels, keys=[key], views=2, sampling=sampling_of(config), batch=4,
        seed=config.data_seed,
    )  # fmt: skip
    for epoch in range(3):
        total = 0.0
        for number, batch in enumerate(loader):
            optimizer.param_groups[0]["lr"] = learning_rate(config, epoch + (number + 1) / len(loader))
            x = F.layer_norm(batch.features[key].values, (CHANNELS,), probe.input.gamma, probe.input.beta, 1e-6)
            logits = probe.read(F.linear(x, probe.input.weight, probe.input.bias))["logits"]
            loss = asymmetric_loss(logits, batch.labels["tag_pixel_counts"].sum(1) >= 200)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch.ids)
        assert result.curve[epoch]["train_loss"] == pytest.approx(total / len(ids), rel=1e-4)
    trained, _ = load(tmp_path / "checkpoint.safetensors")
    torch.testing.assert_close(trained["0/probe/input.weight"], probe.input.weight.detach(), rtol=1e-3, atol=1e-4)


# -- what is learnt -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 1])
def test_features_that_hold_the_answer_are_read(depth, store, labels):
    settings = {**SMALL, "depth": depth, "epochs": 30, "lr": 1e-2, "dropout": 0.0, "decoder_dropout": 0.0}
    (result,) = train(TAGGING, store, labels, layer=3, step=749, **settings)
    assert result.curve[-1]["mAP"] > 0.97
    assert result.curve[-1]["train_loss"] < 0.1 * result.curve[0]["train_loss"]


def test_noise_gives_chance(other, labels):
    (result,) = train(TAGGING, other, labels, **{**SMALL, "epochs": 6})
    assert abs(result.metrics["mAP"] - result.metrics["mAP_chance"]) < 0.25


# -- resuming -------------------------------------------------------------------------------------------------------

RUN = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_train import SMALL
from spatialprobe.engine.store import FeatureStore
from spatialprobe.probes.labels import ScanNetLabels
from spatialprobe.probes.tasks.tagging import TAGGING
from spatialprobe.probes.loop import train
torch.set_num_threads(1)
tell = lambda state: print(state.epoch, state.batch, flush=True)
train(TAGGING, FeatureStore.open({store!r}), ScanNetLabels({labels!r}, classes={k}), layer=1, step=749, out={out!r},
      save_every=0.0, progress=tell, grid={{"seed": [1, 2]}}, **{{**SMALL, "epochs": 3, "patience": 2}})
"""


def start(store, labels, out) -> subprocess.Popen:
    code = RUN.format(
        tests=str(Path(__file__).parent), store=str(store.root), labels=str(labels.root), out=str(out), k=K
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_a_killed_run_ends_with_the_same_bits(store, labels, tmp_path):
    whole = start(store, labels, tmp_path / "whole")
    killed = start(store, labels, tmp_path / "killed")
    for line in killed.stdout:
        if line.split() == ["1", "3"]:  # inside the second epoch, after checkpoints of its first batches
            os.kill(killed.pid, signal.SIGKILL)
            break
    killed.wait()
    assert not (tmp_path / "killed" / "results.json").exists()
    again = start(store, labels, tmp_path / "killed")
    told = again.communicate()[0].split("\n")
    assert whole.wait() == 0
    assert again.returncode == 0
    assert told[0].split()[0] == "1", "the rerun began at the first epoch"
    a, b = (read_results(tmp_path / name / "results.json") for name in ("whole", "killed"))
    assert [replace(r, seconds=0) for r in a] == [replace(r, seconds=0) for r in b]
    for name in ("probe-000.safetensors", "probe-001.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


def test_a_finished_run_is_not_trained_again(store, labels, tmp_path):
    told = []
    first = train(TAGGING, store, labels, layer=1, step=749, out=tmp_path, **SMALL)
    again = train(TAGGING, store, labels, layer=1, step=749, out=tmp_path, progress=told.append, **SMALL)
    assert told == []
    assert again[0].metrics == first[0].metrics


def test_a_checkpoint_of_another_run_is_refused(store, labels, tmp_path):
    train(TAGGING, store, labels, layer=1, step=749, out=tmp_path, **SMALL)
    with pytest.raises(ValueError, match="another run; choose another folder\n  probes: "):
        train(TAGGING, store, labels, layer=1, step=749, out=tmp_path, **{**SMALL, "lr": 1e-4})
    elsewhere = tmp_path.parent / "other-labels"
    shutil.copytree(labels.root, elsewhere)
    with pytest.raises(ValueError, match=r"another run; choose another folder\n  labels: .*other-labels"):
        train(TAGGING, store, ScanNetLabels(elsewhere, classes=K), layer=1, step=749, out=tmp_path, **SMALL)
    checkpoint = tmp_path / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is damaged"):
        train(TAGGING, store, labels, layer=1, step=749, out=tmp_path, **SMALL)


def test_a_saved_probe_says_what_it_said(store, labels, tmp_path):
    (result,) = train(TAGGING, store, labels, layer=1, step=749, out=tmp_path, **SMALL)
    file = tmp_path / "probe-000.safetensors"
    assert evaluate(file, store, labels) == pytest.approx(result.metrics)
    each = [evaluate(file, store, labels, ids=[clip_id])["loss"] for clip_id in labels.ids("val")]
    assert len(each) == 6, "batches of 4 must be unequal"
    assert sum(each) / 6 == pytest.approx(result.metrics["loss"])
    probe, header = load_probe(file, {"tagging": TAGGING})
    assert header["task"] == "tagging"
    assert probe.facts.names == tuple(f"class {k}" for k in range(K))
    assert json.loads((tmp_path / "results.json").read_text())[0]["metrics"]["mAP"] == result.metrics["mAP"]


def test_a_probe_with_text_embeddings_needs_their_file_no_more(store, labels, tmp_path):
    texts = np.random.default_rng(0).normal(size=(K, 6)).astype(np.float32)
    np.save(tmp_path / "texts.npy", texts)
    settings = {"layer": 1, "step": 749, "text_embeddings": tmp_path / "texts.npy"} | SMALL
    (result,) = train(TAGGING, store, labels, out=tmp_path / "out", **settings)
    (tmp_path / "texts.npy").unlink()
    file = tmp_path / "out" / "probe-000.safetensors"
    assert evaluate(file, store, labels) == pytest.approx(result.metrics)
    assert torch.equal(load_probe(file, {"tagging": TAGGING})[0].facts.text, torch.from_numpy(texts))


def test_a_compiled_probe_ends_where_the_plain_one_does(store, labels, monkeypatch):
    """Traced and differentiated by torch.compile; its code generator, which takes a minute here, is left out."""
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: real(module, backend="aot_eager"))
    torch._dynamo.utils.counters.clear()
    settings = {"layer": 1, "step": 749} | SMALL | {"dropout": 0.0, "decoder_dropout": 0.0, "epochs": 1}
    plain, compiled = (train(TAGGING, store, labels, compiled=how, **settings)[0] for how in (False, True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert numbers(compiled) == pytest.approx(numbers(plain), rel=1e-3, abs=1e-4)


# -- stopping -------------------------------------------------------------------------------------------------------


def test_early_stopping_keeps_the_best_weights(other, labels):
    settings = {**SMALL, "epochs": 12, "patience": 2, "lr": 3e-2, "dropout": 0.0}
    (result,) = train(TAGGING, other, labels, **settings)
    assert len(result.curve) == result.best_epoch + 3 < 12
    assert "2 epochs" in result.stopped
    scores = [row["AP_head"] for row in result.curve]
    assert scores[result.best_epoch] == max(scores) == result.metrics["AP_head"]


def test_a_loss_that_is_not_finite_stops_its_probe_alone(store, labels, tmp_path, monkeypatch):
    rate = lambda config, epoch: 1e-3 if epoch <= 1 else 1e30  # noqa: E731
    monkeypatch.setattr("spatialprobe.probes.training.learning_rate", rate)
    with pytest.raises(Diverged, match=r"the loss is nan at step \d+ \(clips train/clip"):
        train(TAGGING, store, labels, layer=1, step=749, out=tmp_path, **{**SMALL, "epochs": 4})
    checkpoint = (tmp_path / "checkpoint.safetensors").read_bytes()
    assert read_results(tmp_path / "results.json")[0].stopped.startswith("the loss is nan")
    with pytest.raises(Diverged):
        train(TAGGING, store, labels, layer=1, step=749, out=tmp_path, **{**SMALL, "epochs": 4})
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == checkpoint
    monkeypatch.undo()
    wild = {"lr": [1e-3, 1e30]}
    settings = beside(wild) | {"warmup": 0}
    fine, bad = train(TAGGING, store, labels, layer=1, step=749, grid=wild, **settings)
    assert bad.stopped.startswith("the loss is")
    assert fine.stopped == ""
    (alone,) = train(TAGGING, store, labels, layer=1, step=749, lr=1e-3, **settings)
    assert numbers(fine) == pytest.approx(numbers(alone), rel=2e-4, abs=1e-5)


# -- bad input ------------------------------------------------------------------------------------------------------


def test_grids_name_settings(store, labels):
    with pytest.raises(ValueError, match="no probe setting is called lrr; there are"):
        grid_configs(TAGGING, {"lrr": [1]}, {})
    with pytest.raises(ValueError, match="batch cannot be in a grid"):
        grid_configs(TAGGING, {"batch": [1, 2]}, {})
    with pytest.raises(ValueError, match=r"grid\['lr'\] must be a list"):
        grid_configs(TAGGING, {"lr": 1e-3}, {})
    with pytest.raises(ValueError, match="lr cannot be both"):
        grid_configs(TAGGING, {"lr": [1e-3]}, {"lr": 1})
    with pytest.raises(ValueError, match="geometry takes its last epoch, whatever it scores: patience must be null"):
        grid_configs(GEOMETRY, {"patience": [None, 2]}, {})
    with pytest.raises(ValueError, match=r"must choose one of them, got \{'layer': None, 'step': 749\}"):
        train(TAGGING, store, labels, step=749, **SMALL)
    with pytest.raises(ValueError, match=r"got \{'layer': 2, 'step': 749\}"):
        train(TAGGING, store, labels, layer=2, step=749, **SMALL)


def test_clips_of_features_and_labels_must_meet(store, labels, tmp_path):
    elsewhere = write_labels(tmp_path / "few", clips=4)
    with pytest.raises(
        ValueError, match=r"20 clips have features but no labels in .*--skip-unreadable\) leaves them out"
    ):
        split([store], elsewhere, None, 0, "raise")
    train_ids, val_ids = split([store], elsewhere, None, 0, "skip")
    assert (train_ids, val_ids) == (["train/clip000", "train/clip001", "train/clip002"], ["val/clip003"])
    with pytest.raises(ValueError, match="no features or labels, such as val/clip999"):
        split([store], labels, ["val/clip999"], 0, "raise")
    train_ids, val_ids = split([store], labels, 0.25, 7, "raise")
    assert len(val_ids) == 6
    assert sorted(train_ids + val_ids) == store.ids()


def test_paths_are_refused_where_what_they_hold_is_wanted(store, labels, tmp_path):
    for wrong in (str(store.root), store.root, [store, store.root]):
        with pytest.raises(ValueError, match=r"sources must be stores, got the path .*: open_source opens it"):
            train(TAGGING, wrong, labels, **SMALL)
        with pytest.raises(ValueError, match="sources must be stores, got the path"):
            evaluate(tmp_path / "probe", wrong, labels)
    with pytest.raises(ValueError, match=r"labels must be a reader of labels, got the path .*: open_labels opens it"):
        train(TAGGING, store, str(labels.root), **SMALL)
    with pytest.raises(ValueError, match="sources must be at least one store, got none"):
        train(TAGGING, [], labels, **SMALL)
    config = TAGGING.defaults.with_settings(text_embeddings=tmp_path / "texts.npy")
    assert json.loads(json.dumps(asdict(config)))["options"]["text_embeddings"] == str(tmp_path / "texts.npy")


def test_the_rate_warms_up_and_ends_at_its_least():
    config = TAGGING.defaults.with_settings(lr=1e-3, warmup=2, epochs=10)
    assert learning_rate(config, 1.0) == pytest.approx(5e-4)
    assert learning_rate(config, 2.0) == pytest.approx(1e-3)
    assert learning_rate(config, 6.0) == pytest.approx((1e-3 + 1e-6) / 2)
    assert learning_rate(config, 10.0) == pytest.approx(1e-6)
    assert all(learning_rate(config, e / 10) <= 1e-3 for e in range(1, 101))
    assert torch.tensor([learning_rate(config, e / 10) for e in range(20, 101)]).diff().max() < 0
