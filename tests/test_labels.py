"""Labels of three layouts against the scenes they were rendered from; what is damaged or foreign is named."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file
from study_layouts import tag_pixel_counts, unproject, write_dl3dv, write_scannet

from spatialprobe.engine.demo.render import render_clip
from spatialprobe.engine.demo.scene_files import write_demo
from spatialprobe.engine.demo.scenes import CLASS_NAMES_20, make_scene, resized
from spatialprobe.probes.labels import (
    DemoLabels,
    DL3DVLabels,
    Labels,
    ScanNetLabels,
    open_labels,
    presence_rates,
)
from spatialprobe.probes.labels.base import read_array

FRAMES, HEIGHT, WIDTH = 9, 24, 40
PICKED = [0, 5, 3, 5]  # any order, twice the same
SCENES = [make_scene(seed, frames=FRAMES, height=HEIGHT, width=WIDTH) for seed in (0, 1)]
SMALL = (14, 28)  # height and width of DL3DV's targets


@pytest.fixture(scope="module")
def clips():
    return {scene.id: render_clip(scene) for scene in SCENES}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """All three layouts of the same two scenes."""
    root = tmp_path_factory.mktemp("labels")
    write_scannet(root, "train", [SCENES[0]])
    write_scannet(root, "val", [SCENES[1]])
    write_dl3dv(root, "1K", SCENES, size=SMALL)
    write_demo(root / "demo", SCENES[0], kind="video")
    write_demo(root / "demo", SCENES[1], kind="images")
    return root


@pytest.fixture
def scannet(made) -> ScanNetLabels:
    return ScanNetLabels(made / "ScanNet-processed")


@pytest.fixture
def dl3dv(made) -> DL3DVLabels:
    return DL3DVLabels(made / "DL3DV-processed")


@pytest.fixture
def demo(made) -> DemoLabels:
    return DemoLabels(made / "demo")


def world_to_camera(scene) -> torch.Tensor:
    return torch.from_numpy(np.linalg.inv(scene.poses)[PICKED, :3]).float()


def equal(got: torch.Tensor, expected) -> bool:
    expected = torch.as_tensor(np.ascontiguousarray(expected))
    return got.shape == expected.shape and torch.equal(got, expected.to(got.dtype))


# -- what is read -----------------------------------------------------------------------------------------------------


def test_ids_and_splits(scannet, dl3dv, demo):
    first, second = (scene.id for scene in SCENES)
    assert scannet.ids() == [f"train/{first}", f"val/{second}"]
    assert scannet.ids("val") == [f"val/{second}"]
    assert dl3dv.ids() == sorted(f"1K/{scene.id}" for scene in SCENES)
    assert demo.ids() == sorted([first, second])
    for labels in (scannet, dl3dv, demo):
        assert {labels.frames(clip_id) for clip_id in labels.ids()} == {FRAMES}


def test_scannet(scannet, clips):
    scene, clip = SCENES[0], clips[SCENES[0].id]
    read = scannet.read(f"train/{scene.id}", PICKED, scannet.names)
    assert set(read) == set(scannet.names)
    assert read["tag_pixel_counts"].dtype == read["instance_masks"].dtype == torch.int32
    assert equal(read["tag_pixel_counts"], tag_pixel_counts(clip.tag)[PICKED])
    assert equal(read["instance_masks"], clip.instance[PICKED].astype(np.int32))
    torch.testing.assert_close(read["extrinsic"], world_to_camera(scene))
    torch.testing.assert_close(read["intrinsic"], torch.from_numpy(scene.intrinsic).float().expand(4, 3, 3))
    files = sorted((scannet.root / "train" / scene.id / "frames").iterdir())
    images = np.stack([np.asarray(Image.open(files[f])) for f in PICKED]).transpose(0, 3, 1, 2)
    assert equal(read["images"], images)
    assert scannet.class_names == CLASS_NAMES_20


def test_dl3dv(dl3dv, clips):
    scene = SCENES[1]
    window = resized(scene, *SMALL)
    clip = render_clip(window)
    read = dl3dv.read(f"1K/{scene.id}", PICKED, dl3dv.names)
    assert set(read) == {"depth", "points", "confidence", "extrinsic", "intrinsic", "images"}
    assert equal(read["depth"], clip.depth[PICKED])
    torch.testing.assert_close(read["extrinsic"], world_to_camera(scene))
    torch.testing.assert_close(read["intrinsic"], torch.from_numpy(window.intrinsic).float().expand(4, 3, 3))
    points = unproject(clip.depth, window.intrinsic, scene.poses)[PICKED]
    torch.testing.assert_close(read["points"], torch.from_numpy(points).float())
    assert equal(read["confidence"], np.ones((4, *SMALL), np.float32))
    assert equal(read["images"], clip.rgb[PICKED].transpose(0, 3, 1, 2))


@pytest.mark.parametrize("seed", [0, 1])
def test_demo(demo, clips, seed):
    scene, clip = SCENES[seed], clips[SCENES[seed].id]
    read = demo.read(scene.id, PICKED, demo.names)
    assert equal(read["tag_pixel_counts"], tag_pixel_counts(clip.tag)[PICKED])
    assert equal(read["instance_masks"], clip.instance[PICKED].astype(np.int32))
    assert equal(read["depth"], clip.depth[PICKED])
    points = unproject(clip.depth, scene.intrinsic, scene.poses)[PICKED]
    torch.testing.assert_close(read["points"], torch.from_numpy(points).float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(read["extrinsic"], world_to_camera(scene))
    assert equal(read["confidence"], np.ones((4, HEIGHT, WIDTH), np.float32))
    difference = (read["images"].int() - torch.from_numpy(clip.rgb[PICKED].transpose(0, 3, 1, 2)).int()).abs()
    assert difference.float().mean() < (8 if seed == 0 else 1e-9)  # a video is not lossless


@pytest.mark.parametrize("kind", ["dl3dv", "demo"])
def test_points_depth_and_cameras_belong_together(kind, made, request):
    """A world point, taken into the camera and projected, is the pixel it came from at the depth there."""
    labels: Labels = request.getfixturevalue(kind)
    read = labels.read(labels.ids()[0], [0, 8], ("points", "depth", "extrinsic", "intrinsic"))
    turn, shift = read["extrinsic"][..., :3], read["extrinsic"][..., 3]
    camera = torch.einsum("sij,shwj->shwi", turn, read["points"]) + shift[:, None, None]
    torch.testing.assert_close(camera[..., 2], read["depth"], rtol=1e-4, atol=1e-4)
    pixels = torch.einsum("sij,shwj->shwi", read["intrinsic"], camera)
    pixels = pixels[..., :2] / pixels[..., 2:]
    height, width = read["depth"].shape[1:]
    v, u = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    torch.testing.assert_close(pixels, torch.stack([u, v], -1).expand(2, -1, -1, -1), rtol=0, atol=1e-2)


def test_only_what_is_wanted_is_opened(scannet, made, tmp_path):
    """A scene that holds nothing but its masks gives masks."""
    folder = tmp_path / "S" / "train" / "a"
    folder.mkdir(parents=True)
    source = scannet.root / "train" / SCENES[0].id
    for name in ("instance_masks.npy", "metadata.sft"):
        (folder / name).write_bytes((source / name).read_bytes())
    (tmp_path / "S" / "class_names_20.json").write_text(json.dumps({"names": list(CLASS_NAMES_20)}))
    labels = ScanNetLabels(tmp_path / "S")
    assert labels.ids() == ["train/a"]  # without train.json, what is there
    assert list(labels.read("train/a", [1], ("instance_masks",))) == ["instance_masks"]
    with pytest.raises(ValueError, match=r"clip train/a: labels in .*train/a: .*tag_pixel_counts_20.npy"):
        labels.read("train/a", [1], ("tag_pixel_counts",))


def test_only_the_wanted_frames_are_decoded(scannet, tmp_path, monkeypatch):
    opened, real = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path, **k: opened.append(Path(path).name) or real(path, **k))
    scannet.read(scannet.ids()[0], [2, 7], ("images",))
    assert sorted(opened) == ["frame_00002.jpg", "frame_00007.jpg"]


def test_the_rates_of_presence_are_the_published_ones(scannet):
    stored = np.load(scannet.root / "train_pos_rate_20.npy")
    assert presence_rates(scannet, scannet.ids("train")).tolist() == stored.tolist()
    both = presence_rates(scannet, scannet.ids())
    assert 0 < (both == 0.5).sum() < 20  # a bathroom and another room
    with pytest.raises(ValueError, match="at least 1 clip"):
        presence_rates(scannet, [])


def test_an_intrinsic_of_larger_images_is_scaled(made):
    """A pixel's ray is the same when the image is half as large."""
    labels = ScanNetLabels(made / "ScanNet-processed", intrinsic_size=(2 * HEIGHT, 2 * WIDTH))
    scaled = labels.read(labels.ids()[0], [0], ("intrinsic",))["intrinsic"][0]
    half = resized(SCENES[0], HEIGHT // 2, WIDTH // 2).intrinsic
    torch.testing.assert_close(scaled, torch.from_numpy(half).float(), rtol=1e-5, atol=1e-5)


# -- whose labels they are --------------------------------------------------------------------------------------------


def test_a_folder_is_recognised(made, tmp_path):
    kinds = {"ScanNet-processed": ScanNetLabels, "DL3DV-processed": DL3DVLabels, "demo": DemoLabels}
    assert {name: type(open_labels(made / name)) for name in kinds} == kinds
    assert open_labels(made / "demo", "demo").ids() == sorted(scene.id for scene in SCENES)
    with pytest.raises(ValueError, match=r"demo holds no labels, looked for dl3dv: <subset>/<hash>.sft"):
        open_labels(made / "demo", "dl3dv")
    with pytest.raises(ValueError, match=r"holds no labels, looked for scannet: .*; dl3dv: .*; demo: "):
        open_labels(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        open_labels(tmp_path / "none")
    with pytest.raises(ValueError, match="layout must be auto or one of scannet, dl3dv, demo, lifted, got 'coco'"):
        open_labels(made, "coco")
    with pytest.raises(ValueError, match="holds labels of layout demo, which has no classes to choose"):
        open_labels(made / "demo", classes=20)
    for name in ("labels", "1K"):
        (tmp_path / name).mkdir()
    (tmp_path / "labels" / "a.safetensors").touch()
    (tmp_path / "1K" / "b.sft").touch()
    with pytest.raises(ValueError, match="holds labels of both dl3dv and demo"):
        open_labels(tmp_path)


def test_class_lists(made):
    root = made / "ScanNet-processed"
    with pytest.raises(ValueError, match=r"class_names_200.json does not exist; there is class_names_20.json"):
        open_labels(root, classes=200)
    for content in ('["wall"]', '{"names": 3}', "not json"):
        (root / "class_names_7.json").write_text(content)
        with pytest.raises(ValueError, match=r"class_names_7.json must hold a table with names"):
            ScanNetLabels(root, classes=7)
    (root / "class_names_7.json").write_text('{"names": ["wall"]}')
    with pytest.raises(ValueError, match="must name 7 classes, got 1"):
        ScanNetLabels(root, classes=7)
    (root / "class_names_7.json").unlink()


def test_splits_that_are_not_known(dl3dv, demo, tmp_path):
    with pytest.raises(ValueError, match=r"train.json does not exist, so which clips are in train is not known"):
        dl3dv.ids("train")
    with pytest.raises(ValueError, match="the demo's scenes have no splits"):
        demo.ids("train")
    with pytest.raises(ValueError, match="split must be one of train, val, got 'test'"):
        dl3dv.ids("test")
    (tmp_path / "1K").mkdir()
    (tmp_path / "1K" / "b.sft").touch()
    (tmp_path / "val.json").write_text('[["1K", "b"], ["1K", "without-labels"]]')
    assert DL3DVLabels(tmp_path).ids("val") == ["1K/b"]
    for content, message in (("{", "not JSON"), ('{"a": 1}', "wanted a list"), ('[["1K"]]', r"got \['1K'\]")):
        (tmp_path / "val.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            DL3DVLabels(tmp_path).ids("val")
    (tmp_path / "val.json").write_text('[["..", "x"]]')
    with pytest.raises(ValueError, match="clip id must be"):
        DL3DVLabels(tmp_path).ids("val")


def test_a_scene_that_is_not_complete_has_no_labels(made, tmp_path):
    root = tmp_path / "S"
    (root / "train" / "half").mkdir(parents=True)
    (root / "train.json").write_text('[["train", "half"]]')
    (root / "class_names_20.json").write_text(json.dumps({"names": list(CLASS_NAMES_20)}))
    assert ScanNetLabels(root).ids() == []


# -- bad input --------------------------------------------------------------------------------------------------------


def test_what_is_not_there_is_named(scannet, dl3dv):
    with pytest.raises(FileNotFoundError, match=r"clip train/none has no labels: .*train/none does not exist"):
        scannet.read("train/none", [0], ("instance_masks",))
    with pytest.raises(ValueError, match=r"has no depth; it has tag_pixel_counts, instance_masks, "):
        scannet.read(scannet.ids()[0], [0], ("depth",))
    with pytest.raises(ValueError, match=r"clip 1K/\S+: labels in .*sft: frames \[-1, 9\] are not there: it has 9"):
        dl3dv.read(dl3dv.ids()[0], [0, -1, 9], ("depth",))
    with pytest.raises(ValueError, match="clip id must be a relative path"):
        dl3dv.read("../x", [0], ("depth",))
    with pytest.raises(ValueError, match="at least 1 frame must be asked for"):
        dl3dv.read(dl3dv.ids()[0], [], ("depth",))


@pytest.fixture
def copy(made, tmp_path):
    """Labels of one scene in each layout, to be damaged."""

    def make(kind: str) -> tuple[Labels, str, Path]:
        folder, reader = {
            "scannet": ("ScanNet-processed", ScanNetLabels),
            "dl3dv": ("DL3DV-processed", DL3DVLabels),
            "demo": ("demo", DemoLabels),
        }[kind]
        shutil.copytree(made / folder, tmp_path / folder)
        labels = reader(tmp_path / folder)
        clip_id = next(i for i in labels.ids() if i.endswith(SCENES[0].id))
        return labels, clip_id, labels.path(clip_id)

    return make


@pytest.mark.parametrize(
    ("file", "array", "message"),
    [
        ("instance_masks.npy", np.zeros((9, 4, 4), np.uint8), "must be uint16"),
        ("instance_masks.npy", np.zeros((8, 4, 4), np.uint16), "has 8 frames, frame 8 is wanted"),
        (
            "instance_masks.npy",
            np.zeros((9, 4), np.uint16),
            r"instance_masks must be torch.int32 \[2, H, W\], got .*2, 4",
        ),
        ("tag_pixel_counts_20.npy", np.zeros((9, 19), np.int32), r"must be torch.int32 \[2, 20\], got .* \[2, 19\]"),
        ("poses.npy", np.zeros((9, 3, 4), np.float32), r"poses.npy must be \[F, 4, 4\], got \[F, 3, 4\]"),
        ("poses.npy", np.full((9, 4, 4), -np.inf, np.float32), "extrinsic is not finite"),
    ],
)
def test_scannet_arrays_of_another_kind(copy, file, array, message):
    labels, clip_id, path = copy("scannet")
    np.save(path / file, array)
    with pytest.raises(ValueError, match=rf"clip {clip_id}: labels in {path}: .*{message}"):
        labels.read(clip_id, [0, 8], ("tag_pixel_counts", "instance_masks", "extrinsic"))


@pytest.mark.parametrize("file", ["instance_masks.npy", "tag_pixel_counts_20.npy", "metadata.sft", "intrinsic.txt"])
@pytest.mark.parametrize("damage", ["empty", "half", "garbage", "gone"])
def test_damaged_scannet_files(copy, file, damage):
    labels, clip_id, path = copy("scannet")
    raw = (path / file).read_bytes()
    (path / file).write_bytes(
        {"empty": b"", "half": raw[: len(raw) // 2], "garbage": b"\x93NUM" * 40, "gone": b""}[damage]
    )
    if damage == "gone":
        (path / file).unlink()
    with pytest.raises(ValueError, match=rf"clip {clip_id}: labels in {path}: \S"):
        labels.read(clip_id, [0, 8], ("tag_pixel_counts", "instance_masks", "intrinsic"))


def test_images_may_be_larger_than_masks(copy):
    labels, clip_id, path = copy("scannet")
    masks = np.arange(9 * 4 * 5, dtype=np.uint16).reshape(9, 4, 5)
    np.save(path / "instance_masks.npy", masks)
    read = labels.read(clip_id, [8], ("instance_masks", "images"))
    assert equal(read["instance_masks"], masks[8:].astype(np.int32))
    assert read["images"].shape == (1, 3, HEIGHT, WIDTH)


@pytest.mark.parametrize("kind", ["dl3dv", "demo"])
@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_truncated_tensor_files(copy, kind, kept):
    labels, clip_id, path = copy(kind)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"clip {clip_id}: labels in {path}: \S"):
        labels.read(clip_id, [0, 8], labels.names)


@pytest.mark.parametrize(
    ("kind", "name", "array", "message"),
    [
        ("dl3dv", "depthmaps", None, "has no depthmaps; it holds confmaps, "),
        ("dl3dv", "depthmaps", np.zeros((9, 14, 28, 2), np.float32), r"depth must be torch.float32 \[2, H, W\]"),
        ("dl3dv", "depthmaps", np.zeros((9, 14, 28, 1), np.float16), r"depth must be .* got torch.float16"),
        ("dl3dv", "depthmaps", np.zeros((9, 13, 28, 1), np.float32), r"points must be .* \[2, 13, 28, 3\]"),
        ("dl3dv", "confmaps", np.zeros((8, 14, 28, 1), np.float32), r"confmaps is \[8, 14, 28, 1\], frame 8 is wanted"),
        ("dl3dv", "intrinsic", np.full((9, 3, 3), np.nan, np.float32), "intrinsic is not finite"),
        ("demo", "instance", np.zeros((9, 24, 40, 1), np.uint16), r"instance_masks must be torch.int32 \[2, H, W\]"),
        ("demo", "intrinsic", np.zeros((3, 3), np.float64), "must be .* with positive focal lengths"),
    ],
)  # fmt: skip
def test_tensors_of_another_kind(copy, kind, name, array, message):
    labels, clip_id, path = copy(kind)
    tensors = load_file(path)
    tensors = {n: x for n, x in tensors.items() if n != name} | ({} if array is None else {name: array})
    save_file(tensors, path)
    with pytest.raises(ValueError, match=rf"clip {clip_id}: labels in {path}: .*{message}"):
        labels.read(clip_id, [0, 8], labels.names)


def test_array_headers_are_read_one_at_a_time(tmp_path, monkeypatch):
    """Python 3.11 raises SystemError when two threads parse literals at once, as numpy does of headers."""
    np.save(tmp_path / "a.npy", np.arange(12, dtype=np.int32).reshape(4, 3))
    inside, most, load = [], [], np.load

    def slow(*args, **kwargs):
        inside.append(None)
        most.append(len(inside))
        time.sleep(0.002)
        inside.pop()
        return load(*args, **kwargs)

    monkeypatch.setattr(np, "load", slow)
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda i: read_array(tmp_path / "a.npy", [i % 4], "int32"), range(20)))
    assert [int(x[0, 0]) for x in read] == [3 * (i % 4) for i in range(20)]
    assert max(most) == 1
