"""Attention by name: the kernel that was asked for runs, within a stated bound of the definition, or nothing does."""

from importlib import metadata

import pytest
import torch
import torch.nn.functional as F
from families import CPU, features, make_adapter, make_clip
from torch.nn.attention import sdpa_kernel

from spatialprobe.engine.adapters.wan import Wan
from spatialprobe.engine.cli import main
from spatialprobe.engine.device.attention import BACKENDS, is_there, resolve_attention, with_attention
from spatialprobe.engine.device.blocks import set_up_blocks
from spatialprobe.engine.job import Job
from spatialprobe.engine.resolve import resolve
from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.types import Refused

BOUNDS = {
    torch.float32: 1e-6,
    torch.bfloat16: 5e-3,
    torch.float16: 1e-3,
}  # relative L2, as engine/device/attention.py says
THERE = ["math", "flash"]  # on a CPU


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", [*THERE, "sdpa"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("tokens", "head"), [(1, 16), (61, 64), (300, 128)])
def test_every_kernel_is_within_the_bound_of_the_definition(dtype, name, masked, tokens, head):
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(2, 3, tokens, head, generator=generator).to(dtype) for _ in range(3))
    mask = None
    if masked:
        mask = torch.rand(tokens, tokens, generator=generator) > 0.3
        mask.fill_diagonal_(True)
    run = with_attention(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask), name)
    scores = q.double() @ k.double().mT / head**0.5
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    expected = scores.softmax(-1) @ v.double()
    assert float((run().double() - expected).norm() / expected.norm()) < BOUNDS[dtype]


def test_what_there_is_on_a_cpu():
    assert [name for name in BACKENDS if is_there(name, CPU, torch.float32)] == THERE
    assert resolve_attention("auto", CPU, torch.float32) == resolve_attention("sdpa", CPU, torch.float32) == "sdpa"
    for name in THERE:
        assert resolve_attention(name, CPU, torch.bfloat16) == name
    for name in ("efficient", "cudnn", "flash3", "flash4"):
        message = rf"attention {name} is not there for torch.float32 on cpu; there are auto, sdpa, math, flash"
        with pytest.raises(ValueError, match=message):
            resolve_attention(name, CPU, torch.float32)
    with pytest.raises(ValueError, match=r"attention must be one of auto, sdpa, math, .*, got 'fast'"):
        resolve_attention("fast", CPU, torch.float32)


def test_the_package_that_brings_a_kernel_is_a_field_of_the_spec(clips_path, wan_path, tmp_path, monkeypatch):
    words = {"clips": str(clips_path), "model": str(wan_path), "out": str(tmp_path / "s"), "layers": [0]}
    plain = resolve(Job.from_words(words)).spec.versions
    there = {"flash_attn_interface": ["pytest", "pytest"]}  # stands for the kernels' distribution
    monkeypatch.setattr(metadata, "packages_distributions", lambda: there)
    for name, added in (
        ("math", {}),
        ("flash3", {"pytest": metadata.version("pytest")}),
        ("flash4", {"flash_attn": "unknown"}),  # copied into place, without a word of what it is
    ):
        monkeypatch.setattr("spatialprobe.engine.resolve.resolve_attention", lambda *asked, name=name: name)
        assert resolve(Job.from_words(words)).spec.versions == plain | added


def wan_features(path, cache, name, monkeypatch):
    """Two blocks' features, and which kernels (torch's numbers) ran outside and inside of the blocks."""
    adapter = make_adapter(Wan, path, size=(64, 96))
    adapter.load(2, CPU, torch.float32, cache)
    set_up_blocks(adapter.blocks, attention=name)
    inside, kernels = [], {False: set(), True: set()}
    for block in adapter.blocks:
        block.register_forward_pre_hook(lambda *args: inside.append(1))
        block.register_forward_hook(lambda *args: inside.clear())
    native = F.scaled_dot_product_attention

    def attention(query, key, value, **kwargs):
        kernels[bool(inside)].add(torch._fused_sdp_choice(query, key, value, **kwargs))
        return native(query, key, value, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attention)
        return features(adapter, make_clip(9), (0, 1), step=749), kernels


def test_the_named_kernel_runs_in_the_blocks_and_only_there(wan_path, tmp_path, monkeypatch):
    found = {name: wan_features(wan_path, tmp_path, name, monkeypatch) for name in ("sdpa", "flash", "math")}
    numbers = {name: {BACKENDS[name].value} for name in THERE}
    own = found["sdpa"][1][False]  # of the VAE
    assert own
    for name, (_, kernels) in found.items():
        assert kernels == {False: own, True: numbers["flash" if name == "sdpa" else name]}, name
    math, flash, auto = (found[name][0][1] for name in ("math", "flash", "sdpa"))
    assert torch.equal(auto, flash)
    assert not torch.equal(math, flash)
    torch.testing.assert_close(math, flash, rtol=1e-4, atol=1e-5 * float(flash.abs().max()))


@pytest.mark.filterwarnings("ignore:Flash attention")
def test_a_kernel_that_cannot_do_a_call_is_refused():
    class Block(torch.nn.Module):
        def forward(self, q):
            return F.scaled_dot_product_attention(q, q, q[..., :8])  # the CPU's flash kernel wants equal widths

    q = torch.randn(1, 1, 4, 16)
    for name, works in (("math", True), ("flash", False)):
        block = Block()
        set_up_blocks([block], attention=name)
        if works:
            with sdpa_kernel(BACKENDS["math"]):
                assert torch.equal(block(q), Block()(q))
        else:
            with pytest.raises(
                Refused, match="attention flash cannot do what Block asks for, such as a mask; try auto"
            ):
                block(q)


def test_other_errors_stay_what_they_are():
    class Block(torch.nn.Module):
        def forward(self, q):
            return q @ torch.zeros(3, 3)

    block = Block()
    set_up_blocks([block], attention="math")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as error:
        block(torch.zeros(2, 2))
    assert type(error.value) is RuntimeError


def test_the_spec_has_what_ran(clips_path, wan_path, tmp_path, capsys):
    words = {"clips": str(clips_path), "model": str(wan_path), "out": str(tmp_path / "s"), "layers": [0]}
    assert resolve(Job.from_words(words)).spec.attention == "sdpa"
    command = ["extract", str(clips_path), "--model", str(wan_path), "--layers", "0", "--window", "9", "--limit", "1"]
    command += ["--size", "64x96", "--device", "cpu"]
    stores = {}
    for name in ("auto", "math"):
        assert main([*command, "--attention", name, "--out", str(tmp_path / name)]) == 0
        stores[name] = FeatureStore.open(tmp_path / name)
    assert [store.spec.attention for store in stores.values()] == ["sdpa", "math"]
    capsys.readouterr()
    assert main([*command, "--attention", "math", "--out", str(tmp_path / "auto")]) == 2
    assert 'attention: "sdpa" there, "math" asked' in capsys.readouterr().err
    assert main([*command, "--attention", "flash3", "--out", str(tmp_path / "other")]) == 2
    assert "attention flash3 is not there for torch.float32 on cpu; there are auto, sdpa, math, flash" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "other").exists()
