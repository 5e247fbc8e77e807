"""What kernel files share: the choice of implementation and launch, and rounding under the interpreter."""

import pytest
import torch
import triton
import triton.language as tl

from spatialprobe.kernels import launch
from spatialprobe.kernels.launch import cast, launch_for, use_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TABLE = {80: "ampere", 90: "hopper", 100: "blackwell"}


@pytest.mark.parametrize(
    ("sm", "row"),
    [(80, "ampere"), (86, "ampere"), (87, "ampere"), (89, "ampere"), (90, "hopper"), (100, "blackwell"),
     (103, "blackwell"), (110, "blackwell"), (120, "ampere"), (121, "ampere")],
)  # fmt: skip
def test_a_device_takes_the_newest_row_that_fits_it(sm, row, monkeypatch):
    monkeypatch.setattr(launch, "capability", lambda device: sm)
    assert launch_for(TABLE, torch.device("cuda")) == row


def test_a_device_older_than_all_rows_is_named(monkeypatch):
    monkeypatch.setattr(launch, "capability", lambda device: 75)
    with pytest.raises(ValueError, match=r"need sm_80 or newer, got sm_75; impl='torch' runs everywhere"):
        launch_for(TABLE, torch.device("cuda"))


def test_auto_is_triton_on_cuda_alone_and_a_name_never_falls_back(monkeypatch):
    x = torch.zeros(1)
    assert not use_triton("auto", x)
    assert not use_triton("torch", x)
    monkeypatch.setattr(launch, "INTERPRET", True)
    assert use_triton("triton", x)
    monkeypatch.setattr(launch, "INTERPRET", False)
    with pytest.raises(ValueError, match="impl='triton' needs a CUDA tensor, got one on cpu"):
        use_triton("triton", x)
    with pytest.raises(ValueError, match="impl must be one of auto, triton, torch, got 'cuda'"):
        use_triton("cuda", x)


@triton.jit
def cast_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, cast(tl.load(x_ptr + i, i < n, 0.0), out_ptr.dtype.element_ty), i < n)


def halfway(dtype, values):
    """Numbers half a step above representable ones, where rounding goes to even, and their neighbours."""
    x = values.to(dtype).float()
    above = (
        torch.nextafter(x.to(dtype), torch.tensor(float("inf")).to(dtype)).float()
        if dtype != torch.float8_e4m3fn
        else x * 1.125
    )
    middle = (x + above) / 2
    return torch.cat([middle, torch.nextafter(middle, x), torch.nextafter(middle, above)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_casts_round_as_torch_does(dtype):
    rng = torch.Generator().manual_seed(0)
    normal = torch.randn(1000, generator=rng)
    parts = [normal, normal * 100, normal * 0.01, halfway(dtype, normal.abs()), torch.tensor([0.0, -0.0])]
    if dtype == torch.float8_e4m3fn:
        steps = torch.arange(0, 33) * 2.0**-10  # the subnormal values, below 2**-6, and halves between them
        parts = [*(p.clamp(-448, 448) for p in parts), steps, -steps, torch.tensor([448.0, -448.0, 447.9, 432.1])]
    else:
        parts.append(torch.tensor([float("nan"), float("inf"), -float("inf"), 3.4e38, 65504.0, 65519.9, 65520.0]))
    x = torch.cat(parts).to(DEVICE)
    out = torch.empty(len(x), dtype=dtype, device=DEVICE)
    cast_kernel[(1,)](x, out, len(x), BLOCK=triton.next_power_of_2(len(x)))
    torch.testing.assert_close(out.float(), x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)
