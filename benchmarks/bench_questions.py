"""Questions per second and core from object tables, text included, written as JSON lines; clips per minute and core
lifted to object tables; and that memory stays flat.

`python -m pytest benchmarks/bench_questions.py`, about two minutes on a quiet core; `--record` writes
`results/questions-cpu.json` and `results/lift-cpu.json`. Tables are of made-up rooms of 6 to 11 boxes seen by 8 views,
several of one tag in every third. The 200 questions of a clip are those of the largest published set: 2 billion of 10
million images (SpatialVLM, arXiv 2401.12168). One thread; a part's files are on the disk before its clips count. What
is lifted are demo scenes of 81 frames at 294x518, read from files; point maps are float16, and all files synced.
"""

import gc
import statistics
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from lifting_scenes import views_of
from safetensors.numpy import save_file
from synthetic_tables import random_table

from spatialprobe.engine.demo.scene_files import save_json, scene_table
from spatialprobe.engine.demo.scenes import make_scene
from spatialprobe.engine.lifting.objects import ObjectTable
from spatialprobe.engine.lifting.run import LiftJob, run_lift
from spatialprobe.engine.questions.folder import QuestionFolder, QuestionSpec
from spatialprobe.engine.questions.run import ask_parts
from spatialprobe.engine.questions.settings import Settings
from spatialprobe.probes.labels import open_labels

PER_CLIP, PART_CLIPS, ROUNDS = 200, 256, 5
LEAST_PER_S = 20_000
MANY_CLIPS, FEW_PER_CLIP = 6_000, 20  # for memory: more clips, fewer questions of each
LEAST_LIFTED_PER_MINUTE = 20
LIFTED, DISTINCT, WINDOW, SIZE = 10, 2, 81, (294, 518)
MOST_GROWTH = 16 << 20  # bytes of resident memory from the first quarter of the clips to the last


@cache
def room(number: int) -> ObjectTable:
    return random_table(number, objects=6 + number % 6, views=8, alike=number % 3 == 0)


def read(path: Path) -> ObjectTable:
    """In place of a file: one of 192 rooms, under the clip's name."""
    return replace(room(int(path.stem) % 192), clip=path.stem)


def make(out: Path, ids: list[str], parts: range, *, per_clip: int, images: str | None = None) -> QuestionFolder:
    spec = QuestionSpec(Settings(per_clip=per_clip), len(ids), "made up", {}, images, part_clips=PART_CLIPS)
    folder = QuestionFolder(out, spec)
    report = ask_parts(Path(), ids, parts, folder, read)
    assert report.written == len(ids[parts.start * PART_CLIPS : parts.stop * PART_CLIPS])
    return folder


def test_questions_per_second(tmp_path, show, record):
    ids = [f"{n:06d}" for n in range(ROUNDS * PART_CLIPS)]
    make(tmp_path / "warm", ids, range(1), per_clip=PER_CLIP)
    rates: dict[str, list[float]] = {"records": [], "records and chats": []}
    for part in range(ROUNDS):
        for name, images in (("records", None), ("records and chats", "{clip}/{frame}.jpg")):
            start = time.perf_counter(), time.process_time()
            folder = make(tmp_path / name, ids, range(part, part + 1), per_clip=PER_CLIP, images=images)
            wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
            count = sum(folder.counts(part)["levels"].values())
            assert count >= 0.95 * PART_CLIPS * PER_CLIP
            assert folder.part_path(part).read_bytes().count(b"\n") == count
            rates[name].append((count / wall, count / cpu, folder.part_path(part).stat().st_size / count))
    result = {
        name: {
            "questions_per_s": round(statistics.median(wall for wall, *_ in runs)),
            "questions_per_cpu_s": round(statistics.median(cpu for _, cpu, _ in runs)),
            "runs_per_cpu_s": [round(cpu) for _, cpu, _ in runs],
            "bytes_per_record": round(runs[0][2]),
        }
        for name, runs in rates.items()
    }
    show(
        f"{PART_CLIPS} clips of {PER_CLIP} questions, median of {ROUNDS}\n"
        + "\n".join(
            f"  {name:<18}{r['questions_per_s']:>8,} per s, {r['questions_per_cpu_s']:>8,} per s of one core's time"
            for name, r in result.items()
        )
    )
    record("questions-cpu", {"per_clip": PER_CLIP, "part_clips": PART_CLIPS} | result)
    assert result["records"]["questions_per_cpu_s"] >= LEAST_PER_S


def test_memory_is_flat(tmp_path, show):
    ids = [f"{n:06d}" for n in range(MANY_CLIPS)]
    resident, parts = [], -(-MANY_CLIPS // PART_CLIPS)
    for part in range(parts):
        make(tmp_path / "out", ids, range(part, part + 1), per_clip=FEW_PER_CLIP)
        gc.collect()
        resident.append(psutil.Process().memory_info().rss)
    first, last = (statistics.median(some) for some in (resident[: parts // 4], resident[-(parts // 4) :]))
    show(f"{MANY_CLIPS:,} clips: {first / 1e6:.0f} MB resident in the first quarter, {last / 1e6:.0f} MB in the last")
    assert last - first < MOST_GROWTH


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """Labels of clips in the demo's layout: two scenes under several names."""
    root = tmp_path_factory.mktemp("scenes") / "labels"
    root.mkdir()
    for n in range(LIFTED):
        files = root / f"clip{n:02d}.safetensors", root / f"clip{n:02d}.json"
        if n >= DISTINCT:
            for file in files:
                file.symlink_to(root / f"clip{n % DISTINCT:02d}{file.suffix}")
            continue
        scene = make_scene(n, frames=WINDOW, height=SIZE[0], width=SIZE[1])
        of = views_of(scene)
        tensors = {"depth": of.depth, "instance": of.masks.astype(np.uint16), "poses": scene.poses}
        save_file(tensors | {"tag": of.masks.astype(np.uint8), "intrinsic": scene.intrinsic}, files[0])
        save_json(files[1], scene_table(scene))
    return root.parent


def test_clips_lifted_per_minute(scenes, tmp_path, show, record):
    labels, threads = open_labels(scenes), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rates, resident = [], []
        for n in range(LIFTED):
            start = time.perf_counter(), time.process_time()
            job = LiftJob(str(tmp_path / "lifted"), limit=n + 1, loaders=1, writers=1)
            report, _ = run_lift(labels, None, job)
            assert (report.written, report.failed) == (1, 0)
            rates.append((60 / (time.perf_counter() - start[0]), 60 / (time.process_time() - start[1])))
            gc.collect()
            resident.append(psutil.Process().memory_info().rss)
    finally:
        torch.set_num_threads(threads)
    wall, cpu = (statistics.median(some) for some in zip(*rates[1:], strict=True))
    size = (tmp_path / "lifted" / "clip00.sft").stat().st_size
    result = {
        "frames": WINDOW,
        "size": SIZE,
        "clips_per_minute": round(wall, 1),
        "clips_per_cpu_minute": round(cpu, 1),
        "mb_per_clip": round(size / 1e6, 1),
    }
    grown = max(resident[-3:]) - max(resident[1:4])
    show(
        f"{LIFTED} clips of {WINDOW} frames at {SIZE[0]}x{SIZE[1]}: {wall:.1f} lifted per minute, {cpu:.1f} per minute "
        f"of one core's time; {size / 1e6:.0f} MB each, {grown / 1e6:+.0f} MB resident since the first"
    )
    record("lift-cpu", result)
    assert cpu >= LEAST_LIFTED_PER_MINUTE
    assert grown < 64 << 20
