"""Point maps on token grids against slow loops and exact scenes, as a store that resumes, and joined to features."""

import json
import math
from fractions import Fraction

import pytest
import torch
from safetensors.torch import load_file, save_file
from study_layouts import unproject, write_dl3dv, write_scannet
from torch import Tensor

from spatialprobe.engine.cli import main
from spatialprobe.engine.demo.probes import write_noise
from spatialprobe.engine.demo.render import render_clip
from spatialprobe.engine.demo.scene_files import write_demo
from spatialprobe.engine.demo.scenes import make_scene
from spatialprobe.engine.files.durable import StoreFull
from spatialprobe.engine.pointmaps.encode import channel_names, encode_points, token_shares
from spatialprobe.engine.pointmaps.options import PointOptions
from spatialprobe.engine.pointmaps.run import run_points
from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.types import FeatureSpec, FrameSelection, tensor_name
from spatialprobe.kernels.pool_features import finish
from spatialprobe.probes import INSTANCE, train
from spatialprobe.probes.labels import open_labels

FRAMES, SIZE = 9, (24, 36)  # of the scenes: frames, pixels


def store_like(root, ids, *, rows, tokens, pool=None, padded=0, frames=None, **fields) -> FeatureStore:
    """Random features of `tokens` H x W per row, pooled or not, with these rows."""
    frames = frames or FrameSelection(window=len(rows))
    about = {"family": "clip", "weights": "content:0", "layers": (3,), "pool": pool, "frames": frames} | fields
    store, length = FeatureStore.create(root, FeatureSpec(**about)), max(rows) + 1
    for i, clip_id in enumerate(ids):
        x = torch.randn(length, *(pool or tokens), 8, generator=torch.Generator().manual_seed(i))
        provenance = {"grid": [length, *tokens], "rows_kept": list(range(length)), "padded": padded}
        store.write(clip_id, finish(x, torch.float16).named(tensor_name(3)), torch.tensor(rows), provenance)
    return FeatureStore.open(root)


class RandomLabels:
    """Labels of one clip from memory: points everywhere, confidence 0 at a third of the pixels, two points infinite."""

    names, metric, selection, root = ("points", "confidence", "extrinsic"), True, FrameSelection(), "/nowhere"

    def __init__(self, frames: int, size: tuple[int, int], seed: int = 0):
        rng = torch.Generator().manual_seed(seed)
        self.points = 3 * torch.randn(frames, *size, 3, generator=rng)
        self.confidence = torch.rand(frames, *size, generator=rng) * 5
        self.confidence[torch.rand(frames, *size, generator=rng) < 1 / 3] = 0
        self.confidence[:, :2, :3] = 0  # some tokens have nothing
        self.points[0, -1, -1, 0], self.points[-1, -1, 0, 2] = math.inf, math.nan
        turn, _ = torch.linalg.qr(torch.randn(frames, 3, 3, generator=rng))
        turn *= torch.linalg.det(turn)[:, None, None].sign()
        self.extrinsic = torch.cat([turn, torch.randn(frames, 3, 1, generator=rng)], 2)

    def ids(self):
        return ["a"]

    def read(self, clip_id, frames, wanted):
        if outside := [f for f in frames if f >= len(self.points)]:
            raise ValueError(f"clip {clip_id}: frames {outside} are not there")
        return {name: getattr(self, name)[frames] for name in wanted}


def overlap(i: int, tokens: int, p: int, pixels: int) -> Fraction:
    """Of token i's stretch of an image side, in pixels, how much pixel p covers."""
    start, stop = Fraction(i * pixels, tokens), Fraction((i + 1) * pixels, tokens)
    return max(Fraction(0), min(stop, Fraction(p + 1)) - max(start, Fraction(p)))


def bins(tokens: int, pooled: int) -> list[range]:
    return [range(i * tokens // pooled, math.ceil((i + 1) * tokens / pooled)) for i in range(pooled)]


def by_hand(labels, frames, tokens, pooled, options, unit=1.0) -> Tensor:  # float64 [H, W, C]
    """One row's tokens, pixel by pixel, as the words say it."""
    size = labels.points.shape[1:3]
    out = torch.zeros(*pooled, len(channel_names(options.bands)), dtype=torch.float64)
    weights = []
    for side, count, kept in zip(size, tokens, pooled, strict=True):
        shares = [[float(overlap(i, count, p, side) * count / side) for p in range(side)] for i in range(count)]
        weights.append([[sum(shares[i][p] for i in b) / len(b) for p in range(side)] for b in bins(count, kept)])
    for i in range(pooled[0]):
        for j in range(pooled[1]):
            total, share = torch.zeros(out.shape[-1] - 2, dtype=torch.float64), 0.0
            trust = 0.0
            for f in frames:
                for y in range(size[0]):
                    for x in range(size[1]):
                        weight = weights[0][i][y] * weights[1][j][x]
                        point, c = labels.points[f, y, x].double(), float(labels.confidence[f, y, x])
                        if not weight or not c > 0 or not point.isfinite().all():
                            continue
                        pose = {"world": None, "first": labels.extrinsic[0], "camera": labels.extrinsic[f]}
                        if (to := pose[options.frame]) is not None:
                            point = to[:, :3].double() @ point + to[:, 3].double()
                        point = point / unit
                        waves = [w(2**k * point) for k in range(options.bands) for w in (torch.sin, torch.cos)]
                        total += weight * torch.cat([point, *waves])
                        share, trust = share + weight, trust + weight * c / (1 + c)
            if share:
                out[i, j] = torch.cat([total / share, torch.tensor([share / len(frames), trust / share])])
    return out


# -- tokens and pixels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pixels", "tokens", "pooled"),
    [(24, 4, 4), (17, 5, 5), (7, 12, 12), (23, 10, 4), (16, 27, 15), (1, 1, 1), (5, 3, 1)],
)
def test_shares_of_pixels_are_exact(pixels, tokens, pooled):
    shares = token_shares(pixels, tokens, pooled)
    for row, tokens_of_bin in zip(shares.tolist(), bins(tokens, pooled), strict=True):
        of = [sum(overlap(i, tokens, p, pixels) for i in tokens_of_bin) for p in range(pixels)]
        assert row == pytest.approx([float(x / sum(of)) for x in of], rel=1e-6)
    assert shares.sum(1).tolist() == pytest.approx([1.0] * pooled)


def test_channels_are_what_they_are_called():
    point, names = torch.tensor([0.3, -1.2, 2.5]), channel_names(3)
    encoded = dict(zip(names, encode_points(point, 3).tolist(), strict=False))
    assert names[-2:] == ["share", "confidence"]
    assert len(names) == 3 + 6 * 3 + 2
    assert [encoded[axis] for axis in "xyz"] == pytest.approx(point.tolist())
    for wavelength, text in ((2 * math.pi, "6.283"), (math.pi, "3.142"), (math.pi / 2, "1.571")):
        for axis, value in zip("xyz", point.tolist(), strict=True):
            assert encoded[f"sin({axis}, {text})"] == pytest.approx(
                math.sin(2 * math.pi * value / wavelength), abs=1e-6
            )
            assert encoded[f"cos({axis}, {text})"] == pytest.approx(
                math.cos(2 * math.pi * value / wavelength), abs=1e-6
            )


@pytest.mark.parametrize(
    ("size", "tokens", "pool"), [((9, 13), (3, 4), None), ((4, 6), (5, 7), None), ((11, 8), (7, 5), (3, 2))]
)
@pytest.mark.parametrize("frame", ["world", "first", "camera"])
def test_tokens_equal_a_loop_over_pixels(tmp_path, size, tokens, pool, frame):
    """Sizes that do not divide, rows that see 1 and 4 frames, pixels without depth, tokens without pixels."""
    labels, rows = RandomLabels(5, size), [0, 1, 1, 1, 1]
    like = store_like(tmp_path / "like", ["a"], rows=rows, tokens=tokens, pool=pool)
    options = PointOptions(bands=2, frame=frame)
    report, store = run_points(labels, like, tmp_path / "points", options)
    assert report.written == 1
    stored = store.read("a", 0)
    assert stored.rows.tolist() == rows
    for row, frames in ((0, [0]), (1, [1, 2, 3, 4])):
        wanted = by_hand(labels, frames, tokens, pool or tokens, options)
        torch.testing.assert_close(stored.data[row].double(), wanted, rtol=2e-3, atol=2e-3)  # float16 of values to 12
    assert (stored.data[0, 0, 0] == 0).all() == (size == (4, 6))  # the corner without depth is whole tokens there only


def test_a_unit_of_the_clip_and_padding(tmp_path):
    """A clip of 4 frames in a window of 6, whose last row sees frame 3 and its two repeats."""
    labels, rows = RandomLabels(4, (6, 5)), [0, -1, 1, 2, 2, 2]
    labels.metric = False
    like = store_like(tmp_path / "like", ["a"], rows=rows, tokens=(2, 3), padded=2)
    with pytest.raises(ValueError, match=r"lengths in /nowhere are not metres.*say unit clip"):
        run_points(labels, like, tmp_path / "points", PointOptions())
    options = PointOptions(bands=1, unit="clip")
    _, store = run_points(labels, like, tmp_path / "points", options, dtype="bfloat16")
    away = []
    for f in (0, 2, 3):  # frame 1 is seen by no row, and repeats count once
        there = (labels.confidence[f] > 0) & labels.points[f].isfinite().all(-1)
        seen = labels.points[f][there].double() @ labels.extrinsic[f, :, :3].double().T + labels.extrinsic[f, :, 3]
        away += seen.norm(dim=-1).tolist()
    unit = store.provenance("a")["unit"]
    assert unit == pytest.approx(sum(away) / len(away), rel=1e-5)
    stored = store.read("a", 0, dtype=torch.float32)
    for row, frame in ((0, 0), (1, 2), (2, 3)):
        wanted = by_hand(labels, [frame], (2, 3), (2, 3), options, unit)
        torch.testing.assert_close(stored.data[row].double(), wanted, rtol=2**-8, atol=1e-4)


# -- scenes -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(i, frames=FRAMES, height=SIZE[0], width=SIZE[1]) for i in range(8)]


@pytest.fixture(scope="module")
def root(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    for scene in scenes:
        write_demo(folder, scene, kind="images")
    return folder


@pytest.fixture(scope="module")
def like(root, tmp_path_factory) -> FeatureStore:
    """A row for every other frame, 6 x 6 tokens of 4 x 6 pixels."""
    folder = tmp_path_factory.mktemp("like") / "store"
    rows = [f // 2 if f % 2 == 0 else -1 for f in range(FRAMES)]
    return store_like(folder, open_labels(root).ids(), rows=rows, tokens=(6, 6))


def test_points_of_a_scene_are_the_means_of_its_exact_points(scenes, root, like, tmp_path):
    scene = scenes[0]
    depth = render_clip(scene).depth[::2]
    world = torch.from_numpy(unproject(depth, scene.intrinsic, scene.poses[::2]))
    tokens = lambda x: x.unflatten(2, (6, 6)).unflatten(1, (6, 4)).mean((2, 4))  # noqa: E731
    stored = {}
    for frame in ("world", "camera", "first"):
        options = PointOptions(bands=0, frame=frame)
        _, store = run_points(open_labels(root), like, tmp_path / frame, options)
        assert store.ids() == like.ids()
        stored[frame] = store.read(scene.id, 0).data.double()
    torch.testing.assert_close(stored["world"][..., :3], tokens(world), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        stored["camera"][..., 2], tokens(torch.from_numpy(depth).double()[..., None])[..., 0], rtol=1e-3, atol=1e-3
    )
    pose = torch.from_numpy(scene.poses[0]).inverse()
    torch.testing.assert_close(
        stored["first"][..., :3], tokens(world @ pose[:3, :3].T + pose[:3, 3]), rtol=1e-3, atol=1e-3
    )
    assert (stored["world"][..., 3:] == torch.tensor([1.0, 0.5])).all()  # all pixels have depth, of confidence 1


def test_the_command_makes_a_store_like_any_other(root, like, tmp_path, capsys):
    out = tmp_path / "points"
    said = ["points", str(root), "--like", str(like.root), "--out", str(out), "--bands", "3"]
    lost = like.ids()[2]
    labels_file = root / "labels" / f"{lost}.safetensors"
    whole = labels_file.read_bytes()
    labels_file.write_bytes(whole[:1000])
    try:
        assert main(said) == 1
    finally:
        labels_file.write_bytes(whole)
    told = capsys.readouterr()
    assert f"{out}: 7 written, 0 there before, 1 failed" in told.out
    assert "device busy" not in told.out
    assert f"  {lost}  labels: clip {lost}: labels in {labels_file}" in told.err
    assert json.loads((out / "failed.jsonl").read_text())["id"] == lost
    kept = {path: path.stat().st_mtime_ns for path in (out / "clips").iterdir()}
    assert main([*said, "--retry-failed"]) == 0
    assert "1 written, 0 there before" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert main(said) == 0
    assert "0 written, 8 there before" in capsys.readouterr().out
    assert main(["verify", str(out)]) == 0
    assert main(["info", str(out)]) == 0
    told = capsys.readouterr().out
    assert "layer0: [5, 6, 6, 23] float16 in 8 clips" in told
    assert "sin(x, 6.283)" in told
    assert "unit: metres" in told
    spec = FeatureStore.open(out).spec
    assert (spec.family, spec.weights) == ("points", f"labels:{root}")
    assert main([*said[:-1], "4"]) == 2
    assert "options.bands: 3 there, 4 asked" in capsys.readouterr().err
    for word, value, why in (("--frame", "room", "frame must be one of world"), ("--bands", "17", "bands must be 0")):
        assert main([*said[:5], str(tmp_path / "new"), word, value]) == 2
        assert why in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_what_does_not_belong_together_is_refused(scenes, root, like, tmp_path):
    labels, out = open_labels(root), tmp_path / "points"
    ids = labels.ids()
    late = FrameSelection(window=3, start=2)
    other = store_like(tmp_path / "late", ids, rows=[0, 1, 2], tokens=(6, 6), frames=late)
    with pytest.raises(ValueError, match=r"labels in .* at start start, stride 1, features in .* of those at start 2"):
        run_points(labels, other, out, PointOptions())
    other = store_like(tmp_path / "others", ["somewhere/else"], rows=[0], tokens=(6, 6))
    with pytest.raises(ValueError, match=r"none of the 1 clips in .*others has labels in"):
        run_points(labels, other, out, PointOptions())
    other = store_like(tmp_path / "crop", ids, rows=[0], tokens=(6, 6), options={"crop": True})
    with pytest.raises(ValueError, match="are of the middle of each image"):
        run_points(labels, other, out, PointOptions())
    scannet = open_labels(write_scannet(tmp_path, "train", scenes[:1]))
    with pytest.raises(ValueError, match="ScanNet-processed has no points, confidence, it has tag_pixel_counts"):
        run_points(scannet, like, out, PointOptions())
    assert not out.exists()
    dl3dv = open_labels(write_dl3dv(tmp_path, "1K", scenes[:1], size=(12, 18)))
    of_model = store_like(tmp_path / "d", dl3dv.ids(), rows=[0], tokens=(2, 2), frames=FrameSelection(1, "start_idx"))
    with pytest.raises(ValueError, match="are not metres"):
        run_points(dl3dv, of_model, out, PointOptions())
    longer = store_like(tmp_path / "longer", ids[:1], rows=list(range(FRAMES + 1)), tokens=(6, 6))
    report, _ = run_points(labels, longer, out, PointOptions())
    assert "frames [9] are not there: it has 9" in report.failures[ids[0]]


def test_points_without_a_scale_are_in_units_of_the_clip(scenes, tmp_path, capsys):
    """DL3DV's: twice the scene gives the same points."""
    stored = []
    for scale in (1.0, 2.0):
        dl3dv = open_labels(write_dl3dv(tmp_path / str(scale), "1K", scenes[:1], size=(12, 18)))
        (clip_id,) = dl3dv.ids()
        file = load_file(dl3dv.path(clip_id))
        for name in ("pointmaps", "depthmaps"):
            file[name] *= scale
        file["extrinsic"][:, :, 3] *= scale
        save_file(file, dl3dv.path(clip_id))
        frames = FrameSelection(FRAMES, "start_idx")
        like = store_like(tmp_path / f"like{scale}", [clip_id], rows=[0] * FRAMES, tokens=(2, 2), frames=frames)
        said = ["points", str(dl3dv.root), "--like", str(like.root), "--out", str(tmp_path / f"points{scale}")]
        assert main(said) == 0
        store = FeatureStore.open(tmp_path / f"points{scale}")
        assert store.about["unit"] == "the mean distance of the clip's points from the cameras that see them"
        stored.append(store.read(clip_id, 0))
    torch.testing.assert_close(stored[0].data, stored[1].data, rtol=1e-3, atol=2e-3)
    assert stored[0].data[..., :3].abs().max() > 0.5


def test_bad_clips_fail_with_reasons_and_the_rest_goes_on(tmp_path):
    like = store_like(tmp_path / "like", ["a"], rows=[0, 1], tokens=(2, 2))
    blind, bent, mirrored, near, far = (RandomLabels(2, (4, 4)) for _ in range(5))
    blind.confidence[:] = 0
    bent.extrinsic[1, 0] *= 1.1
    mirrored.extrinsic[1, 0] *= -1
    near.points, near.extrinsic = torch.zeros_like(near.points), torch.eye(3, 4).expand(2, 3, 4)
    far.points[:, 3, 3] = 1e6
    for number, (labels, how, why) in enumerate(
        (
            (blind, {}, "labels: no pixel of its frames has depth"),
            (bent, {"frame": "camera"}, r"labels: poses must be rigid, those of frames \[1\] stretch or mirror"),
            (mirrored, {"frame": "camera"}, r"labels: poses must be rigid, those of frames \[1\] stretch or mirror"),
            (near, {"unit": "clip"}, "labels: all its points lie in the cameras, so they have no scale"),
            (far, {}, "labels: its points reach .*, more than float16 holds"),
        )
    ):
        report, store = run_points(labels, like, tmp_path / str(number), PointOptions(**how))
        assert (report.failed, store.ids()) == (1, [])
        with pytest.raises(ValueError, match=why):
            raise ValueError(report.failures["a"])


def test_shards_and_an_interrupted_run_make_the_store_of_one_run(root, like, tmp_path, monkeypatch, capsys):
    labels, one = open_labels(root), tmp_path / "one"
    _, whole = run_points(labels, like, one, PointOptions(bands=1))
    for shard, ids in (("0/2", like.ids()[::2]), ("1/2", like.ids())):
        _, store = run_points(labels, like, tmp_path / "shards", PointOptions(bands=1), shard=shard)
        assert store.ids() == ids
        assert (store.root / f"run-{shard[0]}of2.json").exists()
    write, wrote, cut = FeatureStore.write, [], tmp_path / "cut"

    def interrupted(self, clip_id, *args):
        wrote.append(clip_id)
        if len(wrote) == 3:
            raise KeyboardInterrupt
        return write(self, clip_id, *args)

    said = ["points", str(root), "--like", str(like.root), "--out", str(cut), "--bands", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(FeatureStore, "write", interrupted)
        assert main(said) == 130
    assert "interrupted: run the same command again" in capsys.readouterr().err
    there = len(FeatureStore.open(cut))
    assert 2 <= there < 8  # what was being written is
    assert main(said) == 0
    assert f"{8 - there} written, {there} there before" in capsys.readouterr().out
    for clip_id in like.ids():
        for folder in (tmp_path / "shards", cut):
            assert FeatureStore.open(folder).path(clip_id).read_bytes() == whole.path(clip_id).read_bytes()


def test_a_full_disk_ends_the_run_and_the_next_goes_on(root, like, tmp_path, monkeypatch, capsys):
    """While points are written, then while the run's report is."""
    _, whole = run_points(open_labels(root), like, tmp_path / "whole", PointOptions(bands=1))
    write, write_record, out = FeatureStore.write, FeatureStore.write_record, tmp_path / "points"
    said = ["points", str(root), "--like", str(like.root), "--out", str(out), "--bands", "1"]
    room = like.ids()[:3]

    def full(self, clip_id, *args):
        if clip_id not in room:
            raise StoreFull(28, "No space left on device: 1 MB needed, 0 MB free", str(self.path(clip_id)))
        return write(self, clip_id, *args)

    monkeypatch.setattr(FeatureStore, "write", full)
    assert main(said) == 1
    told, store = capsys.readouterr(), FeatureStore.open(out)
    assert f"{out}: 3 written, 0 there before, 0 failed" in told.out
    (line,) = told.err.splitlines()
    named = (
        f"No space left on device: 1 MB needed, 0 MB free: '{store.path(like.ids()[3])}'; run the same command again"
    )
    assert line.startswith(f"engine: stopped: [Errno 28] {named}")
    assert json.loads((out / "run.json").read_text())["stopped"] in line
    assert store.ids() == room
    assert store.failures() == {}
    assert store.verify() == []

    def no_record(self, name, text):
        raise StoreFull(28, "No space left on device: 0.001 MB needed, 0 MB free", str(self.root / name))

    monkeypatch.setattr(FeatureStore, "write", write)
    monkeypatch.setattr(FeatureStore, "write_record", no_record)
    assert main(said) == 1
    told = capsys.readouterr()
    assert f"{out}: 5 written, 3 there before, 0 failed" in told.out
    assert f"stopped: [Errno 28] No space left on device: 0.001 MB needed, 0 MB free: '{out / 'run.json'}'" in told.err
    monkeypatch.setattr(FeatureStore, "write_record", write_record)
    assert main(said) == 0
    assert json.loads((out / "run.json").read_text())["stopped"] == ""
    assert not (out / "tmp").exists()
    for clip_id in like.ids():
        assert store.path(clip_id).read_bytes() == whole.path(clip_id).read_bytes()


def test_a_store_says_what_it_was_made_of(tmp_path):
    """The grid of the other store, whose spec is in its own, and a digest of the labels that were read."""
    like = store_like(tmp_path / "like", ["a"], rows=[0, 1], tokens=(4, 4), pool=(2, 2))
    labels = [RandomLabels(2, (4, 4), seed) for seed in (0, 0, 1)]
    stores = [run_points(x, like, tmp_path / str(i), PointOptions())[1] for i, x in enumerate(labels)]
    assert stores[0].spec.pool == (2, 2)
    read = [store.provenance("a")["labels_read"] for store in stores]
    assert read[0] == read[1] != read[2]
    other = store_like(tmp_path / "other", ["a"], rows=[0, 1], tokens=(4, 4), pool=(2, 2), weights="content:1")
    with pytest.raises(ValueError, match=f'options.like: "{like.spec_hash}" there, "{other.spec_hash}" asked'):
        run_points(labels[0], other, tmp_path / "0", PointOptions())


# -- as features ------------------------------------------------------------------------------------------------------


def test_geometry_alone_beats_noise_and_joins_features(root, like, tmp_path):
    """Objects are places: points say which pixels are one object in all views, noise does not."""
    labels = open_labels(root)
    _, points = run_points(labels, like, tmp_path / "points", PointOptions(bands=2))
    noise = write_noise(tmp_path / "noise", like)
    small = {"embed": 32, "heads": 2, "depth": 0, "dropout": 0.0, "lr": 3e-3, "warmup": 1, "epochs": 12, "batch": 2}
    small |= {"views": 3, "gap": 4, "context": FRAMES, "query": "::4", "dims": 8, "pixels": 256, "val": 0.25}
    loss = {}
    for name, sources in {"points": [points], "noise": [noise], "both": [noise, points]}.items():
        (result,) = train(INSTANCE, sources, labels, device="cpu", threads=1, **small)
        loss[name] = result.metrics["loss"]
        assert [source["weights"] for source in result.sources] == [source.spec.weights for source in sources]
    assert loss["points"] < 0.8 * loss["noise"]
    assert loss["both"] < 0.95 * loss["noise"]
