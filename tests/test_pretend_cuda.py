"""The code that runs on CUDA, on a pretended device: nothing meets what lies elsewhere, and values are the CPU's."""

from importlib.metadata import version

import families
import pretend_cuda
import pytest
import torch
from pretend_cuda import CUDA, OnCuda, pretended_cuda
from probe_data import SAMPLING, write_labels, write_store
from tiny_models import MODELS

from spatialprobe.engine.checkpoint import Checkpoint
from spatialprobe.engine.device import placement
from spatialprobe.engine.device.placement import place
from spatialprobe.engine.device.tap import Taps
from spatialprobe.engine.extract import batch_noise
from spatialprobe.engine.job import Job
from spatialprobe.engine.pipeline.feeding import Fed, Feeder
from spatialprobe.engine.pipeline.timing import Clock
from spatialprobe.engine.presets import adapter_class, detect_family
from spatialprobe.engine.run import run_job
from spatialprobe.probes.loop import evaluate, train
from spatialprobe.probes.tasks.instance import INSTANCE
from spatialprobe.probes.tasks.tagging import TAGGING

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one")


def test_the_pretence_refuses_what_a_gpu_refuses():
    with pretended_cuda():
        x, y = torch.ones(3, device="cuda"), torch.arange(3.0)
        assert isinstance(x, OnCuda)
        assert (x.device, (x + 1).device, x.to("cpu").device.type) == (CUDA, CUDA, "cpu")
        assert (x * 2 + torch.tensor(1.0)).tolist() == [3, 3, 3]  # a number may come from anywhere
        assert x[torch.tensor([True, False, True])].tolist() == [1, 1]
        x[1] = 5.0
        assert x.tolist() == [1, 5, 1]
        with pytest.raises(RuntimeError, match="same device"):
            x + y
        with pytest.raises(RuntimeError, match="same device"):
            torch.cat([x, y])
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(3, generator=torch.Generator(), device="cuda")
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        assert not pretend_cuda.unpinned
        y.to("cuda", non_blocking=True)
        assert len(pretend_cuda.unpinned) == 1
        torch.empty(3, pin_memory=True).copy_(x, non_blocking=True)
        assert len(pretend_cuda.unpinned) == 1


@torch.inference_mode()
def features(tiny, root, device, offload="none") -> dict[int, torch.Tensor]:
    """Two clips as one batch, fed as `extract` feeds them; frames are resized on the device if they are small."""
    path, options = root / "model", dict(tiny.options)
    if tiny.base is not None:
        options["base"] = str(root / "base")
    family = tiny.family or detect_family(Checkpoint.open(str(path)))
    adapter = families.make_adapter(adapter_class(family), path, **options)
    adapter.steps = () if tiny.step is None else (tiny.step,)
    if offload == "none":
        adapter.load(adapter.num_layers, device, torch.float32, root / "cache")
    else:
        adapter.load(adapter.num_layers, torch.device("cpu"), torch.float32, root / "cache")
        place(adapter, device, offload)
    plan = adapter.plan(tiny.frames, tiny.query or tuple(range(tiny.frames)))
    feeder, feds = Feeder(adapter, Clock(device)), [Fed(), Fed()]
    for seed, fed in enumerate(feds):
        feeder.take(fed, families.shown(families.make_clip(tiny.frames, seed=seed), plan), plan)
    state, out = feeder.state(feds, plan, lambda x: x), {}
    noise = batch_noise(["a", "b"], adapter.noise_shape(plan), 0, tiny.step, device)
    taps = Taps(adapter.blocks, tuple(range(adapter.num_layers)))
    with taps.into(lambda layer, x: out.__setitem__(layer, adapter.grid(x.to(device), state, plan)), plan.passes):
        adapter.forward(state, tiny.step, noise)
    assert {x.device.type for x in out.values()} == {device.type}
    return {layer: x.cpu() for layer, x in out.items()}


@pytest.mark.parametrize("name", MODELS)
def test_every_familys_features_are_the_cpus(name, tmp_path):
    tiny = MODELS[name]
    tiny.build(tmp_path / "model")
    if tiny.base is not None:
        tiny.base.build(tmp_path / "base")
    expected = features(tiny, tmp_path, torch.device("cpu"))
    with pretended_cuda():
        got = features(tiny, tmp_path, CUDA)
    assert not pretend_cuda.unpinned
    for layer, x in expected.items():
        assert torch.equal(got[layer], x), f"layer {layer}"


@pytest.mark.parametrize("name", MODELS)
def test_blocks_may_lie_on_two_devices(name, tmp_path, monkeypatch):
    """The CPU plays the second GPU: what comes after the blocks finds their output on the first."""
    tiny = MODELS[name]
    tiny.build(tmp_path / "model")
    if tiny.base is not None:
        tiny.base.build(tmp_path / "base")
    expected = features(tiny, tmp_path, torch.device("cpu"))
    monkeypatch.setattr(placement, "every_gpu", lambda: [CUDA, torch.device("cpu")])
    monkeypatch.setattr(placement, "free_bytes", lambda device: 1)
    with pretended_cuda():
        got = features(tiny, tmp_path, CUDA, "spread")
    for layer, x in expected.items():
        assert torch.equal(got[layer], x), f"layer {layer}"


@pytest.mark.parametrize(
    "words",
    [
        {"steps": [749, 900], "merge_steps": True, "latents": True},
        {"offload": "host", "store_dtype": "int8"},
        {"precision": "fp8", "compute_dtype": "bfloat16"},
    ],
    ids=lambda words: next(iter(words)),
)
def test_a_job_fills_its_store(words, clips_path, wan_path, tmp_path):
    if "precision" in words and version("torch").startswith("2.11"):
        pytest.skip("torch 2.11's product of fp8 takes no row scales on a CPU")
    job = {"clips": str(clips_path), "model": str(wan_path), "layers": [1], "window": 9, "limit": 3, "pool": "1x2"}
    job |= {"options": {"size": "32x48"}, "compute_dtype": "float32"} | words
    job |= {"latents": str(tmp_path / "latents")} if "latents" in words else {}
    on_cuda = Job.from_words(job | {"out": str(tmp_path / "cuda"), "device": "cuda:0", "batch": 2})
    with pretended_cuda():
        report, made = run_job(on_cuda)
    assert report.written == 3, report.failures
    assert not pretend_cuda.unpinned
    assert made.provenance("clip0")["gpu"] == "Pretended GPU"
    launches = report.timing.get("launches")
    if "steps" in words:  # four passes; else there are two, and the third is measured
        assert 0 < launches["launch_ms"] <= launches["block_ms"]
    else:
        assert launches is None
    assert made.spec.options["vae_tiling"] is False  # by a plan of memory, and then tried
    if "precision" in words:
        return  # a CPU is refused
    job.pop("latents", None)
    _, expected = run_job(Job.from_words(job | {"out": str(tmp_path / "cpu"), "device": "cpu"}))
    for clip in expected.ids():
        for key in expected.spec.tensors():
            cpu, cuda = (store.read(clip, *key).data.float() for store in (expected, made))
            assert float((cuda - cpu).norm() / cpu.norm()) < 0.01  # in a batch products are summed otherwise


@pytest.mark.skipif(torch.version.cuda is not None, reason="gradients of a torch with CUDA ask its driver")
@pytest.mark.parametrize("task", [TAGGING, INSTANCE], ids=lambda task: task.name)
def test_probes_train_and_are_measured(task, tmp_path):
    labels = write_labels(tmp_path / "labels", clips=8)
    stores = [write_store(tmp_path / "a", labels), write_store(tmp_path / "b", labels, dtype="int8", seed=1)]
    stores = stores if task is TAGGING else stores[1:]
    words = SAMPLING | {"embed": 16, "heads": 2, "depth": 1, "batch": 4, "epochs": 2, "warmup": 0.5, "dropout": 0.0}
    if task is TAGGING:
        words |= {"decoder_width": 16, "decoder_heads": 2, "decoder_layers": 1, "decoder_dropout": 0.0}
    else:
        words |= {"dims": 8, "pixels": 32, "min_cluster_size": 5, "min_samples": 2}
    grid = {"lr": [1e-3, 3e-3]}
    on_cpu = train(task, stores, labels, grid=grid, device="cpu", **words)
    with pretended_cuda():
        found = train(task, stores, labels, grid=grid, out=tmp_path / "run", **words)
        again = train(task, stores, labels, grid=grid, out=tmp_path / "run", **words)  # from its checkpoint
        alone = evaluate(tmp_path / "run/probe-000.safetensors", stores, labels)
    for cpu, cuda, resumed in zip(on_cpu, found, again, strict=True):
        assert cuda.metrics["loss"] == pytest.approx(cpu.metrics["loss"], rel=0.02)  # bfloat16 on one side
        assert resumed.metrics == cuda.metrics
    assert alone == pytest.approx(found[0].metrics)
