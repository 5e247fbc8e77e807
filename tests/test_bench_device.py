"""The GPU benchmark checks itself without one, notices what it checks for, and measures in the order that it will."""

import json
from importlib.metadata import version

import bench_device
import device_flops
import pytest
import random_checkpoint
import torch
from bench_device import COMPILED_BOUND, measure, record, self_check, table, verdicts
from device_subject import MODELS, Subject

TERAFLOPS = {  # at the true sizes: of the VAE or the vision tower, and of a clip at one step
    "wan2.1-t2v-1.3b": (164, 361),
    "wan2.1-t2v-14b": (164, 1040),
    "cogvideox-5b": (149, 315),
    "qwen3-vl-8b": (47, 156),
}


@pytest.mark.parametrize("name", MODELS)
def test_both_contenders_agree_and_work_is_counted_right(tmp_path, name):
    result = self_check(name, tmp_path)
    assert result["difference"] == 0.0
    row = result["rows"]["1 step"]
    assert (row["encode_tflop"], row["tflop"]) == pytest.approx(TERAFLOPS[name], rel=0.01)
    line = next(line for line in table({name: result}).splitlines() if line.startswith(name))
    assert line.count("not measured") == 5


def test_other_weights_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_device, "draw", lambda module, folder: random_checkpoint.draw(module, "x"))
    with pytest.raises(AssertionError, match=r"qwen3-vl-8b: features differ from the plain loop's by \d"):
        self_check("qwen3-vl-8b", tmp_path)


def test_a_wrong_count_is_noticed(tmp_path, monkeypatch):
    right = device_flops.qwen3_vl_vision
    monkeypatch.setattr(device_flops, "qwen3_vl_vision", lambda *sizes: 1.1 * right(*sizes))
    with pytest.raises(AssertionError, match=r"qwen3-vl-8b, flops: .* found, .* wanted within 0\.5%"):
        self_check("qwen3-vl-8b", tmp_path)


def test_what_is_measured_on_a_gpu(tmp_path):
    model = MODELS["wan2.1-t2v-14b"]
    subject = Subject("wan2.1-t2v-14b", model.small, tmp_path / "s", torch.device("cpu"), {"compile": "none"})
    result = measure(subject, tmp_path / "s", 1e12, clips=3, plain_clips=2, resident=1000)
    assert result["difference"] == 0.0
    assert result["difference_bound"] < COMPILED_BOUND
    for row in result["rows"].values():
        mine = row["engine"]["seconds_per_clip"]
        assert 0 < mine <= 3 * row["engine"]["seconds_per_clip_with_first"]
        assert row["ratio"] == pytest.approx(row["plain"]["seconds_per_clip"] / mine)
        assert row["share_of_roofline"] == pytest.approx(row["tflop"] / mine)
        assert {"decode", "encode", "blocks", "write"} <= set(row["engine"]["stages_seconds"])
        row["planned_peak_bytes"] = 4 * row["engine"]["peak_bytes"]
    found = verdicts(model, result["rows"])
    assert list(found) == [*model.targets, "1 step, peak off its plan"]
    assert found["1 step, peak off its plan"] == {"is": 0.75, "wanted": "<= 0.15", "met": False}
    assert found["1 step, peak GB"] == {
        "is": round(result["rows"]["1 step"]["engine"]["peak_bytes"] / 1e9, 3), "wanted": "<= 20.0", "met": True,
    }  # fmt: skip
    shown = table({"wan2.1-t2v-14b": result | {"verdicts": found}})
    assert "not measured" not in shown
    assert shown.count("wanted") == len(found)


def test_bytes_of_text_encoders():
    sizes = {"wan": 11.36e9, "cogvideox": 9.52e9, "qwen3_vl": 0}  # as published, in bfloat16
    assert {family: random_checkpoint.text_encoder_bytes(family) for family in sizes} == pytest.approx(sizes, rel=1e-3)


def test_a_record_keeps_other_models(tmp_path):
    record("a", {"rows": {}}, "NVIDIA H200", tmp_path)
    path = record("b", {"rows": {"1 step": {}}}, "NVIDIA H200", tmp_path)
    assert path.name == "device-nvidia-h200.json"
    models = json.loads(path.read_text())["models"]
    assert {name: one["rows"] for name, one in models.items()} == {"a": {}, "b": {"1 step": {}}}
    assert models["a"]["machine"]["versions"]["torch"] == version("torch")


def test_an_unknown_model_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench_device.arguments(["--models", "wan2.1-t2v-14b,sora"])
    assert "got sora" in capsys.readouterr().err
