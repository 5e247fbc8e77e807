"""Arguments of any strides: kernels index memory, so a view that is not contiguous must not show."""

import pytest
import torch

from spatialprobe.kernels.probe_input import probe_input

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def spread(x: torch.Tensor) -> torch.Tensor:
    """Equal to x, with strangers between its elements."""
    wide = torch.full((*x.shape, 2), 1e3, dtype=x.dtype, device=x.device)
    wide[..., 0] = x
    return wide[..., 0]


@pytest.mark.parametrize("name", ["weight", "weight turned", "bias", "bias expanded", "gamma", "mean", "scale"])
@pytest.mark.parametrize("with_beta", [False, True])
def test_strided_arguments_change_nothing(name, with_beta):
    rng = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=rng).to(DEVICE)  # noqa: E731
    values = draw(37, 24)
    scale = values.abs().amax(-1) / 127
    x = (values / scale[:, None]).round().to(torch.int8)
    variance, mean = torch.var_mean(x * scale[:, None], -1, correction=0)
    given = {"weight": draw(5, 24), "bias": draw(1).expand(5), "gamma": draw(24)}
    given |= {"beta": draw(24)} if with_beta else {}
    stats = {"scale": scale, "mean": mean, "rstd": (variance + 1e-6).rsqrt()}
    views = {
        "weight": {"weight": spread(given["weight"])},
        "weight turned": {"weight": given["weight"].T.contiguous().T},
        "bias": {"bias": spread(given["bias"])},
        "bias expanded": {},
        "gamma": {"gamma": spread(given["gamma"])},
        "mean": {"mean": spread(mean), "rstd": spread(stats["rstd"])},
        "scale": {"scale": spread(scale)},
    }[name]
    plain = given | {"bias": given["bias"].contiguous()}
    strided = (given if name == "bias expanded" else plain) | {n: v for n, v in views.items() if n in given}
    found = []
    for parameters, known in ((plain, stats), (strided, stats | {n: v for n, v in views.items() if n in stats})):
        leaves = {n: t.detach().requires_grad_() for n, t in parameters.items()}
        y = probe_input(x, **leaves, **known, impl="triton")
        y.square().sum().backward()
        found.append([y.detach(), *(leaf.grad for leaf in leaves.values())])
    for wanted, got in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)  # strangers are 1e3
