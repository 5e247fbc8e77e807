"""The fused input layer against its definition in float64, with bounds from the roundings that its arithmetic has."""

import math

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from spatialprobe.kernels import folded_backward, folded_forward, folded_linear
from spatialprobe.kernels.probe_input import definition, probe_input

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUANTISED = (torch.int8, torch.float8_e4m3fn)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, *QUANTISED)
# of the product; half a unit in the last place, relative
ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-11, **dict.fromkeys((torch.bfloat16, *QUANTISED), 2.0**-8)}
FLOAT32 = 2.0**-24


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """What a kernel does not write is NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(math.nan))


def make(dtype, tokens, channels, width, *, mean=1.0, std=3.0, seed=0):
    """Features with scale and true statistics, and parameters."""
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
    x, scale = normal(tokens, channels) * std + mean, None
    if dtype in QUANTISED:
        scale = x.abs().amax(-1).clamp_min(1e-30) / 127
        x = (x / scale[:, None]).round() if dtype == torch.int8 else x / scale[:, None]
    parameters = [
        normal(width, channels) / channels**0.5,
        normal(width) / 10,
        1 + normal(channels) / 10,
        normal(channels) / 10,
    ]
    x = x.to(dtype).to(DEVICE)
    known = {"scale": None if scale is None else scale.to(DEVICE)}
    return x, known, [p.to(DEVICE) for p in parameters]


def statistics(x, known):
    variance, mean = torch.var_mean(values_of(x, known), -1, correction=0)
    return {"mean": mean.float(), "rstd": (variance + 1e-6).rsqrt().float()}


def values_of(x, known):
    return x.double() if known["scale"] is None else x.double() * known["scale"].double()[..., None]


def bound(x, known, weight, gamma, y, out_dtype=torch.float32):
    """What the fused product may be off by: roundings of W'', of sums in float32, and of the result.

    A sum of n roundings is within 6 sqrt(n) of one, but for a chance of 1e-8 (Higham and Mary 2019).
    """
    values = values_of(x, known)
    variance, mean = torch.var_mean(values, -1, correction=0, keepdim=True)
    rstd = (variance + 1e-6).rsqrt()
    folded = (weight * gamma).double()
    folded = (folded - folded.mean(-1, keepdim=True)).abs()
    rounded = ROUNDING[x.dtype] * ((values - mean).abs() * rstd) @ folded.T
    summed = 6 * (values.shape[-1] ** 0.5 + 8) * FLOAT32 * (values.abs() * rstd @ (folded + FLOAT32).T + y.abs() + 1)
    return rounded + summed + torch.finfo(out_dtype).eps / 2 * y.abs()


def run(dtype, size, *, stored=True, impl="triton", seed=0, out_dtype=None, eps=1e-6, **data):
    """Output and definition, the bound of their difference."""
    x, known, parameters = make(dtype, *size, seed=seed, **data)
    reference = definition(x, *(p.double() for p in parameters), scale=known["scale"], eps=eps)
    known |= statistics(x, known) if stored else {}
    y = probe_input(x, *parameters, **known, impl=impl, eps=eps, out_dtype=out_dtype)
    allowed = bound(x, known, parameters[0], parameters[2], reference, y.dtype)
    return y, reference, allowed


SIZES = [(1, 1, 1, True), (7, 17, 5, False), (130, 40, 33, True), (70, 130, 32, False), (66, 17, 70, False)]


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("normalize", [False, True])
def test_the_definition_is_what_torch_modules_do(activation, normalize):
    x, _, parameters = make(torch.float32, 9, 17, 5)
    weight, bias, gamma, beta = (p.double() for p in parameters)
    y = F.linear(F.layer_norm(x.double(), (17,), gamma, beta, 1e-6), weight, bias)
    y = F.gelu(y) if activation else y
    y = y / y.norm(dim=-1, keepdim=True) if normalize else y
    made = definition(x, weight, bias, gamma, beta, activation=activation, normalize=normalize)
    torch.testing.assert_close(made, y, rtol=1e-12, atol=1e-12)


def within(y, reference, allowed):
    off = ((y - reference).abs() / allowed).max()
    assert off <= 1, f"{off:.2f} of what rounding explains"


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_size(dtype, size):
    within(*run(dtype, size[:3], stored=size[3]))


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("mean", "std"), [(100, 1), (1e4, 1e4), (0, 1e-5), (0, 1e-40), (3, 0)])
def test_extreme_values(dtype, stored, mean, std):
    """Means far above the deviation, large values, float16's denormals, float32's, and constant tokens."""
    if stored and dtype in (torch.bfloat16, torch.float8_e4m3fn):
        return  # as float16 and int8
    within(*run(dtype, (70, 40, 16), stored=stored, mean=mean, std=std))
