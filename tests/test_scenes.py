"""Demo scenes: labels against maths that shares nothing with the renderer, files against what was written."""

import json
from dataclasses import replace
from functools import cache

import av
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from study_layouts import write_dl3dv, write_scannet

from spatialprobe.engine.demo.furnish import SceneObject, fits
from spatialprobe.engine.demo.furniture import KINDS, ROOMS, Part
from spatialprobe.engine.demo.patterns import PATTERNS, Finish
from spatialprobe.engine.demo.render import render, render_clip
from spatialprobe.engine.demo.scene_files import write_demo, write_image_folder, write_video
from spatialprobe.engine.demo.scenes import CLASS_NAMES_20, NO_TAG, make_scene, resized

SEEDS = [5, 6, 7, 8, 9]  # one of each kind of room


@cache
def scene_of(seed, frames=9):
    return make_scene(seed, frames=frames, height=48, width=80)


@cache
def clip_of(seed, frames=9):
    return render_clip(scene_of(seed, frames))


def points_of(depth, intrinsic, pose):
    """World points [H, W, 3] of a depth image [H, W], one axis at a time."""
    v, u = np.indices(depth.shape)
    camera = np.empty((*depth.shape, 3))
    camera[..., 2] = depth
    camera[..., 0] = (u - intrinsic[0, 2]) / intrinsic[0, 0] * depth
    camera[..., 1] = (v - intrinsic[1, 2]) / intrinsic[1, 1] * depth
    return (pose[:3, :3] @ camera[..., None])[..., 0] + pose[:3, 3]


def pixels_of(points, intrinsic, pose):
    """Columns, rows and depths [...] of world points [..., 3]."""
    camera = points @ np.linalg.inv(pose)[:3, :3].T + np.linalg.inv(pose)[:3, 3]
    u = camera[..., 0] / camera[..., 2] * intrinsic[0, 0] + intrinsic[0, 2]
    v = camera[..., 1] / camera[..., 2] * intrinsic[1, 1] + intrinsic[1, 2]
    return u, v, camera[..., 2]


def outside(box, points):
    """Metres [...] by which points [..., 3] are outside of a turned box; negative inside."""
    turn = complex(np.cos(-box.yaw), np.sin(-box.yaw))
    flat = (points[..., 0] - box.centre[0] + 1j * (points[..., 1] - box.centre[1])) * turn
    local = np.stack([flat.real, flat.imag, points[..., 2] - box.centre[2]], axis=-1)
    return (np.abs(local) - np.array(box.size) / 2).max(axis=-1)


def test_seeds_cover_every_room():
    assert {scene_of(seed).id.rsplit("-", 1)[0].replace("-", " ") for seed in SEEDS} == set(ROOMS)


@pytest.mark.parametrize("seed", SEEDS)
def test_depth_lands_on_the_surface_that_the_labels_name(seed):
    scene, clip = scene_of(seed), clip_of(seed)
    x, y, z = scene.room
    for frame in (0, 4, 8):
        points = points_of(clip.depth[frame], scene.intrinsic, scene.poses[frame])
        instance, tag = clip.instance[frame], clip.tag[frame]
        for thing in scene.objects:
            seen = instance == thing.id
            off = np.min([np.abs(outside(part, points[seen])) for part in thing.parts], axis=0)
            assert (off < 1e-4).all()
            assert (tag[seen] == CLASS_NAMES_20.index(thing.tag)).all()
            assert (outside(thing, points[seen]) < 1e-4).all()
        for name, distance in (
            ("wall", np.minimum(np.abs(np.abs(points[..., 0]) - x / 2), np.abs(np.abs(points[..., 1]) - y / 2))),
            ("floor", np.abs(points[..., 2])),
            ("ceiling", np.abs(points[..., 2] - z)),
        ):
            index = NO_TAG if name == "ceiling" else CLASS_NAMES_20.index(name)
            assert (distance[(instance == 0) & (tag == index)] < 1e-4).all()
        assert set(np.unique(tag[instance == 0])) <= {0, 1, NO_TAG}


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_stands_between_the_camera_and_what_it_sees(seed):
    scene, clip = scene_of(seed), clip_of(seed)
    points = points_of(clip.depth[5], scene.intrinsic, scene.poses[5])
    eye = scene.poses[5, :3, 3]
    for share in np.linspace(0.02, 0.995, 24):
        before = eye + share * (points - eye)
        for thing in scene.objects:
            for part in thing.parts:
                assert (outside(part, before) > -1e-4).all()


def test_a_point_of_floor_and_wall_has_the_depth_it_projects_to():
    scene = make_scene(2, frames=3, height=96, width=160)
    empty = replace(scene, objects=())
    x, y, _ = scene.room
    u, v = np.meshgrid((20, 79, 140), (5, 30, 60, 90))
    depth = render(empty, 1).depth[v, u]
    # A pixel's depth is what makes its ray meet one of the room's planes, and no smaller depth does.
    low = np.array([-x / 2, -y / 2, 0])
    near, far = (
        np.array([points_of(np.full((96, 160), d), scene.intrinsic, scene.poses[1])[b, a] for d, a, b in rays])
        for rays in (zip((depth * k).ravel(), u.ravel(), v.ravel(), strict=True) for k in (0.999, 1.001))
    )
    assert ((near > low) & (near < low + scene.room)).all()
    assert ((far < low) | (far > low + scene.room)).any(axis=1).all()


def test_a_level_camera_sees_what_a_hand_calculation_says():
    scene = make_scene(2, frames=1, height=96, width=160)
    x, y, z = scene.room
    # In the middle of the room, looking north at the wall y / 2 away, 0.9 m above the floor and below the ceiling.
    poses = [np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, eye], [0, 0, 0, 1.0]]) for eye in (0.9, z - 0.9)]
    scene = replace(scene, objects=(), poses=np.stack(poses))
    low, high = render(scene, 0), render(scene, 1)
    focal, middle_u, middle_v = 0.65 * 160, 79.5, 47.5
    np.testing.assert_allclose(low.depth[47:49, 79:81], y / 2, rtol=1e-6)
    np.testing.assert_allclose(low.depth[48, 159], min(y / 2, x / 2 * focal / (159 - middle_u)), rtol=1e-6)
    np.testing.assert_allclose(low.depth[95, 80], 0.9 * focal / (95 - middle_v), rtol=1e-6)
    np.testing.assert_allclose(high.depth[0, 80], 0.9 * focal / middle_v, rtol=1e-6)
    names = (low.tag[95, 80], low.tag[48, 80], high.tag[0, 80])
    assert names == (CLASS_NAMES_20.index("floor"), CLASS_NAMES_20.index("wall"), NO_TAG)


def test_a_box_and_its_pattern_are_where_a_hand_calculation_puts_them():
    look = Finish("checker", ((1.0, 1.0, 1.0), (0.0, 0.0, 0.0)), period=0.08, glow=1.0)
    centre, size = (0.1, 0.55, 1.2), (0.5, 0.1, 0.3)  # its front is 0.5 m in front of the camera
    thing = SceneObject(1, "crate", "otherfurniture", centre, size, 0.0, (Part(centre, size, 0.0, look),))
    pose = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 1.2], [0, 0, 0, 1.0]])
    scene = replace(make_scene(2, frames=1, height=240, width=400), objects=(thing,), poses=pose[None])
    frame = render(scene, 0)
    v, u = np.indices((240, 400))
    x, z = (u - 199.5) / 260 * 0.5 - 0.1, -(v - 119.5) / 260 * 0.5  # metres from the middle of the front
    front = (np.abs(x) < 0.25) & (np.abs(z) < 0.15)
    np.testing.assert_array_equal(frame.instance == 1, front)
    np.testing.assert_allclose(frame.depth[front], 0.5, rtol=1e-6)
    across, up = np.sin(2 * np.pi * x / 0.08), np.sin(2 * np.pi * z / 0.08)
    inside = front & (np.abs(across) > 0.4) & (np.abs(up) > 0.4) & (np.abs(x) < 0.24) & (np.abs(z) < 0.14)
    wanted = np.where(across * up > 0, 0, 255)[inside]
    np.testing.assert_array_equal(frame.rgb[inside], np.stack([wanted] * 3, axis=-1))


def test_furniture_must_fit_the_room_the_camera_and_what_stands_there():
    def stand(x, y, height=1.0):
        return SceneObject(1, "crate", "otherfurniture", (x, y, height / 2), (1.0, 0.6, height), 0.0, ())

    room, eyes = (4.0, 4.0, 2.5), np.array([[0.0, -1.5, 1.5]])
    assert fits(stand(0, 1), room, eyes, [])
    assert not fits(stand(1.6, 1), room, eyes, [])
    assert not fits(stand(0, 1.8), room, eyes, [])
    assert not fits(stand(0, 1, height=2.6), room, eyes, [])
    assert not fits(stand(0, -0.75), room, eyes, [])  # 0.45 m from the camera's path
    assert fits(stand(0, -0.65), room, eyes, [])
    assert not fits(stand(0, 1), room, eyes, [stand(0.9, 1.5)])
    assert fits(stand(0, 1), room, eyes, [stand(1.05, 1.5)])


@pytest.mark.parametrize("seed", SEEDS)
def test_pixels_reproject_from_one_frame_into_another(seed):
    scene, clip = scene_of(seed), clip_of(seed)
    here, there = 1, 7
    points = points_of(clip.depth[here], scene.intrinsic, scene.poses[here])
    u, v, z = pixels_of(points, scene.intrinsic, scene.poses[there])
    column, row = np.round(u).astype(int), np.round(v).astype(int)
    inside = (z > 0) & (column >= 1) & (column < 79) & (row >= 1) & (row < 47)
    column, row, z = column[inside], row[inside], z[inside]
    rgb, instance = clip.rgb[here][inside].astype(int), clip.instance[here][inside]
    block = np.stack([clip.depth[there][row + i, column + j] for i in (-1, 0, 1) for j in (-1, 0, 1)])
    names = np.stack([clip.instance[there][row + i, column + j] for i in (-1, 0, 1) for j in (-1, 0, 1)])
    in_front = z < block.min(axis=0) - np.ptp(block, axis=0) - 0.02
    assert in_front.mean() < 0.01  # never, but for points of things thinner than a pixel
    flat = (names == instance).all(axis=0) & (np.ptp(block, axis=0) < 0.15 * z)
    assert flat.mean() > 0.4
    visible = np.abs(z - block[4]) < np.ptp(block, axis=0) + 1e-3
    assert visible[flat].mean() > 0.97
    shown = clip.rgb[there][row, column][flat & visible].astype(int)
    assert np.median(np.abs(shown - rgb[flat & visible])) < 6  # patterns and light stay with their surfaces


@pytest.mark.parametrize("seed", range(30))
def test_rooms_are_tidy(seed):
    scene = make_scene(seed, frames=81, height=48, width=80)
    assert 5 <= len(scene.objects) <= 10
    x, y, z = scene.room
    rng = np.random.default_rng(seed)
    for thing in scene.objects:
        assert thing.tag == KINDS[thing.kind].tag
        c, s = np.cos(thing.yaw), np.sin(thing.yaw)
        corners = np.array([(a, b, e) for a in (-0.5, 0.5) for b in (-0.5, 0.5) for e in (-0.5, 0.5)]) * thing.size
        inner = rng.uniform(-0.5, 0.5, (500, 3)) * thing.size
        turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
        corners, inner = (turn @ corners.T).T + thing.centre, (turn @ inner.T).T + thing.centre
        assert (np.abs(corners[:, 0]) <= x / 2).all()
        assert (np.abs(corners[:, 1]) <= y / 2).all()
        assert corners[:, 2].min() >= -1e-9
        assert corners[:, 2].max() <= z
        everything = np.concatenate([corners, inner])
        assert all((outside(other, everything) > 0).all() for other in scene.objects if other is not thing)
        flat = everything[:, None, :2] - scene.poses[None, :, :2, 3]
        assert np.linalg.norm(flat, axis=-1).min() > 0.49
        reach = [outside(thing, np.array(part.centre)) for part in thing.parts]
        assert max(reach) < 0
    half = np.array([x, y, z]) / 2
    assert (np.abs(scene.poses[:, :3, 3] - (0, 0, half[2])) < half - 0.35).all()


@pytest.mark.parametrize("frames", [1, 2, 17, 81])
def test_camera_is_rigid_upright_and_smooth(frames):
    poses = make_scene(5, frames=frames).poses
    assert poses.shape == (frames, 4, 4)
    turn = poses[:, :3, :3]
    np.testing.assert_allclose(turn @ turn.transpose(0, 2, 1), np.broadcast_to(np.eye(3), turn.shape), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(turn), 1, atol=1e-12)
    np.testing.assert_array_equal(poses[:, 3], np.broadcast_to((0, 0, 0, 1), (frames, 4)))
    np.testing.assert_allclose(turn[:, 2, 0], 0, atol=1e-12)  # x is level
    assert (turn[:, 2, 1] < -0.8).all()  # y points down
    if frames > 1:
        step = np.linalg.norm(np.diff(poses[:, :3, 3], axis=0), axis=1)
        assert 0.001 < step.max() < 0.08
        angle = np.degrees(np.arccos(np.clip((turn[:-1] * turn[1:]).sum((1, 2)) / 2 - 0.5, -1, 1)))
        assert angle.max() < 2


def test_equal_seeds_give_equal_bytes_and_others_differ():
    first, again, other = (make_scene(seed, frames=3, height=48, width=80) for seed in (7, 7, 8))
    assert first.objects == again.objects
    assert first.objects != other.objects
    for name in ("rgb", "depth", "instance", "tag"):
        a, b, c = (getattr(render(scene, 2), name) for scene in (first, again, other))
        assert a.tobytes() == b.tobytes()
        assert a.tobytes() != c.tobytes()
    assert first.poses.tobytes() == again.poses.tobytes() != other.poses.tobytes()
    assert make_scene(7, frames=40, height=20, width=20).objects == first.objects
    assert make_scene(7, room="study").objects != make_scene(8, room="study").objects


def test_frame_types_and_that_more_samples_change_colours_at_edges_only():
    scene = scene_of(5)
    one, four = render(scene, 3, samples=1), render(scene, 3, samples=4)
    assert [a.dtype for a in vars(one).values()] == [np.uint8, np.float32, np.uint16, np.uint8]
    for name in ("depth", "instance", "tag"):
        assert getattr(one, name).tobytes() == getattr(four, name).tobytes()
    changed = (one.rgb != four.rgb).any(axis=-1)
    assert 0.02 < changed.mean() < 0.6
    sky = render(replace(scene, objects=()), 3, samples=1), render(replace(scene, objects=()), 3, samples=4)
    assert (sky[0].rgb != sky[1].rgb).any(axis=-1).mean() < 0.1  # an empty room has few edges


def test_resized_scene_shows_what_resizing_shows():
    scene = replace(scene_of(8), objects=())
    large = render(resized(scene, 144, 240), 0).depth
    np.testing.assert_allclose(large[1::3, 1::3], render(scene, 0).depth, rtol=1e-6)


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_stay_in_range_and_fade_before_they_alias(name):
    u, v = np.random.default_rng(0).uniform(-40, 40, (2, 4000))
    offset = np.full((2, 4000), 0.3)
    sharp, blurred = (PATTERNS[name](u, v, offset, np.full(4000, span)) for span in (0.01, 0.6))
    assert sharp.min() >= 0
    assert sharp.max() <= 1
    assert sharp.std() > 0.1
    if name not in ("wood", "planks", "tiles", "landscape"):  # these keep what is larger: boards, tiles and hills
        assert blurred.std() < 0.01


def test_video_decodes_to_the_frames_that_were_written(tmp_path):
    clip = clip_of(4)
    write_video(tmp_path / "clip.mp4", clip.rgb, 15)
    with av.open(str(tmp_path / "clip.mp4")) as video:
        assert video.streams.video[0].average_rate == 15
        assert video.streams.video[0].codec_context.name == "h264"
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])
    assert decoded.shape == clip.rgb.shape
    error = np.abs(decoded.astype(int) - clip.rgb).mean(axis=(1, 2, 3))
    assert error.max() < 4
    assert error.max() < 0.5 * np.abs(clip.rgb[0].astype(int) - clip.rgb[-1]).mean()
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize("kind", ["video", "images"])
def test_demo_layout_reads_back(tmp_path, kind):
    scene, clip = scene_of(6), clip_of(6)
    path = write_demo(tmp_path, scene, kind=kind)
    if kind == "images":
        assert path == tmp_path / "images" / scene.id
        assert [p.name for p in sorted(path.iterdir())] == [f"frame_{i:05d}.png" for i in range(9)]
        shown = np.stack([np.asarray(Image.open(p)) for p in sorted(path.iterdir())])
        np.testing.assert_array_equal(shown, clip.rgb)
    else:
        assert path == tmp_path / "videos" / f"{scene.id}.mp4"
        with av.open(str(path)) as video:
            assert sum(1 for _ in video.decode(video=0)) == 9
    labels = load_file(tmp_path / "labels" / f"{scene.id}.safetensors")
    for name, wanted in (("depth", clip.depth), ("instance", clip.instance), ("tag", clip.tag)):
        np.testing.assert_array_equal(labels[name], wanted)
        assert labels[name].dtype == wanted.dtype
    np.testing.assert_array_equal(labels["poses"], scene.poses)
    np.testing.assert_array_equal(labels["intrinsic"], scene.intrinsic)
    table = json.loads((tmp_path / "labels" / f"{scene.id}.json").read_text())
    assert tuple(table["room"]) == scene.room
    for row, thing in zip(table["objects"], scene.objects, strict=True):
        assert (row["id"], row["tag"], row["kind"], row["yaw"]) == (thing.id, thing.tag, thing.kind, thing.yaw)
        assert (tuple(row["centre"]), tuple(row["size"])) == (thing.centre, thing.size)
        assert [tuple(part["centre"]) for part in row["parts"]] == [part.centre for part in thing.parts]


def test_scannet_layout_reads_back(tmp_path):
    scenes = [scene_of(1), scene_of(4)]
    root = write_scannet(tmp_path, "train", scenes)
    assert root == tmp_path / "ScanNet-processed"
    assert json.loads((root / "train.json").read_text()) == [["train", scene.id] for scene in scenes]
    assert json.loads((root / "class_names_20.json").read_text())["names"] == list(CLASS_NAMES_20)
    present = []
    for scene, clip in zip(scenes, (clip_of(1), clip_of(4)), strict=True):
        folder = root / "train" / scene.id
        masks = np.load(folder / "instance_masks.npy")
        assert masks.dtype == np.uint16
        np.testing.assert_array_equal(masks, clip.instance)
        counts = np.load(folder / "tag_pixel_counts_20.npy")
        assert counts.shape == (9, 20)
        for index, name in enumerate(CLASS_NAMES_20[2:], start=2):
            ids = [thing.id for thing in scene.objects if thing.tag == name]
            np.testing.assert_array_equal(counts[:, index], np.isin(masks, ids).sum(axis=(1, 2)))
        np.testing.assert_array_equal(counts[:, 1], (clip.tag == 1).sum(axis=(1, 2)))
        np.testing.assert_array_equal(counts.sum(axis=1), (clip.tag != NO_TAG).sum(axis=(1, 2)))
        present.append((counts.sum(axis=0) >= 200) & ((counts > 0).sum(axis=0) >= 2))
        np.testing.assert_allclose(np.load(folder / "poses.npy"), scene.poses, atol=1e-6)
        np.testing.assert_allclose(np.loadtxt(folder / "intrinsic.txt")[:3, :3], scene.intrinsic, atol=1e-5)
        window = load_file(folder / "metadata.sft")
        assert (int(window["start_idx"]), int(window["gt_num_frames"])) == (0, 9)
        frames = sorted((folder / "frames").iterdir())
        assert [p.name for p in frames] == [f"frame_{i:05d}.jpg" for i in range(9)]
        shown = np.stack([np.asarray(Image.open(p)) for p in frames]).astype(int)
        assert np.abs(shown - clip.rgb).mean() < 4
    rate = np.load(root / "train_pos_rate_20.npy")
    np.testing.assert_array_equal(rate, (present[0].astype(float) + present[1]) / 2)
    assert 0 < rate.mean() < 1
    write_scannet(tmp_path, "val", scenes[:1])
    np.testing.assert_array_equal(np.load(root / "train_pos_rate_20.npy"), rate)


def test_dl3dv_layout_reads_back(tmp_path):
    scene = scene_of(5)
    root = write_dl3dv(tmp_path, "1K", [scene], start_idx=4, size=(42, 74))
    images = tmp_path / "DL3DV-ALL-960P" / "1K" / scene.id / "images_4"
    assert [p.name for p in sorted(images.iterdir())] == [f"frame_{i:05d}.png" for i in range(1, 10)]
    np.testing.assert_array_equal(np.asarray(Image.open(images / "frame_00003.png")), clip_of(5).rgb[2])
    target = load_file(root / "1K" / f"{scene.id}.sft")
    assert {name: array.shape for name, array in target.items()} == {
        "images": (5, 3, 42, 74),
        "depthmaps": (5, 42, 74, 1),
        "pointmaps": (5, 42, 74, 3),
        "confmaps": (5, 42, 74, 1),
        "intrinsic": (5, 3, 3),
        "extrinsic": (5, 3, 4),
        "start_idx": (),
    }
    assert int(target["start_idx"]) == 4
    for i in range(5):
        rotation, shift = target["extrinsic"][i, :, :3], target["extrinsic"][i, :, 3]
        np.testing.assert_allclose(rotation @ scene.poses[4 + i, :3, 3] + shift, 0, atol=1e-5)
        projected = (target["pointmaps"][i] @ rotation.T + shift) @ target["intrinsic"][i].T
        np.testing.assert_allclose(projected[..., 2], target["depthmaps"][i, ..., 0], atol=1e-4)
        v, u = np.indices((42, 74))
        np.testing.assert_allclose(projected[..., 0] / projected[..., 2], u, atol=1e-2)
        np.testing.assert_allclose(projected[..., 1] / projected[..., 2], v, atol=1e-2)
    wide = render(resized(scene, 42, 74), 6).rgb
    np.testing.assert_array_equal(target["images"][2].transpose(1, 2, 0), wide)


def test_a_failed_write_leaves_nothing_and_a_full_folder_is_refused(tmp_path):
    def broken():
        yield from np.zeros((90, 16, 16, 3), np.uint8)  # more than the encoder holds back before it writes
        raise OSError("no more frames")

    for name, write in (("a.mp4", write_video), ("a", write_image_folder)):
        with pytest.raises(OSError, match="no more frames"):
            write(tmp_path / name, broken())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("keep")
    with pytest.raises(ValueError, match="must be new or empty"):
        write_image_folder(tmp_path / "mine", np.zeros((1, 4, 4, 3), np.uint8))
    assert (tmp_path / "mine" / "note.txt").read_text() == "keep"


BLACK = np.zeros((2, 4, 4, 3), np.uint8)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda to: make_scene(-1), "seed must be 0 or more, got -1"),
        (lambda to: make_scene(1, frames=0), "frames must be at least 1, got 0"),
        (lambda to: make_scene(1, height=1), "at least 2x2 pixels, got 1x160"),
        (lambda to: make_scene(1, room="garage"), "room must be one of living room.*got 'garage'"),
        (lambda to: make_scene(1, id="../up"), "clip id"),
        (lambda to: replace(scene_of(1), poses=np.eye(4)), r"poses must be \[F, 4, 4\]"),
        (lambda to: replace(scene_of(1), poses=2 * np.eye(4)[None]), "poses must be rigid"),
        (lambda to: replace(scene_of(1), poses=np.diag([1.0, 1, -1, 1])[None]), "poses must be rigid"),
        (lambda to: replace(scene_of(1), intrinsic=np.eye(4)), "intrinsic must be"),
        (lambda to: replace(scene_of(1), objects=scene_of(1).objects[1:]), "object ids must be 1, 2"),
        (lambda to: render(scene_of(1), 9), "frame must be 0 .. 8 .*got 9"),
        (lambda to: render(scene_of(1), -1), "frame must be 0 .. 8 .*got -1"),
        (lambda to: render(scene_of(1), 0, samples=0), "samples must be at least 1, got 0"),
        (lambda to: render(replace(scene_of(1), poses=np.eye(4)[None]), 0), "must stay inside the room"),
        (lambda to: Finish("plaid", ((0, 0, 0), (1, 1, 1))), "pattern must be one of plain.*got 'plaid'"),
        (lambda to: write_video(to / "a.mp4", BLACK, codec="vp0"), "codec must be one of.*got 'vp0'"),
        (lambda to: write_video(to / "a.mp4", BLACK, 0), "fps must be positive, got 0"),
        (lambda to: write_video(to / "a.mp4", []), "at least 1 frame"),
        (lambda to: write_video(to / "a.mp4", BLACK[:, :3]), "even sides, got 3x4"),
        (lambda to: write_video(to / "a.mp4", BLACK.astype(float)), "uint8.*got float64"),
        (lambda to: write_video(to / "a.mp4", [BLACK[0], BLACK[0, :2]]), "frame 1 must be 4x4.*got 2x4"),
        (lambda to: write_image_folder(to / "a", []), "at least 1 frame"),
        (lambda to: write_image_folder(to / "a", BLACK, suffix=".gif"), "suffix must be .png or .jpg, got '.gif'"),
        (lambda to: write_demo(to, scene_of(1), kind="gif"), "kind must be one of video, images, got 'gif'"),
        (lambda to: write_scannet(to, "test", [scene_of(1)]), "split must be train or val, got 'test'"),
        (lambda to: write_scannet(to, "val", [scene_of(1)] * 2), "distinct ids"),
        (lambda to: write_dl3dv(to, "1K", []), "at least one"),
        (lambda to: write_dl3dv(to, "..", [scene_of(1)]), "clip id"),
        (lambda to: write_dl3dv(to, "1K", [scene_of(1)], start_idx=9), "start_idx must be 0 .. 8 .*got 9"),
    ],
)
def test_bad_arguments_say_what_was_wanted(tmp_path, call, match):
    with pytest.raises(ValueError, match=match):
        call(tmp_path)
    assert list(tmp_path.iterdir()) == []
