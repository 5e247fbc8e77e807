"""The engine around a model that does nothing, in a process of its own: what `bench_workers` starts one or two of.

`python idle_model.py CLIPS STORE` says "ready", waits for a line, extracts what no other process does, and answers with
a line of JSON. Files reach the disk as always; the calls that see to it are counted.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

import psutil
import torch
from torch import nn

from spatialprobe.engine.adapter import Adapter
from spatialprobe.engine.clips.sources import list_clips
from spatialprobe.engine.extract import extract
from spatialprobe.engine.pipeline.progress import RunLog
from spatialprobe.engine.processes.sharing import Sharing
from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.types import FeatureSpec, FrameSelection, Plan

GRID, CHANNELS = (1, 4, 4), 64
SPEC = FeatureSpec(
    family="idle",
    weights="content:0",
    layers=(0,),
    frames=FrameSelection(window=1),
    compute_dtype="float32",
    device="cpu",
)
LOOK_EVERY = 250  # clips between looks at the memory


class Idle(Adapter):
    """Features are a ramp plus the clip's first pixel."""

    OPTIONS, PARITY, LIBRARIES = {}, {}, ()
    num_layers, num_steps, channels = 1, 0, CHANNELS

    def __init__(self):
        self.device = torch.device("cpu")
        self.blocks = nn.ModuleList([nn.Identity()])
        self.ramp = torch.arange(16.0 * CHANNELS).view(1, 16, CHANNELS)

    def plan(self, frames, query):
        return Plan(frames, tuple(range(frames)), (8, 8), GRID, (0,) * frames)

    def load(self, depth, device, dtype, cache): ...

    def check_options(self): ...

    def skeleton(self, depth):
        return [self.blocks]

    def prepare(self, clip, plan):
        return {"pixel": clip.frames[0, :, 0, 0].float()}

    def encode(self, inputs, plan):
        return inputs["pixel"][:, :1, None]

    def forward(self, state, step, noise):
        self.blocks[0](self.ramp + state)

    def grid(self, tokens, state, plan):
        return tokens.unflatten(1, plan.grid)


def main(clips: str, root: str) -> None:
    torch.set_num_threads(1)
    synced, lock, fsync = [0], threading.Lock(), os.fsync

    def counted(fd: int) -> None:
        fsync(fd)
        name = Path(f"/proc/self/fd/{fd}").readlink().name
        with lock:
            synced[0] += name.endswith(".part")  # a clip's file, before it gets its name

    os.fsync = counted
    refs, process, resident, settled = list_clips(clips, "auto"), psutil.Process(), [], [0]
    store = FeatureStore.create(root, SPEC)
    print("ready", flush=True)
    sys.stdin.readline()
    synced[0] = 0

    def look(clip_id: str, outcome: str, reason: str) -> None:
        settled[0] += 1
        if settled[0] % LOOK_EVERY == 0:
            resident.append(process.memory_info().rss)

    start, cpu = time.perf_counter(), time.process_time()
    with RunLog(Path(root) / "log.jsonl", total=len(refs), tell=look) as log, Sharing(store) as sharing:
        report = extract(refs, Idle(), store, progress=log.clip, sharing=sharing)
    answer = {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "files_synced": synced[0],
        "written": report.written,
        "elsewhere": report.elsewhere,
        "resident": resident,
        "stages": {name: stage["seconds"] for name, stage in report.timing["stages"].items()},
    }
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
