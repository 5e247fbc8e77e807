"""`engine lift`: folders in, folders out; no clip is lost, and what cannot be lifted says why."""

import json
import re
import shutil
import signal
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from lifting_scenes import UP, views_of
from safetensors.torch import load_file, save_file
from study_layouts import write_dl3dv, write_scannet

from spatialprobe.engine.cli import main
from spatialprobe.engine.demo.scene_files import write_demo
from spatialprobe.engine.demo.scenes import make_scene, resized
from spatialprobe.engine.files.clipfile import is_whole, read_header, write_file
from spatialprobe.engine.files.durable import StoreFull
from spatialprobe.engine.lifting import run
from spatialprobe.engine.lifting.folder import LiftFolder, read_spec, read_table
from spatialprobe.engine.lifting.lift import lift
from spatialprobe.engine.targets.folder import TargetFolder, TargetSpec
from spatialprobe.engine.types import FrameSelection
from spatialprobe.probes.labels import open_labels

FRAMES, SIZE = 5, (72, 126)
SCENES = [make_scene(seed, frames=FRAMES, height=SIZE[0], width=SIZE[1]) for seed in range(3)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    for scene in SCENES:
        write_demo(root, scene, kind="images")
    return root


@pytest.fixture(scope="module")
def scannet(tmp_path_factory):
    root = write_scannet(tmp_path_factory.mktemp("scannet"), "train", SCENES[:2])
    for scene in SCENES[:2]:
        groups = [{"id": 0, "objectId": thing.id - 1, "label": thing.kind} for thing in scene.objects]
        (root / "train" / scene.id / f"{scene.id}.aggregation.json").write_text(json.dumps({"segGroups": groups}))
    return root


def targets(root, scenes, *, size=SIZE, cameras=None, window=FRAMES, padded=0):
    """As `engine targets` makes them, with the true depth in the teacher's place."""
    folder = TargetFolder(
        root, TargetSpec("depth_pro", "content:0", FrameSelection(window=window), size, cameras=cameras)
    )
    for scene in scenes:
        scene = resized(scene, *size)
        depth = torch.from_numpy(views_of(scene).depth)
        depth = torch.cat([depth, depth[-1:].expand(padded, *size)])
        tensors = {"depthmaps": depth[..., None], "confmaps": torch.ones_like(depth)}
        if cameras:
            tensors["extrinsic"] = torch.from_numpy(np.linalg.inv(scene.poses)[:, :3]).float()
            tensors["intrinsic"] = torch.from_numpy(scene.intrinsic).float().expand(len(depth), 3, 3).contiguous()
            tensors["extrinsic"] = torch.cat([tensors["extrinsic"], tensors["extrinsic"][-1:].expand(padded, 3, 4)])
        folder.write(f"train/{scene.id}", tensors, {"padded": padded})
    return root


def same(table, other):
    for name, x in table.arrays().items():
        np.testing.assert_array_equal(x, getattr(other, name), err_msg=name)
    for name in ("tags", "metric", "gravity", "floor", "size"):
        assert getattr(table, name) == getattr(other, name)


def test_files_hold_tables_points_masks_and_cameras(demo, tmp_path, capsys):
    out = tmp_path / "lifted"
    assert main(["lift", str(demo), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "3 written" in said
    assert "device" not in said
    for scene in SCENES:
        path = out / f"{scene.id}.sft"
        assert is_whole(path)
        of, names = views_of(scene), {thing.id: thing.kind for thing in scene.objects}
        read = open_labels(demo).read(scene.id, range(FRAMES), ("extrinsic", "intrinsic"))
        cameras = [read[name].numpy() for name in ("extrinsic", "intrinsic")]
        lifted = lift(scene.id, of.depth, *cameras, of.masks, names, frames=np.arange(FRAMES), up=UP)
        same(read_table(path), lifted.table)
        held = load_file(path)
        assert torch.equal(held["points"], lifted.points)
        assert np.array_equal(held["instance_masks"].numpy(), of.masks.astype(np.uint16))
        assert (held["instance_masks"].dtype, held["objects.complete"].dtype) == (torch.uint16, torch.bool)
        back = np.linalg.inv(lifted.table.poses)[:, :3]
        np.testing.assert_allclose(held["extrinsic"].numpy(), back, atol=1e-6)
        with path.open("rb") as file:
            said = read_header(file).provenance
        assert (said["clip"], said["index"], said["spec"]["points"]) == (scene.id, list(range(FRAMES)), "float16")
    spec = read_spec(out / "lift.json")
    assert (spec.up, spec.metric, spec.data, spec.depth) == ((0, 0, 1), True, str(demo), str(demo))
    assert json.loads((out / "run.json").read_text())["written"] == 3
    assert not (out / "tmp").exists()


def test_a_run_goes_on_from_another_working_folder(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(demo.parent)
    assert main(["lift", demo.name, "--limit", "1", "--out", str(tmp_path / "out")]) == 0
    monkeypatch.chdir(demo / "labels")
    assert main(["lift", "..", "--limit", "1", "--out", str(tmp_path / "out")]) == 0
    assert "0 written, 1 there before" in capsys.readouterr().out


def test_frames_points_and_scale_are_chosen(demo, tmp_path):
    words = ["lift", str(demo), "--limit", "1", "--out"]
    assert main([*words, str(tmp_path / "a"), "--query", "1,3", "--points", "none", "--scale", "free"]) == 0
    (path,) = (tmp_path / "a").glob("*.sft")
    table = read_table(path)
    assert (table.metric, table.frames.tolist()) == (False, [1, 3])
    assert "points" not in load_file(path)
    assert main([*words, str(tmp_path / "b"), "--points", "float32", "--up", "floor"]) == 0
    (path,) = (tmp_path / "b").glob("*.sft")
    assert read_table(path).gravity == "floor"
    assert load_file(path)["points"].dtype == torch.float32


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--points", "int8"], "points must be one of float16, float32, none"),
        (["--up", "0,0"], "up must be 3 numbers"),
        (["--up", "north"], "up must be three numbers like 0,0,1, or floor"),
        (["--scale", "1"], "scale must be metric or free"),
        (["--query", "9:1,x"], "query must be frame numbers"),
        (["--names", "none.json"], "No such file"),
        (["--loaders", "0"], "loaders must be"),
        (["--shard", "3/3"], "shard must be i/n"),
        (["--retry-failed"], "there is nothing to retry"),
        (["--classes", "20"], "holds no labels, looked for scannet"),
    ],
)
def test_bad_words_are_refused_before_anything_is_written(demo, tmp_path, capsys, words, message):
    assert main(["lift", str(demo), "--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_labels_that_do_not_go_together_are_refused(demo, scannet, tmp_path, capsys):
    write_dl3dv(tmp_path, "1K", SCENES[:1], size=(14, 28))
    published = str(tmp_path / "DL3DV-processed")
    for data, more, message in (
        (scannet, [], "has no depth, it has .*; give --depth"),
        (published, [], "has no instance_masks"),
        (
            scannet,
            ["--depth", published],
            "masks are of frames at start start, stride 1, depth of those at start start",
        ),
    ):
        assert main(["lift", str(data), *more, "--out", str(tmp_path / "out")]) == 2
        assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("own_cameras", [True, False])
def test_masks_of_scannet_and_depth_of_targets(scannet, demo, tmp_path, own_cameras):
    """Depth of other sizes, with cameras copied from the data or none; both give what the demo's own labels give."""
    size = (108, 189)  # half as large again
    depth = targets(tmp_path / "t", SCENES[:2], size=size, cameras=str(scannet) if own_cameras else None)
    out = tmp_path / "lifted"
    assert main(["lift", str(scannet), "--depth", str(depth), "--out", str(out)]) == 0
    assert main(["lift", str(demo), "--out", str(tmp_path / "demo"), "--limit", "3"]) == 0
    for scene in SCENES[:2]:
        table, other = read_table(out / "train" / f"{scene.id}.sft"), read_table(tmp_path / "demo" / f"{scene.id}.sft")
        assert (table.gravity, table.metric, table.size) == ("poses", True, size)
        np.testing.assert_allclose(table.poses, other.poses, atol=0.01)
        for i, tag in zip(other.ids, other.tags, strict=True):
            (n,), (m,) = np.flatnonzero(table.ids == i), np.flatnonzero(other.ids == i)
            assert table.tags[n] == tag
            assert table.pixels[n].sum() == pytest.approx(2.25 * other.pixels[m].sum(), rel=0.1, abs=20)
            if (table.complete[n] & other.complete[m]).all():
                np.testing.assert_allclose(table.extent[n], other.extent[m], atol=0.08)


def test_padded_frames_are_not_lifted_and_shorter_windows_are(scannet, tmp_path, capsys):
    """Masks of 5 frames; depth of 5 and 3 repeated ones, of a window of 3, and of 4 of which nobody knows why."""
    for name, frames, window, padded in (("padded", 5, 8, 3), ("shorter", 3, 3, 0), ("torn", 4, 8, 0)):
        scene = replace(SCENES[0], poses=SCENES[0].poses[:frames])
        depth = targets(tmp_path / name, [scene], window=window, padded=padded, cameras=str(scannet))
        out = tmp_path / f"{name}-lifted"
        assert main(["lift", str(scannet), "--depth", str(depth), "--out", str(out)]) == 1  # the other has no depth
        path = out / "train" / f"{scene.id}.sft"
        if name == "torn":
            assert not path.exists()
            assert "read: there are masks of 5 frames and depth of 4" in capsys.readouterr().err
        else:
            assert read_table(path).frames.tolist() == list(range(frames))
            assert f"clip train/{SCENES[1].id} has no labels" in capsys.readouterr().err


def test_frames_without_a_pose_are_left_out(scannet, tmp_path):
    """ScanNet's preprocessing writes the identity for them; infinite ones were there before."""
    root = tmp_path / "data"
    shutil.copytree(scannet, root)
    name = f"train/{SCENES[0].id}"
    poses = np.load(root / name / "poses.npy")
    poses[1], poses[3] = np.eye(4), -np.inf
    np.save(root / name / "poses.npy", poses)
    depth = targets(tmp_path / "t", SCENES[:1])
    main(["lift", str(root), "--depth", str(depth), "--out", str(tmp_path / "out")])
    path = tmp_path / "out" / f"{name}.sft"
    assert read_table(path).frames.tolist() == [0, 2, 4]
    with path.open("rb") as file:
        assert read_header(file).provenance["left_out"] == {"no pose": [1, 3]}


def test_names_of_a_file_win(scannet, tmp_path):
    depth, names = targets(tmp_path / "t", SCENES[:2]), tmp_path / "names.json"
    names.write_text(json.dumps({f"train/{SCENES[0].id}": {"1": "settee"}}))
    out = tmp_path / "out"
    words = ["lift", str(scannet), "--depth", str(depth), "--out", str(out), "--names", str(names)]
    assert main(words) == 1
    assert read_table(out / "train" / f"{SCENES[0].id}.sft").tags == ("settee",)
    assert f"train/{SCENES[1].id}" in (out / "failed.jsonl").read_text()


@pytest.mark.parametrize("name", ["<image>", "chair <|im_end|>", "[INST] lamp", "{clip}", "a\nchair", " "])
def test_names_that_would_be_tokens_of_a_chat_are_refused(demo, tmp_path, name):
    clip_id = min(scene.id for scene in SCENES)
    (tmp_path / "names.json").write_text(json.dumps({clip_id: {"1": name, "2": "settee"}}))
    words = ["--names", str(tmp_path / "names.json"), "--limit", "1", "--points", "none"]
    assert main(["lift", str(demo), "--out", str(tmp_path / "out"), *words]) == 1
    (failure,) = map(json.loads, (tmp_path / "out" / "failed.jsonl").read_text().splitlines())
    assert "must be called by printable words without < > [ ] { | } (chats of questions" in failure["reason"]
    assert failure["reason"].endswith(f"got {name!r}")


def spoiled(demo, root, change):
    """The demo with its second clip's labels changed."""
    shutil.copytree(demo / "labels", root / "labels")
    clip_id = sorted(scene.id for scene in SCENES)[1]
    path = root / "labels" / f"{clip_id}.safetensors"
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file({name: x.contiguous() for name, x in tensors.items()}, path)
    return clip_id


def scaled(name, by):
    return lambda tensors: tensors.update({name: tensors[name] * by})


def sheared(tensors):
    tensors["poses"][2, 0, :3] *= 1.2


def single(tensors):
    tensors["instance"].zero_()
    tensors["instance"][1, 40, 60] = 1


BAD = {
    "no depth": (lambda t: t.pop("depth"), "read: .*it has no depth"),
    "all-zero depth": (scaled("depth", 0), "read: its depth is nowhere positive and finite"),
    "poses that are not rigid": (sheared, "lift: the pose of frame 2 is not rigid"),
    "masks of another size": (
        lambda t: t.update(instance=t["instance"][:, :50]),
        "read: masks of 50x126 pixels are not",
    ),
    "masks of fewer frames": (lambda t: t.update(instance=t["instance"][:3]), "read: .*instance is"),
    "no objects": (scaled("instance", 0), "read: its masks show no object"),
    "an object of one pixel": (single, "lift: none of its objects 1 has a surface"),
    "a room of 3 km": (
        lambda t: (scaled("depth", 600)(t), t["poses"][:, :3, 3].mul_(600)),
        "lift: depth cannot be in me",
    ),
    "a room of 3 mm": (
        lambda t: (scaled("depth", 6e-4)(t), t["poses"][:, :3, 3].mul_(6e-4)),
        "lift: depth cannot be in",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_clip_is_named_and_the_others_are_lifted(demo, tmp_path, what, capsys):
    change, message = BAD[what]
    clip_id, out = spoiled(demo, tmp_path / "data", change), tmp_path / "out"
    words = ["lift", str(tmp_path / "data"), "--out", str(out)]
    assert main(words) == 1
    record = json.loads((out / "failed.jsonl").read_text())
    assert record["id"] == clip_id
    assert re.search(message, f"{record['stage']}: {record['reason']}")
    assert len(list(out.glob("*.sft"))) == 2
    if what == "no objects":  # mended, it is retried
        shutil.copy(demo / "labels" / f"{clip_id}.safetensors", tmp_path / "data" / "labels")
        capsys.readouterr()
        assert main([*words, "--retry-failed"]) == 0
        assert "1 written, 0 there before, 0 failed, 0 skipped of 1 clips" in capsys.readouterr().out


def test_a_second_run_goes_on_and_another_spec_is_refused(demo, tmp_path, capsys):
    words = ["lift", str(demo), "--out", str(tmp_path / "out")]
    for shard, written in (("0/2", 2), ("1/2", 1)):
        assert main([*words, "--shard", shard]) == 0
        assert f"{written} written" in capsys.readouterr().out
    before = {path: path.read_bytes() for path in (tmp_path / "out").glob("*.sft")}
    assert main(words) == 0
    assert "0 written, 3 there before" in capsys.readouterr().out
    assert main([*words[:-1], str(tmp_path / "whole"), "--loaders", "1", "--writers", "1"]) == 0
    for path, data in before.items():
        assert (tmp_path / "whole" / path.name).read_bytes() == data  # whatever the shard and the threads
    assert main([*words, "--points", "none"]) == 2
    assert 'points: "float16" there, "none" asked' in capsys.readouterr().err
    assert main([*words[:-1], str(demo)]) == 2
    assert "no folder of lifted clips" in capsys.readouterr().err


def test_a_full_disk_and_an_interrupt_end_the_run_and_the_next_goes_on(demo, tmp_path, capsys, monkeypatch):
    words, write = (
        ["lift", str(demo), "--out", str(tmp_path / "out"), "--loaders", "1", "--writers", "1"],
        LiftFolder.write,
    )

    def full(self, clip_id, *args):
        if clip_id == SCENES[0].id:
            raise StoreFull(28, "No space left on device", clip_id)
        return write(self, clip_id, *args)

    monkeypatch.setattr(LiftFolder, "write", full)
    assert main(words) == 1
    assert "stopped: [Errno 28] No space left" in capsys.readouterr().err
    monkeypatch.setattr(LiftFolder, "write", write)
    (tmp_path / "out" / f"{SCENES[0].id}.sft").unlink(missing_ok=True)

    pressed = threading.Event()

    def interrupted(*args, **given):
        if not pressed.is_set():
            pressed.set()
            signal.raise_signal(signal.SIGINT)
        return lift(*args, **given)

    monkeypatch.setattr(run, "lift", interrupted)
    assert main([*words[:2], "--out", str(tmp_path / "new")]) == 130
    assert "interrupted: run the same command again" in capsys.readouterr().err
    monkeypatch.setattr(run, "lift", lift)
    for out in ("out", "new"):
        assert main([*words[:3], str(tmp_path / out)]) == 0
        assert len(list((tmp_path / out).glob("*.sft"))) == 3


def test_few_clips_are_in_memory_at_once(demo, tmp_path, monkeypatch):
    """A writer that is slow holds the loaders back: memory does not grow with the clips."""
    root = tmp_path / "data"
    (root / "labels").mkdir(parents=True)
    for n in range(24):
        for suffix in (".safetensors", ".json"):
            (root / "labels" / f"clip{n:02d}{suffix}").symlink_to(demo / "labels" / f"{SCENES[0].id}{suffix}")
    alive, most, lock = 0, 0, threading.Lock()
    make, write = run.make, run.write

    def counted(*args):
        nonlocal alive, most
        with lock:
            alive, most = alive + 1, max(most, alive + 1)
        return make(*args)

    def slow(*args):
        nonlocal alive
        threading.Event().wait(0.05)
        write(*args)
        with lock:
            alive -= 1

    monkeypatch.setattr(run, "make", counted)
    monkeypatch.setattr(run, "write", slow)
    words = ["lift", str(root), "--out", str(tmp_path / "out"), "--query", "0,1", "--loaders", "2", "--writers", "1"]
    assert main(words) == 0
    assert most <= 2 + 1 + 1 + 2  # ahead, one more made, one handed over, behind


def test_a_file_of_other_things_is_no_table(tmp_path):
    write_file(tmp_path / "a.sft", {"x": torch.zeros(1)}, {"clip": "a"})
    with pytest.raises(ValueError, match=r"a.sft is no lifted clip: it has no objects.frames"):
        read_table(tmp_path / "a.sft")
    (tmp_path / "b.sft").write_bytes(b"\0" * 4)
    with pytest.raises(ValueError, match=r"b.sft: truncated: 4 bytes"):
        read_table(tmp_path / "b.sft")


def test_clip_files_hold_the_dtypes_of_tables(tmp_path):
    tensors = {
        str(dtype): torch.tensor([0, 1, 250]).to(dtype)
        for dtype in (torch.uint16, torch.int32, torch.float64, torch.bool, torch.float16)
    }
    write_file(tmp_path / "a.sft", tensors, {})
    assert is_whole(tmp_path / "a.sft")
    read = load_file(tmp_path / "a.sft")
    assert {name: (x.dtype, x.tolist()) for name, x in read.items()} == {
        name: (x.dtype, x.tolist()) for name, x in tensors.items()
    }


def test_names_and_up_of_labels(demo, scannet):
    labels = open_labels(demo)
    assert labels.object_names(SCENES[0].id) == {thing.id: thing.kind for thing in SCENES[0].objects}
    assert (labels.up, labels.metric) == ((0, 0, 1), True)
    other = open_labels(scannet)
    assert other.object_names(f"train/{SCENES[1].id}") == {thing.id: thing.kind for thing in SCENES[1].objects}
    assert (other.up, other.identity_is_no_pose) == ((0, 0, 1), True)
    file = scannet / "train" / SCENES[1].id / f"{SCENES[1].id}.aggregation.json"
    text = file.read_text()
    try:
        file.write_text('{"segGroups": [{"objectId": 3}]}')
        with pytest.raises(ValueError, match=r"aggregation.json must list named objects below segGroups: KeyError"):
            other.object_names(f"train/{SCENES[1].id}")
        file.unlink()
        assert other.object_names(f"train/{SCENES[1].id}") == {}
    finally:
        file.write_text(text)
