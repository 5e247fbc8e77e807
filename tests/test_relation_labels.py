"""Labels of lifted clips: what is in the file for the frames asked for, and questions; the probe from the command."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from object_tables import lifted_from_world, table_of_scene
from relation_scenes import FRAMES, boxes_of, true_features, write_lifted, write_rooms
from safetensors.torch import load_file, save_file

from spatialprobe.engine.cli import main
from spatialprobe.engine.demo.render import render_clip
from spatialprobe.engine.demo.scenes import make_scene
from spatialprobe.engine.pointmaps.options import PointOptions
from spatialprobe.engine.pointmaps.run import run_points
from spatialprobe.engine.types import FrameSelection
from spatialprobe.probes.labels import DL3DVLabels, LiftedLabels, open_labels
from spatialprobe.probes.labels.relations import NAMES, relation_rows

PICKED = [8, 0, 5]


def thinned(table, frames: list[int]):
    """The table as if only these frames had been lifted."""
    of_objects = {n: getattr(table, n)[:, frames] for n in ("pixels", "whole", "nearest", "box")}
    names = ("frames", "poses", "intrinsic", "sample_pixels", "sample_points", "sample_ids")
    return replace(table, **of_objects, **{n: getattr(table, n)[frames] for n in names})


def test_lifted_clips_are_read_for_the_frames_asked_for(tmp_path):
    scene = make_scene(3, frames=9, height=24, width=40)
    table, clip = table_of_scene(scene), render_clip(scene)
    table = replace(table, intrinsic=table.intrinsic.copy())  # torch warns of arrays that cannot be written to
    rays = np.stack([*np.mgrid[:24, :40][::-1], np.ones((24, 40))], -1) @ np.linalg.inv(scene.intrinsic).T
    points = np.einsum("vij,hwj->vhwi", table.poses[:, :3, :3], rays) * clip.depth[..., None]
    points += table.poses[:, None, None, :3, 3]
    points[5, 3, 7] = np.nan
    labels = write_lifted(tmp_path / "lifted", {scene.id: (table, clip.instance)}, {scene.id: points})
    assert isinstance(open_labels(labels.root), LiftedLabels)
    assert labels.ids() == [scene.id]
    assert labels.frames(scene.id) == 9
    read = labels.read(scene.id, PICKED, labels.names)
    assert set(read) == {"instance_masks", "points", "confidence", "extrinsic", "intrinsic", "relations"}
    assert torch.equal(read["instance_masks"], torch.from_numpy(clip.instance[PICKED].astype(np.int32)))
    known = np.isfinite(points[PICKED]).all(-1)
    assert known.sum() == known.size - 1
    assert torch.equal(read["confidence"], torch.from_numpy(known).float())
    assert torch.allclose(read["points"], torch.from_numpy(np.where(known[..., None], points[PICKED], 0)).float())
    extrinsic = np.linalg.inv(lifted_from_world(scene) @ scene.poses[PICKED])[:, :3]
    assert torch.allclose(read["extrinsic"], torch.from_numpy(extrinsic).float(), atol=1e-5)
    homogeneous = torch.nn.functional.pad(read["points"], (0, 1), value=1)[..., None]
    seen = read["extrinsic"][:, None, None] @ homogeneous  # [S, H, W, 3, 1]
    depth = torch.from_numpy(clip.depth[PICKED]).float()
    assert torch.allclose(seen[..., 2, 0][known], depth[known], atol=1e-4)
    assert torch.allclose(read["intrinsic"], torch.from_numpy(scene.intrinsic).float().expand(3, 3, 3))
    assert torch.equal(read["relations"], relation_rows(table, PICKED))
    assert (read["relations"][..., 0] >= 0).sum() > 300


def test_frames_that_were_not_lifted_are_named_and_others_found(tmp_path):
    table, masks = boxes_of(0)
    lifted = [0, 1, 5]
    labels = write_lifted(tmp_path / "lifted", {"a/b": (thinned(table, lifted), masks[lifted])})
    assert labels.ids() == ["a/b"]
    assert labels.frames("a/b") == 6
    assert "points" not in labels.names
    read = labels.read("a/b", [5, 0], ("instance_masks", "relations"))
    assert torch.equal(read["instance_masks"], torch.from_numpy(masks[[5, 0]].astype(np.int32)))
    whole = replace(table, clip="a/b")
    assert torch.equal(read["relations"], relation_rows(whole, [5, 0]))
    with pytest.raises(ValueError, match=r"clip a/b: labels in .*: frames \[2\] were not lifted, only \[0, 1, 5\]"):
        labels.read("a/b", [0, 2], ("relations",))
    assert LiftedLabels(labels.root, rows=7).read("a/b", [0], ("relations",))["relations"].shape == (1, 7, 4)
    with pytest.raises(ValueError, match="rows must be at least 1 question per view, got 0"):
        open_labels(labels.root, rows=0)
    with pytest.raises(ValueError, match="no splits, got split 'val'"):
        labels.ids("val")
    with pytest.raises(ValueError, match=r"has no points; it has instance_masks, extrinsic"):
        labels.read("a/b", [0], ("points",))
    spec = labels.root / "lift.json"
    spec.write_text(spec.read_text().replace('"stride": 1', '"stride": 2'))
    assert open_labels(labels.root).selection == FrameSelection(stride=2)
    assert isinstance(open_labels(labels.root, layout="dl3dv"), DL3DVLabels)  # if it is said


def test_clips_lifted_without_a_known_scale_are_not_in_metres(tmp_path):
    """Or `engine points` would take a unit that is another in each clip for a metre."""
    table, masks = boxes_of(1)
    rooms, points = {"clip": (table, masks)}, {"clip": np.ones((*masks.shape, 3))}
    like = write_rooms(tmp_path / "like", rooms, true_features)
    assert write_lifted(tmp_path / "metres", rooms, points).metric
    free = write_lifted(tmp_path / "free", rooms, points, metric=False)
    with pytest.raises(ValueError, match=r"lengths in .*free are not metres.*say unit clip"):
        run_points(free, like, tmp_path / "points", PointOptions())


def test_damaged_clips_and_specs_are_named(tmp_path):
    labels = write_lifted(tmp_path / "lifted", {"clip": boxes_of(1)})
    path = labels.path("clip")
    tensors = load_file(path)
    del tensors["objects.centre"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"clip clip: labels in .*clip\.sft: "):
        labels.read("clip", [0], ("relations",))
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"clip clip: labels in .*clip\.sft: "):
        labels.read("clip", [0], ("instance_masks",))
    with pytest.raises(FileNotFoundError, match="clip other has no labels"):
        labels.read("other", [0], ("relations",))
    (labels.root / "lift.json").write_text("{}")
    with pytest.raises(ValueError, match=r"lift\.json is not the spec of a folder of lifted clips"):
        open_labels(labels.root)


def test_the_command_trains_on_a_lifted_folder(tmp_path, capsys):
    rooms = {room[0].clip: room for room in map(boxes_of, range(6))}
    write_lifted(tmp_path / "lifted", rooms)
    write_rooms(tmp_path / "store", rooms, true_features)
    words = ["probe", "--task", "relation", "--features", str(tmp_path / "store"), "--labels", str(tmp_path / "lifted")]
    small = {"embed": 16, "heads": 2, "depth": 0, "hidden": 8, "batch": 3, "epochs": 2, "warmup": 0}
    sampled = {"views": 3, "gap": 4, "context": FRAMES, "query": "0,1::4"}
    settings = [word for name, value in (small | sampled).items() for word in ("--set", f"{name}={value}")]
    assert main([*words, "--out", str(tmp_path / "out"), "--device", "cpu", *settings]) == 0
    shown = capsys.readouterr().out
    assert "results.json, curve.png, relations.png" in shown
    assert "/left_of" not in shown
    (result,) = json.loads((tmp_path / "out" / "results.json").read_text())
    scored = {n.split("/")[1] for n in result["metrics"] if "/" in n and "/level" not in n}
    assert scored <= set(NAMES)
    assert len(scored) == result["metrics"]["relations_scored"] > 15
