"""Offloaded models give the same numbers; models that cannot fit are refused before anything is read."""

import pytest
import torch
from families import CPU, features, make_adapter, make_clip

from spatialprobe.engine.adapters.qwen3_vl import Qwen3VL
from spatialprobe.engine.adapters.wan import Wan
from spatialprobe.engine.cli import main
from spatialprobe.engine.device import placement
from spatialprobe.engine.device.placement import check_fits, place, spread
from spatialprobe.engine.job import Job
from spatialprobe.engine.resolve import device_of
from spatialprobe.engine.run import run_job


@pytest.mark.parametrize(("cls", "fixture", "step"), [(Wan, "wan_path", 749), (Qwen3VL, "qwen_path", None)])
def test_blocks_in_host_memory_change_no_value_and_are_not_kept_on_the_device(cls, fixture, step, tmp_path, request):
    made = [make_adapter(cls, request.getfixturevalue(fixture), size=(64, 96)) for _ in range(2)]
    for adapter in made:
        adapter.load(3, CPU, torch.float32, tmp_path)
    place(made[1], CPU, "host")
    blocks = made[1].blocks
    assert all(p.is_meta for block in blocks for p in block.parameters())
    whole, offloaded = (features(adapter, make_clip(), (0, 2), query=(0, 4), step=step) for adapter in made)
    for layer in (0, 2):
        assert torch.equal(whole[layer], offloaded[layer])
    assert all(p.is_meta for block in blocks for p in block.parameters())  # and again after they ran


def test_a_gpu_goes_by_its_number(monkeypatch):
    """`torch.cuda.set_device` takes no device without one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [device_of(name).index for name in (None, "cuda", "cuda:1")] == [0, 0, 1]
    assert device_of("cpu") == CPU


def test_offload_is_part_of_what_a_store_holds(clips_path, wan_path, tmp_path):
    words = {"clips": str(clips_path), "model": str(wan_path), "layers": [1], "window": 9, "limit": 2}
    words |= {"options": {"size": "64x96"}}
    stores = [
        run_job(Job.from_words(words | {"out": str(tmp_path / how), "offload": how}))[1] for how in ("none", "host")
    ]
    assert [store.spec.offload for store in stores] == ["none", "host"]
    a, b = (store.read("clip1", 1, 749).data for store in stores)
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("blocks", "free", "expected"),
    [
        (4, [1, 1], [0, 0, 1, 1]),
        (5, [3, 1, 1], [0, 0, 0, 1, 2]),
        (3, [0, 5], [1, 1, 1]),
        (2, [1, 1, 1], [0, 2]),
    ],
)
def test_blocks_are_spread_by_free_memory(blocks, free, expected):
    assert spread(blocks, free) == expected


def test_a_model_that_cannot_fit_says_what_would(wan_path, tmp_path, monkeypatch, clips_path, capsys):
    wan = make_adapter(Wan, wan_path, size=(64, 96))
    one, two = (wan.weight_bytes(depth, torch.float32) for depth in (1, 2))
    before, block = 2 * one - two, two - one
    for depth in (1, 4):
        assert wan.weight_bytes(depth, torch.float32) == before + depth * block
    monkeypatch.setattr(placement, "free_bytes", lambda device: before + 2 * block)
    check_fits(wan, 2, torch.float32, CPU, "none")
    with pytest.raises(ValueError, match=r"3 blocks need .* GB .* free: 2 would fit \(layers up to 1\)"):
        check_fits(wan, 3, torch.float32, CPU, "none")
    monkeypatch.setattr(placement, "free_bytes", lambda device: before)
    with pytest.raises(ValueError, match="not one would fit"):
        check_fits(wan, 1, torch.float32, CPU, "none")
    monkeypatch.setattr(Wan, "load", lambda *a: pytest.fail("weights were read"))
    words = ["extract", str(clips_path), "--model", str(wan_path), "--layers", "1", "--window", "9", "--size", "64x96"]
    assert main([*words, "--out", str(tmp_path / "store")]) == 2
    assert "not one would fit" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_blocks_that_host_memory_cannot_hold_are_refused(wan_path, monkeypatch):
    wan = make_adapter(Wan, wan_path, size=(64, 96))
    one, two = (wan.weight_bytes(depth, torch.float32) for depth in (1, 2))
    gpu, free = torch.device("cuda"), {"cuda": one, "cpu": 2 * (two - one)}
    monkeypatch.setattr(placement, "free_bytes", lambda device: free[device.type])
    check_fits(wan, 2, torch.float32, gpu, "host")  # of which the GPU holds one at a time
    with pytest.raises(ValueError, match=r"3 blocks need 0\.0 GB of host memory: 2 blocks would fit"):
        check_fits(wan, 3, torch.float32, gpu, "host")
    free["cuda"] = one - 1
    with pytest.raises(ValueError, match="not one would fit"):
        check_fits(wan, 2, torch.float32, gpu, "host")


@pytest.mark.parametrize(
    ("how", "message"), [("disk", "offload must be one of none, host, spread"), ("spread", "needs CUDA devices")]
)
def test_bad_offload(how, message, clips_path, wan_path, tmp_path):
    words = {"clips": str(clips_path), "model": str(wan_path), "layers": [1], "out": str(tmp_path), "offload": how}
    with pytest.raises(ValueError, match=message):
        run_job(Job.from_words(words))
