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
