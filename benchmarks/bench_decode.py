"""Clips per second that loaders decode and resize: threads against processes, for JPEG, PNG and H.264, on this machine.

`python -m pytest benchmarks/bench_decode.py`, some minutes on 2 cores; `--record` writes
`results/decode-cpu.json`. Threads hand over the pixels they decoded; processes copy them into shared memory, which is
what it costs to hand them to the process that drives the device. The engine uses threads: this says whether it should.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from spatialprobe.engine.clips.decode import load_clip
from spatialprobe.engine.clips.images import resize
from spatialprobe.engine.device.resize import resize_on_device
from spatialprobe.engine.types import ClipRef, FrameSelection

SOURCE, SIZE = (540, 960), (480, 832)  # the study's frames, and Wan's input
FRAMES, CLIPS, ROUNDS = 9, 4, 3
SELECTION = FrameSelection(window=FRAMES)
CORES = len(os.sched_getaffinity(0))
# Of the processes' clips/s that threads must reach to stay the default: a process costs seconds to start, memory for
# its libraries, and a way to hand over its pixels.
LEAST_SHARE = 0.9


def frames() -> np.ndarray:
    """Moving colours with some grain, so that files have the size of photographs."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: SOURCE[0], : SOURCE[1]] / 60
    waves = [[np.sin(y + 0.7 * c + 0.1 * f) * np.cos(x - 0.05 * f) for c in range(3)] for f in range(FRAMES)]
    grain = rng.normal(0, 3, (FRAMES, *SOURCE, 1))
    return (127 + 100 * np.moveaxis(np.array(waves), 1, -1) + grain).clip(0, 255).astype(np.uint8)


def write(kind: str, folder: Path, pixels: np.ndarray) -> list[ClipRef]:
    if kind == "h264":
        source = folder / "clip.mp4"
        with av.open(str(source), "w") as container:
            stream = container.add_stream("libx264", rate=24)
            stream.height, stream.width = SOURCE
            for frame in pixels:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
            container.mux(stream.encode(None))
    else:
        source = folder / kind
        source.mkdir()
        for f, frame in enumerate(pixels):
            Image.fromarray(frame).save(source / f"{f:03d}.{kind}", **({"quality": 90} if kind == "jpg" else {}))
    return [ClipRef(f"clip{i}", str(source)) for i in range(CLIPS)]


def loaded(ref: ClipRef) -> torch.Tensor:
    return resize(load_clip(ref, SELECTION).frames, SIZE, Image.Resampling.LANCZOS)


def by_thread(ref: ClipRef) -> int:
    return int(loaded(ref)[0, 0, 0, 0])


def by_process(ref: ClipRef) -> str:
    video = loaded(ref).numpy()
    shared = SharedMemory(create=True, size=video.nbytes)
    np.ndarray(video.shape, np.uint8, shared.buf)[:] = video
    shared.close()
    return shared.name


def take(name: str) -> int:
    """The first value of a clip that a process handed over."""
    shared = SharedMemory(name=name)
    value = shared.buf[0]
    shared.close()
    shared.unlink()
    return value


def clips_per_second(pool: Executor, work: Callable, take: Callable, refs: list[ClipRef]) -> float:
    start = time.perf_counter()
    values = [take(result) for result in pool.map(work, refs)]
    assert len(set(values)) == 1  # every clip is the same file
    return len(refs) / (time.perf_counter() - start)


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[str, tuple[Executor, Callable, Callable]]]:
    counts = sorted({1, 2, CORES, 2 * CORES})
    pools = {f"{n} threads": (ThreadPoolExecutor(n), by_thread, int) for n in counts}
    spawn = get_context("spawn")
    pools |= {f"{n} processes": (ProcessPoolExecutor(n, spawn), by_process, take) for n in counts}
    yield pools
    for pool, _, _ in pools.values():
        pool.shutdown()


def test_loaders(pools, tmp_path, show, record):
    torch.set_num_threads(1)
    pixels, table, results = frames(), [], {}
    for kind in ("jpg", "png", "h264"):
        refs = write(kind, tmp_path, pixels)
        for pool, work, taken in pools.values():  # warm: processes import, files are cached
            clips_per_second(pool, work, taken, refs)
        rates = {name: [] for name in pools}
        for _ in range(ROUNDS):
            for name, (pool, work, taken) in pools.items():
                rates[name].append(clips_per_second(pool, work, taken, refs))
        results[kind] = {name: round(statistics.median(r), 3) for name, r in rates.items()}
        table += [f"{kind:<6}{name:<14}{rate:7.2f} clips/s" for name, rate in results[kind].items()]
    stages = {kind: stage_seconds(kind, tmp_path) for kind in results}
    table += [f"{kind:<6}" + ", ".join(f"{k} {v * 1e3:.1f} ms" for k, v in s.items()) for kind, s in stages.items()]
    resizes = resize_seconds(pixels)
    table += [f"resize {name:<22}{seconds * 1e3:8.1f} ms per frame" for name, seconds in resizes.items()]
    show("\n".join([f"{FRAMES} frames of {SOURCE[0]}x{SOURCE[1]} to {SIZE[0]}x{SIZE[1]}, {CORES} cores", *table]))
    best = {
        kind: {way: max(r for name, r in rates.items() if name.endswith(way)) for way in ("threads", "processes")}
        for kind, rates in results.items()
    }
    task = {"frames": FRAMES, "source": SOURCE, "size": SIZE, "clips": CLIPS, "rounds": ROUNDS}
    measured = {"clips_per_second": results, "seconds_per_clip": stages, "resize_seconds_per_frame": resizes}
    record("decode-cpu", {"task": task, "load_average": os.getloadavg()[0]} | measured)
    for kind, ways in best.items():
        assert ways["threads"] >= LEAST_SHARE * ways["processes"], f"{kind}: {ways}"


def stage_seconds(kind: str, folder: Path) -> dict[str, float]:
    """One clip on one thread: decode, then resize."""
    ref = ClipRef("clip", str(folder / ("clip.mp4" if kind == "h264" else kind)))
    start = time.perf_counter()
    clip = load_clip(ref, SELECTION)
    middle = time.perf_counter()
    resize(clip.frames, SIZE, Image.Resampling.LANCZOS)
    return {"decode": round(middle - start, 5), "resize": round(time.perf_counter() - middle, 5)}


def resize_seconds(pixels: np.ndarray) -> dict[str, float]:
    """A frame by Pillow, and by the definition that devices run, which a CPU has no use for."""
    x, found = torch.from_numpy(pixels[:4]), {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        ways = {
            f"torch, {threads} threads": lambda: resize_on_device(x, SIZE, Image.Resampling.LANCZOS),
            f"Pillow, {threads} threads": lambda n=threads: list(
                ThreadPoolExecutor(n).map(
                    lambda frame: Image.fromarray(frame).resize(SIZE[::-1], Image.Resampling.LANCZOS), pixels[:4]
                )
            ),
        }
        for name, way in ways.items():
            way()
            seconds = []
            for _ in range(3):
                start = time.perf_counter()
                way()
                seconds.append((time.perf_counter() - start) / 4)
            found[name] = round(statistics.median(seconds), 5)
    torch.set_num_threads(1)
    return found
