"""The pooling definition against slow float64 arithmetic."""

import pytest
import torch

from spatialprobe.kernels.pool_features import dequantize, finish, pool_features, token_stats


def slow_pool(x, rows, grid):
    """adaptive_avg_pool2d by its definition: bin i covers floor(i*n/m) up to ceil((i+1)*n/m)."""
    batch, _, height, width, channels = x.shape
    h, w = grid
    out = torch.zeros(batch, len(rows), h, w, channels, dtype=torch.float64)
    for r, row in enumerate(rows):
        for i in range(h):
            for j in range(w):
                top, bottom = i * height // h, -(-(i + 1) * height // h)
                left, right = j * width // w, -(-(j + 1) * width // w)
                out[:, r, i, j] = x[:, row, top:bottom, left:right].double().mean((1, 2))
    return out


@pytest.mark.parametrize(("tokens", "grid"), [((6, 8), (3, 4)), ((6, 9), (3, 4)), ((5, 7), (1, 1)), ((3, 3), (3, 3))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pooling_is_the_mean_over_adaptive_bins(tokens, grid, dtype):
    x = torch.randn(2, 5, *tokens, 13, generator=torch.Generator().manual_seed(0)).to(dtype)
    pooled = pool_features(x, (0, 3, 4), grid)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled.double(), slow_pool(x, (0, 3, 4), grid), rtol=0, atol=1e-6)


@pytest.mark.parametrize("grid", [None, (2, 3)])
def test_steps_add_up_to_their_mean_and_the_input_is_untouched(grid):
    steps = torch.randn(3, 2, 4, 4, 6, 5)
    before, total = steps.clone(), None
    for x in steps:
        total = pool_features(x, (0, 1, 2, 3), grid, into=total, weight=1 / 3)
    expected = pool_features(steps.double().mean(0).float(), (0, 1, 2, 3), grid)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(steps, before)


def test_wrong_arguments_are_named():
    x = torch.zeros(1, 2, 4, 4, 3)
    with pytest.raises(ValueError, match=r"\[B, T, H, W, C\]"):
        pool_features(x[0], (0,), None)
    with pytest.raises(ValueError, match="2 rows"):
        pool_features(x, (2,), None)
    with pytest.raises(ValueError, match="larger than the 4x4"):
        pool_features(x, (0,), (5, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_finish_rounds_to_nearest(dtype):
    x = torch.randn(3, 4, 7) * 10
    done = finish(x, dtype)
    assert torch.equal(done.data, x.to(dtype))
    assert done.scale is None


@pytest.mark.parametrize(("dtype", "bound"), [(torch.int8, 0.5 / 127), (torch.float8_e4m3fn, 1 / 16)])
def test_quantised_values_are_within_half_a_step(dtype, bound):
    x = torch.randn(50, 33) * torch.logspace(-6, 4, 50)[:, None]
    x[7] = 0
    done = finish(x, dtype)
    back = dequantize(done.data, done.scale)
    peak = x.abs().amax(-1, keepdim=True)
    # int8 steps are equal over the range; float8_e4m3 has 3 bits of mantissa, and denormals below 2**-6 of 448
    error = (back - x).abs() / (peak if dtype == torch.int8 else x.abs().clamp_min(peak / 448 / 64))
    assert error[peak[:, 0] > 0].max() <= bound * 1.001
    assert torch.equal(back[7], x[7])
    assert done.data.float().abs().amax(-1)[0] == (127 if dtype == torch.int8 else 448)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_statistics_are_those_of_the_stored_values(dtype):
    x = torch.randn(5, 64) * 3 + 1
    done = finish(x, dtype)
    stored = dequantize(done.data, done.scale).double()
    torch.testing.assert_close(done.mean.double(), stored.mean(-1), rtol=1e-5, atol=1e-6)
    rstd = 1 / (stored.var(-1, correction=0) + 1e-6).sqrt()
    torch.testing.assert_close(done.rstd.double(), rstd, rtol=1e-5, atol=1e-6)
    layer_norm = torch.nn.functional.layer_norm(stored, (64,), eps=1e-6)
    by_stats = (stored - done.mean[:, None]) * done.rstd[:, None]
    torch.testing.assert_close(by_stats, layer_norm, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_value_shows_in_its_tokens_mean(dtype, bad):
    x = torch.ones(4, 8)
    x[2, 3] = bad
    assert torch.isfinite(finish(x, dtype).mean).tolist() == [True, True, False, True]


def test_float16_overflow_shows_in_its_tokens_mean():
    assert not torch.isfinite(finish(torch.tensor([[70000.0, 0.0]]), torch.float16).mean).any()


def test_token_stats_of_a_constant_token():
    mean, rstd = token_stats(torch.full((1, 8), 3.0))
    assert mean.item() == 3.0
    assert rstd.item() == pytest.approx(1000.0)
