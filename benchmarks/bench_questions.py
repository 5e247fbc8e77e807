"""Questions per second and core from object tables, text included, written as JSON lines; and that memory stays flat.

`python -m pytest benchmarks/bench_questions.py`, about two minutes on a quiet core; `--record` writes
`results/questions-cpu.json`. Tables are of made-up rooms of 6 to 11 boxes seen by 8 views, several of one tag in every
third. The 200 questions of a clip are those of the largest published set: 2 billion of 10 million images (SpatialVLM,
arXiv 2401.12168). One thread; a part's files are on the disk before its clips count.
"""

import gc
import statistics
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import psutil
from synthetic_tables import random_table

from spatialprobe.engine.lifting.objects import ObjectTable
from spatialprobe.engine.questions.folder import QuestionFolder, QuestionSpec
from spatialprobe.engine.questions.run import ask_parts
from spatialprobe.engine.questions.settings import Settings

PER_CLIP, PART_CLIPS, ROUNDS = 200, 256, 5
LEAST_PER_S = 20_000
CLIPS, CLIPS_PER_CLIP = 6_000, 20  # for memory: more clips, fewer questions of each
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
    ids = [f"{n:06d}" for n in range(CLIPS)]
    resident, parts = [], -(-CLIPS // PART_CLIPS)
    for part in range(parts):
        make(tmp_path / "out", ids, range(part, part + 1), per_clip=CLIPS_PER_CLIP)
        gc.collect()
        resident.append(psutil.Process().memory_info().rss)
    first, last = (statistics.median(some) for some in (resident[: parts // 4], resident[-(parts // 4) :]))
    show(f"{CLIPS:,} clips: {first / 1e6:.0f} MB resident in the first quarter, {last / 1e6:.0f} MB in the last")
    assert last - first < MOST_GROWTH
