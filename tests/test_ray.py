"""`--ray`: actors of a Ray cluster on one store; neither a killed actor nor a cluster that goes away costs anything."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from spatialprobe.engine.cli import main
from spatialprobe.engine.job import Job
from spatialprobe.engine.pipeline import latents
from spatialprobe.engine.processes.ray_worker import RayWorker
from spatialprobe.engine.run import run_job
from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.types import FeatureSpec

CLIPS = 60


@pytest.fixture(scope="module")
def words(make_clip, qwen_path, tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("many")
    for i in range(CLIPS):
        make_clip(root / f"scene{i % 3}" / f"clip{i:02d}", frames=3, size=(32, 48), seed=i)
    return {"clips": str(root), "model": str(qwen_path), "layers": [1], "window": 3, "query": ":"} | {
        "options": {"size": (64, 96)}
    }


@pytest.fixture(scope="module")
def alone(words, tmp_path_factory) -> dict[str, bytes]:
    """The files of a single process."""
    report, store = run_job(Job(**words, out=str(tmp_path_factory.mktemp("alone") / "s"), device="cpu"))
    assert report.written == CLIPS
    return files(store.root)


def files(root: Path) -> dict[str, bytes]:
    store = FeatureStore.open(root)
    return {clip_id: store.path(clip_id).read_bytes() for clip_id in store.ids()}


def logged(root: Path) -> list[str]:
    path = root / "log.jsonl"
    return [json.loads(line)["id"] for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition, seconds: float = 90.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def of_ray() -> list[psutil.Process]:
    """Ray's processes below this one."""
    return [p for p in psutil.Process().children(recursive=True) if "ray" in " ".join(p.cmdline())]


def actors() -> list[psutil.Process]:
    return [p for p in of_ray() if p.cmdline()[:1] == ["ray::RayWorker.work"]]


@pytest.fixture
def ray():
    return pytest.importorskip("ray", reason="needs the extra ray: pip install 'spatialprobe[ray]'")


def test_an_actor_killed_in_mid_run_costs_nothing(words, alone, ray, tmp_path, capfd):
    from spatialprobe.engine.processes.ray_run import run_ray

    store, killed = tmp_path / "s", []

    def kill_one() -> None:
        wait_for(lambda: len(logged(store)) >= 3)
        wait_for(lambda: killed.extend(actors()[:1]) or killed)  # Ray changes their titles between calls
        killed[0].kill()

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    job = Job(**words, out=str(store), device="cpu", ray="local", ray_workers=2)
    report, _ = run_ray(job, beat=0.2)
    assert killed
    assert (report.written + report.elsewhere, report.failed, report.stopped) == (CLIPS, 0, "")
    assert files(store) == alone
    assert FeatureStore.open(store).verify() == []
    assert sorted(path.name for path in store.iterdir()) == [
        "about.json",
        "clips",
        "log.jsonl",
        "run.json",
        "spec.json",
    ]
    assert len(logged(store)) - CLIPS in (-1, 0)  # the dead actor may have stored one and not said so
    assert len(json.loads((store / "run.json").read_text())["workers"]) == 2
    assert "Traceback" not in capfd.readouterr().err
    assert of_ray() == []
    report, _ = run_ray(job)
    assert (report.present, report.written) == (CLIPS, 0)


PLOT = """
import os, signal
from PIL import Image
_open = Image.open
def spoiled(path, *args, **kwargs):
    if os.environ["SPOIL"] in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    return _open(path, *args, **kwargs)
Image.open = spoiled
"""


def test_a_clip_that_kills_two_actors_fails_alone(words, alone, ray, tmp_path, capfd, monkeypatch):
    from spatialprobe.engine.processes.ray_run import run_ray

    (tmp_path / "plot").mkdir()
    (tmp_path / "plot/sitecustomize.py").write_text(PLOT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "plot"))
    monkeypatch.setenv("SPOIL", "clip10")
    report, root = run_ray(Job(**words, out=str(tmp_path / "s"), device="cpu", ray="local", ray_workers=1), beat=0.2)
    assert report.failures == {"scene1/clip10": "worker: 2 processes died while they worked on it"}
    assert files(root) == {clip_id: data for clip_id, data in alone.items() if clip_id != "scene1/clip10"}
    assert "worker 0 (" in (err := capfd.readouterr().err)
    assert "died and was started again" in err


def command(words: dict, out: Path, gone_after: float = 20.0) -> list[str]:
    """`engine extract --ray`, in a process of its own."""
    start = "import sys, spatialprobe.engine.processes.ray_run as r; from spatialprobe.engine.cli import main\n"
    start += f"r.run_ray.__kwdefaults__['gone_after'] = {gone_after}; sys.exit(main())"
    flags = ["--layers", "1", "--window", "3", "--query", ":", "--size", "64x96", "--device", "cpu", "--ray"]
    return [sys.executable, "-c", start, "extract", words["clips"], "--model", words["model"], "--out", out, *flags]


def begun(words: dict, out: Path, **what: float) -> subprocess.Popen:
    """A run in a process group of its own, as a terminal starts it, that has stored three clips."""
    run = subprocess.Popen(
        command(words, out, **what), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for(lambda: len(logged(out)) >= 3 or run.poll() is not None)
    assert run.poll() is None, run.communicate()
    return run


def test_a_cluster_that_goes_away_ends_the_run_with_a_line(words, alone, ray, tmp_path):
    run = begun(words, tmp_path / "s", gone_after=3.0)
    for process in psutil.Process(run.pid).children(recursive=True):
        process.kill()
    err = run.communicate(timeout=60)[1]
    assert run.returncode == 1, err
    line = "engine: stopped: the Ray cluster at 127.0.0.1 went away; run the same command again to go on"
    assert err.splitlines() == [line]
    done = files(tmp_path / "s")
    assert 3 <= len(done) < CLIPS
    report, store = run_job(Job(**words, out=str(tmp_path / "s"), device="cpu"))
    assert report.written == CLIPS - len(done)
    assert files(store.root) == alone
    store.run.close()
    assert not (store.root / "tmp").exists()
    assert not (store.root / "leases").exists()


def test_an_interrupt_ends_the_run_and_keeps_everything(words, alone, ray, tmp_path):
    run = begun(words, tmp_path / "s")
    below = psutil.Process(run.pid).children(recursive=True)
    os.killpg(run.pid, signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130, err
    assert err.splitlines() == ["interrupted: run the same command again to go on"]
    done = files(tmp_path / "s")
    assert f"{len(done)} written" in out
    assert set(done.items()) < set(alone.items())
    wait_for(lambda: not any(process.is_running() for process in below), seconds=15)
    assert not (tmp_path / "s/tmp").exists()
    assert not (tmp_path / "s/leases").exists()


# -- without Ray ----------------------------------------------------------------------------------------------------


def test_an_actor_that_sees_another_store_is_refused(words, tmp_path, monkeypatch):
    monkeypatch.setattr("spatialprobe.engine.processes.ray_worker.LOOKS", 1)
    job = Job(**words, out=str(tmp_path / "s"), device="cpu")
    worker = RayWorker(asdict(job), torch.get_num_threads())
    loaded = worker.load()
    spec = FeatureSpec.from_json(loaded["spec"])
    ticket = {"sign": "tmp/run-0", "spec_hash": "x", "of_sharing": {}}
    assert "must be a path that all machines share" in worker.work(["scene0/clip00"], ticket)["error"]
    store = FeatureStore.create(tmp_path / "s", spec)
    assert "must be a path that all machines share" in worker.work(["scene0/clip00"], ticket)["error"]
    ticket["sign"] = f"tmp/{store.run.path.name}"
    assert "the run's is of x" in worker.work(["scene0/clip00"], ticket)["error"]
    ticket["spec_hash"] = store.spec_hash
    assert "holds no clip nowhere here" in worker.work(["nowhere"], ticket)["error"]
    said = worker.work(["scene0/clip00", "scene1/clip01"], ticket)
    assert [(clip_id, outcome) for clip_id, outcome, *_ in said["clips"]] == [
        ("scene0/clip00", "written"), ("scene1/clip01", "written"),
    ]  # fmt: skip
    assert worker.work(["scene0/clip00"], ticket)["clips"] == [("scene0/clip00", "written elsewhere", "", 0.0)]


def test_an_actor_hashes_its_encoders_once_and_counts_latents_by_task(wan_path, clips_path, tmp_path, monkeypatch):
    hashed, weights_hash = [], latents.weights_hash
    monkeypatch.setattr(latents, "weights_hash", lambda module: hashed.append(module) or weights_hash(module))
    words = {"clips": str(clips_path), "model": str(wan_path), "layers": [0], "steps": [749], "window": 9}
    words |= {"options": {"size": (64, 96)}, "latents": str(tmp_path / "latents"), "out": str(tmp_path / "s")}
    worker = RayWorker(asdict(Job(**words, device="cpu")), torch.get_num_threads())
    store = FeatureStore.create(tmp_path / "s", FeatureSpec.from_json(worker.load()["spec"]))
    ticket = {"sign": f"tmp/{store.run.path.name}", "spec_hash": store.spec_hash, "of_sharing": {}}
    for clip_id in ("clip0", "clip1"):
        assert worker.work([clip_id], ticket)["timing"]["latents"] == {"read": 0, "made": 1}
    assert len(hashed) == 1


def test_actors_whose_gpus_have_other_memory_free_follow_the_first(wan_path, clips_path, tmp_path, monkeypatch):
    from spatialprobe.engine.processes.ray_run import Crew, Hand

    words = {"clips": str(clips_path), "model": str(wan_path), "layers": [0], "steps": [749], "window": 9}
    words |= {"options": {"size": (64, 96), "vae_tiling": "auto"}, "out": str(tmp_path / "s")}
    job, workers = Job(**words, device="cpu"), []
    for free in (0, 1 << 60, 0):
        monkeypatch.setattr("spatialprobe.engine.device.tiling.free_bytes", lambda device, free=free: free)
        workers.append(RayWorker(asdict(job), torch.get_num_threads()))
        workers[-1].load()
    assert [worker.resolved.spec.options["vae_tiling"] for worker in workers] == [True, False, True]
    there = SimpleNamespace(ray=SimpleNamespace(get=lambda said: said), gone=False)
    crew = Crew(there, job, 2, [], 1.0, {})
    hands = [Hand(number, worker, None) for number, worker in enumerate(workers)]
    crew.workers = hands
    workers[2].resolved.spec = replace(workers[2].resolved.spec, seed=1)
    for hand in hands:
        crew._hear(hand, hand.actor.load())
    assert [hand.ended for hand in hands] == ["", "", "would store other features: seed: 0 there, 1 asked"]
    ticket = {"sign": f"tmp/{crew.store.run.path.name}", "spec_hash": crew.store.spec_hash, "of_sharing": {}}
    for worker, clip_id in zip(workers, ("clip0", "clip1"), strict=False):
        assert worker.work([clip_id], ticket)["clips"][0][1] == "written"
    assert FeatureStore.open(tmp_path / "s").spec.options["vae_tiling"] is True
    assert FeatureStore.open(tmp_path / "s").verify() == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"devices": "cpu,cpu"}, "ray and devices exclude each other"),
        ({"device": "cuda:1"}, "device must be cpu or cuda with ray, which picks the GPU, got 'cuda:1'"),
        ({"ray": "ray://head:10001"}, "ray must be HOST:PORT or auto, on a machine of the cluster, got 'ray://head"),
        ({"offload": "spread"}, "offload spread uses every GPU"),
    ],
)
def test_words_that_do_not_go_with_ray(words, tmp_path, more, message):
    from spatialprobe.engine.processes.ray_run import check_words

    with pytest.raises(ValueError, match=message):
        check_words(Job(**words, out=str(tmp_path / "s"), **({"ray": "local"} | more)))


def test_without_ray_installed_the_extra_is_named(words, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main([str(word) for word in command(words, tmp_path / "s")[3:]]) == 2
    assert capfd.readouterr().err == (
        "engine: error: ray is not installed: --ray needs the extra ray, pip install 'spatialprobe[ray]'\n"
    )
    assert not (tmp_path / "s").exists()
    with pytest.raises(ValueError, match="ray local is for `run_ray`"):
        run_job(Job(**words, out=str(tmp_path / "s"), ray="local"))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1: [Errno 111] Connection refused"),
        ("head", "no Ray cluster answers at head: wanted HOST:PORT or auto, got 'head'"),
    ],
)
def test_an_address_where_no_cluster_is(words, ray, tmp_path, capfd, address, message):
    assert main([*(str(word) for word in command(words, tmp_path / "s")[3:]), address]) == 2
    assert capfd.readouterr().err == f"engine: error: {message}\n"
    assert not (tmp_path / "s").exists()


def test_tasks_of_one_actor_add_up():
    def timing(seconds, busy):
        return {"seconds": seconds, "busy": busy, "peak_memory_bytes": 7, "stages": {"write": {"seconds": seconds}}}

    from spatialprobe.engine.processes.ray_run import in_turn

    assert in_turn([timing(1.0, 0.5), timing(3.0, 1.0)]) == {
        "seconds": 4.0, "busy": 0.875, "peak_memory_bytes": 7, "stages": {"write": {"seconds": 4.0}},
    }  # fmt: skip
    assert in_turn([]) == {}
