"""Compiled blocks: the same features up to rounding, one program per shape, found again on disk, and told apart.

Programs are made without vector instructions here, which takes a fifth of the time; EVERY_FAMILY=1 takes minutes.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from families import features, make_clip
from tiny.encoders import build_encoder
from tiny_models import MODELS
from torch import nn

from spatialprobe.engine import extract as pipeline
from spatialprobe.engine.cli import main
from spatialprobe.engine.device import compiled
from spatialprobe.engine.device.blocks import set_up_blocks
from spatialprobe.engine.device.compiled import CompileTimes, check_compile, check_thread, full_batch, new_pass
from spatialprobe.engine.job import Job
from spatialprobe.engine.live import live
from spatialprobe.engine.pipeline.timing import Clock
from spatialprobe.engine.resolve import resolve
from spatialprobe.engine.run import job_clips, load, run_job
from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.types import FeatureSpec, Refused

TOWERS = "qwen2_5_vl qwen3_vl qwen3_vl_moe qwen3_5 internvl llava_onevision glm4v gemma3".split()  # with tap=vision
if os.environ.get("EVERY_FAMILY") == "1":
    FAMILIES = [(name, "usual") for name in MODELS] + [(name, "vision") for name in TOWERS]
else:
    FAMILIES = [("ltx", "usual"), ("qwen3_vl", "usual"), ("clip", "usual"), ("qwen2_5_vl", "vision")]
BOUND = 2e-6  # relative L2 per block in float32
BOUNDS = {"qwen3_5": 1e-4}  # a recurrence over tokens, which carries its rounding on


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(autouse=True)
def quick(monkeypatch, programs):
    monkeypatch.setattr(compiled, "_asked_for", str(programs))
    monkeypatch.setenv(compiled.VARIABLE, str(programs))
    torch._dynamo.reset()
    with torch._inductor.config.patch({"cpp.simdlen": 1}):
        yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def clip_path(tmp_path_factory):
    return build_encoder(tmp_path_factory.mktemp("clip") / "clip-tiny", "clip")


def job(clips, model, out, **words) -> Job:
    given = {"clips": str(clips), "model": str(model), "out": str(out), "layers": [0, 2], "window": 8, "device": "cpu"}
    return Job.from_words(given | {"query": "0,3"} | words)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize(("name", "tap"), FAMILIES)
def test_compiled_blocks_have_the_features_of_eager_ones(name, tap, tmp_path):
    """All blocks of a kind share a program; the first may see its input laid out otherwise, and so have its own."""
    tiny = MODELS[name]
    if tap == "vision":
        tiny = replace(tiny, options=tiny.options | {"tap": "vision"})
    adapter, clip = tiny.load(tmp_path), make_clip(tiny.frames)
    layers = range(len(adapter.blocks))
    eager = features(adapter, clip, layers, query=tiny.query, step=tiny.step)
    set_up_blocks(adapter.blocks, compile="blocks")
    times = CompileTimes("blocks")
    got = features(adapter, clip, layers, query=tiny.query, step=tiny.step)
    times.stop()
    assert 1 <= times.programs <= 3
    worst = max(relative(got[layer], eager[layer]) for layer in layers)
    assert 0 < worst < BOUNDS.get(name, BOUND)
    again = CompileTimes("blocks")
    same = features(adapter, clip, layers, query=tiny.query, step=tiny.step)
    again.stop()
    assert again.programs == 0
    assert all(torch.equal(same[layer], got[layer]) for layer in layers)


def test_a_run_with_compile(clips_path, clip_path, tmp_path, capsys):
    """Its store is its own, near the eager one; what compiling took is told apart; the same bits from disk later."""
    _, eager = run_job(job(clips_path, clip_path, tmp_path / "eager"))
    words = ["extract", str(clips_path), "--model", str(clip_path), "--layers", "0,2", "--window", "8"]
    words += ["--query", "0,3", "--device", "cpu", "--out", str(tmp_path / "compiled")]
    assert main([*words, "--compile"]) == 0
    assert "compiled 1 programs in" in capsys.readouterr().out
    store = FeatureStore.open(tmp_path / "compiled")
    assert (store.spec.compile, eager.spec.compile) == ("blocks", "none")
    for clip_id in eager.ids():
        for layer in (0, 2):
            assert relative(store.read(clip_id, layer).data, eager.read(clip_id, layer).data) < 2**-11
    first = json.loads((store.root / "run.json").read_text())["timing"]
    assert first["compile"]["programs"] == 1
    assert first["compile"]["recompiled"] == first["compile"]["from_cache"] == 0
    assert first["stages"]["compile"]["seconds"] == pytest.approx(first["compile"]["seconds"], abs=1e-3)
    assert 0 < first["stages"]["blocks"]["seconds"] < first["stages"]["compile"]["seconds"]

    assert main(words) == 2
    assert 'compile: "blocks" there, "none" asked' in capsys.readouterr().err
    before = {clip_id: store.path(clip_id).read_bytes() for clip_id in store.ids()}
    for clip_id in ("clip1", "clip4"):
        store.path(clip_id).unlink()
    torch._dynamo.reset()  # as in a new process, which has the disk alone
    assert main([*words, "--compile", "blocks"]) == 0
    assert {clip_id: store.path(clip_id).read_bytes() for clip_id in store.ids()} == before
    second = json.loads((store.root / "run.json").read_text())["timing"]
    assert second["compile"]["from_cache"] == second["compile"]["programs"] == 1
    assert second["compile"]["seconds"] < first["compile"]["seconds"]


def test_a_batch_that_is_not_full_has_no_program_of_its_own(clips_path, clip_path, tmp_path):
    """Five clips in batches of two: the last is filled with a repeat, which goes nowhere."""
    asked = job(clips_path, clip_path, tmp_path / "s", compile="blocks")
    resolved = resolve(asked)
    load(resolved, tmp_path / "cache")
    store, refs = FeatureStore.create(asked.out, resolved.spec), job_clips(asked)
    report = pipeline.extract(refs, resolved.adapter, store, batch_size=2)
    assert (report.written, report.timing["compile"]["programs"]) == (5, 1)
    assert store.ids() == [f"clip{i}" for i in range(5)]
    assert store.provenance("clip4")["batch"] == 2
    _, eager = run_job(job(clips_path, clip_path, tmp_path / "eager"))
    for clip_id in eager.ids():
        assert relative(store.read(clip_id, 2).data, eager.read(clip_id, 2).data) < 2**-11
    assert full_batch(["a", "b"], 4, "blocks") == ["a", "b", "b", "b"]
    assert full_batch(["a", "b"], 4, "none") == ["a", "b"]


def test_graphs_are_refused_in_a_thread_that_torch_has_none_for(monkeypatch):
    """Torch 2.11 looks for them where the first thread put them, and a second `live` would not start."""
    from torch._inductor import cudagraph_trees

    monkeypatch.setattr(cudagraph_trees, "_initialize_tls", None, raising=False)
    check_thread("graphs")
    monkeypatch.delattr(cudagraph_trees, "_initialize_tls")
    check_thread("blocks")
    spec = FeatureSpec("clip", "content:0", (0,), compile="graphs")
    with pytest.raises(ValueError, match=r"compile graphs cannot be had live with torch .*: take compile blocks"):
        with live([], None, spec):
            pass


class Attention(nn.Module):
    def forward(self, q):
        return F.scaled_dot_product_attention(q, q, q)


@torch.inference_mode()
def test_programs_of_other_attention_are_not_taken_for_each_other():
    """Neither in the process nor on disk, where nothing but the choice inside tells them apart."""
    q = torch.randn(1, 2, 96, 16, generator=torch.Generator().manual_seed(0))

    def attend(name, compile):
        block = Attention()
        set_up_blocks([block], attention=name, compile=compile)
        return block(q)

    flash, math = (attend(name, "none") for name in ("flash", "math"))
    assert not torch.equal(flash, math)
    for order in (("math", "flash"), ("flash", "math")):
        found = {name: attend(name, "blocks") for name in order}
        assert torch.equal(found["flash"], flash)
        assert not torch.equal(found["math"], flash)
        assert relative(found["math"], math) < 1e-6
        torch._dynamo.reset()


@pytest.mark.gpu
@torch.inference_mode()
def test_cuda_graphs_give_what_eager_blocks_give():
    """Twice through the blocks, whose outputs are kept to the end of a pass, as taps keep them."""
    blocks = [nn.Linear(64, 64, device="cuda") for _ in range(3)]
    inputs, eager, found = torch.randn(4, 8, 64, device="cuda"), [], []
    for x in inputs:
        for block in blocks:
            x = block(x)
            eager.append(x)
    set_up_blocks(blocks, compile="graphs")
    for x in inputs:
        new_pass("graphs")
        kept = []
        for block in blocks:
            x = block(x)
            kept.append(x)
        found += [x.clone() for x in kept]
    for a, b in zip(found, eager, strict=True):
        assert relative(a, b) < 1e-3  # of products that may be TF32


def test_a_block_that_cannot_be_compiled_is_refused():
    class Counting(nn.Module):
        def forward(self, x):
            return x * x.sum().item() if float(x.mean()) > 0 else x

    block = Counting()
    set_up_blocks([block], compile="blocks")
    with pytest.raises(Refused, match=r"Counting cannot be compiled: .*; run it without --compile"):
        block(torch.ones(3))


def test_hooks_stay_outside(programs):
    """A hook may do what cannot be compiled, and one added later compiles nothing again."""
    block, seen = nn.Linear(4, 4), []
    set_up_blocks([block], compile="blocks")
    x, times = torch.ones(2, 4), CompileTimes("blocks")
    with torch.inference_mode():
        block(x)
        block.register_forward_hook(lambda module, args, out: seen.append(out.sum().item()))
        out = block(x)
    times.stop()
    assert times.programs == 1
    assert seen == [out.sum().item()]


@pytest.mark.parametrize(
    ("mode", "device", "offload", "message"),
    [
        ("all", "cpu", "none", "compile must be one of none, blocks, graphs, got 'all'"),
        ("graphs", "cpu", "none", "compile graphs records CUDA graphs: it needs a CUDA device, got cpu"),
        ("blocks", "cuda", "host", "compile blocks needs blocks that stay on one device, got offload host"),
    ],
)
def test_what_cannot_be_had(mode, device, offload, message):
    with pytest.raises(ValueError, match=message):
        check_compile(mode, torch.device(device), offload)


def test_a_job_says_so_before_it_begins(clips_path, clip_path, tmp_path):
    with pytest.raises(ValueError, match="it needs a CUDA device, got cpu"):
        resolve(job(clips_path, clip_path, tmp_path / "s", compile="graphs"))
    assert not (tmp_path / "s").exists()


def test_where_programs_lie(monkeypatch, tmp_path):
    """In the user's cache or where TORCHINDUCTOR_CACHE_DIR says, apart for machines of other kinds; in no store."""
    monkeypatch.setattr(compiled, "_asked_for", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = compiled.use_cache()
    assert folder.parent == tmp_path / "spatialprobe" / "inductor"
    assert os.environ[compiled.VARIABLE] == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(compiled, "_asked_for", str(tmp_path / "mine"))
    assert compiled.use_cache() == tmp_path / "mine" / folder.name
    monkeypatch.setattr(compiled.platform, "machine", lambda: "another")
    assert compiled.use_cache() != tmp_path / "mine" / folder.name
    monkeypatch.setattr(compiled, "_asked_for", None)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert compiled.use_cache().parent == tmp_path / "home" / ".cache" / "spatialprobe" / "inductor"


def test_nothing_is_counted_without_compile():
    clock, times = Clock(torch.device("cpu")), CompileTimes("none")
    times.stop()
    told = times.told_apart(clock)
    assert "compile" not in told
    assert "compile" not in told["stages"]
