"""Two runs of `targets`, `lift` or `points` on one folder: they split its clips, and a killed one's are taken over."""

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from test_pointmaps import store_like
from tiny.teachers import build_teacher

from spatialprobe.engine.cli import main
from spatialprobe.engine.demo.scene_files import write_demo
from spatialprobe.engine.demo.scenes import make_scene
from spatialprobe.probes.labels import open_labels

CLIPS, FRAMES, SIZE = 10, 5, (48, 64)

# A run that writes down what it loads and has written. Before its third clip it waits until the other has one too; a
# "victim" is killed at its third write, and a "witness" waits for that before its third clip.
RUN = """
import os, signal, sys, threading, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from spatialprobe.engine.pipeline import each_clip
from spatialprobe.engine.cli import main
from spatialprobe.engine.processes.leases import Leases
from spatialprobe.engine.files.spec_folder import ClipFolder
from spatialprobe.engine.store import FeatureStore

role, diary, argv = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
ahead, claim, claims = each_clip.ahead, Leases.claim, []
begun, ended, counting = [], [], threading.Lock()  # writes

def note(what, clip_id):
    with (diary / "lines").open("a") as file:
        file.write(f"{what} {role} {clip_id}\\n")

def wait_for(condition):
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)

def gated_claim(self, clip_id, *more):
    if len(claims) == 2:
        wait_for((diary / "died").exists if role == "witness" else lambda: len([*diary.glob("begun-*")]) == 2)
    deaths = claim(self, clip_id, *more)
    if deaths is not None:
        claims.append(clip_id)
        (diary / f"begun-{os.getpid()}").touch()
    return deaths

def noted_ahead(pool, load, refs, depth):
    def noted(ref):
        note("load", ref.id)
        return load(ref)
    return ahead(pool, noted, refs, depth)

def noted_write(write):
    def noted(self, clip_id, *made):
        with counting:
            begun.append(clip_id)
            count = len(begun)
        if role == "victim" and count >= 3:
            wait_for(lambda: len(ended) == 2)
            (diary / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        written = write(self, clip_id, *made)
        note("write", clip_id)
        ended.append(clip_id)
        return written
    return noted

each_clip.ahead, Leases.claim = noted_ahead, gated_claim
for place in (ClipFolder, FeatureStore):
    place.write = noted_write(place.write)
sys.exit(main(argv))
"""


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> dict[str, list[str]]:
    """Each command, but for where its output goes."""
    root = tmp_path_factory.mktemp("inputs")
    scenes = [make_scene(seed, frames=FRAMES, height=SIZE[0], width=SIZE[1]) for seed in range(CLIPS)]
    for scene in scenes:
        write_demo(root / "scenes", scene, kind="images")
    teacher = build_teacher(root / "teacher", "depth_anything")
    store_like(root / "like", open_labels(root / "scenes").ids(), rows=list(range(FRAMES)), tokens=(6, 8))
    given = {
        "targets": [root / "scenes/images", "--model", teacher, "--window", FRAMES, "--size", "42x56"],
        "lift": [root / "scenes"],
        "points": [root / "scenes", "--like", root / "like"],
    }
    given["targets"] += ["--device", "cpu"]
    return {name: [name, *map(str, more)] for name, more in given.items()}


@pytest.fixture(scope="module")
def alone(words, tmp_path_factory):
    """What a single run makes, by command."""
    made = {}

    def files_of(command: str) -> dict[str, bytes]:
        if command not in made:
            out = tmp_path_factory.mktemp("alone") / "out"
            assert main([*words[command], "--out", str(out)]) == 0
            made[command] = snapshot(out)
        return made[command]

    return files_of


def snapshot(root: Path) -> dict[str, bytes]:
    """Everything in a folder but the records of its runs, which tell the time."""
    names = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*"))}
    return {
        name: b"" if path.is_dir() else path.read_bytes()
        for name, path in names.items()
        if name not in ("run.json", "log.jsonl")
    }


def start(role: str, diary: Path, words: list[str]) -> subprocess.Popen:
    diary.mkdir(exist_ok=True)
    argv = [sys.executable, "-c", RUN, role, str(diary), *words]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def noted(diary: Path, what: str) -> Counter:
    lines = [line.rpartition(" ") for line in (diary / "lines").read_text().splitlines()]
    return Counter(clip_id for did, _, clip_id in lines if did == what)


@pytest.mark.parametrize("command", ["targets", "lift", "points"])
def test_two_runs_split_the_clips_and_make_none_twice(command, words, alone, tmp_path):
    out, diary = tmp_path / "out", tmp_path / "diary"
    runs = [start("run", diary, [*words[command], "--out", str(out)]) for _ in range(2)]
    said = [run.communicate(timeout=300) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert snapshot(out) == alone(command)  # nor are leases or temporary files left
    ids = Counter(json.loads(line)["id"] for line in (out / "log.jsonl").read_text().splitlines())
    assert len(ids) == ids.total() == CLIPS
    assert noted(diary, "load run") == noted(diary, "write run") == ids
    mine, theirs = (int(text.split(": ")[1].split(" written")[0]) for text, _ in said)
    assert mine + theirs == CLIPS
    assert min(mine, theirs) >= 1
    for (text, _), here, there in zip(said, (mine, theirs), (theirs, mine), strict=True):
        counts = f"{here} written, 0 there before, 0 failed, 0 skipped of {CLIPS} clips"
        assert f"{out}: {counts}, {there} written by other processes meanwhile\n" in text


@pytest.mark.parametrize("command", ["targets", "lift"])
def test_a_killed_runs_clips_are_made_by_the_other(command, words, alone, tmp_path, capsys):
    out, diary = tmp_path / "out", tmp_path / "diary"
    victim, witness = (start(role, diary, [*words[command], "--out", str(out)]) for role in ("victim", "witness"))
    text, errors = witness.communicate(timeout=300)
    assert witness.returncode == 0, errors
    victim.communicate(timeout=60)
    assert victim.returncode == -signal.SIGKILL
    made, killed = noted(diary, "write witness"), noted(diary, "write victim")
    assert set(made.values()) == {1}
    assert not made & killed
    assert noted(diary, "load witness") == made  # what the victim had written is not even loaded again
    assert noted(diary, "load victim") & made  # but what it was at is
    counts = f"{CLIPS - 2} written, 0 there before, 0 failed, 0 skipped of {CLIPS} clips"
    assert f"{counts}, 2 written by other processes meanwhile\n" in text
    assert main([*words[command], "--out", str(out)]) == 0  # clears away the victim's temporary files
    assert f"0 written, {CLIPS} there before" in capsys.readouterr().out
    assert snapshot(out) == alone(command)
