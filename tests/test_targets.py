"""Depth models as makers of labels: the library's own numbers, cameras that fit them, and no clip lost."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from study_layouts import write_dl3dv, write_scannet
from tiny.encoders import build_encoder
from tiny.teachers import PROCESSORS, build_teacher
from transformers import AutoModelForDepthEstimation
from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil
from transformers.models.zoedepth.image_processing_pil_zoedepth import ZoeDepthImageProcessorPil

from spatialprobe.engine.cli import main
from spatialprobe.engine.clips.cameras import check_centre, unproject
from spatialprobe.engine.demo.scene_files import write_demo
from spatialprobe.engine.demo.scenes import make_scene
from spatialprobe.engine.job import Job
from spatialprobe.engine.pipeline.timing import DEVICE_STAGES
from spatialprobe.engine.run import run_job
from spatialprobe.engine.targets import run as targets
from spatialprobe.engine.targets.run import map_size, run_targets
from spatialprobe.engine.targets.teachers import Maps, open_teacher
from spatialprobe.probes import FeatureLoader
from spatialprobe.probes.labels import open_labels
from spatialprobe.probes.loading.sampling import FrameSampling

CPU = torch.device("cpu")
SOURCE, SIZE = (48, 64), (42, 56)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    root = tmp_path_factory.mktemp("teachers")
    return {kind: build_teacher(root / kind, kind) for kind in PROCESSORS}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return build_encoder(tmp_path_factory.mktemp("encoder") / "clip", "clip")


@pytest.fixture(scope="module")
def frames():
    return torch.randint(0, 256, (3, 3, *SOURCE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def maps_of(path, frames, size=SIZE):
    teacher = open_teacher(str(path))
    teacher.load(CPU, torch.float32)
    with torch.inference_mode():
        return teacher.maps(teacher.prepare(frames), tuple(frames.shape[2:]), size)


def library(path, processor, frames):
    images = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        return AutoModelForDepthEstimation.from_pretrained(path).eval()(pixels)


def test_depth_anything_is_the_librarys(teachers, frames):
    processor = DPTImageProcessorPil.from_pretrained(teachers["depth_anything"])
    out = library(teachers["depth_anything"], processor, frames)
    theirs = processor.post_process_depth_estimation(out, target_sizes=[SIZE] * 3)
    mine = maps_of(teachers["depth_anything"], frames)
    assert mine.focal is None
    for depth, other in zip(mine.depth, theirs, strict=True):
        torch.testing.assert_close(depth, other["predicted_depth"], rtol=1e-6, atol=1e-6)
    assert mine.depth.std() > 0


def test_zoedepth_loses_exactly_the_padding(teachers, frames, monkeypatch):
    path = teachers["zoedepth"]
    out = library(path, ZoeDepthImageProcessorPil.from_pretrained(path), frames)
    teacher = open_teacher(str(path))
    teacher.load(CPU, torch.float32)
    with torch.inference_mode():
        assert torch.equal(teacher.model(teacher.prepare(frames)).predicted_depth, out.predicted_depth)
    # A model that answers with each padded pixel's place, in pixels of the source: the maps must be the places.
    above, beside = int(math.sqrt(SOURCE[0] / 2) * 3), int(math.sqrt(SOURCE[1] / 2) * 3)
    rows = torch.arange(SOURCE[0] + 2 * above).float() - above
    columns = torch.arange(SOURCE[1] + 2 * beside).float() - beside
    places = rows[:, None] + 1000 * columns
    teacher.model = lambda pixels: SimpleNamespace(predicted_depth=places[None])
    found = teacher.maps(torch.zeros(1, 3, 32, 64), SOURCE, SOURCE).depth[0]
    expected = torch.arange(SOURCE[0])[:, None] + 1000 * torch.arange(SOURCE[1])
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=0.5)


def test_depth_pro_makes_metres_of_its_angle_of_view(teachers, frames):
    path, processor = teachers["depth_pro"], PROCESSORS["depth_pro"]
    mean, std = (torch.tensor(processor[name]).view(1, 3, 1, 1) for name in ("image_mean", "image_std"))
    pixels = torch.nn.functional.interpolate((frames / 255 - mean) / std, (64, 64), mode="bilinear")
    with torch.inference_mode():
        out = AutoModelForDepthEstimation.from_pretrained(path).eval()(pixels)
    mine = maps_of(path, frames)
    for i in range(3):
        focal = SIZE[1] / (2 * math.tan(math.radians(float(out.field_of_view.flatten()[i])) / 2))
        assert float(mine.focal[i]) == pytest.approx(focal, rel=1e-4)
        inverse = torch.nn.functional.interpolate(out.predicted_depth[i][None, None], SIZE, mode="bilinear")[0, 0]
        depth = 1 / (inverse * SIZE[1] / focal).clamp(1e-4, 1e4)
        assert depth.max() < 1e4  # not all clamped
        torch.testing.assert_close(mine.depth[i], depth, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    for seed in range(2):
        write_demo(root, make_scene(seed, frames=5, height=48, width=64), kind="images")
    return root


def words(scenes, teacher, out, **more) -> dict:
    clips = str(scenes / "images")
    return {"clips": clips, "model": str(teacher), "out": str(out), "window": 5, "options": {"size": "42x56"}} | more


def test_targets_are_labels_that_the_readers_read(scenes, teachers, tmp_path):
    out = tmp_path / "targets"
    report, _ = run_targets(Job.from_words(words(scenes, teachers["depth_pro"], out)))
    assert (report.asked, report.written, report.failed) == (2, 2, 0)
    assert set(DEVICE_STAGES) & set(report.timing["stages"]) == {
        "blocks"
    }  # writers' threads do not count as the device
    labels, truth = open_labels(out), open_labels(scenes)
    assert labels.ids() == truth.ids()
    clip_id = labels.ids()[0]
    read = labels.read(clip_id, [0, 3], ("depth", "confidence", "intrinsic", "images"))
    frames = truth.read(clip_id, [0, 3], ("images",))["images"]
    mine = maps_of(teachers["depth_pro"], frames)
    torch.testing.assert_close(read["depth"], mine.depth, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(read["intrinsic"][:, 0, 0], mine.focal, rtol=1e-5, atol=1e-5)
    assert read["intrinsic"][0, 0, 2] == (56 - 1) / 2
    assert (read["confidence"] == 1).all()
    assert read["images"].shape == (2, 3, *SIZE)
    with pytest.raises(ValueError, match="it has no extrinsic"):  # a model of single images knows no poses
        labels.read(clip_id, [0], ("extrinsic",))


def test_known_cameras_make_points_of_depth(scenes, teachers, tmp_path, monkeypatch):
    """With the true depth in the teacher's place, points, poses and intrinsics are the scene's own."""
    truth = open_labels(scenes)

    def true_depth(decoded, teacher, clock):
        return Maps(truth.read(decoded.clip.id, range(5), ("depth",))["depth"])

    monkeypatch.setattr(targets, "predict", true_depth)
    job = words(
        scenes, teachers["depth_anything"], tmp_path / "targets", options={"size": "48x64"}, targets=str(scenes)
    )
    report, _ = run_targets(Job.from_words(job), truth)
    assert report.written == 2
    made, wanted = open_labels(tmp_path / "targets"), ("depth", "points", "extrinsic", "intrinsic")
    for clip_id in truth.ids():
        mine, true = (labels.read(clip_id, range(5), wanted) for labels in (made, truth))
        for name in wanted:
            torch.testing.assert_close(mine[name], true[name], rtol=1e-5, atol=1e-4)


def test_intrinsics_follow_the_size_of_the_maps(scenes, teachers, tmp_path):
    truth = open_labels(scenes)
    job = words(
        scenes, teachers["depth_anything"], tmp_path / "targets", options={"size": "24x32"}, targets=str(scenes)
    )
    run_targets(Job.from_words(job), truth)
    made, clip_id = open_labels(tmp_path / "targets"), truth.ids()[0]
    half = made.read(clip_id, [0], ("intrinsic", "depth", "points", "extrinsic"))
    full = truth.read(clip_id, [0], ("intrinsic",))["intrinsic"]
    ray = torch.linalg.inv(full[0]) @ torch.tensor([2 * 10 + 0.5, 2 * 7 + 0.5, 1])  # between the four pixels of one
    small = torch.linalg.inv(half["intrinsic"][0]) @ torch.tensor([10.0, 7.0, 1.0])
    torch.testing.assert_close(small, ray, rtol=1e-4, atol=1e-5)
    turn, move = half["extrinsic"][0, :, :3], half["extrinsic"][0, :, 3]
    in_camera = turn @ half["points"][0, 7, 10] + move
    torch.testing.assert_close(in_camera, small * half["depth"][0, 7, 10], rtol=1e-3, atol=1e-3)


CUTS = [{}, {"start": 1}, {"start": "center", "window": 3}, {"stride": 2, "window": 3}]


@pytest.mark.parametrize("cut", CUTS)
def test_features_of_the_same_frames_take_these_labels(scenes, teachers, encoder, tmp_path, cut):
    """Labels of a job's windows, with cameras of its source frames, meet features of equal windows and of no others."""
    truth = open_labels(scenes)
    job = words(scenes, teachers["depth_anything"], tmp_path / "targets", targets=str(scenes), **cut)
    report, _ = run_targets(Job.from_words(job), truth)
    assert report.written == 2
    stores = []
    for number, own in enumerate((cut, {"stride": 3})):
        job = words(scenes, encoder, tmp_path / f"store{number}", layers=[0], query=":", **own) | {"options": {}}
        stores.append(run_job(Job.from_words(job))[1])
    labels = open_labels(tmp_path / "targets")
    how = {"views": 2, "sampling": FrameSampling(context=3, gap=1, query=":"), "wanted": ["extrinsic", "images"]}
    (batch,) = FeatureLoader(stores[0], labels, batch=2, **how)
    for clip_id, frames, poses in zip(batch.ids, batch.frames, batch.labels["extrinsic"], strict=True):
        source = [stores[0].provenance(clip_id)["index"][f] for f in frames]
        assert torch.equal(poses, truth.read(clip_id, source, ("extrinsic",))["extrinsic"])
        first = stores[0].provenance(clip_id)["index"][0]
        assert int(load_file(labels.path(clip_id))["start_idx"]) == first
    with pytest.raises(ValueError, match=r"labels in .*targets are of frames at start .*, features at .*stride 3"):
        FeatureLoader(stores[1], labels, **how)
    again = words(scenes, teachers["depth_anything"], tmp_path / "again", targets=str(tmp_path / "targets"), **cut)
    run_targets(Job.from_words(again), labels)  # cameras of windows of the same frames
    for clip_id in labels.ids():
        poses = (of.read(clip_id, range(3), ("extrinsic",))["extrinsic"] for of in (labels, open_labels(again["out"])))
        torch.testing.assert_close(*poses, rtol=0, atol=0)


def test_intrinsics_of_larger_images_are_noticed(scenes, teachers, tmp_path, capsys):
    """As ScanNet's are: intrinsic.txt is of the camera's own images, of about twice the sides."""
    scene = make_scene(0, frames=5, height=48, width=64)
    root = write_scannet(tmp_path, "train", [scene])
    text = root / "train" / scene.id / "intrinsic.txt"
    matrix = np.loadtxt(text)
    large = np.diag([2.0, 2.0, 1.0, 1.0]) @ matrix
    large[:2, 2] += 0.5  # centres are whole numbers
    np.savetxt(text, large)
    command = ["targets", str(root), "--model", str(teachers["depth_anything"]), "--window", "5", "--size", "48x64"]
    command += ["--cameras", str(root), "--out"]
    assert main([*command, str(tmp_path / "a")]) == 1
    assert "images of 48x64 pixels; if they are of others" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "b"), "--intrinsic-size", "96x128"]) == 0
    made = open_labels(tmp_path / "b").read(f"train/{scene.id}", [0], ("intrinsic",))["intrinsic"][0]
    torch.testing.assert_close(made.double(), torch.from_numpy(matrix[:3, :3]), rtol=1e-5, atol=1e-4)
    assert main([*command[:-3], "--out", str(tmp_path / "c"), "--intrinsic-size", "96x128"]) == 2
    assert "is for --cameras" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "b")]) == 2
    assert "intrinsic_size: [96, 128] there" in capsys.readouterr().err.replace("(", "[").replace(")", "]")


def test_cameras_of_other_windows_are_refused(scenes, teachers, tmp_path):
    write_dl3dv(tmp_path, "1K", [make_scene(0, frames=5, height=48, width=64)], start_idx=2, size=(14, 28))
    published = open_labels(tmp_path / "DL3DV-processed")
    job = Job.from_words(words(scenes, teachers["depth_anything"], tmp_path / "t", targets=str(published.root)))
    wanted = "cameras are of frames at start start_idx, stride 1, targets of those at start start, stride 1"
    with pytest.raises(ValueError, match=wanted):
        run_targets(job, published)
    assert not (tmp_path / "t").exists()


def test_a_damaged_spec_of_a_folder_is_named(scenes, teachers, tmp_path):
    job = Job.from_words(words(scenes, teachers["depth_anything"], tmp_path / "t", limit=1))
    run_targets(job)
    (tmp_path / "t" / "targets.json").write_text("{}")
    for call in (lambda: open_labels(tmp_path / "t"), lambda: run_targets(job)):
        with pytest.raises(ValueError, match=r"targets\.json is not the spec of a folder of targets"):
            call()


def test_frames_that_nobody_wanted_are_not_looked_at(scenes, teachers, tmp_path, monkeypatch):
    seen = []
    teacher = open_teacher(str(teachers["depth_anything"]))
    monkeypatch.setattr(targets, "open_teacher", lambda *a: teacher)
    maps = teacher.maps
    monkeypatch.setattr(teacher, "maps", lambda pixels, *a: seen.append(len(pixels)) or maps(pixels, *a))
    run_targets(Job.from_words(words(scenes, "any", tmp_path / "t", query="0,3", limit=1)))
    assert seen == [2]
    labels = open_labels(tmp_path / "t")
    read = labels.read(labels.ids()[0], range(5), ("depth", "confidence"))
    assert read["confidence"].flatten(1).amax(1).tolist() == [1, 0, 0, 1, 0]
    assert read["depth"][[1, 2, 4]].abs().max() == 0


def test_a_second_run_goes_on_and_failures_are_listed_and_retried(scenes, teachers, tmp_path, capsys):
    clips, out = tmp_path / "clips", tmp_path / "targets"
    good = sorted((scenes / "images").iterdir())[0]
    for name in ("a", "b"):
        (clips / name).mkdir(parents=True)
        for image in good.iterdir():
            (clips / name / image.name).write_bytes(image.read_bytes())
    torn = sorted((clips / "b").iterdir())[2]
    whole = torn.read_bytes()
    torn.write_bytes(whole[:100])
    command = ["targets", str(clips), "--model", str(teachers["depth_anything"]), "--out", str(out), "--window", "5"]
    assert main(command) == 1
    err = capsys.readouterr().err
    assert "1 clips failed" in err
    assert "--retry-failed" in err
    assert json.loads((out / "failed.jsonl").read_text())["id"] == "b"
    first = (out / "a.sft").read_bytes()
    torn.write_bytes(whole)
    assert main([*command[:5], str(tmp_path / "new"), "--retry-failed"]) == 2
    assert "there is nothing to retry" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert main([*command, "--retry-failed"]) == 0
    assert main(command) == 0
    assert "0 written, 2 there before" in capsys.readouterr().out
    assert (out / "a.sft").read_bytes() == first
    assert not (out / "tmp").exists()
    assert main([*command, "--query", "0"]) == 2
    assert "frames.query" in capsys.readouterr().err


def test_sizes_are_the_studys():
    assert map_size((540, 960)) == (294, 518)
    assert map_size((960, 540)) == (518, 294)


def test_intrinsics_of_other_images_are_refused_by_the_one_that_is_farthest_off():
    intrinsic = torch.eye(3).repeat(2, 1, 1)
    intrinsic[:, :2, 2] = torch.tensor([[47.5, 31.5], [320.0, 240.0]])  # of 64x96 pixels, and of 480x640
    check_centre(intrinsic[:1], (64, 96))
    message = r"principal point at \[320.0, 240.0\] of images of 64x96 pixels; .* say --intrinsic-size"
    with pytest.raises(ValueError, match=message):
        check_centre(intrinsic, (64, 96))


@pytest.mark.parametrize(("u", "v"), [(72.0, 16.0), (72.1, 31.5), (47.5, 48.1), (23.9, 31.5), (47.5, 15.9)])
def test_a_principal_point_is_in_the_middle_half_of_either_side(u, v):
    intrinsic = torch.tensor([[[100.0, 0, u], [0, 100, v], [0, 0, 1]]])
    if (u, v) == (72.0, 16.0):  # its corner
        check_centre(intrinsic, (64, 96))
    else:
        with pytest.raises(ValueError, match=r"principal point at .* of images of 64x96 pixels"):
            check_centre(intrinsic, (64, 96))


def test_unproject_of_an_identity_camera():
    depth = torch.full((1, 2, 3), 2.0)
    points = unproject(depth, torch.eye(3, 4)[None], torch.eye(3)[None])
    assert torch.equal(points[0, 1, 2], torch.tensor([4.0, 2.0, 2.0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "vggt"}, "vggt cannot be had"),
        ({"model": "depth-pr"}, "none of depth-anything-v2, depth-pro, zoedepth"),
        ({"model": "relative"}, "gives relative depth, wanted a metric checkpoint"),
        ({"model": "blind"}, "no model of the field of view"),
        ({"model": "other"}, "says it is 'qwen3_vl'"),
        ({"model": "newer"}, "fields that ZoeDepthConfig of the installed transformers does not know: gate"),
        ({"options": {"prompt": "x"}}, "option size alone"),
        ({"compute_dtype": "int8"}, "compute_dtype must be one of"),
        ({"model": "torn"}, "is not a whole safetensors file|lacks 1 tensors|cannot be loaded"),
    ],
)
def test_bad_input(scenes, teachers, tmp_path, change, message):
    model = change.get("model", teachers["depth_anything"])
    if model == "relative":
        model = build_teacher(tmp_path / "relative", "depth_anything", relative=True)
    elif model == "blind":
        model = build_teacher(tmp_path / "blind", "depth_pro", fov=False)
    elif model == "other":
        model = tmp_path / "other"
        model.mkdir()
        (model / "config.json").write_text(json.dumps({"model_type": "qwen3_vl"}))
    elif model == "newer":
        model = build_teacher(tmp_path / "newer", "zoedepth")
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"gate": 1}))
    elif model == "torn":
        model = build_teacher(tmp_path / "torn", "depth_anything")
        weights = model / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    job = Job.from_words(words(scenes, model, tmp_path / "out") | {k: v for k, v in change.items() if k != "model"})
    with pytest.raises(ValueError, match=message):
        run_targets(job)
    assert not (tmp_path / "out").exists()
