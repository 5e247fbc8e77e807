"""`--devices`: worker processes that share a store, killed, interrupted or out of room, end as one process does."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from spatialprobe.engine.cli import main
from spatialprobe.engine.job import Job
from spatialprobe.engine.processes.ranks import part_of, words_for
from spatialprobe.engine.processes.sharing import Sharing
from spatialprobe.engine.processes.workers import Pool, Worker, devices_of, merged_timing, run_workers
from spatialprobe.engine.run import run_job
from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.types import ClipRef, FeatureSpec

CLIPS = 30


@pytest.fixture(scope="module")
def clips(make_clip, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("many")
    for i in range(CLIPS):
        make_clip(root / f"scene{i % 3}" / f"clip{i:02d}", frames=3, size=(32, 48), seed=i)
    return root


def job_words(clips: Path, model: Path, out: Path) -> dict:
    return {
        "clips": str(clips), "model": str(model), "out": str(out), "layers": [1], "window": 3, "query": ":",
        "options": {"size": (64, 96)},
    }  # fmt: skip


@pytest.fixture(scope="module")
def alone(clips, qwen_path, tmp_path_factory) -> dict[str, bytes]:
    """The files of a single process."""
    report, store = run_job(Job(**job_words(clips, qwen_path, tmp_path_factory.mktemp("alone") / "s"), device="cpu"))
    assert report.written == CLIPS
    return files(store.root)


def files(root: Path) -> dict[str, bytes]:
    store = FeatureStore.open(root)
    return {clip_id: store.path(clip_id).read_bytes() for clip_id in store.ids()}


def left_behind(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name in ("leases", "tmp"))


def command(words: dict, *flags: str) -> list[str]:
    """The same job for a process of its own."""
    out = [words["clips"], "--model", words["model"], "--out", words["out"], "--layers", "1", "--window", "3"]
    out += ["--query", ":", "--size", "64x96", *flags]
    return [sys.executable, "-m", "spatialprobe.engine.cli", "extract", *out]


def wait_for(condition, seconds: float = 90.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def logged(root: str | Path) -> list[dict]:
    path = Path(root) / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_two_workers_end_as_one_process_and_report_together(clips, qwen_path, alone, tmp_path, capfd, spoil):
    words, both = job_words(clips, qwen_path, tmp_path / "s"), tmp_path / "both"
    spoil("", WAIT.format(both=str(both), leases=str(tmp_path / "s/leases")))  # nor is one done before the other begins
    assert main([*command(words)[3:], "--devices", "cpu,cpu"]) == 0
    printed = capfd.readouterr()
    assert f"{CLIPS} written, 0 there before, 0 failed, 0 skipped of {CLIPS} clips" in printed.out
    assert printed.err == ""
    assert files(tmp_path / "s") == alone
    assert left_behind(tmp_path / "s") == []
    record = json.loads((tmp_path / "s/run.json").read_text())
    assert (record["written"], record["job"]["devices"]) == (CLIPS, "cpu,cpu")
    parts = record["workers"]
    assert [part["ended"] for part in parts] == ["done", "done"]
    assert sum(part["written"] for part in parts) == CLIPS
    assert all(part["written"] > 0 for part in parts)
    assert sorted(line["id"] for line in logged(tmp_path / "s")) == sorted(alone)  # nothing twice
    assert main([*command(words)[3:], "--devices", "cpu,cpu"]) == 0
    assert f"0 written, {CLIPS} there before" in capfd.readouterr().out


def test_two_runs_on_one_store_share_the_clips(clips, qwen_path, alone, tmp_path, spoil):
    words, both = job_words(clips, qwen_path, tmp_path / "s"), tmp_path / "both"
    spoil("", WAIT.format(both=str(both), leases=str(tmp_path / "s/leases")))
    runs = [subprocess.Popen(command(words, "--device", "cpu"), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [run.communicate(timeout=180)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert files(tmp_path / "s") == alone
    assert sorted(line["id"] for line in logged(tmp_path / "s")) == sorted(alone)
    counts = [int(text.split(": ")[1].split(" written")[0]) for text in said]
    assert sum(counts) == CLIPS
    assert left_behind(tmp_path / "s") == []


@pytest.mark.parametrize("seed", [0, 1])
def test_workers_killed_at_random_moments_lose_nothing(clips, qwen_path, alone, tmp_path, capfd, seed):
    words, rng = job_words(clips, qwen_path, tmp_path / "s"), random.Random(seed)
    killed = []

    def kill_some() -> None:
        wait_for(lambda: len(logged(tmp_path / "s")) >= 2)
        for _ in range(2):
            time.sleep(rng.uniform(0, 0.5))
            workers = [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]
            if len(workers) > 1:
                rng.choice(workers).kill()
                killed.append(1)

    killer = threading.Thread(target=kill_some)
    killer.start()
    report, _ = run_workers(Job(**words, devices="cpu,cpu,cpu"), beat=0.2)
    killer.join()
    assert killed
    assert report.written + report.elsewhere + report.failed == CLIPS
    assert report.failed <= 1  # two kills can hit one clip, and then it counts as their cause
    assert "was killed by SIGKILL; " in capfd.readouterr().err
    if report.failed:
        assert run_workers(Job(**words, devices="cpu,cpu"))[0].written == report.failed
    assert files(tmp_path / "s") == alone
    assert FeatureStore.open(tmp_path / "s").verify() == []
    assert left_behind(tmp_path / "s") == []


PLOT = """
import os, signal
from PIL import Image
_open = Image.open
def spoiled(path, *args, **kwargs):
    if os.environ["SPOIL"] in str(path):
        {deed}
    return _open(path, *args, **kwargs)
Image.open = spoiled
"""


WAIT = """import pathlib, time
        while not os.path.exists({both!r}):
            time.sleep(0.01)
            if len([*pathlib.Path({leases!r}).glob("holder-*")]) > 1:
                open({both!r}, "w").close()"""


@pytest.fixture
def spoil(tmp_path, monkeypatch):
    """spoil(clip, deed): what worker processes do when they read an image of that clip."""

    def plot(clip: str, deed: str) -> None:
        (tmp_path / "plot").mkdir()
        (tmp_path / "plot/sitecustomize.py").write_text(PLOT.format(deed=deed))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "plot"))
        monkeypatch.setenv("SPOIL", clip)

    return plot


def test_a_clip_that_kills_two_workers_fails_and_costs_nothing_else(
    clips, qwen_path, alone, tmp_path, capfd, spoil, monkeypatch
):
    spoil("clip10", "os.kill(os.getpid(), signal.SIGKILL)")
    words = job_words(clips, qwen_path, tmp_path / "s")
    assert main([*command(words)[3:], "--devices", "cpu,cpu,cpu"]) == 1
    printed = capfd.readouterr()
    assert f"1 failed, 0 skipped of {CLIPS} clips" in printed.out
    assert "scene1/clip10  worker: 2 processes died while they worked on it" in printed.err
    assert printed.err.count("was killed by SIGKILL") == 2
    there = files(tmp_path / "s")
    assert there == {clip_id: data for clip_id, data in alone.items() if clip_id != "scene1/clip10"}
    assert left_behind(tmp_path / "s") == []
    monkeypatch.undo()
    assert main([*command(words)[3:], "--devices", "cpu,cpu", "--retry-failed"]) == 0
    assert files(tmp_path / "s") == alone


def test_a_clip_that_kills_the_last_workers_fails_too(clips, qwen_path, alone, tmp_path, capfd, spoil):
    spoil("clip10", "os.kill(os.getpid(), signal.SIGKILL)")
    words = job_words(clips, qwen_path, tmp_path / "s")
    assert main([*command(words)[3:], "--devices", "cpu,cpu"]) == 1
    assert "no worker is left" in capfd.readouterr().err
    store = FeatureStore.open(tmp_path / "s")
    assert store.failures()["scene1/clip10"]["reason"] == "2 processes died while they worked on it"
    assert set(files(tmp_path / "s").items()) < set(alone.items())
    assert left_behind(tmp_path / "s") == []


def test_a_lost_gpu_ends_its_worker_and_the_others_go_on(clips, qwen_path, alone, tmp_path, capfd, spoil):
    once = f"(os.close(os.open({str(tmp_path / 'once')!r}, os.O_CREAT | os.O_EXCL)), lost())"
    lost = "def lost(): raise RuntimeError('CUDA error: uncorrectable ECC error encountered')"
    spoil("clip10", f"{lost}\n        if not os.path.exists({str(tmp_path / 'once')!r}): {once}")
    words = job_words(clips, qwen_path, tmp_path / "s")
    assert main([*command(words)[3:], "--devices", "cpu,cpu"]) == 0
    printed = capfd.readouterr()
    told = "(cpu) lost its GPU: CUDA error: uncorrectable ECC error encountered; "
    others = ("1 of 2 workers go on", "the others are done")  # they may be, by the time that its process has ended
    assert any(told + of_them in printed.err for of_them in others), printed.err
    assert "Traceback" not in printed.err
    assert files(tmp_path / "s") == alone
    assert left_behind(tmp_path / "s") == []
    ended = [part["ended"] for part in json.loads((tmp_path / "s/run.json").read_text())["workers"]]
    assert sorted(ended) == ["done", "lost its GPU: CUDA error: uncorrectable ECC error encountered"]


def test_an_interrupt_is_passed_on_and_everything_is_kept(clips, qwen_path, alone, tmp_path):
    words = job_words(clips, qwen_path, tmp_path / "s")
    run = subprocess.Popen(
        command(words, "--devices", "cpu,cpu"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: len(logged(tmp_path / "s")) >= 3)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130, err
    assert "interrupted: run the same command again" in err
    assert "Traceback" not in err
    done = files(tmp_path / "s")
    assert f"{len(done)} written" in out
    assert set(done.items()) <= set(alone.items())
    assert left_behind(tmp_path / "s") == []
    assert main([*command(words)[3:], "--devices", "cpu,cpu"]) == 0
    assert files(tmp_path / "s") == alone


def test_workers_stop_when_the_parent_is_killed(clips, qwen_path, alone, tmp_path):
    words = job_words(clips, qwen_path, tmp_path / "s")
    run = subprocess.Popen(command(words, "--devices", "cpu,cpu"), stderr=subprocess.DEVNULL)
    wait_for(lambda: len(logged(tmp_path / "s")) >= 3)
    workers = psutil.Process(run.pid).children()
    assert len(workers) == 2
    run.kill()
    run.wait()
    wait_for(lambda: not any(worker.is_running() for worker in workers))
    assert left_behind(tmp_path / "s") == []  # as after an interrupt
    assert main([*command(words)[3:], "--device", "cpu"]) == 0
    assert files(tmp_path / "s") == alone


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("may not mount a small file system")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_stops_all_workers_and_loses_nothing(clips, qwen_path, alone, small_disk, capfd):
    words = job_words(clips, qwen_path, small_disk / "s")
    run_job(Job(**words, device="cpu", limit=5))
    disk, pages = os.statvfs(small_disk), -(-max(map(len, alone.values())) // 4096)
    (small_disk / "other").write_bytes(bytes((disk.f_bavail - 10 * pages) * disk.f_frsize))
    assert main([*command(words)[3:], "--devices", "cpu,cpu"]) == 1
    err = capfd.readouterr().err
    assert "engine: stopped: [Errno 28] No space left on device" in err
    assert "Traceback" not in err
    done = files(small_disk / "s")
    assert 5 <= len(done) < CLIPS
    assert set(done.items()) < set(alone.items())
    assert left_behind(small_disk / "s") == []
    (small_disk / "other").unlink()
    assert main([*command(words)[3:], "--devices", "cpu,cpu"]) == 0
    assert files(small_disk / "s") == alone
    assert FeatureStore.open(small_disk / "s").verify() == []


def test_failed_and_short_clips_are_settled_once(clips, qwen_path, tmp_path, make_clip):
    for i in range(6):
        make_clip(tmp_path / "clips" / f"good{i}", frames=3, size=(32, 48), seed=i)
        make_clip(tmp_path / "clips" / f"short{i}", frames=2, size=(32, 48), seed=i)
        (make_clip(tmp_path / "clips" / f"bad{i}", frames=3, size=(32, 48)) / "001.png").write_bytes(b"broken")
    words = job_words(tmp_path / "clips", qwen_path, tmp_path / "s") | {"short": "skip"}
    report, root = run_workers(Job(**words, devices="cpu,cpu"))
    assert (report.written, report.failed, report.skipped, report.elsewhere) == (6, 6, 6, 0)
    assert all(
        "image cannot be read" in reason and reason.startswith("decode: ") for reason in report.failures.values()
    )
    lines = logged(root)
    assert len(lines) == len({line["id"] for line in lines}) == 18
    assert len((root / "failed.jsonl").read_text().splitlines()) == 6


def test_a_job_that_cannot_be_done_says_so_once_and_writes_nothing(clips, qwen_path, tmp_path, capfd):
    words = job_words(clips, qwen_path, tmp_path / "s")
    for flags, message in (
        (["--devices", "all"], "this machine has no CUDA device; cpu,cpu starts two"),
        (["--devices", "cpu,"], "device must be cpu, cuda or cuda:N, got 'nothing'"),
        (["--devices", "cpu,cuda:0"], "device 'cuda:0' is not there"),
        (["--devices", "cpu,cpu", "--device", "cpu"], "device and devices exclude each other"),
        (["--devices", "cpu,cpu", "--offload", "spread"], "offload spread"),
        (["--devices", "cpu,cpu", "--layers", "99"], "layers must be blocks"),
    ):
        if torch.cuda.is_available() and "cpu,cpu" not in flags:
            continue
        assert main([*command(words)[3:], *flags]) == 2
        err = capfd.readouterr().err
        assert message in err
        assert len(err.splitlines()) == 1
    with pytest.raises(ValueError, match="devices cpu,cpu are for `run_workers`"):
        run_job(Job(**words, devices="cpu,cpu"))
    assert not (tmp_path / "s").exists()


def test_weights_that_no_worker_can_load_leave_no_store(clips, qwen_path, tmp_path, capfd):
    import shutil

    broken = tmp_path / "model"
    shutil.copytree(qwen_path, broken)
    for file in broken.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:5000])
    words = job_words(clips, broken, tmp_path / "s")
    assert main([*command(words)[3:], "--device", "cpu"]) == 2
    alone = capfd.readouterr().err.splitlines()[-1]
    assert main([*command(words)[3:], "--devices", "cpu,cpu"]) == 2
    assert capfd.readouterr().err.splitlines()[-1] == alone
    assert not (tmp_path / "s/spec.json").exists()


# -- what launchers say ---------------------------------------------------------------------------------------------

RUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
STEP = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}
ARRAY = {f"SLURM_ARRAY_TASK_{name}": value for name, value in
         {"ID": "7", "COUNT": "3", "MIN": "5", "MAX": "9", "STEP": "2"}.items()}  # fmt: skip


@pytest.mark.parametrize(
    ("env", "part"),
    [
        ({}, None),
        (RUN, (3, 8)),
        (RUN | {"WORLD_SIZE": "1", "RANK": "0"}, None),
        (STEP, (2, 4)),
        (STEP | {"SLURM_STEP_NUM_TASKS": "3"}, (2, 3)),
        ({name: STEP[name] for name in STEP if name != "SLURM_STEP_ID"}, None),  # a batch script without srun
        (STEP | RUN, (3, 8)),  # srun starts a torchrun on each machine: its ranks count
        (ARRAY, (1, 3)),
        (ARRAY | {"SLURM_ARRAY_TASK_COUNT": "1", "SLURM_ARRAY_TASK_MIN": "7", "SLURM_ARRAY_TASK_MAX": "7"}, None),
        (ARRAY | STEP, (1 * 4 + 2, 12)),
    ],
)
def test_the_part_that_a_launcher_gives(env, part):
    got = part_of(env)
    assert (got and (got.index, got.count)) == part


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (RUN | {"RANK": "x"}, "RANK must be a whole number, got 'x'"),
        (RUN | {"RANK": "8"}, "RANK=8 must be below WORLD_SIZE=8"),
        (ARRAY | {"SLURM_ARRAY_TASK_STEP": "1"}, "3 tasks from 5 to 9, with gaps"),
        ({"SLURM_ARRAY_TASK_ID": "3"}, "SLURM_ARRAY_TASK_COUNT must be a whole number, got None"),
    ],
)
def test_variables_that_make_no_sense_are_refused(env, message):
    with pytest.raises(ValueError, match=message):
        part_of(env)


def test_the_users_words_win_over_a_launchers(monkeypatch):
    job = {"clips": "c", "model": "m", "out": "o"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert words_for(RUN | {"LOCAL_RANK": "5"}, Job(**job)) == {
        "shard": ("3/8", "RANK, WORLD_SIZE"), "device": ("cuda:1", "local rank 5"),
    }  # fmt: skip
    assert words_for(RUN, Job(**job, shard="0/2")) == {"device": ("cuda:1", "local rank 1")}
    assert words_for(RUN, Job(**job, shard="0/2", device="cuda:3")) == {}
    assert words_for(ARRAY | {"SLURM_ARRAY_TASK_STEP": "1"}, Job(**job, shard="0/2")) == {}
    assert list(words_for(ARRAY, Job(**job, devices="all"))) == ["shard"]
    with pytest.raises(ValueError, match="leave one of them out"):
        words_for(RUN, Job(**job, devices="all"))


def test_ranks_of_a_launcher_fill_one_store(clips, qwen_path, alone, tmp_path):
    words, ranks = job_words(clips, qwen_path, tmp_path / "s"), []
    for rank in ("0", "1"):
        env = os.environ | {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank}
        ranks.append(subprocess.Popen(command(words), env=env, stderr=subprocess.PIPE, text=True))
    for rank, process in enumerate(ranks):
        err = process.communicate(timeout=180)[1]
        assert process.returncode == 0, err
        assert f"engine: shard {rank}/2, from RANK, WORLD_SIZE" in err
    assert files(tmp_path / "s") == alone
    for rank in (0, 1):
        assert json.loads((tmp_path / f"s/run-{rank}of2.json").read_text())["written"] == CLIPS / 2


@pytest.mark.parametrize(
    ("interrupted", "stopped", "told"),
    [
        (False, "", "2 clips are left, and no worker is"),
        (False, "no room", "no room"),
        (True, "", ""),
        (True, "Permission denied", "Permission denied"),  # of a clip whose write came last
    ],
)
def test_why_clips_are_left_is_said_after_an_interrupt_too(tmp_path, interrupted, stopped, told):
    store = FeatureStore.create(tmp_path / "s", FeatureSpec("wan", "content:0", (0,)))
    pool = Pool(3, [ClipRef("a", "/nowhere"), ClipRef("b", "/nowhere")])
    pool.interrupted = interrupted
    pool.workers = [Worker(0, "cpu", None, None, report={"stopped": stopped, "batch_size": 1, "timing": {}})]
    with Sharing(store) as sharing:
        report = pool.add_up(store, sharing)
    assert (report.stopped, report.interrupted, report.present, report.written) == (told, interrupted, 1, 0)


def test_timing_of_workers_adds_up():
    def timing(seconds, busy, gb):
        stages = {"write": {"seconds": seconds, "gb_per_s": gb}, "wait": {"seconds": 1.0}}
        return {"seconds": seconds, "busy": busy, "peak_memory_bytes": int(gb), "stages": stages}

    assert merged_timing([timing(1.0, 0.5, 4.0), timing(3.0, 1.0, 2.0)]) == {
        "seconds": 3.0, "busy": 0.75, "peak_memory_bytes": 4,
        "stages": {"write": {"seconds": 4.0, "gb_per_s": 2.5}, "wait": {"seconds": 2.0}},
    }  # fmt: skip
    told = [{"latents": {"read": 2, "made": n}, "held_back": f"by {n}", "launches": {"launch_ms": n}} for n in (1, 4)]
    merged = merged_timing([timing(1.0, 0.5, 4.0) | told[0], timing(3.0, 1.0, 2.0) | told[1]])
    assert (merged["latents"], merged["held_back"]) == ({"read": 4, "made": 5}, "by 4")
    assert merged["launches"] == {"launch_ms": 4}  # of the longest, as what held it back
    assert merged_timing([]) == {}


def test_devices_are_named_one_by_one(monkeypatch):
    assert devices_of("cpu, cpu") == ["cpu", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert devices_of("all") == ["cuda:0", "cuda:1", "cuda:2"]
    with pytest.raises(ValueError, match="devices must be of one kind"):
        devices_of("cpu,cuda:0")
    assert Pool(3, []).outcomes == {}
