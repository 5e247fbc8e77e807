"""The fused input layer against its definition in float64, with bounds from the roundings that its arithmetic has."""

import math

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from probe_input_reference import (
    DEVICE,
    DTYPES,
    FLOAT32,
    QUANTISED,
    bound,
    gradient_bound,
    make,
    poison,
    statistics,
    values_of,
    within,
)

from spatialprobe.kernels import folded_linear
from spatialprobe.kernels.probe_input import definition, probe_input


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    poison(monkeypatch)


def run(dtype, size, *, stored, **data):
    """Output and definition, and the bound of their difference."""
    x, known, parameters = make(dtype, *size, **data)
    reference = definition(x, *(p.double() for p in parameters), scale=known["scale"])
    known |= statistics(x, known) if stored else {}
    y = probe_input(x, *parameters, **known, impl="triton")
    return y, reference, bound(x, known, parameters[0], parameters[2], reference)


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


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_size(dtype, size):
    within(*run(dtype, size[:3], stored=size[3]))


@pytest.mark.filterwarnings("ignore:divide by zero")  # eps / scale^2 of the tiniest scale
@pytest.mark.parametrize(
    ("dtype", "stored"), [*((dtype, False) for dtype in DTYPES), (torch.float32, True), (torch.int8, True)]
)
@pytest.mark.parametrize(("mean", "std"), [(100, 1), (1e4, 1e4), (0, 1e-5), (0, 1e-40), (3, 0)])
def test_extreme_values(dtype, stored, mean, std):
    """Means far above the deviation, large values, float16's denormals, float32's, and constant tokens."""
    within(*run(dtype, (70, 40, 16), stored=stored, mean=mean, std=std))


def test_statistics_of_a_mean_far_above_the_deviation():
    """Means of blocks are within a unit in their last place, 2^-23 of the mean; E[x^2] - mean^2 is off by half."""
    x, _, parameters = make(torch.float32, 66, 130, 5, mean=3000.0, std=1.0)
    stacked = [p[None, None] for p in parameters]
    _, mean, rstd, _ = torch.ops.spatialprobe.probe_input(
        [x], *stacked, None, None, None, 1e-6, False, False, torch.float32, False
    )
    variance, true_mean = torch.var_mean(x.double(), -1, correction=0)
    torch.testing.assert_close(mean.double(), true_mean, rtol=2 * FLOAT32, atol=0)
    torch.testing.assert_close(rstd.double(), (variance + 1e-6).rsqrt(), rtol=3000 * 2 * FLOAT32, atol=0)


@triton.jit
def _values(x_ptr, y_ptr):
    at = tl.arange(0, 256)
    tl.store(y_ptr + at, folded_linear.exact(tl.load(x_ptr + at)).to(tl.float32))


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "uint8"])
def test_every_quantised_value_is_exact(dtype):
    """float8_e4m3 also as its bits, for devices that do not know it."""
    codes = torch.arange(256, device=DEVICE).to(torch.uint8)
    stored = codes.view(torch.int8 if dtype == "int8" else torch.float8_e4m3fn)
    y = torch.zeros(256, device=DEVICE)
    _values[(1,)](codes if dtype == "uint8" else stored, y)
    if dtype == "float8_e4m3fn" and DEVICE == "cpu":
        y[[127, 255]] = math.nan  # Triton's interpreter takes them for 480
    torch.testing.assert_close(y, stored.float(), rtol=0, atol=0, equal_nan=True)


def test_massive_channels():
    x, known, parameters = make(torch.bfloat16, 70, 130, 33)
    x[:, [7, 99]] = 500 + 10 * torch.randn(70, 2, device=DEVICE).bfloat16()
    reference = definition(x, *(p.double() for p in parameters))
    y = probe_input(x, *parameters, impl="triton")
    within(y, reference, bound(x, known, parameters[0], parameters[2], reference))


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("activation", "normalize"), [("gelu", False), (None, True), ("gelu", True)])
@pytest.mark.parametrize("width", [5, 70, 140])  # in a padded tile, wider than float32's, and wider than any
def test_what_follows_the_product(width, activation, normalize, out_dtype):
    """float32 features, so that only the output is rounded: half a unit in its last place."""
    x, known, parameters = make(torch.float32, 66, 40, width)
    after = {"activation": activation, "normalize": normalize}
    reference = definition(x, *(p.double() for p in parameters), **after)
    y = probe_input(x, *parameters, out_dtype=out_dtype, impl="triton", **after, **statistics(x, known))
    assert y.dtype == out_dtype
    torch.testing.assert_close(y.double(), reference, rtol=torch.finfo(out_dtype).eps / 2 + 1e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("activation", "normalize"), [(None, False), ("gelu", True)])
def test_many_columns_of_16_bits(dtype, activation, normalize):
    """From 129 on, cuBLAS makes the product."""
    after = {"activation": activation, "normalize": normalize}
    x, known, parameters = make(dtype, 70, 40, 131, mean=30)
    reference = definition(x, *(p.double() for p in parameters), **after)
    plain = definition(x, *(p.double() for p in parameters))
    for out_dtype in (torch.float32, torch.bfloat16):
        y = probe_input(x, *parameters, out_dtype=out_dtype, impl="triton", **after, **statistics(x, known))
        allowed = bound(x, known, parameters[0], parameters[2], plain)
        if normalize:  # GELU stretches errors by at most 1.13; all of a token's move its norm
            size = F.gelu(plain).norm(dim=-1, keepdim=True)
            allowed = 1.13 * (allowed + reference.abs() * allowed.norm(dim=-1, keepdim=True)) / size
        if out_dtype == torch.bfloat16:  # the product is rounded too, before its correction
            allowed = allowed + 2.0**-8 * (1.1 * reference.abs() + 0.1)
        within(y, reference, allowed)


def test_products_beyond_the_range_of_float16():
    """What comes out of cuBLAS, before it is divided by the deviation."""
    x, known, (weight, *rest) = make(torch.float16, 30, 40, 131, std=1e4)
    parameters = [weight * 20, *rest]
    y = probe_input(x, *parameters, **statistics(x, known), impl="triton")
    reference = definition(x, *(p.double() for p in parameters))
    within(y, reference, bound(x, known, parameters[0], parameters[2], reference))


def test_any_strides_and_leading_dimensions():
    x, known, parameters = make(torch.bfloat16, 2 * 3 * 8, 40, 5)
    known = statistics(x, known)
    flat = probe_input(x, *parameters, **known, impl="triton")
    grid = {name: t.view(2, 3, 8) for name, t in known.items()}
    wide = torch.full((2, 3, 16, 50), math.nan, dtype=torch.bfloat16, device=DEVICE)
    wide[:, :, ::2, 3:43] = x.view(2, 3, 8, 40)
    turned = x.view(2, 3, 8, 40).permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    for same in (x.view(2, 3, 8, 40), wide[:, :, ::2, 3:43], turned):
        assert torch.equal(probe_input(same, *parameters, **grid, impl="triton"), flat.view(2, 3, 8, 5))
    one = probe_input(x[0], *parameters, mean=known["mean"][0], rstd=known["rstd"][0], impl="triton")
    assert torch.equal(one, flat[0])


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_no_tokens(impl):
    x, _, parameters = make(torch.float32, 4, 40, 5)
    parameters = [p.requires_grad_() for p in parameters]
    y = probe_input(x[:0].view(3, 0, 40), *parameters, normalize=True, impl=impl)
    assert y.shape == (3, 0, 5)
    y.sum().backward()
    assert not any(p.grad.any() for p in parameters)


# -- gradients --------------------------------------------------------------------------------------------------------


def gradients(x, known, parameters, upstream, **options):
    """Of the parameters: what is computed, and what float64 autograd makes of the definition."""
    ours = [p.clone().requires_grad_() for p in parameters]
    y = probe_input(x, *ours, **known, **options)
    y.backward(upstream.to(y.dtype))
    exact = [p.double().requires_grad_() for p in parameters]
    after = {name: options[name] for name in ("activation", "normalize") if name in options}
    definition(x, *exact, scale=known["scale"], **after).backward(upstream.to(y.dtype).double())
    return [p.grad for p in ours], [p.grad for p in exact]


@pytest.mark.parametrize("size", [(130, 40, 33, True), (7, 17, 1, False), (300, 9, 40, True)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_every_dtype(dtype, size):
    x, known, parameters = make(dtype, *size[:3], seed=1)
    upstream = torch.randn(len(x), size[2], generator=torch.Generator().manual_seed(2)).to(DEVICE)
    stats = statistics(x, known) if size[3] else {}
    ours, exact = gradients(x, known | stats, parameters, upstream, impl="triton")
    for mine, true, allowed in zip(ours, exact, gradient_bound(x, known, parameters, upstream), strict=True):
        within(mine, true, allowed + 1e-30)


@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_gradients_beyond_the_range_of_float16(size):
    x, known, parameters = make(torch.float16, 130, 40, 5, std=0.1)
    upstream = torch.randn(130, 5, device=DEVICE) * size * torch.tensor([1, 1e-6, 1, 1e6, 0], device=DEVICE)
    ours, exact = gradients(x, known | statistics(x, known), parameters, upstream, impl="triton")
    for mine, true, allowed in zip(ours, exact, gradient_bound(x, known, parameters, upstream), strict=True):
        within(mine, true, allowed + 1e-30)


@pytest.mark.parametrize(("mean", "std"), [(100, 1), (1e4, 1e4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_gradients_of_extreme_values(dtype, mean, std):
    x, known, parameters = make(dtype, 70, 40, 5, mean=mean, std=std)
    upstream = torch.randn(70, 5, device=DEVICE)
    ours, exact = gradients(x, known, parameters, upstream, impl="triton")
    for mine, true, allowed in zip(ours, exact, gradient_bound(x, known, parameters, upstream), strict=True):
        within(mine, true, allowed)


@pytest.mark.parametrize(("activation", "normalize"), [("gelu", False), (None, True), ("gelu", True)])
@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.float32, 33), (torch.float16, 5), (torch.bfloat16, 33), (torch.int8, 140)]
)
def test_gradients_through_gelu_and_normalisation(dtype, width, activation, normalize):
    """z is that of the rounded W'', and so is its gradient; from there on, as without them."""
    x, known, parameters = make(dtype, 70, 40, width)
    upstream = torch.randn(70, width, device=DEVICE)
    ours = [p.clone().requires_grad_() for p in parameters]
    y = probe_input(x, *ours, **known, activation=activation, normalize=normalize, impl="triton")
    y.backward(upstream)
    exact = [p.double().requires_grad_() for p in parameters]
    values = values_of(x, known)
    normed = F.layer_norm(values, (40,), eps=1e-6)
    folded, _ = folded_linear.fold(*parameters)
    rounded = folded.to(torch.bfloat16 if dtype in QUANTISED else dtype).double()
    z = definition(values, *exact)
    z.retain_grad()
    after = z + normed @ (rounded - folded.double()).T
    after = F.gelu(after) if activation else after
    (F.normalize(after, dim=-1) if normalize else after).backward(upstream.double())
    limits = gradient_bound(x, known, parameters, z.grad)
    for mine, true, allowed in zip(ours, exact, limits, strict=True):
        within(mine.grad, true.grad, allowed + 1e-6 * true.grad.abs().max())


def test_gradients_of_many_columns():
    """From 257 on, cuBLAS makes the gradient's product of 16 bits; quantised features stay with Triton."""
    for dtype in (torch.bfloat16, torch.float16, torch.int8):
        x, known, parameters = make(dtype, 40, 17, 260)
        upstream = torch.randn(40, 260, device=DEVICE)
        ours, exact = gradients(x, known, parameters, upstream, impl="triton")
        for mine, true, allowed in zip(ours, exact, gradient_bound(x, known, parameters, upstream), strict=True):
            within(mine, true, allowed)


def test_gradients_are_the_same_every_time_and_may_be_partial():
    x, known, parameters = make(torch.float32, 600, 9, 5)
    runs = [gradients(x, known, parameters, torch.ones(600, 5, device=DEVICE), impl="triton")[0] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    weight = parameters[0].clone().requires_grad_()
    probe_input(x, weight, gamma=parameters[2], impl="triton").sum().backward()
    torch.testing.assert_close(weight.grad, runs[0][0] - torch.outer(runs[0][1], parameters[3]), rtol=1e-5, atol=1e-4)
