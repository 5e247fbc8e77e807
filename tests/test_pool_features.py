"""Pooling and rounding, both the definition and the Triton kernel, against slow float64 arithmetic.

Bounds are what float32 sums of so many numbers, and then one rounding to the store's dtype, can be wrong by.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from spatialprobe.kernels import launch
from spatialprobe.kernels.pool_features import (
    LAUNCHES,
    accumulate,
    dequantize,
    finish,
    pool_features,
    token_stats,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # on the CPU, Triton's interpreter
ULP = 2.0**-24  # half a unit in the last place of float32, relative
HALF_STEP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
HALF_SMALLEST = {torch.float32: 2.0**-150, torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25}
TOP = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
STORED = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8]
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, in Triton's interpreter
both = pytest.mark.parametrize("impl", ["torch", "triton"])


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory from torch.empty is full of NaN, or of -128, which no kernel writes: what is left unwritten shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(-128 if x.dtype == torch.int8 else math.nan) if x.dtype in STORED else x

    monkeypatch.setattr(torch, "empty", poisoned)


def noise(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def slow_pool(x, rows, grid):
    """adaptive_avg_pool2d by its definition: bin i covers floor(i*n/m) up to ceil((i+1)*n/m)."""
    batch, _, height, width, channels = x.shape
    h, w = grid or (height, width)
    out = torch.zeros(batch, len(rows), h, w, channels, dtype=torch.float64)
    for r, row in enumerate(rows):
        for i in range(h):
            for j in range(w):
                top, bottom = i * height // h, -(-(i + 1) * height // h)
                left, right = j * width // w, -(-(j + 1) * width // w)
                out[:, r, i, j] = x[:, row, top:bottom, left:right].double().mean((1, 2))
    return out


def slow_sum(x, rows, grid, weights, onto):
    """The weighted sum over steps in float64, and the most that adding it up in float32 can be wrong by."""
    steps = (x if x.ndim == 6 else x[None]).cpu()
    total = sum(w * slow_pool(step, rows, grid) for w, step in zip(weights, steps, strict=True))
    size = sum(abs(w) * slow_pool(step.abs(), rows, grid) for w, step in zip(weights, steps, strict=True))
    if onto is not None:
        total, size = total + onto.double().cpu(), size + onto.double().abs().cpu()
    h, w = grid or x.shape[-3:-1]
    added = len(steps) * ((-(-x.shape[-3] // h) + 1) * (-(-x.shape[-2] // w) + 1) + 5)
    return total, added * ULP * size


def slow_norm(y, error, norm):
    """Layer or L2 norm in float64, with what is left of `error`, and what its own float32 sums add."""
    if norm == "none":
        return y, error
    centre = y.mean(-1, keepdim=True) if norm == "layer" else torch.zeros_like(y[..., :1])
    power = (y - centre).square().sum(-1, keepdim=True)
    size = (power / y.shape[-1] + 1e-6).sqrt() if norm == "layer" else power.sqrt().clamp_min(1e-12)
    out = (y - centre) / size
    worst = error.norm(dim=-1, keepdim=True) + error.amax(-1, keepdim=True) + 32 * ULP * centre.abs()
    return out, (2 * error + 32 * ULP * centre.abs()) / size + out.abs() * (worst / size + 32 * ULP)


def check(done, exact, error, dtype):
    """That `done` is `exact`, known up to `error`, rounded to `dtype`, with the statistics of its rounded values."""
    assert done.data.dtype == dtype
    done = done.map(lambda x: x.cpu())
    peak = exact.abs().amax(-1)
    assert ((done.peak - peak).abs() <= error.amax(-1) + ULP * peak).all()
    stored = done.data.double()
    if dtype in TOP:
        assert (
            (done.scale - peak / TOP[dtype]).abs() <= error.amax(-1) / TOP[dtype] + 2 * ULP * done.scale + 2e-38
        ).all()
        stored = stored * done.scale.double()[..., None]
        step = done.scale.double()[..., None].expand_as(stored)
        rounding = step / 2 if dtype == torch.int8 else (exact.abs() * 2.0**-4).maximum(step * 2.0**-10)
        error = error + 8 * ULP * exact.abs()
    else:
        assert done.scale is None
        rounding = (HALF_STEP[dtype] * (exact.abs() + error)).clamp_min(HALF_SMALLEST[dtype])
    assert ((stored - exact).abs() <= rounding + error).all()
    size = 32 * ULP * stored.abs().mean(-1)
    assert ((done.mean - stored.mean(-1)).abs() <= size + 1e-44).all()
    variance = stored.var(-1, correction=0) + 1e-6
    loose = 1e-5 + size**2 / variance + 4 * ULP * stored.abs().amax(-1) / variance.sqrt()
    assert ((done.rstd * variance.sqrt() - 1).abs() <= loose).all()


# -- pooling ----------------------------------------------------------------------------------------------------------

CASES = {
    "one number": ((1, 1, 1, 1, 1), (0,), (1, 1)),
    "primes, rows not in order": ((2, 3, 3, 5, 7), (2, 0), (2, 1)),
    "bins like those of 45 -> 22": ((1, 2, 6, 9, 129), (1,), (3, 4)),
    "bins like those of 52 -> 14": ((1, 1, 5, 14, 40), (0,), (3, 3)),
    "one bin": ((2, 1, 5, 17, 3), (0,), (1, 1)),
    "no pooling": ((1, 3, 1, 3, 256), (0, 2), None),
    "exact bins": ((1, 2, 4, 6, 33), (0, 1), (2, 3)),
    "small bins of two heights": ((1, 1, 5, 2, 24), (0,), (3, 2)),
    "small bins of two widths": ((1, 1, 2, 5, 24), (0,), (2, 3)),
}


@both
@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("case", CASES)
def test_a_step_is_pooled_and_rounded(case, dtype, impl):
    shape, rows, grid = CASES[case]
    x = noise(*shape, dtype=torch.bfloat16) * 3 + 1
    before = x.clone()
    check(pool_features(x, rows, grid, dtype=dtype, impl=impl), *slow_sum(x, rows, grid, [1.0], None), dtype)
    assert torch.equal(x, before)


@both
@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("given", [torch.float32, torch.float16])
@pytest.mark.parametrize(("tokens", "grid"), [((2, 4), (1, 2)), ((3, 5), (2, 2))])
def test_input_dtypes(tokens, grid, given, dtype, impl):
    x = noise(1, 1, *tokens, 70, dtype=given)
    check(pool_features(x, (0,), grid, dtype=dtype, impl=impl), *slow_sum(x, (0,), grid, [1.0], None), dtype)


@both
@pytest.mark.parametrize("norm", ["none", "layer", "l2"])
@pytest.mark.parametrize("dtype", STORED)
def test_the_last_step_is_added_normalised_and_rounded(dtype, norm, impl):
    x, onto = noise(1, 2, 4, 5, 37, dtype=torch.bfloat16), noise(1, 1, 2, 3, 37, seed=1) + 2
    before = onto.clone()
    done = pool_features(x, (1,), (2, 3), dtype=dtype, norm=norm, onto=onto, weight=0.3, impl=impl)
    check(done, *slow_norm(*slow_sum(x, (1,), (2, 3), [0.3], onto), norm), dtype)
    assert torch.equal(onto, before)


def test_the_norms_are_torchs():
    x = noise(1, 1, 2, 3, 64) * 5 + 3
    for norm, expected in (("layer", F.layer_norm(x, (64,), eps=1e-6)), ("l2", F.normalize(x, dim=-1))):
        done = pool_features(x, (0,), None, dtype=torch.float32, norm=norm)
        torch.testing.assert_close(done.data, expected, rtol=0, atol=1e-6)


@both
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("grid", "rows"), [(None, (1,)), ((1, 2), (1, 0)), ((1, 1), (0,))])
def test_steps_one_by_one_or_at_once_are_their_weighted_sum(grid, rows, given, impl):
    x, weights = noise(3, 1, 2, 2, 3, 20, dtype=given), [0.5, -0.25, 1 / 3]
    exact, error = slow_sum(x, rows, grid, weights, None)
    total = accumulate(x[0], rows, grid, weight=weights[0], impl=impl)
    assert accumulate(x[1], rows, grid, total, weight=weights[1], impl=impl) is total
    done = pool_features(x[2], rows, grid, dtype=torch.float32, onto=total, weight=weights[2], impl=impl)
    check(done, exact, error, torch.float32)
    at_once = pool_features(x, rows, grid, dtype=torch.float32, weight=weights, impl=impl)
    check(at_once, exact, error, torch.float32)
    first = accumulate(x[0], rows, grid, weight=weights[0], impl=impl)
    rest = pool_features(x[1:], rows, grid, dtype=torch.int8, onto=first, weight=weights[1:], impl=impl)
    check(rest, exact, error, torch.int8)
    twice = accumulate(x, rows, grid, accumulate(x, rows, grid, weight=weights, impl=impl), weight=weights, impl=impl)
    assert ((twice.cpu() - 2 * exact).abs() <= 3 * error).all()


@both
@pytest.mark.parametrize("grid", [None, (2, 3), (3, 5)])
def test_steps_whose_channels_are_not_side_by_side_add_up(grid, impl):
    """As those of HunyuanVideo's first blocks: its embedded patches keep the strides of a convolution."""
    x = noise(2, 20, 2, 4, 6).permute(0, 2, 3, 4, 1)  # [K, T, H, W, C]
    x = x[:, None]
    exact, error = slow_sum(x, (0, 1), grid or (4, 6), [0.5, 0.5], None)
    total = accumulate(x[0], (0, 1), grid, weight=0.5, impl=impl)
    done = pool_features(x[1], (0, 1), grid, dtype=torch.float32, onto=total, weight=0.5, impl=impl)
    check(done, exact, error, torch.float32)


@both
def test_accumulating_writes_nothing_beside_the_buffer(impl):
    memory = torch.full((64 + 2 * 6 * 5 + 64,), 7.25, device=DEVICE)
    into = memory[64:-64].view(1, 2, 2, 3, 5)
    x = noise(1, 2, 4, 6, 5)
    accumulate(x, (0, 1), (2, 3), into, weight=2.0, impl=impl)
    exact, error = slow_sum(x, (0, 1), (2, 3), [2.0], torch.full((1, 2, 2, 3, 5), 7.25))
    assert ((into.cpu() - exact).abs() <= error).all()
    assert (memory[:64] == 7.25).all()
    assert (memory[-64:] == 7.25).all()


STRIDED = {
    "rows of a longer clip": lambda: noise(2, 9, 4, 6, 16)[:, ::4],
    "channels of more": lambda: noise(2, 3, 4, 6, 40)[..., 3:19],
    "every second channel": lambda: noise(2, 3, 4, 6, 32)[..., ::2],
    "channels before tokens": lambda: noise(2, 16, 3, 4, 6).permute(0, 2, 3, 4, 1),
    "width before height": lambda: noise(2, 3, 6, 4, 16).transpose(2, 3),
    "one clip repeated": lambda: noise(1, 3, 4, 6, 16).expand(2, -1, -1, -1, -1),
    "one channel repeated": lambda: noise(2, 3, 4, 6, 1).expand(-1, -1, -1, -1, 16),
    "the tail of padded tokens": lambda: noise(2, 3 * 4 * 6 + 5, 16)[:, 5:].unflatten(1, (3, 4, 6)),
    "a step among others": lambda: noise(2, 3, 3, 4, 6, 16)[:, 1],
}


@both
@pytest.mark.parametrize("how", STRIDED)
def test_strided_input(how, impl):
    x = STRIDED[how]()
    done = pool_features(x, (0, 2), (1, 3), dtype=torch.float32, impl=impl)
    check(done, *slow_sum(x, (0, 2), (1, 3), [1.0], None), torch.float32)


@both
def test_many_channels(impl):
    x = noise(1, 1, 1, 2, 16384, dtype=torch.bfloat16)
    done = pool_features(x, (0,), (1, 1), dtype=torch.float16, impl=impl)
    check(done, *slow_sum(x, (0,), (1, 1), [1.0], None), torch.float16)


@both
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", STORED)
def test_extreme_values(dtype, given, impl):
    misread = impl == "triton" and DEVICE.type == "cpu" and torch.bfloat16 in (given, dtype)
    tiny = 1e-37 if misread else 1e-39  # Triton 3.7's interpreter misreads bfloat16 below its smallest normal number
    x = torch.zeros(1, 6, 2, 2, 31, dtype=given, device=DEVICE)
    x[:, 0] = 1e4  # a token of one value: its variance is 0
    x[:, 1] = noise(2, 2, 31) + 1e4
    x[:, 2, ..., 5] = -60000
    x[:, 3] = (1 + noise(2, 2, 31).abs()) * tiny
    x[:, 4] = 1e-8
    rows = tuple(range(6))  # the last is of zeros
    done = pool_features(x, rows, (1, 1), dtype=dtype, impl=impl)
    check(done, *slow_sum(x, rows, (1, 1), [1.0], None), dtype)
    for norm in ("layer", "l2"):
        done = pool_features(x, rows[2:], (1, 1), dtype=dtype, norm=norm, impl=impl)
        check(done, *slow_norm(*slow_sum(x, rows[2:], (1, 1), [1.0], None), norm), dtype)


@both
@pytest.mark.parametrize("norm", ["none", "layer", "l2"])
@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_bad_value_shows_in_its_token_and_nowhere_else(bad, dtype, norm, impl):
    x = noise(1, 2, 2, 4, 19, dtype=torch.bfloat16)
    x[0, 0, 1, 1, 7] = bad
    done = pool_features(x, (1, 0), (1, 2), dtype=dtype, norm=norm, impl=impl)
    good = [True, True, False, True]
    assert torch.isfinite(done.peak).flatten().tolist() == good
    assert torch.isfinite(done.mean).flatten().tolist() == good
    assert torch.isfinite(done.rstd).flatten()[good].all()


@both
def test_both_infinities_in_one_token_show(impl):
    x = torch.ones(1, 1, 1, 2, 8, device=DEVICE)
    x[0, 0, 0, 1, 2:4] = torch.tensor([math.inf, -math.inf])
    done = pool_features(x, (0,), None, dtype=torch.float16, impl=impl)
    assert done.peak.flatten().tolist() == [1.0, math.inf]
    assert torch.isfinite(done.mean).flatten().tolist() == [True, False]


@both
@pytest.mark.parametrize("norm", ["layer", "l2"])
def test_a_token_too_large_to_normalise_is_nan_not_zero(norm, impl):
    x = noise(1, 1, 1, 2, 8)
    x[0, 0, 0, 1] *= 1e25
    done = pool_features(x, (0,), None, dtype=torch.float32, norm=norm, impl=impl)
    assert done.data.isnan().all(-1).flatten().tolist() == [False, True]
    assert done.peak.isnan().flatten().tolist() == [False, True]


@both
def test_float16_overflow_shows_in_the_mean_and_its_size_in_the_peak(impl):
    x = torch.tensor([70000.0, 1.0, 65504.0, 1.0], device=DEVICE).view(1, 1, 1, 2, 2)
    done = pool_features(x, (0,), None, dtype=torch.float16, impl=impl)
    assert torch.isfinite(done.mean).flatten().tolist() == [False, True]
    assert done.peak.flatten().tolist() == [70000.0, 65504.0]


def between(values):
    """Sorted float32 values, the middle of each two, and the float32 numbers next to that middle; all of both signs."""
    middle = (values[1:] + values[:-1]) / 2
    near = torch.cat([values, middle, middle.nextafter(values[1:]), middle.nextafter(values[:-1])])
    return torch.cat([near, -near])


@both
@pytest.mark.parametrize("sm", [80, 90])  # float8_e4m3 is made of bits by hand, or converted by the device
def test_quantised_values_are_the_nearest_ties_to_even(sm, impl, monkeypatch):
    if DEVICE.type == "cuda" and sm > launch.capability(DEVICE):
        pytest.skip(f"sm_{sm} instructions on sm_{launch.capability(DEVICE)}")
    monkeypatch.setattr(launch, "capability", lambda device: sm)
    eights = between(torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float())  # 0 to 448
    wholes = between(torch.arange(128.0))
    for x, dtype, expected in (
        (eights, torch.float8_e4m3fn, eights.to(torch.float8_e4m3fn)),
        (wholes, torch.int8, wholes.round().to(torch.int8)),
    ):
        done = pool_features(x.view(1, 1, 1, 1, -1).to(DEVICE), (0,), None, dtype=dtype, impl=impl)
        assert done.scale.item() == 1.0
        assert torch.equal(done.data.flatten().cpu().float(), expected.float())
    x = torch.full((1, 1, 1, 1, 4096), 1.4 * 2.0**-9)  # to 2**-9, the smallest: most of the mean
    x[..., 0] = 448
    done = pool_features(x.to(DEVICE), (0,), None, dtype=torch.float8_e4m3fn, impl=impl)
    check(done, x.double(), torch.zeros_like(x), torch.float8_e4m3fn)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_values_are_the_nearest_ties_to_even(dtype, impl):
    first, last = (0, 0x7800) if dtype == torch.float16 else (0x80, 0x7F00)  # normal numbers, as in test_extreme_values
    bits = torch.arange(first, last, 7, dtype=torch.int16)
    x = between(bits.view(dtype).float())[:16384]
    done = pool_features(x.view(1, 1, 1, 1, -1).to(DEVICE), (0,), None, dtype=dtype, impl=impl)
    assert torch.equal(done.data.flatten().cpu(), x.to(dtype))


def test_float8_bits_are_for_devices_that_cannot_convert():
    assert {sm: row.e4m3 for sm, row in LAUNCHES.items()} == {80: False, 90: True, 100: True}


@both
@pytest.mark.filterwarnings("ignore:var_mean")  # of nothing
def test_no_clips_give_no_features(impl):
    x = noise(0, 2, 4, 4, 3)
    done = pool_features(x, (1,), (2, 3), dtype=torch.int8, impl=impl)
    assert done.data.shape == (0, 1, 2, 3, 3)
    assert {part.shape for part in (done.scale, done.mean, done.rstd, done.peak)} == {(0, 1, 2, 3)}
    assert accumulate(x, (1,), (2, 3), torch.empty(0, 1, 2, 3, 3, device=DEVICE), impl=impl).shape == (0, 1, 2, 3, 3)


@both
def test_what_is_returned_shares_no_memory(impl):
    x, onto = noise(1, 2, 2, 2, 3), torch.zeros(1, 2, 2, 2, 3, device=DEVICE)
    results = [accumulate(x, (0, 1), None, impl=impl)]
    results += [pool_features(x, (0, 1), None, dtype=torch.float32, onto=o, impl=impl).data for o in (None, onto)]
    for result in results:
        assert torch.equal(result, x)
        result.zero_()
    assert (x != 0).all()


@both
def test_wrong_arguments_are_named(impl):
    x = torch.zeros(1, 2, 4, 4, 3, device=DEVICE)

    def refused(match, x=x, rows=(0,), grid=None, **words):
        with pytest.raises(ValueError, match=match):
            pool_features(x, rows, grid, **({"dtype": torch.float16, "impl": impl} | words))

    refused(r"\[B, T, H, W, C\]", x[0])
    refused("not empty", x[..., :0])
    refused("2 rows", rows=(2,))
    refused("2 rows", rows=(-1,))
    refused("2 rows", rows=())
    refused("larger than the 4x4", grid=(5, 4))
    refused("empty or larger than the 4x4", grid=(4, 0))
    refused("each of the 1 steps", weight=[0.5, 0.5])
    refused("each of the 2 steps", torch.stack([x, x]))
    refused("x must be one of .*, got torch.int8", x.to(torch.int8))
    refused("norm must be one of none, layer, l2, got 'batch'", norm="batch")
    refused("dtype must be one of .*, got torch.float64", dtype=torch.float64)
    refused(r"onto must be float32 \(1, 1, 4, 4, 3\)", onto=x)
    refused("onto must be contiguous", onto=torch.zeros(1, 1, 4, 3, 4, device=DEVICE).transpose(3, 4))
    refused("impl must be one of auto, triton, torch", impl="cuda")
    with pytest.raises(ValueError, match=r"into must be float32 .*, got torch.float16"):
        accumulate(x, (0,), None, x[:, :1].half(), impl=impl)


def test_more_channels_than_fit_registers():
    x = noise(1, 1, 1, 1, 16385)
    with pytest.raises(ValueError, match="at most 16384 channels, got 16385"):
        pool_features(x, (0,), None, dtype=torch.float16, impl="triton")
    assert torch.equal(pool_features(x, (0,), None, dtype=torch.float16, impl="torch").data, x.half())


# -- torch ------------------------------------------------------------------------------------------------------------


@both
def test_a_gradient_is_refused(impl):
    x = noise(1, 1, 2, 2, 3).requires_grad_()
    for call in (lambda: accumulate(x, (0,), None, impl=impl), lambda: finished(x, impl)):
        with pytest.raises(ValueError, match="features are frozen"):
            call()
    with torch.no_grad():
        assert torch.equal(accumulate(x, (0,), None, impl=impl), x)


def test_the_operator_has_no_backward():
    x = noise(1, 1, 1, 2, 2, 3).requires_grad_()
    data, *_ = torch.ops.spatialprobe.pool_and_finish(x, [0], [1, 1], [1.0], None, torch.float32, "none")
    with pytest.raises(RuntimeError, match="no autograd formula"):
        data.sum().backward()


def finished(x, impl, onto=None):
    return pool_features(x, (1,), (2, 3), dtype=torch.int8, norm="layer", onto=onto, weight=0.5, impl=impl)


@both
def test_inference_mode(impl):
    x = noise(2, 2, 4, 5, 17)
    with torch.inference_mode():
        total = accumulate(x.clone(), (1,), (2, 3), impl=impl)
        accumulate(x, (1,), (2, 3), total, impl=impl)
        done = finished(x, impl, onto=total)
    exact, error = slow_sum(x, (1,), (2, 3), [2.5], None)
    check(done, *slow_norm(exact, error, "layer"), torch.int8)


def test_operators_keep_their_promises():
    x, onto = noise(1, 2, 2, 3, 4, 5), noise(2, 1, 2, 2, 5)
    for dtype, buffer in ((torch.float16, None), (torch.float8_e4m3fn, onto)):
        args = (x, [1], [2, 2], [0.5], buffer, dtype, "l2")
        torch.library.opcheck(torch.ops.spatialprobe.pool_and_finish.default, args)
    torch.library.opcheck(torch.ops.spatialprobe.add_pooled.default, (x, [1], [2, 2], [0.5], onto))


@both
def test_compiled_calls_give_the_same(impl):
    x = noise(2, 2, 4, 5, 17)

    def merged(first, last):
        total = accumulate(first, (1,), (2, 3), weight=0.25, impl=impl)
        total = accumulate(first, (1,), (2, 3), total, weight=0.25, impl=impl)
        done = finished(last, impl, onto=total)
        return total, done.data, done.scale, done.mean, done.rstd, done.peak

    compiled = torch.compile(merged, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(x, x + 1), merged(x, x + 1), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


# -- rounding alone ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", STORED)
def test_finishing_alone(dtype):
    x = noise(50, 33).cpu() * torch.logspace(-6, 4, 50)[:, None]
    x[7] = 0
    done = finish(x, dtype)
    check(done, x.double(), torch.zeros(50, 33, dtype=torch.float64), dtype)
    assert torch.equal(dequantize(done.data, done.scale)[7], x[7])


def test_the_peak_is_not_stored():
    x = noise(2, 3)
    assert list(finish(x, torch.int8).named("layer3")) == ["layer3", "layer3.scale", "layer3.mean", "layer3.rstd"]
    done = finish(x, torch.float16)
    stored = done.named("layer3/step9")
    for part, x in (("", done.data), (".mean", done.mean), (".rstd", done.rstd)):
        assert stored.pop(f"layer3/step9{part}") is x
    assert not stored


def test_token_stats_of_a_constant_token():
    mean, rstd = token_stats(torch.full((1, 8), 3.0))
    assert mean.item() == 3.0
    assert rstd.item() == pytest.approx(1000.0)
