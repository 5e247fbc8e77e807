"""What the kernel files share: which implementation runs, the launch for a device, rounding that tests can trust.

It does not know any kernel.
"""

import os
from collections.abc import Mapping
from typing import Literal, TypeVar, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

Impl = Literal["auto", "triton", "torch"]
Row = TypeVar("Row")

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # triton reads it when a kernel is decorated
_INTERPRET = tl.constexpr(INTERPRET)


def use_triton(impl: Impl, x: Tensor) -> bool:
    """Whether the Triton kernel runs on `x`: "auto" means on CUDA. What is named never falls back.

    Raises ValueError for another name, and for "triton" where it cannot run: off CUDA, unless interpreted.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {', '.join(get_args(Impl))}, got {impl!r}")
    if impl == "triton" and not (x.is_cuda or INTERPRET):
        raise ValueError(f"impl='triton' needs a CUDA tensor, got one on {x.device}; TRITON_INTERPRET=1 interprets it")
    return impl == "triton" or (impl == "auto" and x.is_cuda)


def capability(device: torch.device) -> int:
    """Compute capability as one number, 90 for sm_90; interpreted kernels launch like sm_80's."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launch_for(table: Mapping[int, Row], device: torch.device) -> Row:
    """The row of a launch table for `device`: the newest one that is not newer than it.

    The consumer parts (sm_86, 89 and 120) have less shared memory than their elder data-centre kin, and take the row
    of sm_80, which must fit their 99 KiB. Raises ValueError for a device older than all rows.
    """
    sm = capability(device)
    wanted = 80 if sm in (86, 87, 89) or sm >= 120 else sm
    rows = [row for row in table if row <= wanted]
    if not rows:
        raise ValueError(f"the Triton kernels need sm_{min(table)} or newer, got sm_{sm}; impl='torch' runs everywhere")
    return table[max(rows)]


@triton.jit
def cast(x, dtype: tl.constexpr):
    """float32 `x` in `dtype`, to nearest even; float8_e4m3 takes |x| <= 448 and int8 whole numbers.

    The interpreter truncates to bfloat16 and float8, so there the value is made representable first.
    """
    if _INTERPRET:
        if dtype == tl.bfloat16:
            bits = x.to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
            x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
        elif dtype == tl.float8e4nv:
            bits = x.to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000  # 3 bits of mantissa stay
            step = 12582912.0 / 512  # 1.5 * 2**23 * 2**-9: below 2**-6 the values are multiples of 2**-9
            small = (x + step) - step
            x = tl.where(tl.abs(x) < 0.015625, small, bits.to(tl.float32, bitcast=True))
    return x.to(dtype)
