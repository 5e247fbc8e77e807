"""What several processes gain, and what the engine costs per clip beyond the model.

`python -m pytest benchmarks/bench_workers.py`, about four minutes on 2 quiet cores; `--record` writes
`results/workers-*-cpu.json`. Overhead: a model that does nothing over CLIPS tiny clips, each file and its name on the
disk before the clip counts, by one process and by two that share a store. Scaling: `engine extract --device cpu`
against `--devices cpu,cpu` on a tiny Wan, one thread of torch per process. How fast the disk alone takes such files,
and how busy the machine was with others' work, stand beside the figures. Nothing is deleted in between: for minutes
after thousands of deletions ext4 takes up to a millisecond longer to make a file.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from spatialprobe.engine.demo.tiny.wan import build_wan_t2v
from spatialprobe.engine.files.durable import RunFolder, make_folder, publish
from spatialprobe.engine.store import FeatureStore

CLIPS, ROUNDS, WRITERS = 10_000, 3, 4  # writers: the engine's default
LEAST_CLIPS_PER_S = 300  # of one process
MOST_GROWTH = 8 << 20  # bytes of resident memory from the first quarter of the clips to the last
MODEL_CLIPS, FRAMES, SIZE = 12, 9, (64, 96)
ALONE = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


@pytest.fixture(scope="module")
def tiny_clips(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    for i in range(CLIPS):
        (root / f"clip{i:05d}").mkdir()
        Image.fromarray(np.full((16, 16, 3), i % 256, np.uint8)).save(root / f"clip{i:05d}/0.png")
    return root


def idle_engines(clips: Path, store: Path, count: int) -> list[dict]:
    """What `count` processes of `idle_model.py`, started at once on one new store, answer."""
    words = [sys.executable, str(Path(__file__).with_name("idle_model.py")), str(clips), str(store)]
    processes = [
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | ALONE)
        for _ in range(count)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    answers = [json.loads(process.communicate(timeout=600)[0]) for process in processes]
    assert sum(answer["written"] for answer in answers) == len(FeatureStore.open(store)) == CLIPS  # nothing twice
    assert all(answer["files_synced"] == answer["written"] for answer in answers)
    return answers


def disk_alone(folder: Path, file: Path) -> float:
    """Files like `file` per second, written, synced and named by as many threads as the engine has."""
    make_folder(folder / "files")
    data, run = file.read_bytes(), RunFolder(folder / "tmp")

    def put(i: int) -> None:
        temp = run.file()
        with temp.open("wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        publish(temp, folder / f"files/{i}")

    start = time.perf_counter()
    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(put, range(1000)))
    seconds = time.perf_counter() - start
    run.close()
    return 1000 / seconds


def test_overhead_per_clip(benchmark, tiny_clips, tmp_path, show, record):
    rounds: dict[int, list[list[dict]]] = {1: [], 2: []}
    disk, busy = [], []

    def one() -> None:
        rounds[1].append(idle_engines(tiny_clips, tmp_path / f"one{len(rounds[1])}", 1))

    def before() -> None:
        busy.append(round(psutil.cpu_percent(1.0) / 100, 3))  # others' work
        store = tmp_path / f"two{len(rounds[2])}"
        rounds[2].append(idle_engines(tiny_clips, store, 2))
        disk.append(round(disk_alone(tmp_path / f"disk{len(disk)}", FeatureStore.open(store).path("clip00000"))))

    benchmark.pedantic(one, setup=before, rounds=ROUNDS)
    rates = {n: [CLIPS / max(a["seconds"] for a in answers) for answers in rounds[n]] for n in rounds}
    answers = [answer for of_one in rounds[1] for answer in of_one]
    growth = max(growth_of(answer["resident"]) for n in rounds for of_round in rounds[n] for answer in of_round)
    result = {
        "clips": CLIPS,
        "rounds": ROUNDS,
        "clips_per_s": {str(n): round(statistics.median(rates[n]), 1) for n in rates},
        "clips_per_s_range": {str(n): [round(min(rates[n]), 1), round(max(rates[n]), 1)] for n in rates},
        "cpu_ms_per_clip": round(1e3 * statistics.median(a["cpu_seconds"] for a in answers) / CLIPS, 3),
        "resident_growth_bytes": growth,
        "disk_files_per_s": disk,
        "others_share_of_cpus": busy,
        "stages_seconds": {
            s: round(statistics.median(a["stages"][s] for a in answers), 3) for s in answers[0]["stages"]
        },
    }
    benchmark.extra_info.update(result)
    show(overhead_table(result))
    record("workers-overhead-cpu", result)
    assert growth < MOST_GROWTH
    assert result["clips_per_s"]["1"] >= LEAST_CLIPS_PER_S


def growth_of(resident: list[int]) -> int:
    quarter = max(1, len(resident) // 4)
    return max(resident[-quarter:]) - max(resident[:quarter])


def overhead_table(result: dict) -> str:
    rate, spread = result["clips_per_s"], result["clips_per_s_range"]
    return (
        f"no-op model, {result['clips']} clips, every file synced: {rate['1']} clips/s by 1 process {spread['1']}, "
        f"{rate['2']} by 2 {spread['2']}; bar {LEAST_CLIPS_PER_S}\n"
        f"CPU {result['cpu_ms_per_clip']} ms per clip; memory grew by {result['resident_growth_bytes'] / 1e6:.1f} MB; "
        f"the disk alone takes {result['disk_files_per_s']} files/s; others used {result['others_share_of_cpus']} of "
        "the CPUs"
    )


@pytest.fixture
def model_clips(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for i in range(MODEL_CLIPS):
        folder = tmp_path / "clips" / f"clip{i:02d}"
        folder.mkdir(parents=True)
        for f in range(FRAMES):
            Image.fromarray(rng.integers(0, 256, (*SIZE, 3), np.uint8)).save(folder / f"{f}.png")
    return tmp_path / "clips"


def test_clips_per_second_with_workers(benchmark, model_clips, tmp_path, show, record):
    model = build_wan_t2v(tmp_path / "model", num_layers=8, vae_dim=8)
    seconds: dict[str, list[float]] = {"cpu": [], "cpu,cpu": []}

    def extract(devices: str) -> Callable[[], None]:
        def run() -> None:
            shutil.rmtree(tmp_path / devices, ignore_errors=True)
            words = ["extract", str(model_clips), "--model", str(model), "--out", str(tmp_path / devices)]
            words += ["--layers", "7", "--steps", "749", "--window", str(FRAMES), "--size", "64x96"]
            words += ["--devices", devices]
            done = subprocess.run(
                [sys.executable, "-m", "spatialprobe.engine.cli", *words],
                env=os.environ | ALONE, capture_output=True, text=True,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            seconds[devices].append(float(re.search(r"^([0-9.]+) s, ", done.stdout, re.MULTILINE)[1]))

        return run

    benchmark.pedantic(extract("cpu,cpu"), setup=extract("cpu"), rounds=ROUNDS)
    stores = [FeatureStore.open(tmp_path / devices) for devices in seconds]
    assert len(stores[0]) == MODEL_CLIPS
    assert stores[0].ids() == stores[1].ids()
    for clip_id in stores[0].ids():
        assert stores[0].path(clip_id).read_bytes() == stores[1].path(clip_id).read_bytes()
    rates = {devices: round(MODEL_CLIPS / statistics.median(of), 3) for devices, of in seconds.items()}
    result = {
        "shapes": {"clips": MODEL_CLIPS, "window": FRAMES, "size": SIZE, "blocks": 8, "threads": 1, "rounds": ROUNDS},
        "clips_per_s": rates,
        "seconds": {devices: [round(s, 3) for s in of] for devices, of in seconds.items()},
        "ratio": round(rates["cpu,cpu"] / rates["cpu"], 3),
    }
    benchmark.extra_info.update(result)
    show(f"tiny Wan, clips/s by the longest worker's time without loading: {rates}, ratio {result['ratio']}")
    record("workers-scaling-cpu", result)
