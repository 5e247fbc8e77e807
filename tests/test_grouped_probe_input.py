"""Probes that share a pass over features, against each of them alone in float64."""

import pytest
import torch
from probe_input_reference import DEVICE, DTYPES, bound, gradient_bound, make, poison, statistics, within

from spatialprobe.kernels.probe_input import definition, grouped_probe_input, probe_input

IMPLS = ["triton", "torch"]


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    poison(monkeypatch)


def make_probes(probes, channels, width):
    """Each probe's parameters, and the same stacked."""
    alone = [make(torch.float32, 1, channels, width, seed=seed)[2] for seed in range(probes)]
    return alone, [torch.stack(same).requires_grad_() for same in zip(*alone, strict=True)]


def backward(ys):
    """Through all at once, from gradients that are returned."""
    draw = torch.Generator().manual_seed(3)
    upstream = [torch.randn(y.shape, generator=draw).to(DEVICE) for y in ys]
    torch.autograd.backward(ys, upstream)
    return upstream


def check(x, known, parameters, y, upstream, gradients):
    """One probe's values and gradients against its definition."""
    exact = [p.double().requires_grad_() for p in parameters]
    reference = definition(x, *exact, scale=known["scale"])
    reference.backward(upstream.double())
    within(y.detach(), reference.detach(), bound(x, known, parameters[0], parameters[2], reference.detach()))
    for ours, true, allowed in zip(gradients, exact, gradient_bound(x, known, parameters, upstream), strict=True):
        within(ours, true.grad, allowed)


def statistics_if(stored, x, known):
    return statistics(x, known) if stored else {"mean": None, "rstd": None}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("dtype", "probes", "width", "stored"),
    [(torch.float16, 3, 5, True), (torch.int8, 2, 70, False), (torch.float32, 8, 32, False)],
)
def test_probes_on_the_same_features(dtype, probes, width, stored, impl):
    x, known, _ = make(dtype, 66, 40, 1)
    alone, stacked = make_probes(probes, 40, width)
    y = grouped_probe_input(x, *stacked, **known, **statistics_if(stored, x, known), impl=impl)
    assert y.shape == (66, probes, width)
    ys = y.unbind(1)
    upstream = backward(ys)
    for p, parameters in enumerate(alone):
        check(x, known, parameters, ys[p], upstream[p], [t.grad[p] for t in stacked])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("dtype", "probes", "width"), [(torch.float16, 5, 5), (torch.int8, 2, 70), (torch.float32, 3, 70)]
)
def test_each_probe_is_normalised_by_itself(dtype, probes, width, impl):
    """As alone, but for the order of sums: float32's roundings, also where 16 bits were rounded before."""
    x, known, _ = make(dtype, 66, 40, 1)
    alone, stacked = make_probes(probes, 40, width)
    after = {"activation": "gelu", "normalize": True, "impl": impl}
    ys = grouped_probe_input(x, *stacked, **known, **after).unbind(1)
    upstream = backward(ys)
    for p, parameters in enumerate(alone):
        own = [t.requires_grad_() for t in parameters]
        y = probe_input(x, *own, **known, **after)
        y.backward(upstream[p])
        length = probe_input(x, *parameters, **known, activation="gelu", impl=impl).detach().norm(dim=1, keepdim=True)
        slack = 2e-6 / length.clamp_max(1)  # 2^-24 of the 40 terms of a sum, which a short vector's length divides
        assert ((ys[p] - y).abs() <= slack + 1e-5 * y.abs()).all(), f"{((ys[p] - y).abs() / slack).max():.3g} x"
        for together, single in zip(stacked, own, strict=True):
            slack = 1e-5 * single.grad.abs().max().item()
            torch.testing.assert_close(together.grad[p], single.grad, rtol=1e-5, atol=slack)


@pytest.mark.filterwarnings("ignore:var_mean")  # of no tokens
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_probes_on_features_of_their_own(dtype, impl):
    """Of different lengths, one of none, one of several parts; one at an odd address, one with rows further apart."""
    xs, known = zip(*(make(dtype, tokens, 17, 1, seed=tokens)[:2] for tokens in (66, 7, 0, 260)), strict=True)
    xs, stored = list(xs), dtype in (torch.float16, torch.int8)
    xs[1] = torch.zeros(7 * 17 + 1, dtype=dtype, device=DEVICE)[1:].view(7, 17).copy_(xs[1])
    xs[3] = torch.zeros(260, 19, dtype=dtype, device=DEVICE)[:, 1:18].copy_(xs[3])
    known = [k | statistics_if(stored, x, k) for x, k in zip(xs, known, strict=True)]
    alone, stacked = make_probes(4, 17, 40)
    lists = {name: None if known[0][name] is None else [k[name] for k in known] for name in known[0]}
    ys = grouped_probe_input(xs, *stacked, **lists, impl=impl)
    upstream = backward(ys)
    assert ys[2].shape == (0, 40)
    assert not any(t.grad[2].any() for t in stacked)
    for p in (0, 1, 3):
        check(xs[p], known[p], alone[p], ys[p], upstream[p], [t.grad[p] for t in stacked])


@pytest.mark.parametrize("impl", IMPLS)
def test_many_columns_and_leading_dimensions(impl):
    """Two probes of 90 columns are over 128 together and go through cuBLAS; so does each of two of 130."""
    x, known, _ = make(torch.bfloat16, 66, 40, 1)
    stats = {name: t.view(6, 11) for name, t in statistics(x, known).items()}
    grid = x.view(6, 11, 40)
    alone, stacked = make_probes(2, 40, 90)
    y = grouped_probe_input(grid, *stacked, **stats, impl=impl)
    assert y.shape == (6, 11, 2, 90)
    ys = y.unbind(2)
    upstream = backward(ys)
    for p, parameters in enumerate(alone):
        mine = [t.grad[p] for t in stacked]
        check(x, known, parameters, ys[p].reshape(66, 90), upstream[p].view(66, 90), mine)
    alone, stacked = make_probes(2, 40, 130)
    ys = grouped_probe_input([grid] * 2, *stacked, **{name: [t, t] for name, t in stats.items()}, impl=impl)
    upstream = backward(ys)
    for p, parameters in enumerate(alone):
        mine = [t.grad[p] for t in stacked]
        check(x, known, parameters, ys[p].reshape(66, 130), upstream[p].view(66, 130), mine)


def test_wrong_arguments_are_named():
    x, weight = torch.ones(4, 17, device=DEVICE), torch.ones(2, 5, 17, device=DEVICE)
    with pytest.raises(ValueError, match=r"weight must be \[P, D, C\] and not empty, got \[5, 17\]"):
        grouped_probe_input(x, weight[0])
    with pytest.raises(ValueError, match="x must be a tensor or 2 of them, one per probe, got 3"):
        grouped_probe_input([x] * 3, weight)
    with pytest.raises(ValueError, match="scale must be as x is, a tensor or one per probe, got Tensor"):
        grouped_probe_input([x.to(torch.int8)] * 2, weight, scale=torch.ones(4, device=DEVICE))
    with pytest.raises(ValueError, match="mean must be as x is, a tensor or one per probe, got list"):
        grouped_probe_input(x, weight, mean=[x[:, 0]] * 2, rstd=x[:, 0])
    with pytest.raises(ValueError, match=r"the same for all, got torch\.float16"):
        grouped_probe_input([x, x.half()], weight)
    with pytest.raises(ValueError, match=r"x must be \[..., 17\] for this weight, got \[4, 16\]"):
        grouped_probe_input([x, x[:, 1:]], weight)
