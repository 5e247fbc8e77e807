"""kill -9 at random moments, then the same command again: the store ends identical to an uninterrupted run."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from spatialprobe.engine.cli import main
from spatialprobe.engine.store import FeatureStore

# One process pays for the imports; each of its forked children runs the engine's own main and is killed for real.
KILLER = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
import diffusers.models, transformers  # noqa: imports are slow, kills should hit the work
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from spatialprobe.engine.cli import main

kills, longest, argv = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
rng = random.Random(1)
killed = 0
while killed < kills:
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        os._exit(main(argv))
    time.sleep(rng.uniform(0, longest))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        killed += 1
    else:  # finished first: start the store over
        import shutil
        shutil.rmtree(argv[argv.index("--out") + 1])
print(killed)
"""


def snapshot(root: Path) -> dict[str, bytes]:
    """Everything in a store but the records of its runs, which tell the time."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name not in ("run.json", "log.jsonl")
    }


def test_killed_at_thirty_random_moments(wan_path, make_clip, tmp_path):
    for i in range(24):
        make_clip(tmp_path / "clips" / f"scene{i % 3}" / f"clip{i}", frames=5, size=(32, 48), seed=i)

    def words(out: str) -> list[str]:
        return [
            "extract", str(tmp_path / "clips"), "--model", str(wan_path), "--out", str(tmp_path / out), "--layers",
            "0,2", "--steps", "749,300", "--window", "5", "--size", "32x48", "--batch", "3", "--device", "cpu",
        ]  # fmt: skip

    def run_whole(out: str) -> Path:
        assert main(words(out)) == 0
        return tmp_path / out

    expected = snapshot(run_whole("uninterrupted"))
    assert sum(name.startswith("clips/") for name in expected) == 24
    killer = subprocess.run(
        [sys.executable, "-c", KILLER, "30", "2.0", *words("killed")], check=True, capture_output=True, text=True
    )
    assert killer.stdout.splitlines()[-1] == "30"
    store = FeatureStore.open(tmp_path / "killed") if (tmp_path / "killed/spec.json").exists() else None
    if store is not None:  # whatever moment the last kill hit, all that has a final name is whole
        damaged = [p for p in store.verify() if p.startswith("clips/")]
        assert damaged == []
    assert snapshot(run_whole("killed")) == expected
    assert FeatureStore.open(tmp_path / "killed").verify() == []


def test_two_shards_killed_and_run_again_side_by_side(qwen_path, make_clip, tmp_path):
    """Two processes on one store, one of them killed: the other is not disturbed, and nothing is lost."""
    for i in range(12):
        make_clip(tmp_path / "clips" / f"clip{i}", frames=3, size=(32, 48), seed=i)

    def words(out: str, *shard: str) -> list[str]:
        given = ["extract", str(tmp_path / "clips"), "--model", str(qwen_path), "--out", str(tmp_path / out)]
        return [*given, "--layers", "1", "--window", "3", "--query", ":", "--size", "64x96", "--device", "cpu", *shard]

    command = [sys.executable, "-m", "spatialprobe.engine.cli"]
    pair = [
        subprocess.Popen(
            [*command, *words("pair", "--shard", f"{i}/2")], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for i in (0, 1)
    ]
    mine = {f"clip{i}.safetensors" for i in sorted(map(str, range(12)))[::2]}  # every other of the sorted ids
    until = time.monotonic() + 120
    while not any((tmp_path / "pair/clips" / name).exists() for name in mine):  # it is at work: kill it now
        assert pair[0].poll() is None, "finished before it could be killed"
        assert time.monotonic() < until
        time.sleep(0.001)
    pair[0].kill()
    assert pair[0].wait() == -signal.SIGKILL
    assert pair[1].wait(timeout=120) == 0, pair[1].stderr.read()
    assert main(words("pair", "--shard", "0/2")) == main(words("whole")) == 0
    stores = [FeatureStore.open(tmp_path / name) for name in ("pair", "whole")]
    pair_files, whole_files = ({i: s.path(i).read_bytes() for i in s.ids()} for s in stores)
    assert pair_files == whole_files
    assert len(whole_files) == 12
