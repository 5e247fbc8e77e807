"""fp8 layers: rounding, scales and sums against float64, and where fp8 is refused."""

import pytest
import torch
from families import CPU, features, make_adapter, make_clip
from torch import nn

from spatialprobe.engine.adapters.wan import Wan
from spatialprobe.engine.device.blocks import set_up_blocks
from spatialprobe.engine.device.live_bytes import LiveBytes
from spatialprobe.engine.device.precision import (
    FP8_MAX,
    Fp8Linear,
    check_precision,
    fp8_linear,
    quantise_linears,
    quantise_rows,
)
from spatialprobe.engine.job import Job
from spatialprobe.engine.resolve import resolve

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
NO_ROW_SCALES = pytest.mark.skipif(TORCH < (2, 12), reason="torch 2.11's product of fp8 takes no row scales on a CPU")
SHAPES = [(1, 16, 16), (7, 48, 32), (33, 160, 80)]  # tokens, K, N


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def nearest_fp8(x: torch.Tensor) -> torch.Tensor:
    """float64 -> the nearest of all 253 finite values of float8_e4m3fn, the even one of two as near."""
    codes = torch.arange(256, dtype=torch.uint8)
    grid = codes.view(torch.float8_e4m3fn).double()
    keep = grid.isfinite() & ~((grid == 0) & (codes == 128))  # without minus zero
    grid, order = grid[keep].sort()
    even = (codes[keep][order] % 2 == 0).double()
    distance = (x[..., None] - grid).abs() - 1e-18 * even
    return grid[distance.argmin(-1)]


@pytest.mark.parametrize("spread", [1e-6, 1.0, 1e5])
def test_rows_are_rounded_to_the_nearest_at_their_own_scale(spread):
    x = drawn(9, 64) * spread * torch.logspace(-3, 3, 9)[:, None]
    q, scale = quantise_rows(x)
    torch.testing.assert_close(scale[:, 0].double(), x.double().abs().amax(1) / 448, rtol=1e-6, atol=0)
    # at the scale as it was rounded to float32, in the division as it is made there
    assert torch.equal(q.double(), nearest_fp8((x / scale).clamp(-448, 448).double()))
    assert (q.float().abs().amax(1) == FP8_MAX).all()
    error = (q.double() * scale.double() - x.double()).abs()
    assert (error <= torch.maximum(x.double().abs() / 16, scale.double() / 1024) * (1 + 1e-6)).all()


def test_rows_of_zeros_and_what_is_not_finite():
    x = torch.zeros(3, 16)
    x[1, 3], x[2, 5] = float("inf"), float("nan")
    q, scale = quantise_rows(x)
    assert (q[0].float() * scale[0]).eq(0).all()
    weight = drawn(16, 16)
    out = fp8_linear(x, weight)
    assert out[0].eq(0).all()
    assert out[1:].isnan().all()  # never a number that looks like a feature


@pytest.mark.parametrize(("tokens", "k", "n"), SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_the_definition_against_float64(tokens, k, n, bias):
    """Sums of K products in float32 are off by at most K float32 spacings of the sum of magnitudes."""
    x, weight, b = drawn(tokens, k), drawn(n, k, seed=1), drawn(n, seed=2) if bias else None
    (xq, xs), (wq, ws) = quantise_rows(x), quantise_rows(weight)
    products = (xq.double() * xs)[:, None] * (wq.double() * ws)[None]  # [M, N, K]
    expected = products.sum(-1) + (b.double() if bias else 0)
    bound = (k + 3) * 2**-24 * (products.abs().sum(-1) + (b.double().abs() if bias else 0))
    assert ((fp8_linear(x, weight, b).double() - expected).abs() <= bound).all()
    # and it is the layer: two roundings of 1/16 at most, of random sign
    exact = x.double() @ weight.double().T + (b.double() if bias else 0)
    assert 1e-3 < float((expected - exact).norm() / exact.norm()) < 0.06


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rounding_makes_one_float32_copy_and_the_bits_of_the_written_out_formula(dtype):
    x = drawn(33, 64) * torch.logspace(-30, 4, 33)[:, None]  # to subnormal rows
    x[3], x[4, 7], x[5, 0], x[6, 2] = 0.0, float("nan"), float("-inf"), -0.0
    x = x.to(dtype)
    wide = x.float()
    scale = (wide.abs().amax(-1, keepdim=True) / FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    got, got_scale = quantise_rows(x)
    exactly = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(got_scale, scale, **exactly)
    expected = (wide / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    torch.testing.assert_close(got.float(), expected.float(), **exactly)
    if x.itemsize < 4:
        large, peaks = torch.empty(1000, 512, dtype=dtype, device="meta"), {}
        with LiveBytes() as count:
            count.see(large)
            with count.phase(peaks, "round"):
                quantise_rows(large)
        assert peaks["round"] <= large.nbytes + 5 * large.numel() + 5 * 4 * 1000  # a float32 copy, fp8, a few scales


def test_sums_are_float32():
    """256 products of 1 after one of 2**16: fewer than 24 bits would lose them."""
    x, weight = torch.ones(1, 272), torch.ones(16, 272)
    x[0, :16], weight[:, :16] = 448.0, 448.0
    q, scale = quantise_rows(x)
    assert scale.item() == 1.0
    assert q[0, 16].item() == 1.0
    assert fp8_linear(x, weight).tolist() == [[16 * 448.0**2 + 256] * 16]


@pytest.mark.parametrize("emulate", [True, pytest.param(False, marks=NO_ROW_SCALES)])
@pytest.mark.parametrize(("tokens", "k", "n"), SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_is_the_definition(tokens, k, n, bias, emulate):
    """Whether multiplied by definition or by torch's scaled product, up to one rounding to bfloat16."""
    linear = nn.Linear(k, n, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    x = drawn(2, tokens, k, dtype=torch.bfloat16)
    expected = fp8_linear(x.double(), linear.weight, linear.bias)
    assert expected.dtype == torch.float64
    with torch.inference_mode():
        got = Fp8Linear(linear, emulate=emulate)(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), expected, rtol=2**-7, atol=2e-3 * float(expected.abs().max()))


@pytest.mark.gpu
def test_the_layer_is_the_definition_on_a_gpu():
    check_precision("fp8", torch.device("cuda"), "bfloat16", "none")
    linear = nn.Linear(160, 80, dtype=torch.bfloat16, device="cuda").requires_grad_(False)
    x = drawn(2, 33, 160, dtype=torch.bfloat16).cuda()
    expected = fp8_linear(x.double(), linear.weight, linear.bias)
    got = Fp8Linear(linear)(x).double()
    torch.testing.assert_close(got, expected, rtol=2**-7, atol=2e-3 * float(expected.abs().max()))


def test_which_layers_are_quantised():
    def block():
        mixed = nn.Linear(16, 16, dtype=torch.float32)  # kept in float32 by its library
        odd = nn.Linear(16, 24, dtype=torch.bfloat16)
        return nn.ModuleDict({"a": nn.Linear(16, 32, dtype=torch.bfloat16), "b": nn.Sequential(mixed), "c": odd})

    blocks = [block(), block()]
    assert quantise_linears(blocks) == [2, 6]
    for one in blocks:
        kinds = [type(m).__name__ for m in one.modules() if not list(m.children())]
        assert kinds == ["Fp8Linear", "Linear", "Linear"]
    assert set_up_blocks([block()], precision="fp8") == {"fp8_linears": [1, 3]}  # for the run's record
    assert set_up_blocks([block()]) == {}
    with pytest.raises(ValueError, match="precision fp8 finds none of the blocks' 2 linear layers in bfloat16"):
        quantise_linears([nn.ModuleDict({"b": nn.Linear(16, 16), "c": nn.Linear(8, 16, dtype=torch.bfloat16)})])


def test_features_stay_close(wan_path, tmp_path):
    """Of random weights in bfloat16: fp8 moves features by some percent, and every linear layer of a block is in it."""

    def run(fp8: bool):
        adapter = make_adapter(Wan, wan_path, size=(64, 96))
        adapter.load(3, CPU, torch.bfloat16, tmp_path)
        found = quantise_linears(adapter.blocks, emulate=True) if fp8 else None
        return features(adapter, make_clip(9), (0, 2), step=749), found

    (plain, _), (fp8, found) = run(False), run(True)
    assert found == [30, 30]
    for layer, x in plain.items():
        assert 1e-3 < float((fp8[layer].float() - x.float()).norm() / x.float().norm()) < 0.08


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "offload", "message"),
    [
        ("cpu", None, "bfloat16", "none", r"fp8 needs a CUDA device of compute capability 8.9 or newer, got cpu"),
        ("cuda", (8, 0), "bfloat16", "none", r"8.9 or newer, got Some GPU of \(8, 0\)"),
        ("cuda", (9, 0), "float16", "none", "precision fp8 needs compute_dtype bfloat16 around it, got float16"),
        ("cuda", (8, 9), "bfloat16", "host", "precision fp8 needs blocks that stay on one device, got offload host"),
    ],
)
def test_where_it_is_refused(monkeypatch, device, capability, dtype, offload, message):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    with pytest.raises(ValueError, match=message):
        check_precision("fp8", torch.device(device), dtype, offload)


def test_where_it_is_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    check_precision("fp8", torch.device("cuda"), "bfloat16", "none")
    check_precision("full", CPU, "float32", "host")
    with pytest.raises(ValueError, match="precision must be one of full, fp8, got 'int4'"):
        check_precision("int4", CPU, "float32", "none")


def test_a_job_says_so_before_it_begins(clips_path, wan_path, tmp_path):
    words = {"clips": str(clips_path), "model": str(wan_path), "out": str(tmp_path / "s"), "layers": [0]}
    assert resolve(Job.from_words(words)).spec.precision == "full"
    with pytest.raises(ValueError, match=r"compute capability 8.9 or newer, got cpu"):
        resolve(Job.from_words(words | {"precision": "fp8", "device": "cpu"}))
