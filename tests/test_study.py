"""`engine study` with small encoders: the same numbers as extraction and training one by one, whatever stops it."""

import json
import math
import shutil
from dataclasses import replace
from statistics import mean, stdev
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from study_layouts import write_scannet
from tiny.encoders import build_encoder

from spatialprobe.engine.cli import main
from spatialprobe.engine.commands import study as study_command
from spatialprobe.engine.demo.scene_files import write_demo
from spatialprobe.engine.demo.scenes import make_scene
from spatialprobe.engine.job import Job
from spatialprobe.engine.run import run_job
from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.types import FeatureSpec
from spatialprobe.probes import INSTANCE, TAGGING, open_labels, train
from spatialprobe.probes.results import read_results
from spatialprobe.probes.study import run as study_run
from spatialprobe.probes.study.job import StudyJob
from spatialprobe.probes.study.table import cell
from spatialprobe.probes.tasks import TASKS

FRAMES, SEEDS = 9, (1, 2)
VIEWS = {"views": 2, "gap": 4, "context": FRAMES, "query": "0,1::4"}
PROBES = VIEWS | {"embed": 16, "heads": 2, "depth": 1, "dropout": 0.0, "batch": 3, "epochs": 2, "warmup": 0.5}
OF_TASK = {
    "tagging": {"decoder_width": 8, "decoder_heads": 1, "decoder_layers": 1, "threshold": 20},
    "instance": {"dims": 8, "components": 2, "pixels": 64, "min_cluster_size": 4},
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    for seed in range(6):
        write_demo(root, make_scene(seed, frames=FRAMES, height=24, width=36), kind="images")
    return root


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    return {name: build_encoder(root / name, name) for name in ("clip", "dinov2")}


def words(scenes, encoders, out, *more: str, **changes) -> list[str]:
    """A study's words; of `changes` those of PROBES, and a position or seeds, take the place of the usual."""
    said = ["study", str(scenes / "images"), "--labels", str(scenes), "--out", str(out), "--val", "0.34"]
    said += ["--encoders", ",".join(f"{name}={folder}" for name, folder in encoders.items())]
    said += ["--layers", "2", "--window", str(FRAMES), "--query", "0,1::4", "--threads", "1"]
    usual = {"tasks": "tagging,instance", "pos_embed": "native,shuffled", "position": "none,2d", "device": "cpu"}
    for name, value in (usual | {name: changes.pop(name) for name in usual.keys() & changes}).items():
        said += [f"--{name.replace('_', '-')}", value]
    settings = PROBES | {f"{task}.{name}": x for task, own in OF_TASK.items() for name, x in own.items()} | changes
    tasks = said[said.index("--tasks") + 1].split(",")
    return [
        *said,
        *(p for n, x in settings.items() if n.partition(".")[0] in (n, *tasks) for p in ("--set", f"{n}={x}")),
        *more,
    ]


@pytest.fixture(scope="module")
def study(scenes, encoders, tmp_path_factory):
    """A whole study's folder and what it printed."""
    out = tmp_path_factory.mktemp("study") / "out"
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *said, **to: printed.append((said[0], to)))
        assert main(words(scenes, encoders, out, "--seeds", "1,2")) == 0
    return out, [line for line, to in printed if "file" not in to]


def alone(task, store, scenes, **more):
    settings = PROBES | OF_TASK[task.name] | more
    return train(task, store, open_labels(scenes), val=0.34, device="cpu", threads=1, **settings)


def written(path):
    return json.loads(path.read_text())


def plain(metrics):
    """As JSON has them."""
    return {name: None if math.isnan(x) else x for name, x in metrics.items()}


# -- what it makes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pos_embed", ["native", "shuffled"])
def test_stores_are_those_of_engine_extract(study, scenes, encoders, tmp_path, pos_embed):
    out, _ = study
    about = {"clips": str(scenes / "images"), "model": str(encoders["dinov2"]), "out": str(tmp_path / "store")}
    about |= {"layers": "2", "window": FRAMES, "query": "0,1::4", "device": "cpu", "options": {"pos_embed": pos_embed}}
    _, store = run_job(Job.from_words(about))
    mine = FeatureStore.open(out / "stores" / f"dinov2-{pos_embed}")
    assert mine.spec == store.spec
    assert mine.spec.options["pos_embed"] == pos_embed
    assert mine.ids() == store.ids() == open_labels(scenes).ids()
    for clip_id in store.ids():
        assert mine.path(clip_id).read_bytes() == store.path(clip_id).read_bytes()


@pytest.mark.parametrize("task", [TAGGING, INSTANCE])
def test_numbers_are_those_that_train_gives_alone(study, scenes, task):
    out, _ = study
    store = FeatureStore.open(out / "stores" / "clip-shuffled")
    there = written(out / "runs" / "clip-shuffled" / task.name / "results.json")
    assert [(r["config"]["position"], r["config"]["seed"]) for r in there] == [
        (position, seed) for position in ("none", "2d") for seed in SEEDS
    ]
    grid = alone(task, store, scenes, grid={"position": ["none", "2d"], "seed": list(SEEDS)})
    assert [r["metrics"] for r in there] == [plain(r.metrics) for r in grid]
    (single,) = alone(task, store, scenes, position="2d", seed=2)
    for name, value in plain(single.metrics).items():
        assert there[3]["metrics"][name] == pytest.approx(value, rel=1e-3, abs=1e-4)
    assert there[3]["metrics"]["loss"] != there[1]["metrics"]["loss"]  # the position says something


def test_the_table_has_the_means_over_seeds(study):
    out, printed = study
    head, *rows = printed[0].splitlines()
    assert head.split()[:4] == ["encoder", "pos_embed", "position", "mAP"]
    assert [row.split()[:3] for row in rows] == [
        [encoder, how, position]
        for encoder in ("clip", "dinov2")
        for how in ("native", "shuffled")
        for position in ("none", "2d")
    ]
    for task, metric in (("tagging", "mAP"), ("instance", "T-mIoU")):
        scores = [r["metrics"][metric] for r in written(out / "runs" / "dinov2-native" / task / "results.json")[2:]]
        assert f"{mean(scores):.4g} ± {stdev(scores):.2g}" in rows[5]
    assert printed[1] == f"{out}: study.json, 8 training runs of 8"


def test_a_mean_over_some_of_the_seeds_is_none():
    assert cell([1.0, 3.0]) == "2 ± 1.4"
    assert [cell(values) for values in ([0.25], [1.0, None], [1.0, math.nan], [])] == ["0.25", "-", "-", "-"]


def test_grids_have_the_layers_and_steps_that_a_store_has_several_of():
    study = SimpleNamespace(position=("none", "2d"), seeds=(1, 2))
    for several, more in (
        ({"layers": (3,)}, {}),
        ({"layers": (3, 5)}, {"layer": [3, 5]}),
        ({"layers": (3, 5), "steps": (1, 2)}, {"layer": [3, 5], "step": [1, 2]}),
        ({"layers": (3,), "steps": (1, 2), "merge_steps": True}, {}),
    ):
        store = SimpleNamespace(spec=FeatureSpec(family="clip", weights="content:0", **several))
        assert StudyJob.grid(study, store) == {"position": ["none", "2d"], "seed": [1, 2]} | more


def test_the_summary_names_every_probe_and_its_place(study, encoders):
    out, _ = study
    summary = written(out / "study.json")
    assert summary["failed"] == {}
    assert summary["asked"]["encoders"] == {name: str(folder) for name, folder in encoders.items()}
    assert len(summary["probes"]) == 2 * 2 * 2 * 2 * 2
    for probe in summary["probes"]:
        result = written(out / probe["results"])[probe["probe"]]
        assert probe["metrics"] == result["metrics"]
        assert (probe["task"], probe["position"]) == (result["task"], result["config"]["position"])
        assert result["sources"][0]["store"] == str(out / probe["store"])
        assert FeatureStore.open(out / probe["store"]).spec.options["pos_embed"] == probe["pos_embed"]


# -- again ------------------------------------------------------------------------------------------------------------


def test_again_nothing_is_done_twice(study, scenes, encoders, capsys, monkeypatch):
    out, printed = study
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    monkeypatch.setattr(study_run, "train", lambda *args, **more: pytest.fail("a finished run was trained again"))
    assert main(words(scenes, encoders, out, "--seeds", "1,2")) == 0
    assert capsys.readouterr().out.splitlines() == "\n".join(printed).splitlines()
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == before


def test_other_words_do_not_pass_for_finished_runs(study, scenes, encoders, tmp_path, capsys):
    out = shutil.copytree(study[0], tmp_path / "out")
    assert main(words(scenes, {"clip": encoders["clip"]}, out, "--seeds", "1,3", pos_embed="native")) == 1
    told = capsys.readouterr().err
    assert "clip-native/tagging failed:" in told
    assert "is of another run; choose another folder" in told


@pytest.mark.parametrize(
    "change",
    [
        {"sources": [{"store": "elsewhere", "spec": "0123", "weights": "content:0"}]},
        {"labels": "/elsewhere"},
        {"train_clips": 3},
        {"split": "0123456789abcdef"},
        {"config": {"position": "none"}},
    ],
)
def test_results_of_other_features_or_clips_do_not_pass(study, scenes, encoders, tmp_path, monkeypatch, change):
    out = shutil.copytree(study[0], tmp_path / "out")
    file = out / "runs" / "clip-native" / "tagging" / "results.json"
    file.write_text(json.dumps([result | change for result in written(file)]))

    def refuse(task, *args, **more):
        raise ValueError(f"asked for {task.name}")

    monkeypatch.setattr(study_run, "train", refuse)
    said = words(scenes, {"clip": encoders["clip"]}, out, "--seeds", "1,2", pos_embed="native")
    assert main(said) == 1
    assert written(out / "study.json")["failed"] == {"clip-native/tagging": "asked for tagging"}


def test_a_probe_whose_loss_was_not_finite_is_said(study, scenes, encoders, tmp_path, capsys):
    """One that only trained no longer, for it got no better, is not."""
    out = shutil.copytree(study[0], tmp_path / "out")
    for task, stopped in (
        ("tagging", "the loss is nan at step 3 (clips a)"),
        ("instance", "no better score in 2 epochs"),
    ):
        file = out / "runs" / "clip-native" / task / "results.json"
        first, second, *others = written(file)
        file.write_text(json.dumps([first, second | {"stopped": stopped}, *others]))
    clip = {"clip": encoders["clip"]}
    assert main(words(scenes, clip, out, "--seeds", "1,2", pos_embed="native", tasks="instance")) == 0
    assert "failed:" not in capsys.readouterr().err
    assert main(words(scenes, clip, out, "--seeds", "1,2", pos_embed="native")) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "clip-native/tagging probe 1 failed: the loss is nan at step 3 (clips a)"
    )
    stopped = [probe["stopped"] for probe in written(out / "study.json")["probes"] if probe["task"] == "tagging"]
    assert stopped == ["", "the loss is nan at step 3 (clips a)", "", ""]


def test_a_score_that_is_no_number_is_null_in_the_summary(study, scenes, encoders, tmp_path, monkeypatch):
    out = shutil.copytree(study[0], tmp_path / "out")
    file = out / "runs" / "clip-native" / "tagging" / "results.json"
    results = [replace(result, metrics={"loss": math.inf, "mAP": math.nan, "AP": 0.5}) for result in read_results(file)]
    file.unlink()
    monkeypatch.setattr(study_run, "train", lambda *args, **more: results)
    clip = {"clip": encoders["clip"]}
    assert main(words(scenes, clip, out, "--seeds", "1,2", pos_embed="native", tasks="tagging")) == 0
    metrics = [probe["metrics"] for probe in written(out / "study.json")["probes"]]
    assert metrics == [{"loss": None, "mAP": None, "AP": 0.5}] * 4


def test_a_study_of_other_clips_or_labels_wants_another_folder(study, scenes, encoders, tmp_path, capsys):
    """They have the same ids, so that their stores and runs could not be told apart."""
    out, _ = study
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    other = shutil.copytree(scenes, tmp_path / "other")
    for word, place in (("clips", other / "images"), ("labels", other)):
        said = words(scenes, encoders, out)
        said[said.index(str(scenes / "images" if word == "clips" else scenes))] = str(place)
        assert main(said) == 2
        told = capsys.readouterr().err
        assert f"{out} is a study of other data; choose another folder: {word}: {scenes}" in told
        assert f"there, {place} asked" in told
    assert main(words(scenes, encoders, scenes)) == 2
    assert f"{scenes} is not empty and no study: it holds images, labels" in capsys.readouterr().err
    assert main(words(scenes, encoders, encoders["clip"] / "config.json")) == 2
    assert "config.json is a file; a study is a folder" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before


def test_other_classes_are_other_labels(encoders, tmp_path, capsys):
    """ScanNet's lists of classes lie in one folder."""
    root = write_scannet(tmp_path, "train", [make_scene(i, frames=FRAMES, height=24, width=36) for i in range(3)])
    listing = json.loads((root / "class_names_20.json").read_text())
    (root / "class_names_5.json").write_text(json.dumps(listing | {"names": listing["names"][:5]}))
    said = words(root, {"clip": encoders["clip"]}, tmp_path / "out", pos_embed="native", tasks="instance")
    said[1] = str(root)
    assert main([*said, "--position", "none"]) == 0
    assert main([*said, "--position", "none", "--classes", "5"]) == 2
    assert "choose another folder: classes: 20 there, 5 asked" in capsys.readouterr().err


class Killed(BaseException):
    pass


def test_a_study_that_was_killed_ends_with_the_same_numbers(study, scenes, encoders, tmp_path, monkeypatch):
    """Interrupted while it extracts, killed while it trains, then left alone."""
    out, one = tmp_path / "out", {"clip": encoders["clip"]}
    said = words(scenes, one, out, "--seeds", "1,2", pos_embed="shuffled")
    write, wrote = FeatureStore.write, []

    def interrupted(self, clip_id, *args):
        if len(wrote) == 3:
            raise KeyboardInterrupt
        wrote.append(clip_id)
        return write(self, clip_id, *args)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureStore, "write", interrupted)
        assert main(said) == 130
    assert len(FeatureStore.open(out / "stores" / "clip-shuffled")) == 3
    batches = []

    def killed(state):
        batches.append(state)
        if len(batches) == 7:  # the second task's second epoch
            raise Killed

    asked = {}
    monkeypatch.setattr(study_command, "Bar", lambda: killed)
    with pytest.raises(Killed):
        main(said)
    assert not (out / "runs" / "clip-shuffled" / "instance" / "results.json").exists()
    assert written(out / "study.json")["probes"]
    monkeypatch.setattr(study_command, "Bar", lambda: lambda state: asked.setdefault(state.epoch, state))
    assert main(said) == 0
    assert list(asked) == [1]  # the first epoch, of which there is a checkpoint, was not trained again
    for task in OF_TASK:
        place = f"runs/clip-shuffled/{task}/results.json"
        assert [r["metrics"] for r in written(out / place)] == [r["metrics"] for r in written(study[0] / place)]


@pytest.mark.parametrize("tf32", [True, False])
def test_probes_train_in_the_precision_that_was_set(scenes, encoders, tmp_path, monkeypatch, tf32):
    """Extraction turns tf32 off, and a study that finds its features there does not extract: the numbers are alike."""
    seen = []

    def look(*args, **more):
        seen.append(torch.backends.cudnn.allow_tf32)
        raise ValueError("that is all")

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    monkeypatch.setattr(study_run, "train", look)
    said = words(scenes, {"clip": encoders["clip"]}, tmp_path / "out", pos_embed="native", tasks="tagging")
    assert [main(said), main(said)] == [1, 1]
    assert seen == [tf32, tf32]
    assert torch.backends.cudnn.allow_tf32 == tf32


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_encoders_that_fail_do_not_lose_the_others(scenes, encoders, qwen_path, tmp_path, capsys):
    """One without weights, one that is not there, and one whose family has no such option."""
    broken = shutil.copytree(encoders["dinov2"], tmp_path / "broken")
    (broken / "model.safetensors").unlink()
    all_of_them = {"broken": broken, "nowhere": tmp_path / "nowhere", "qwen": qwen_path, "clip": encoders["clip"]}
    out = tmp_path / "out"
    assert main(words(scenes, all_of_them, out, pos_embed="none", tasks="tagging", position="1d")) == 1
    told = capsys.readouterr()
    assert [line.split()[:3] for line in told.out.splitlines()[1:-1]] == [["clip", "none", "1d"]]
    failed = written(out / "study.json")["failed"]
    assert list(failed) == ["broken-none", "nowhere-none", "qwen-none"]
    assert "model.safetensors" in failed["broken-none"]
    assert "is no local folder, and no Hub id of the form owner/name" in failed["nowhere-none"]
    assert "unknown option 'pos_embed' of Qwen3VL" in failed["qwen-none"]
    assert [line.split(" failed: ")[0] for line in told.err.splitlines()[-3:]] == list(failed)
    assert "Traceback" not in told.err


def test_features_without_the_frames_that_probes_see_fail_before_extraction(scenes, encoders, tmp_path, capsys):
    out, clip = tmp_path / "out", {"clip": encoders["clip"]}
    assert main(words(scenes, clip, out, "--window", "5", pos_embed="native", tasks="tagging", views=3)) == 1
    assert "the features' window of 5 frames holds 2 such views at most" in capsys.readouterr().err
    assert main(words(scenes, clip, out, "--query", "0,1", pos_embed="native", tasks="tagging")) == 1
    assert "the features' window of 9 frames lacks frames [5]" in capsys.readouterr().err
    assert not (out / "stores").exists()


def test_lost_clips_are_not_lost_in_silence(scenes, encoders, tmp_path, capsys):
    """An encoder that could not see all clips is not trained beside others that could, unless that is asked for."""
    root = shutil.copytree(scenes, tmp_path / "scenes")
    clip_id = open_labels(root).ids()[0]
    frame = next((root / "images" / clip_id).glob("*5.png"))
    with Image.open(frame) as image:
        image.resize((10, 10)).save(frame)
    said = words(
        root, {"clip": encoders["clip"]}, tmp_path / "out", pos_embed="native", tasks="tagging", position="none"
    )
    assert main(said) == 1
    told = capsys.readouterr()
    assert f"1 clips failed, so its numbers would be of other clips: {clip_id} decode: " in told.err
    assert told.out == f"{tmp_path / 'out'}: study.json, 0 training runs of 1\n"
    assert main([*said, "--skip-failed"]) == 0
    (result,) = written(tmp_path / "out" / "runs" / "clip-native" / "tagging" / "results.json")
    assert result["train_clips"] + result["val_clips"] == 5


def test_what_is_wrong_for_every_encoder_is_refused_at_the_door(scenes, encoders, tmp_path, capsys):
    out = tmp_path / "out"

    def refused(*more, these=encoders, **changes) -> str:
        assert main(words(scenes, these, out, *more, **changes)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "position 2d turns attention, and probes of tagging with depth 0 have none" in refused(depth=0)
    assert "position must be some of none, 1d, 2d, got 3d" in refused(position="3d")
    assert "pos_embed must be some of native, none, shuffled, got native, native" in refused(pos_embed="native,native")
    assert "tasks must be some of tagging, instance" in refused(tasks="naming")
    assert "no setting of tagging, instance is called lrr; there are batch, " in refused(lrr=1)
    assert "no setting of tagging is called dims; there are batch, " in refused("--set", "tagging.dims=3")
    unasked = refused("--set", "instance.dims=3", tasks="tagging")
    assert "instance.dims is a setting of instance, which is none of the tasks tagging" in unasked
    assert "position cannot be both in the grid and set" in refused("--set", "position=none")
    assert "pos_embed is what the study varies" in refused("--option", "pos_embed=none")
    assert "val must be a share between 0 and 1" in refused("--val", "2")
    assert "two encoders are called clip" in refused("--encoders", "a/clip,b/clip")
    assert "seeds must be a whole number" in refused("--seeds", "one")
    assert "seeds must differ, got 1, 2, 1" in refused("--seeds", "1,2,1")
    assert "threads must be a whole number from 1, got '0'" in refused("--threads", "0")
    assert "keep must be a number from 0, got '-1'" in refused("--keep", "-1")
    assert "device must be cpu, cuda or cuda:1, got 'gpu'" in refused(device="gpu")
    assert "holds labels of layout demo, which has no classes to choose" in refused("--classes", "20")
    elsewhere = tmp_path / "elsewhere"
    write_demo(elsewhere, make_scene(7, frames=FRAMES, height=24, width=36), kind="images")
    assert "6 clips have features but no labels in" in refused("--labels", str(elsewhere))
    assert not out.exists()


def test_depth_0_needs_no_position_and_a_plan_writes_nothing(scenes, encoders, tmp_path, capsys):
    out = tmp_path / "out"
    said = words(scenes, encoders, out, "--seeds", "1,2,3", "--dry-run", position="none", depth=0)
    assert main(said) == 0
    told = capsys.readouterr().out
    assert told.count("clips    6 in") == 4
    assert f"dinov2-shuffled, in {out / 'stores' / 'dinov2-shuffled'}" in told
    assert "tagging: 3 probes of each layer, position none x seed 1,2,3, in one pass" in told
    assert main([*words(scenes, encoders | {"nowhere": tmp_path / "no"}, out, "--dry-run", position="none")]) == 1
    assert "  cannot be run: " in capsys.readouterr().out
    assert not out.exists()


def test_by_itself_a_study_takes_the_tasks_that_the_labels_have(scenes, encoders, tmp_path, capsys):
    said = ["study", str(scenes / "images"), "--labels", str(scenes), "--encoders", f"a={encoders['clip']}"]
    said += ["--out", str(tmp_path / "out"), "--layers", "2", "--window", str(FRAMES), "--query", "0,1::4", "--dry-run"]
    said += [part for name, value in VIEWS.items() for part in ("--set", f"{name}={value}")]
    assert main(said) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in told if ", in " in line and ":" not in line] == [
        "a-native",
        "a-none",
        "a-shuffled",
    ]
    tasks = [line.partition(":")[0] for line in told if "in one pass" in line]
    assert tasks == [name for name in TASKS if set(TASKS[name].labels) <= set(open_labels(scenes).names)]
    assert "geometry" in tasks
