"""`engine probe` from words to files: exit codes, what it prints and writes, and one clear line for each mistake."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from probe_data import FRAMES, K, write_labels, write_store
from study_layouts import write_dl3dv, write_scannet

from spatialprobe.engine.cli import main
from spatialprobe.engine.commands.probe import TASK_NAMES
from spatialprobe.engine.demo.scenes import make_scene
from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.types import FeatureSpec, FrameSelection, tensor_name
from spatialprobe.kernels.pool_features import finish
from spatialprobe.probes.labels import ScanNetLabels
from spatialprobe.probes.tasks import TASKS

SMALL = "embed=8 heads=1 depth=0 batch=4 epochs=2 warmup=0.5 dropout=0 views=2 gap=4 query=0,1::4 context=9".split()
TASK_SETTINGS = {
    "tagging": "decoder_width=8 decoder_heads=1 decoder_layers=1".split(),
    "instance": "dims=8 components=2 pixels=64 min_cluster_size=4".split(),
    "geometry": ["features=8", "stages=[4,4,4,4]", "camera_layers=1", "refinements=1", "out_size=8x12"],
}


@pytest.fixture(scope="module")
def labels(tmp_path_factory) -> ScanNetLabels:
    return write_labels(tmp_path_factory.mktemp("labels") / "scannet", clips=8)


@pytest.fixture(scope="module")
def store(labels, tmp_path_factory) -> FeatureStore:
    return write_store(tmp_path_factory.mktemp("store") / "wan", labels, layers=(1, 3))


def words(task: str, store: Path, labels: Path, out: Path, *settings: str, grid: tuple[str, ...] = ()) -> list[str]:
    """SMALL settings, but for those given."""
    given = {word.partition("=")[0] for word in (*settings, *grid)}
    small = [word for word in (*SMALL, *TASK_SETTINGS[task]) if word.partition("=")[0] not in given]
    said = ["probe", "--task", task, "--features", str(store), "--labels", str(labels), "--out", str(out)]
    said += [part for word in (*small, *settings) for part in ("--set", word)]
    return said + [part for word in grid for part in ("--grid", word)]


def tags(store, labels, out, *settings: str, **more) -> list[str]:
    return [*words("tagging", store.root, labels.root, out, *settings, **more), "--classes", str(K)]


def refused(said: list[str], capsys) -> str:
    """The one line of a command that must fail as wrong words do, before anything is written."""
    capsys.readouterr()
    assert main(said) == 2
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    assert line.startswith("engine: error: ")
    return line


def noise_store(root: Path, ids: list[str], *, start: str = "start") -> FeatureStore:
    """Features [3, 4, 6, 8] of any clips."""
    about = {"family": "wan", "weights": "content:0", "layers": (3,), "pool": (4, 6)}
    store = FeatureStore.create(root, FeatureSpec(**about, frames=FrameSelection(window=FRAMES, start=start)))
    rows = torch.tensor([(f + 3) // 4 for f in range(FRAMES)])
    for i, clip_id in enumerate(ids):
        x = torch.randn(3, 4, 6, 8, generator=torch.Generator().manual_seed(i))
        provenance = {"grid": [3, 4, 6], "rows_kept": [0, 1, 2], "padded": 0}
        store.write(clip_id, finish(x, torch.float16).named(tensor_name(3)), rows, provenance)
    return FeatureStore.open(root)


def picture(path: Path) -> np.ndarray:  # uint8 [H, W, 3]
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


# -- what it makes ----------------------------------------------------------------------------------------------------


def test_the_command_names_every_task():
    """By hand, for it knows its words before torch is imported."""
    assert TASK_NAMES == tuple(TASKS)


def test_a_grid_of_tagging_probes(store, labels, tmp_path, capsys):
    out = tmp_path / "out"
    said = tags(store, labels, out, grid=("layer=1,3", "lr=1e-3,1e-2"))
    assert main(said) == 0
    told = capsys.readouterr()
    head, *rows, last = told.out.splitlines()
    assert head.split()[:4] == ["lr", "layer", "loss", "mAP"]
    assert [row.split()[:2] for row in rows] == [["0.001", "1"], ["0.01", "1"], ["0.001", "3"], ["0.01", "3"]]
    assert last == f"{out}: results.json, curve.png, layers.png"
    assert "epoch 2/2: training loss" in told.err
    written = json.loads((out / "results.json").read_text())
    assert [f"{result['metrics']['mAP']:.4g}" for result in written] == [row.split()[3] for row in rows]
    assert [result["keys"] for result in written] == [[[0, 1, None]]] * 2 + [[[0, 3, None]]] * 2
    files = {path.name for path in out.iterdir() if path.is_file()}
    probes = {f"probe-{i:03d}.safetensors" for i in range(4)}
    assert files == probes | {"results.json", "checkpoint.safetensors", "curve.png", "layers.png"}
    for name in ("curve.png", "layers.png"):
        assert len(np.unique(picture(out / name).reshape(-1, 3), axis=0)) > 20  # lines, fields and names

    # the same words again train nothing, another grid is another run
    before = {path: path.read_bytes() for path in out.glob("probe-*")}
    assert main(said) == 0
    again = capsys.readouterr()
    assert again.out == told.out
    assert "epoch" not in again.err
    assert {path: path.read_bytes() for path in out.glob("probe-*")} == before
    assert main(tags(store, labels, out, grid=("layer=1,3",))) == 2
    line, difference = capsys.readouterr().err.splitlines()
    assert line == f"engine: error: {out / 'checkpoint.safetensors'} is of another run; choose another folder"
    assert difference == "  probes: 4 there, 2 asked"


def test_instance_panels_of_the_best_probe(tmp_path, capsys):
    scenes = [make_scene(i, frames=FRAMES, height=24, width=36) for i in range(6)]
    for split, some in (("train", scenes[:4]), ("val", scenes[4:])):
        root = write_scannet(tmp_path, split, some)
    labels, out = ScanNetLabels(root), tmp_path / "out"
    store = noise_store(tmp_path / "store", labels.ids())
    assert main(words("instance", store.root, root, out, grid=("lr=1e-3,1e-2",))) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{out}: results.json, curve.png, instance.png"
    shown = picture(out / "instance.png")
    frame = labels.read(labels.ids("val")[0], [0], ("images",))["images"][0].permute(1, 2, 0).numpy()
    wanted = np.unique(frame.reshape(-1, 3), axis=0)
    there = {tuple(colour) for colour in np.unique(shown.reshape(-1, 3), axis=0)}
    assert sum(tuple(colour) in there for colour in wanted) > 0.5 * len(wanted), "the frame is not in the panels"


def test_instance_panels_without_frames_say_so(store, labels, tmp_path, capsys, caplog):
    said = [*words("instance", store.root, labels.root, tmp_path / "out", "layer=3"), "--classes", str(K)]
    assert main(said) == 0
    assert "pictures have no frames: clip val/clip003" in caplog.text
    assert (tmp_path / "out" / "instance.png").exists()


def test_depth_panels_and_points(tmp_path, capsys):
    scenes = [make_scene(i, frames=FRAMES, height=24, width=36) for i in range(5)]
    root = write_dl3dv(tmp_path, "1K", scenes, size=(16, 24))
    store = noise_store(tmp_path / "store", [f"1K/{scene.id}" for scene in scenes], start="start_idx")
    out = tmp_path / "out"
    assert main([*words("geometry", store.root, root, out), "--val", "0.4"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[-1] == f"{out}: results.json, curve.png, depth.png, points.ply"
    assert told[0].split()[:3] == ["loss", "point_error", "AbsRel"]
    (result,) = json.loads((out / "results.json").read_text())
    assert (result["train_clips"], result["val_clips"]) == (3, 2)
    assert (out / "points.ply").read_bytes().split(b"\n")[2] == b"element vertex 192"  # 2 views of 8 x 12
    assert len(np.unique(picture(out / "depth.png").reshape(-1, 3), axis=0)) > 100


def test_clips_that_cannot_be_read_are_listed_and_the_code_says_so(labels, tmp_path, capsys):
    store = write_store(tmp_path / "store", labels)
    ids = labels.ids()
    for clip_id in (ids[0], labels.ids("val")[0]):  # the first of training and of validation: each is also asked alone
        path = store.path(clip_id)
        path.write_bytes(path.read_bytes()[:200])
    said = [*words("instance", store.root, labels.root, tmp_path / "out"), "--classes", str(K)]
    assert main(said) == 2
    assert "damaged or truncated" in capsys.readouterr().err
    assert main([*said, "--skip-unreadable"]) == 1
    told = capsys.readouterr()
    assert [line.split(":")[0] for line in told.err.splitlines() if line.startswith("skipped")] == [
        f"skipped {ids[0]}",
        f"skipped {labels.ids('val')[0]}",
    ]
    assert told.out.splitlines()[-1].endswith("instance.png")
    (result,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert sorted(result["skipped"]) == [ids[0], labels.ids("val")[0]]


def test_a_diverged_run_is_one_line_and_code_1(store, labels, tmp_path, capsys):
    said = tags(store, labels, tmp_path / "out", "layer=1", "lr=1e30", "warmup=0", "epochs=3")
    assert main(said) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("engine: stopped: the loss is ")
    assert last.endswith("; the last checkpoint is kept")
    both = tags(store, labels, tmp_path / "both", "layer=1", "warmup=0", "epochs=3", grid=("lr=1e30,1e-3",))
    assert main(both) == 1
    rows = capsys.readouterr().out.splitlines()
    assert "the loss is nan at step" in rows[1]
    assert "the loss" not in rows[2]


# -- wrong words ------------------------------------------------------------------------------------------------------


def test_wrong_settings_are_one_line(store, labels, tmp_path, capsys):
    out = tmp_path / "out"
    said = lambda *settings, **more: refused(tags(store, labels, out, *settings, **more), capsys)  # noqa: E731
    assert "no probe setting is called lrr; there are " in said("layer=1", "lrr=1")
    assert "no probe setting is called threads; there are " in said("layer=1", "threads=3")
    assert "no probe setting is called dims; there are " in said("layer=1", "dims=3")  # another task's
    assert "no probe setting is called nothing; there are " in said("layer=1", grid=("nothing=1,2",))
    assert "batch cannot be in a grid" in said("layer=1", grid=("batch=1,2",))
    assert "layer cannot be both in the grid and set" in said("layer=1", grid=("layer=1,3",))
    assert "wanted NAME=VALUE, got 'layer'" in refused([*tags(store, labels, out), "--set", "layer"], capsys)
    assert "lr is given twice: 1 and 2" in said("layer=1", grid=("lr=1", "lr=2"))
    assert "lr must be a number, got 'fast'" in said("layer=1", "lr=fast")
    assert "lr must be positive" in said("layer=1", "lr=NaN")
    assert "depth must be an integer, got 1.5" in said("layer=1", grid=("depth=0,1.5",))
    assert "epochs must be an integer, got True" in said("layer=1", "epochs=true")
    assert "patience must be an integer or null, got 'no'" in said("layer=1", "patience=no")
    assert "threshold must be an integer, got 'many'" in said("layer=1", "threshold=many")
    assert "query must be frame numbers" in said("layer=1", "query=x")
    assert "the settings layer and step must choose one of them, got {'layer': None, 'step': None}" in said()
    assert "got {'layer': 2, 'step': None}" in said("layer=2")
    assert not out.exists()


def test_wrong_places_are_one_line(store, labels, tmp_path, capsys):
    out = tmp_path / "out"
    nowhere, elsewhere = tmp_path / "nowhere", write_labels(tmp_path / "elsewhere", clips=3)
    good = tags(store, labels, out, "layer=1")

    def instead(old: Path | str, new: Path | str) -> str:
        return refused([str(new) if word == str(old) else word for word in good], capsys)

    assert f"{nowhere} is not a feature store" in instead(store.root, nowhere)
    assert f"{nowhere}: no such folder" in instead(labels.root, nowhere)
    file = Path(labels.root) / f"class_names_{K}.json"
    assert f"{file} is a file; a folder is wanted" in instead(out, file)
    assert "5 clips have features but no labels in" in instead(labels.root, elsewhere.root)
    assert "class_names_7.json does not exist; there is class_names_6.json" in instead(K, 7)
    assert "val must be a share between 0 and 1, or clip ids, got 2.0" in refused([*good, "--val", "2"], capsys)
    assert "device must be cpu, cuda or cuda:1, got 'gpu'" in refused([*good, "--device", "gpu"], capsys)
    if not torch.cuda.is_available():
        assert "device cuda is not there: torch sees 0" in refused([*good, "--device", "cuda"], capsys)
    assert "threads must be at least 1, got 0" in refused([*good, "--threads", "0"], capsys)
    assert not out.exists()


def test_a_score_that_no_epoch_has_is_code_2(store, labels, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("spatialprobe.probes.metrics.tagging.frequency_groups", only_absent_head)
    assert main(tags(store, labels, tmp_path / "out", "layer=1")) == 2
    assert "AP_head of probe 0 was NaN in all 2 epochs" in capsys.readouterr().err


def only_absent_head(rates) -> dict[str, torch.Tensor]:
    return {"head": torch.tensor([], dtype=torch.int64), "mid": torch.arange(3), "tail": torch.arange(3, K)}


def test_tasks_and_layouts_that_do_not_exist(store, labels, tmp_path, capsys):
    said = tags(store, labels, tmp_path / "out")
    with pytest.raises(SystemExit) as stop:
        main([word if word != "tagging" else "naming" for word in said])
    assert stop.value.code == 2
    assert "invalid choice: 'naming'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["probe", "--task", "tagging"])
    assert stop.value.code == 2
    assert "required: --features, --labels, --out" in capsys.readouterr().err
    geometry = words("geometry", store.root, labels.root, tmp_path / "out", "layer=1")
    assert "got depth, points, confidence" in refused([*geometry, "--classes", str(K)], capsys)  # ScanNet has none


def test_two_processes_from_the_command(store, labels, tmp_path):
    """As torchrun starts them: one prints and writes, both end with 0."""
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    said = tags(store, labels, tmp_path / "out", "layer=1", "batch=2")
    command = [sys.executable, "-m", "spatialprobe.engine.cli", *said]
    envs = [os.environ | meet | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    both = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for env in envs]
    told = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert told[0].splitlines()[-1].endswith("results.json, curve.png")
    assert told[1] == ""
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())[0]["curve"]) == 2


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])
