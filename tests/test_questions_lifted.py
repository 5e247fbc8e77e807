"""From rendered files to answers, by the commands: `engine lift`, then `engine ask`. The scene itself is the judge."""

import json
from dataclasses import replace

import numpy as np
import pytest
import question_truth
from question_truth import SceneTruth

from spatialprobe.engine.cli import main
from spatialprobe.engine.demo.scene_files import write_demo
from spatialprobe.engine.demo.scenes import make_scene
from spatialprobe.engine.questions.types import BY_TYPE

SEEDS, VIEWS, PER_CLIP = (2, 3, 4, 5), 6, 250
PIXEL = 5.5 / 104  # metres across a pixel at the far end of a room: what an edge of an object is known to
WITHIN = {"m": 1.5 * PIXEL, "degrees": 2.0, "h": 0.15, "": 0.1}  # of numbers; with no unit, a ratio of heights


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> tuple[dict[str, SceneTruth], list[dict]]:
    root, truths = tmp_path_factory.mktemp("lifted"), {}
    for seed in SEEDS:
        scene = make_scene(seed, frames=81)
        scene = replace(scene, poses=scene.poses[:: 80 // (VIEWS - 1)])
        write_demo(root / "scenes", scene, kind="images")
        truths[scene.id] = SceneTruth(scene)
    assert main(["lift", str(root / "scenes"), "--out", str(root / "lift")]) == 0
    words = ["ask", str(root / "lift"), "--out", str(root / "out"), "--per-clip", str(PER_CLIP), "--chat"]
    assert main(words) == 0
    first = {path: path.read_bytes() for path in (root / "out").rglob("part-*")}
    assert main(words) == 0  # all there: nothing is made again
    assert first == {path: path.read_bytes() for path in (root / "out").rglob("part-*")}
    assert main([*words, "--seed", "1"]) == 2
    return truths, [json.loads(line) for line in (root / "out" / "part-00000.jsonl").open()]


def test_answers_about_lifted_clips_are_those_of_the_scenes(asked, monkeypatch):
    monkeypatch.setattr(question_truth, "agree", lambda q, numbers: None)  # of words; numbers are compared below
    truths, records = asked
    assert len(records) > 0.9 * len(SEEDS) * PER_CLIP
    assert len({q["type"] for q in records}) > 40
    for q in records:
        right = truths[q["clip"]].answer(q)
        if isinstance(right, str):
            assert q["right"] == right, q
        elif BY_TYPE[q["type"]].unit == "count":
            assert int(q["right"]) == right, q
        else:
            apart = np.abs(np.array(q["value"]) - right)
            apart = np.minimum(apart, 12 - apart) if q["unit"] == "h" else apart
            assert np.max(apart) <= WITHIN[q["unit"]], (q, right)


def test_pixels_are_as_exact_as_depth(asked):
    truths, records = asked
    for q in records:
        if q["level"] == 0 and BY_TYPE[q["type"]].kind in ("number", "vector"):
            assert np.allclose(q["value"], truths[q["clip"]].answer(q), rtol=1e-4, atol=2e-3), q


def test_what_is_mostly_hidden_or_out_of_the_image_is_not_asked_about(asked):
    """A larger image around each frame, at half the pixels, shows how much of an object the frame shows."""
    truths, records = asked
    truth = truths["bathroom-0004"]
    k = truth.scene.intrinsic / 2
    h, w = truth.scene.height // 2, truth.scene.width // 2
    k[:2, 2] += -0.25 + w, -0.25 + h
    k[2, 2] = 1
    around = SceneTruth(replace(truth.scene, height=3 * h, width=3 * w, intrinsic=k))
    shown = {}
    for q in (q for q in records if q["clip"] == truth.scene.id and q["level"] > 0):
        for thing in q["objects"]:
            key = q["frames"][0], thing["id"]
            if key not in shown:
                seen = around.visible(*key)[h : 2 * h, w : 2 * w]
                shown[key] = seen.sum() / np.isfinite(around.cast(key[0])[1][thing["id"]]).sum()
    share = np.array(list(shown.values()))
    assert len(share) >= 12
    assert share.min() > 0.2
    assert np.mean(share > 0.5) > 0.85
