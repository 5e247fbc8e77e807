"""Which clips a folder or a list file gives, and what it says when it cannot tell. No file here holds real pictures."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from spatialprobe.engine.clips.sources import LAYOUTS, LOOKED_FOR, image_files, list_clips
from spatialprobe.engine.types import ClipRef


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def ids(*args, **kwargs):
    return [ref.id for ref in list_clips(*args, **kwargs)]


def test_videos(tmp_path):
    touch(tmp_path, "b/2.MKV", "a.mp4", "b/c/x.y.webm", ".hidden.mp4", ".cache/d.mp4", "notes.txt")
    refs = list_clips(tmp_path)
    assert refs == [
        ClipRef("a", str(tmp_path / "a.mp4")),
        ClipRef("b/2", str(tmp_path / "b/2.MKV")),
        ClipRef("b/c/x.y", str(tmp_path / "b/c/x.y.webm")),
    ]
    assert list_clips(tmp_path, "videos") == refs


def test_videos_with_one_id(tmp_path):
    touch(tmp_path, "a/x.mp4", "a/x.avi")
    with pytest.raises(ValueError, match=r"a/x\.avi and .*a/x\.mp4 would both be clip a/x"):
        list_clips(tmp_path)


def test_linked_folders(tmp_path):
    touch(tmp_path / "disk", "x.mp4")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/linked").symlink_to(tmp_path / "disk")
    assert ids(tmp_path / "data") == ["linked/x"]
    (tmp_path / "disk/loop").symlink_to(tmp_path / "disk")
    with pytest.raises(ValueError, match="links back"):
        list_clips(tmp_path / "data")


def test_a_link_to_nothing_is_a_clip(tmp_path):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "b.mp4").symlink_to(tmp_path / "gone.mp4")
    assert [ref.id for ref in list_clips(tmp_path)] == ["a", "b"]


def test_images(tmp_path):
    touch(tmp_path, "b/c/1.jpg", "b/c/2.jpg", "a/1.PNG", "b/c/d/1.webp", "e/readme.txt")
    assert list_clips(tmp_path) == [ClipRef(name, str(tmp_path / name)) for name in ("a", "b/c", "b/c/d")]
    assert ids(tmp_path, "images") == ["a", "b/c", "b/c/d"]


def test_one_clip(tmp_path, monkeypatch):
    touch(tmp_path, "kitchen/0.jpg", "walk.mp4")
    assert list_clips(tmp_path / "kitchen") == [ClipRef("kitchen", str(tmp_path / "kitchen"))]
    assert list_clips(tmp_path / "walk.mp4") == [ClipRef("walk", str(tmp_path / "walk.mp4"))]
    monkeypatch.chdir(tmp_path / "kitchen")
    assert ids(".") == ["kitchen"]


def test_image_files_go_by_number(tmp_path):
    touch(tmp_path, "f10.jpg", "f9.jpeg", "f2.JPG", "f1_b.jpg", "f1.jpg", "notes.txt", ".f0.jpg")
    assert [path.name for path in image_files(tmp_path)] == ["f1.jpg", "f1_b.jpg", "f2.JPG", "f9.jpeg", "f10.jpg"]
    touch(tmp_path, "f1.png")
    with pytest.raises(ValueError, match=r"\.jpg and \.png"):
        image_files(tmp_path)


def test_text_list(tmp_path):
    touch(tmp_path, "lists/in/a.mp4", "out/b.mp4", "lists/frames/0.jpg", "lists/v1.5/0.jpg")
    listing = tmp_path / "lists/clips.txt"
    listing.write_text(f"in/a.mp4\n\n../out/b.mp4\n{tmp_path}/lists/frames\nv1.5\n")
    outside = (tmp_path / "out/b").as_posix().removeprefix("/")
    assert {ref.id: ref.source for ref in list_clips(listing)} == {
        "in/a": str(tmp_path / "lists/in/a.mp4"),
        outside: str(tmp_path / "out/b.mp4"),
        "frames": str(tmp_path / "lists/frames"),
        "v1.5": str(tmp_path / "lists/v1.5"),
    }


def test_json_list(tmp_path):
    touch(tmp_path, "a.mp4", "x/2.jpg", "x/1.jpg")
    lines = [{"id": "s/one", "path": "a.mp4", "start_idx": 7}, {"id": "s/all", "frames": ["x/2.jpg", "x/1.jpg"]}]
    listing = tmp_path / "clips.jsonl"
    listing.write_text("\n".join(map(json.dumps, lines)))
    frames = (str(tmp_path / "x/2.jpg"), str(tmp_path / "x/1.jpg"))
    assert list_clips(listing) == [
        ClipRef("s/all", str(tmp_path), frames),
        ClipRef("s/one", str(tmp_path / "a.mp4"), start_idx=7),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "b", "path": "gone.mp4"}', "line 2: .*gone.mp4: no such file"),
        ('{"id": "b", "frames": ["a.mp4", "gone.jpg"]}', "line 2: .*gone.jpg: no such file"),
        ('{"id": "b", "path": "a.mp4", "fps": 3}', "line 2: unknown key 'fps', the keys are id, path"),
        ('{"id": "a", "path": "a.mp4"}', "line 2: id a is already on line 1"),
        ('{"id": "b"}', "line 2: wanted id and either path or frames, got id"),
        ('{"path": "a.mp4"}', "line 2: wanted id and either path or frames"),
        ('{"id": "b", "path": "a.mp4", "frames": ["a.mp4"]}', "line 2: wanted id and either"),
        ('{"id": "b", "frames": []}', "line 2: frames must be a list of image paths"),
        ('{"id": "b", "path": "a.mp4", "start_idx": -1}', "line 2: start_idx must be a frame number"),
        ('{"id": "b", "path": "a.mp4", "start_idx": true}', "line 2: start_idx must be a frame number"),
        ('{"id": "../b", "path": "a.mp4"}', "line 2: clip id must be"),
        ("[1]", "line 2: wanted an object, got list"),
        ('{"id": ', "line 2: not JSON"),
    ],
)
def test_json_list_errors(tmp_path, line, message):
    touch(tmp_path, "a.mp4")
    listing = tmp_path / "clips.jsonl"
    listing.write_text('{"id": "a", "path": "a.mp4"}\n' + line)
    with pytest.raises(ValueError, match=message):
        list_clips(listing)


def test_text_list_errors(tmp_path):
    touch(tmp_path, "a.mp4", "a.mkv", "f.jpg")
    listing = tmp_path / "clips.txt"
    for text, message in [
        ("a.mp4\na.mkv", "line 2: id a is already on line 1"),
        ("gone.mp4", "line 1: .*no such file"),
        ("a.mp4\nf.jpg", "line 2: .*is an image"),
        ("\n\n", "no clips found"),
    ]:
        listing.write_text(text)
        with pytest.raises(ValueError, match=message):
            list_clips(listing)
    listing.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        list_clips(listing)


def scannet(root):
    touch(root, "train/s1/frames/frame_00000.jpg", "train/s0/frames/frame_00000.jpg", "val/s2/frames/frame_00000.jpg")


def test_scannet(tmp_path):
    scannet(tmp_path)
    touch(tmp_path, "train/s0/poses.npy", "train/s0/thumb.png")
    assert ids(tmp_path) == ids(tmp_path, "scannet") == ["train/s0", "train/s1", "val/s2"]
    assert list_clips(tmp_path)[2].source == str(tmp_path / "val/s2/frames")
    (tmp_path / "train.json").write_text('[["train", "s1"]]')
    assert ids(tmp_path) == ["train/s1", "val/s2"]


@pytest.mark.parametrize(
    ("listing", "message"),
    [
        ('[["train", "s1"], ["train", "x"], ["train", "y"]]', "2 of 3 train scenes have no frames/, first train/x"),
        ('[["val", "s2"]]', "wanted scenes of train"),
        ('[["train", "s1"], ["train", "s1"]]', "lists train/s1 more than once"),
        ('["s1"]', r"wanted \[split, scene\], got 's1'"),
        ('{"train": []}', "wanted a list"),
        ('[["train", "../s1"]]', "clip id must be"),
        ("[", "not JSON"),
    ],
)
def test_scannet_errors(tmp_path, listing, message):
    scannet(tmp_path)
    (tmp_path / "train.json").write_text(listing)
    with pytest.raises(ValueError, match=message):
        list_clips(tmp_path)


def test_scannet_folder_without_frames(tmp_path):
    scannet(tmp_path)
    (tmp_path / "val/s9").mkdir()
    with pytest.raises(ValueError, match="1 of 2 val scenes have no frames/, first val/s9"):
        list_clips(tmp_path)


def dl3dv(tmp_path):
    root = tmp_path / "DL3DV"
    touch(root, "1K/aa/images_4/frame_00001.png", "2K/bb/colmap/images_4/frame_00001.png", "1K/aa/images_8/x.png")
    return root


def save_target(path, start_idx):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"images": np.zeros((2, 3, 4, 5), np.uint8), "start_idx": np.array(start_idx)}, path)


def test_dl3dv(tmp_path):
    root = dl3dv(tmp_path)
    aa, bb = str(root / "1K/aa/images_4"), str(root / "2K/bb/colmap/images_4")
    assert list_clips(root) == list_clips(root, "dl3dv") == [ClipRef("1K/aa", aa), ClipRef("2K/bb", bb)]
    save_target(tmp_path / "DL3DV-processed/1K/aa.sft", 31)
    assert list_clips(root) == [ClipRef("1K/aa", aa, start_idx=31), ClipRef("2K/bb", bb)]
    save_target(tmp_path / "other/2K/bb.sft", [5])
    assert list_clips(root, targets=tmp_path / "other") == [ClipRef("1K/aa", aa), ClipRef("2K/bb", bb, start_idx=5)]


def test_dl3dv_errors(tmp_path):
    root = dl3dv(tmp_path)
    with pytest.raises(ValueError, match="no such folder of DL3DV targets"):
        list_clips(root, targets=tmp_path / "gone")
    target = tmp_path / "DL3DV-processed/1K/aa.sft"
    for start_idx in ([1, 2], -1, 0.5, float("nan")):
        save_target(target, start_idx)
        with pytest.raises(ValueError, match=r"aa\.sft: start_idx must be one frame number"):
            list_clips(root)
    for content in (target.read_bytes()[:-3], b""):
        target.write_bytes(content)
        with pytest.raises(ValueError, match=r"aa\.sft: no start_idx can be read"):
            list_clips(root)
    save_file({"images": np.zeros(3)}, target)
    with pytest.raises(ValueError, match=r"aa\.sft: no start_idx can be read"):
        list_clips(root)
    target.unlink()
    touch(root, "1K/aa/colmap/images_4/frame_00001.png")
    with pytest.raises(ValueError, match="holds both images_4 and colmap/images_4"):
        list_clips(root)


def test_auto_says_what_it_looked_for(tmp_path):
    (tmp_path / "sub").mkdir()
    with pytest.raises(ValueError, match=r"no clips found, looked for video files \(\.mp4.*folders of images") as error:
        list_clips(tmp_path)
    assert all(words in str(error.value) for words in LOOKED_FOR.values())
    assert LOOKED_FOR.keys() == LAYOUTS.keys()
    touch(tmp_path, "a.pdf")
    with pytest.raises(ValueError, match=r"a\.pdf: neither video files"):
        list_clips(tmp_path / "a.pdf")


@pytest.mark.parametrize("layout", ["videos", "images", "scannet", "dl3dv"])
def test_nothing_of_a_layout(tmp_path, layout):
    touch(tmp_path, "a/b.txt")
    with pytest.raises(ValueError, match="no clips found, looked for"):
        list_clips(tmp_path, layout)


def test_ambiguous_folders(tmp_path):
    touch(tmp_path, "a/x.mp4", "b/1.jpg")
    with pytest.raises(ValueError, match=r"both videos and images \(.*x\.mp4 and .*1\.jpg\); choose layout"):
        list_clips(tmp_path)
    assert ids(tmp_path, "videos") == ["a/x"]
    assert ids(tmp_path, "images") == ["b"]
    touch(tmp_path, "cover.jpg")
    with pytest.raises(ValueError, match="holds images itself and in folders below"):
        list_clips(tmp_path, "images")


def test_wrong_arguments(tmp_path):
    touch(tmp_path, "x.mp4")
    for source, kwargs, message in [
        (tmp_path / "gone", {}, "gone: no such file or folder"),
        (tmp_path, {"layout": "video"}, "layout must be auto or one of videos, images, list, scannet, dl3dv"),
        (tmp_path, {"targets": tmp_path}, "targets is for the dl3dv layout"),
        (tmp_path, {"layout": "list"}, "layout list wants a file"),
        (tmp_path / "x.mp4", {"layout": "images"}, "layout images wants a folder"),
        (tmp_path / "x.mp4", {"layout": "dl3dv"}, "Not a directory"),
    ]:
        with pytest.raises(ValueError, match=message):
            list_clips(source, **kwargs)
