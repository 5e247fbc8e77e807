"""Joined features of several stores against plain torch in float64: values, grids, dtypes and statistics."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spatialprobe.kernels.pool_features import finish
from spatialprobe.probes.fusion import Stored, fuse

B, S = 2, 3
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}


def stored(grid: tuple[int, int], channels: int, dtype: str = "float16", *, seed: int = 0, gain: float = 1.0) -> Stored:
    """Tokens with means and sizes of their own, as a store would hold them."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(B, S, *grid, channels, generator=rng)
    x = gain * (x * (0.5 + torch.rand(B, S, *grid, 1, generator=rng)) + torch.randn(B, S, *grid, 1, generator=rng))
    done = finish(x, DTYPES[dtype])
    return Stored(done.data, done.mean, done.rstd, done.scale)


def values(part: Stored) -> Tensor:  # float64
    data = part.data.double()
    return data if part.scale is None else data * part.scale[..., None].double()


def pooled(x: Tensor, grid: tuple[int, int]) -> Tensor:
    return F.adaptive_avg_pool2d(x.flatten(0, 1).permute(0, 3, 1, 2), grid).permute(0, 2, 3, 1).unflatten(0, (B, S))


def normalised(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def assert_statistics(fused: Stored) -> None:
    x = fused.data.double()
    torch.testing.assert_close(fused.mean.double(), x.mean(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fused.rstd.double(), (x.var(-1, correction=0) + 1e-6).rsqrt(), rtol=1e-5, atol=0)
    assert fused.scale is None


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("how", ["norm", "concat"])
def test_one_store_stays_as_it_is(how, dtype):
    part = stored((4, 5), 7, dtype)
    assert fuse([part], how) is part


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_norm_is_layer_norm_of_each_part_in_float16(dtype):
    parts = [stored((4, 5), 7, dtype, gain=50.0), stored((4, 5), 24, "float16", seed=1, gain=0.02)]
    fused = fuse(parts, "norm")
    assert fused.data.dtype == torch.float16
    wanted = torch.cat([normalised(values(part)) for part in parts], -1)
    off = (fused.data.double() - wanted).abs()
    assert (off <= 2.0**-11 * wanted.abs() + 1e-5).all()  # float16's rounding, and float32's before it
    assert_statistics(fused)


def test_concat_leaves_values_of_one_dtype():
    parts = [stored((4, 5), c, "bfloat16", seed=c, gain=c) for c in (3, 1, 8)]
    fused = fuse(parts, "concat")
    assert fused.data.dtype == torch.bfloat16
    assert torch.equal(fused.data, torch.cat([part.data for part in parts], -1))
    assert_statistics(fused)


@pytest.mark.parametrize(("first", "second"), [("int8", "int8"), ("fp8", "int8"), ("float16", "bfloat16")])
def test_concat_of_quantised_or_unequal_dtypes_is_float32(first, second):
    parts = [stored((2, 3), 5, first), stored((2, 3), 4, second, seed=1)]
    fused = fuse(parts, "concat")
    assert fused.data.dtype == torch.float32
    wanted = torch.cat([values(part) for part in parts], -1)
    torch.testing.assert_close(fused.data.double(), wanted, rtol=1e-6, atol=0)
    assert_statistics(fused)


@pytest.mark.parametrize(
    ("grids", "smallest"), [([(4, 6), (2, 3)], (2, 3)), ([(4, 3), (2, 7)], (2, 3)), ([(5, 7), (3, 4), (4, 4)], (3, 4))]
)
@pytest.mark.parametrize("how", ["norm", "concat"])
def test_grids_are_pooled_to_the_smallest_sides_before_they_are_normalised(how, grids, smallest):
    parts = [stored(grid, 6 + i, "int8" if i else "float16", seed=i, gain=3.0) for i, grid in enumerate(grids)]
    fused = fuse(parts, how)
    assert fused.data.shape == (B, S, *smallest, sum(6 + i for i in range(len(grids))))
    aligned = [pooled(values(part), smallest) for part in parts]
    wanted = torch.cat([normalised(x) if how == "norm" else x for x in aligned], -1)
    rounding = 2.0**-11 if how == "norm" else 1e-6
    assert ((fused.data.double() - wanted).abs() <= rounding * wanted.abs() + 1e-5).all()
    assert_statistics(fused)


def test_norm_gives_small_features_the_weight_of_large_ones():
    """What it is for: the mean square of each store's channels is 1, whatever their size was."""
    fused = fuse([stored((4, 5), 8, gain=100.0), stored((4, 5), 8, seed=1, gain=0.1)], "norm").data.double()
    for part in fused.split(8, -1):
        assert part.square().mean(-1).sub(1).abs().max() < 5e-3


def test_a_constant_token_stays_finite():
    flat = torch.full((B, S, 1, 1, 4), 3.0)
    part = stored((1, 1), 4)
    done = finish(flat, torch.float16)
    fused = fuse([Stored(done.data, done.mean, done.rstd), part], "norm")
    assert torch.equal(fused.data[..., :4], torch.zeros(B, S, 1, 1, 4, dtype=torch.float16))


def test_parts_of_other_clips_or_views():
    part = stored((2, 3), 4)
    fewer = Stored(part.data[:, :2], part.mean[:, :2], part.rstd[:, :2])
    with pytest.raises(ValueError, match=r"same clips and views, got \[.*2, 3, 2, 3, 4.*2, 2, 2, 3, 4"):
        fuse([part, fewer], "norm")
