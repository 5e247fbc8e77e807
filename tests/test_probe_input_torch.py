"""The probe input without Triton, as torch's machinery sees it with Triton, and what it refuses."""

import re

import pytest
import torch
from probe_input_reference import DEVICE, DTYPES, make, poison, statistics
from torch.func import grad, vmap

from spatialprobe.kernels.probe_input import definition, grouped_probe_input, probe_input

IMPLS = ["triton", "torch"]


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    poison(monkeypatch)


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_torch_is_the_definition_in_float64(dtype, stored):
    """Stored statistics are float32, and so is their error."""
    x, known, parameters = make(dtype, 30, 17, 5, mean=30)
    parameters = [p.double() for p in parameters]
    after = {"activation": "gelu", "normalize": True}
    reference = definition(x, *parameters, **known, **after)
    known |= statistics(x, known) if stored else {}
    y = probe_input(x, *parameters, **known, **after, impl="torch")
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, reference, rtol=0, atol=30 * 2**-23 if stored else 1e-12)


@pytest.mark.parametrize("after", [{}, {"activation": "gelu"}, {"normalize": True}], ids=str)
@pytest.mark.parametrize("given", [(1, 1, 1), (0, 0, 0), (0, 1, 0), (1, 0, 1)], ids=str)  # bias, gamma, beta
def test_torch_gradients(given, after):
    x, _, (weight, *rest) = make(torch.float64, 7, 5, 3)
    rest = [p.double().requires_grad_() if there else None for p, there in zip(rest, given, strict=True)]
    weight = weight.double().requires_grad_()
    f = lambda *p: probe_input(x, *p, **after, impl="torch")  # noqa: E731
    assert torch.autograd.gradcheck(f, (weight, *rest))
    assert torch.autograd.gradgradcheck(f, (weight, *rest))
    y, true = (f(x, weight, *rest, **after) for f in (probe_input, definition))
    torch.testing.assert_close(y, true, rtol=1e-12, atol=1e-12)


def test_torch_maps_over_probes():
    """Gradients of three probes at once, as `torch.func` takes them, are each probe's own."""
    x, _, _ = make(torch.float16, 30, 17, 5)
    probes = [make(torch.float16, 1, 17, 5, seed=seed)[2] for seed in range(3)]
    loss = lambda p: probe_input(x, *p, normalize=True, impl="torch").square().mul(torch.arange(5)).sum()  # noqa: E731
    mapped = vmap(grad(loss))([torch.stack(same) for same in zip(*probes, strict=True)])
    for i, probe in enumerate(probes):
        for ours, alone in zip(mapped, grad(loss)(probe), strict=True):
            torch.testing.assert_close(ours[i], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
def test_one_graph(impl, dtype):
    x, known, parameters = make(dtype, 30, 17, 5)

    def loss(x, known, *parameters):
        y = probe_input(x * 1, *parameters, **known, activation="gelu", impl=impl)
        wide = [torch.stack([p, p]) for p in parameters]
        both = grouped_probe_input(
            [x, x], *wide, **{k: [v, v] if v is not None else v for k, v in known.items()}, impl=impl
        )
        return y.square().sum() + both[0].sum() + both[1].square().sum()

    found = []
    for run in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        own = [p.clone().requires_grad_() for p in parameters]
        value = run(x, known, *own)
        value.backward()
        found.append([value.detach(), *(p.grad for p in own)])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("after", "stored"), [((False, False), True), ((True, True), False)], ids=str)
def test_the_operators_keep_torchs_rules(dtype, after, stored):
    x, known, parameters = make(dtype, 9, 17, 5)
    stats = statistics(x, known) if stored else {"mean": None, "rstd": None}
    parameters = [p[None, None].requires_grad_() for p in parameters]
    args = ([x], *parameters, known["scale"], *stats.values(), 1e-6, *after, torch.float32, True)
    torch.library.opcheck(torch.ops.spatialprobe.probe_input, args)


def test_the_backward_operator_keeps_torchs_rules():
    x, known, (weight, _, gamma, _) = make(torch.bfloat16, 9, 17, 5)
    z = torch.randn(9, 1, 5, device=DEVICE)
    args = (z, [x], weight[None, None], gamma[None, None], None, None, *statistics(x, known).values(), z, True, True)
    torch.library.opcheck(torch.ops.spatialprobe.probe_input_backward, args)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_decides_the_output_and_nothing_else(impl):
    x, _, parameters = make(torch.float16, 30, 17, 5, mean=30)
    plain = probe_input(x, *parameters, impl=impl)
    assert plain.dtype == torch.float32
    with torch.autocast(DEVICE, torch.bfloat16):
        cast = probe_input(x, *parameters, impl=impl)
        kept = probe_input(x, *parameters, out_dtype=torch.float32, impl=impl)
    assert torch.equal(cast, plain.bfloat16())
    assert torch.equal(kept, plain)
    half = [p.bfloat16() for p in parameters]
    assert probe_input(x, *half, impl=impl).dtype == torch.bfloat16


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_have_their_parameters_dtypes(impl):
    x, _, parameters = make(torch.bfloat16, 30, 17, 5)
    mixed = [p.to(dtype).requires_grad_() for p, dtype in zip(parameters, DTYPES[:3] * 2, strict=False)]
    probe_input(x, *mixed, impl=impl).sum().backward()
    assert [p.grad.dtype for p in mixed] == [p.dtype for p in mixed]


WRONG = {
    "weight must be [D, C] and not empty, got [2, 5, 17]": {"weight": torch.ones(2, 5, 17)},
    "bias must be [5] for this weight, got [17]": {"bias": torch.ones(17)},
    "gamma must be [17] for this weight, got [5]": {"gamma": torch.ones(5)},
    "beta must be one of torch.float32": {"beta": torch.ones(17, dtype=torch.int32)},
    "x must be [..., 17] for this weight, got [4, 5]": {"x": torch.ones(4, 5)},
    "x must be one of torch.float32": {"x": torch.ones(4, 17, dtype=torch.int16)},
    "scale must be given for quantised features and no others, got torch.int8": {"x": torch.ones(4, 17).to(torch.int8)},
    "scale must be given for quantised features and no others, got torch.float32": {"scale": torch.ones(4)},
    "mean and rstd must be given together": {"mean": torch.ones(4)},
    "rstd must be float32 [4], got torch.float32 [3]": {"mean": torch.ones(4), "rstd": torch.ones(3)},
    "mean must be float32 [4], got torch.float16 [4]": {"mean": torch.ones(4).half(), "rstd": torch.ones(4)},
    "features are frozen and get no gradient, but x requires one": {"x": torch.ones(4, 17, requires_grad=True)},
    "activation must be None or one of gelu, got 'relu'": {"activation": "relu"},
    "eps must not be negative, got -1": {"eps": -1},
    "impl must be one of auto, triton, torch, got 'cuda'": {"impl": "cuda"},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message):
    options = {"x": torch.ones(4, 17), "weight": torch.ones(5, 17)} | WRONG[message]
    for name, given in options.items():
        if isinstance(given, torch.Tensor):
            options[name] = given.detach().to(DEVICE).requires_grad_(given.requires_grad)
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        probe_input(**options)


def test_triton_has_no_float64():
    x, _, parameters = make(torch.float64, 3, 17, 5)
    with pytest.raises(ValueError, match=r"x must be one of torch\.float32"):
        probe_input(x, *parameters, impl="triton")
    with pytest.raises(ValueError, match=r"weight must be one of torch\.float32"):
        probe_input(x.float(), *(p.double() for p in parameters), impl="triton")


def test_a_gradient_of_features_is_refused_only_where_one_could_be():
    x, _, parameters = make(torch.float32, 3, 17, 5)
    with torch.no_grad():
        y = probe_input(x.requires_grad_(), *parameters, impl="torch")
    assert torch.equal(y, probe_input(x.detach(), *parameters, impl="torch"))
