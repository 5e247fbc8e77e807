"""What the probe input's tests share: features and parameters, and how far off rounding may be."""

import math

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUANTISED = (torch.int8, torch.float8_e4m3fn)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, *QUANTISED)
# of weights and of S to the product's dtype: half a unit in the last place, relative
ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-11, **dict.fromkeys((torch.bfloat16, *QUANTISED), 2.0**-8)}
FLOAT32 = 2.0**-24


def poison(monkeypatch) -> None:
    """Makes NaN of what a kernel does not write."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)


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


def summed(n):
    """What a float32 sum of n may be off by, relative to the sum of magnitudes: 6 sqrt(n) roundings, and some more.

    The chance of more than that is 3e-8 (Higham and Mary 2019).
    """
    return 6 * (n**0.5 + 8) * FLOAT32


def bound(x, known, weight, gamma, y):
    """What the fused product may be off by: W'' is rounded, and sums are float32."""
    values = values_of(x, known)
    variance, mean = torch.var_mean(values, -1, correction=0, keepdim=True)
    rstd = (variance + 1e-6).rsqrt()
    folded = (weight * gamma).double()
    folded = (folded - folded.mean(-1, keepdim=True)).abs()
    rounded = ROUNDING[x.dtype] * ((values - mean).abs() * rstd) @ folded.T
    return rounded + summed(values.shape[-1]) * (values.abs() * rstd @ (folded + FLOAT32).T + y.abs() + 1)


def gradient_bound(x, known, parameters, upstream):
    """What the gradients of weight, bias, gamma and beta may be off by: S is rounded, and sums are float32."""
    weight, _, gamma, beta = (p.double().abs() for p in parameters)
    values, dz = values_of(x, known), upstream.double().abs()
    variance, mean = torch.var_mean(values, -1, correction=0, keepdim=True)
    s = dz * (variance + 1e-6).rsqrt()
    g = ROUNDING[x.dtype] * s.T @ (values - mean).abs() + summed(len(x)) * s.T @ (values.abs() + mean.abs())
    g = g + summed(len(weight)) * s.T @ (values - mean).abs()
    db = (summed(len(x)) + summed(len(weight))) * dz.sum(0)
    return [g * gamma + db[:, None] * beta, db, (weight * g).sum(0), weight.T @ db]


def within(y, reference, allowed):
    off = ((y - reference).abs() / allowed).max()
    assert off <= 1, f"{off:.2f} of what rounding explains"
