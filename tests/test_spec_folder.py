"""A folder of one spec: what it refuses, rivals at its making, what it holds after a failure or without room."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from spatialprobe.engine.files import spec_folder
from spatialprobe.engine.files.durable import StoreFull
from spatialprobe.engine.targets.folder import TargetFolder, TargetSpec
from spatialprobe.engine.types import FrameSelection

X = {"x": torch.arange(250_000.0)}  # 1 MB


def spec(weights: str = "content:0") -> TargetSpec:
    return TargetSpec("teacher", weights, FrameSelection(), None)


def names(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*"))


def test_places_of_other_things_are_refused_and_stay_as_they_are(tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(ValueError, match=r"/file is a file; targets are a folder$"):
        TargetFolder(tmp_path / "file", spec())
    for name in "fedcba":
        (tmp_path / "things" / name).mkdir(parents=True)
    message = r"/things is not empty and no folder of targets: it holds a, b, c, d, e$"
    with pytest.raises(ValueError, match=message):
        TargetFolder(tmp_path / "things", spec())
    assert names(tmp_path / "things") == ["a", "b", "c", "d", "e", "f"]
    TargetFolder(tmp_path / "targets", spec()).write("a", X, {})
    there = names(tmp_path / "targets")
    with pytest.raises(ValueError, match=r"of another spec; choose another folder\n  weights: .*content:0.*content:1"):
        TargetFolder(tmp_path / "targets", spec("content:1"))
    assert names(tmp_path / "targets") == there


def test_a_folder_whose_making_was_killed_is_made_again(tmp_path):
    (tmp_path / "tmp" / "run-0123").mkdir(parents=True)
    TargetFolder(tmp_path, spec()).write("a", X, {})
    assert TargetFolder(tmp_path, spec()).ids() == ["a"]


def test_of_two_specs_at_once_the_later_one_is_refused(tmp_path, monkeypatch):
    first = spec_folder.publish_first

    def late(temp, final):
        final.write_text(spec("content:1").to_json())
        first(temp, final)

    monkeypatch.setattr(spec_folder, "publish_first", late)
    with pytest.raises(ValueError, match="of another spec"):
        TargetFolder(tmp_path, spec())
    assert TargetFolder.READ(tmp_path / TargetFolder.NAME) == spec("content:1")


def test_of_two_at_once_with_one_spec_both_go_on(tmp_path, monkeypatch):
    listing = Path.iterdir

    def late(path):
        if path == tmp_path:
            (path / TargetFolder.NAME).write_text(spec().to_json())
        return listing(path)

    monkeypatch.setattr(Path, "iterdir", late)
    TargetFolder.check_place(tmp_path, spec())
    with pytest.raises(ValueError, match="of another spec"):
        TargetFolder.check_place(tmp_path, spec("content:1"))


def test_a_clip_is_there_once_its_file_is_and_has_not_failed_then(tmp_path):
    folder = TargetFolder(tmp_path, spec())
    for clip_id in ("room/b", "c", "a"):
        folder.record_failure(clip_id, "read", "too dark")
    size = folder.write("room/b", X, {"clip": "another", "frames": [1, 2]})
    (tmp_path / "c.sft").mkdir()
    assert ["room/b" in folder, "a" in folder, "c" in folder] == [True, False, False]
    assert folder.path("room/b").stat().st_size == size
    with safe_open(folder.path("room/b"), "pt") as file:
        assert torch.equal(file.get_tensor("x"), X["x"])
        said = json.loads(file.metadata()["spatialprobe"])
    assert (said["clip"], said["frames"], said["spec"]["weights"]) == ("room/b", [1, 2], "content:0")
    (tmp_path / "c.sft").rmdir()
    assert TargetFolder.failed(tmp_path) == {"a", "c"}
    folder.write("a", X, {})
    assert folder.ids() == ["a", "room/b"]
    with pytest.raises(ValueError, match=r"there is nothing to retry: .*/elsewhere is no folder of targets"):
        TargetFolder.failed(tmp_path / "elsewhere")
    for use in (folder.path, lambda clip_id: folder.write(clip_id, X, {})):
        with pytest.raises(ValueError, match="clip id"):
            use("../outside")
        with pytest.raises(ValueError, match=r"no part that ends in .* or \.sft, got 'a\.sft/b'"):
            use("a.sft/b")  # whose folder would stand where the file of clip a does


def test_without_room_nothing_is_half_there_and_it_says_what_was_wanted(tmp_path, monkeypatch):
    folder = TargetFolder(tmp_path, spec())
    folder.write_record("run.json", "first")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(spec_folder, "publish", full)
        with pytest.raises(StoreFull, match=r"No space left on device: 1\.000 MB needed, .*/a\.sft'"):
            folder.write("a", X, {})
        assert not list(tmp_path.rglob("*.part"))
        with pytest.raises(StoreFull, match=r"No space left on device: 0\.000 MB needed, .*/run\.json'"):
            folder.write_record("run.json", "second")
    assert folder.ids() == []
    assert (tmp_path / "run.json").read_text() == "first"
    folder.record_report(None, {"written": 3})
    folder.record_report("1/2", {"written": 4})
    for name, written in (("run.json", 3), ("run-1of2.json", 4)):
        assert json.loads((tmp_path / name).read_text()) == {"written": written}
