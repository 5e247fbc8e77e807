"""What is asked of CUDA where there is none: streams of the right device, products as they may lie, untouched GPUs."""

import pytest
import torch
from probe_data import CHANNELS
from torch import nn

from spatialprobe.engine.device.precision import Fp8Linear
from spatialprobe.engine.pipeline.timing import Clock
from spatialprobe.probes.probe import Probe
from spatialprobe.probes.tasks.instance import INSTANCE


def test_stages_are_timed_on_the_clocks_device_whatever_the_current_one_is(monkeypatch):
    class Event:
        def __init__(self, enable_timing):
            self.timed, self.on = enable_timing, None

        def record(self, stream="the current device's"):
            self.on = stream

        def synchronize(self):
            assert self.on == "stream of cuda:1"

        def elapsed_time(self, end):
            assert self.timed
            assert self.on == end.on == "stream of cuda:1"
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"stream of {device or 'cuda:0'}")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    clock = Clock(torch.device("cuda:1"))
    with clock.on_device("blocks"):
        pass
    assert clock.summary()["stages"]["blocks"]["seconds"] == 0.25


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tokens", [1, 33])
def test_fp8_products_are_laid_out_as_a_gpu_takes_them(tokens, transposed):
    """torch checks on tensors without memory what it checks on a GPU; other rows would be refused there."""
    layer = Fp8Linear(nn.Linear(64, 32, dtype=torch.bfloat16, device="meta"))
    shape = (1, 64, tokens) if transposed else (1, tokens, 64)
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    with torch.inference_mode():
        out = layer(x.mT if transposed else x)
    assert (out.shape, out.dtype) == ((1, tokens, 32), torch.bfloat16)


def test_a_probes_first_weights_touch_no_gpu(monkeypatch):
    """Each GPU's generator that is read wakes that GPU, and takes half a gigabyte of it."""
    config = INSTANCE.defaults.with_settings(embed=16, heads=2, depth=1, dims=8, seed=5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        weight = nn.Linear(CHANNELS, 16).weight
    for name in ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: pytest.fail("a GPU was asked for"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    before = torch.get_rng_state()
    assert torch.equal(Probe(INSTANCE, config, CHANNELS, None).input.weight, weight)
    assert torch.equal(torch.get_rng_state(), before)
