"""Tiny checkpoints and small clips, made once per run; HF libraries kept off the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")  # read when kernels are decorated

from spatialprobe.engine.demo.tiny.qwen3_vl import build_qwen3_vl
from spatialprobe.engine.demo.tiny.wan import build_wan_t2v

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a background job, whose children would ignore it as well
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # tiny tensors gain nothing from two, and spinning threads stall each other on busy cores


# Files that take a minute or more: begun first, or one process would be left alone with them at the end.
LONG = (
    "workers", "ray", "compiled", "ahead_of_time", "kill", "pretend_cuda", "contrastive_loss", "several_runs",
    "lifting", "train", "demo", "probe_tasks", "bench_device", "report_browser",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    place = {f"test_{name}": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        if os.environ.get("REQUIRE_GPU") == "1":
            pytest.fail("REQUIRE_GPU=1, but there is no CUDA device")
        pytest.skip("no CUDA device")


@pytest.fixture(scope="session")
def wan_path(tmp_path_factory) -> Path:
    return build_wan_t2v(tmp_path_factory.mktemp("wan") / "wan-tiny")


@pytest.fixture(scope="session")
def qwen_path(tmp_path_factory) -> Path:
    return build_qwen3_vl(tmp_path_factory.mktemp("qwen") / "qwen-tiny")


def write_clip(folder: Path, frames: int, size: tuple[int, int] = (48, 64), seed: int = 0) -> Path:
    """An image folder with smooth moving colours, different for every seed."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    wave, phase = rng.uniform(0.05, 0.2, (3, 2)), rng.uniform(0, 6, 3)
    y, x = np.mgrid[: size[0], : size[1]]
    for f in range(frames):
        rgb = [np.sin(wave[c, 0] * y + wave[c, 1] * x + phase[c] + 0.3 * f) for c in range(3)]
        Image.fromarray((127.5 + 127.5 * np.stack(rgb, -1)).astype(np.uint8)).save(folder / f"{f:03d}.png")
    return folder


@pytest.fixture(scope="session")
def make_clip():
    return write_clip


@pytest.fixture(scope="session")
def clips_path(tmp_path_factory) -> Path:
    """Five clips of 9 frames, 48 x 64 pixels."""
    root = tmp_path_factory.mktemp("clips")
    for i in range(5):
        write_clip(root / f"clip{i}", frames=9, seed=i)
    return root
