"""Where frames are resized changes nothing that is stored."""

import pytest
import torch
from tiny.encoders import build_encoder

from spatialprobe.engine.clips import images
from spatialprobe.engine.demo.tiny.cogvideox import build_cogvideox
from spatialprobe.engine.job import Job
from spatialprobe.engine.pipeline.feeding import Feeder, stage
from spatialprobe.engine.pipeline.timing import Clock
from spatialprobe.engine.resolve import resolve
from spatialprobe.engine.run import run_job
from spatialprobe.engine.types import Clip

CPU = torch.device("cpu")


def job(clips, model, out, **words) -> Job:
    asked = {"clips": str(clips), "model": str(model), "out": str(out), "layers": [1], "window": 9, "query": ":"}
    return Job.from_words(asked | words)


@pytest.fixture
def device_path(monkeypatch):
    """Frames are resized as on a device, though there is none; says how often."""
    calls = []
    by_device = images.resize_on_device
    monkeypatch.setattr(images, "on_host", lambda frames: False)
    monkeypatch.setattr(images, "resize_on_device", lambda x, *args: calls.append(len(x)) or by_device(x, *args))
    return calls


@pytest.mark.parametrize("family", ["wan", "cogvideox", "clip"])
def test_stores_are_the_same_bytes(family, wan_path, clips_path, tmp_path, monkeypatch, device_path):
    video = {"steps": [749], "options": {"size": "64x96"}}
    words = {"wan": video, "cogvideox": {**video, "options": {"size": "64x96", "half_frames": 9}}, "clip": {}}[family]
    model = wan_path if family == "wan" else tmp_path / "model"
    if family == "cogvideox":
        build_cogvideox(model)
    if family == "clip":
        build_encoder(model, "clip")
    _, on_device = run_job(job(clips_path, model, tmp_path / "device", resize="device", **words))
    assert len(device_path) >= 5
    monkeypatch.undo()
    report, on_host = run_job(job(clips_path, model, tmp_path / "host", resize="host", **words))
    assert report.written == 5
    for clip_id in on_host.ids():
        assert on_device.path(clip_id).read_bytes() == on_host.path(clip_id).read_bytes()


def test_a_processor_of_its_own_cannot_run_on_the_device(qwen_path, wan_path, clips_path, tmp_path):
    with pytest.raises(ValueError, match="resize must be host or auto for a Qwen3VL: its own processor resizes"):
        resolve(job(clips_path, qwen_path, tmp_path / "store", resize="device"))
    with pytest.raises(ValueError, match="resize must be one of auto, host, device, got 'gpu'"):
        resolve(job(clips_path, wan_path, tmp_path / "store", resize="gpu", steps=[749]))


def test_auto_relieves_loaders_that_are_waited_for_and_sends_fewer_bytes(wan_path, clips_path, tmp_path):
    adapter = resolve(job(clips_path, wan_path, tmp_path, steps=[749], options={"size": "64x96"})).adapter
    adapter.device = CPU
    plan = adapter.plan(9, tuple(range(9)))
    small, large = (
        Clip("clip", torch.zeros(9, 3, *size, dtype=torch.uint8), torch.arange(9)) for size in ((64, 96), (65, 96))
    )
    clock = Clock(CPU)
    feeder = Feeder(adapter, clock)
    assert not feeder._on_device(small, plan)  # on the CPU there is nothing to gain
    feeder.device = torch.device("cuda")
    assert feeder._on_device(small, plan)
    assert not feeder._on_device(large, plan)
    clock.started -= 100
    clock.add("wait for loaders", seconds=9)
    assert not feeder._on_device(large, plan)
    clock.add("wait for loaders", seconds=9)
    assert feeder._on_device(large, plan)
    adapter.PREPARES_ON_DEVICE = False
    assert not feeder._on_device(small, plan)


def test_one_clip_is_not_copied_on_the_cpu():
    x, y = torch.arange(6.0), torch.arange(6.0, 12.0)
    assert stage([x], CPU).data_ptr() == x.data_ptr()
    assert stage([x, y], CPU).tolist() == [x.tolist(), y.tolist()]
