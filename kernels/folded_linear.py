"""LayerNorm and Linear as one product of Triton or cuBLAS, for G feature tensors with H heads of width D on each.

    LayerNorm(x) W^T + b = rstd (x W''^T - mean * sum of W'') + b',    W'' = gamma W - its mean over C,  b' = W beta + b

W'' is rounded to the dtype of the product and its sums are taken after that, so that the mean leaves exactly; centred,
the sums are small, and so is what they remove. T tokens of all tensors, M of one, N = H * D columns, C channels.
This is what `folded_forward.py` and `folded_backward.py` share; `probe_input.py` checks what comes to them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from spatialprobe.kernels.launch import INTERPRET

L2_NORM_EPS = 1e-12  # least norm that is divided by, as in torch.nn.functional.normalize
_INTERPRET = tl.constexpr(INTERPRET)
VALUES = 2048  # that a program works on where it multiplies nothing, or one row of a head if that is more
QUANTISED = (torch.int8, torch.float8_e4m3fn)  # both exact in bfloat16, in which they are multiplied


@dataclass(frozen=True)
class Tile:
    """One program's share of a product: of [M, N] summed over C, or of a gradient's [C, N] summed over M."""

    rows: int
    columns: int  # at most; fewer where there are fewer columns
    depth: int  # of one step along the summed axis
    warps: int
    stages: int


@dataclass(frozen=True)
class Launch:
    """How a device multiplies."""

    tile: Tile
    float32: Tile  # where features are float32
    cublas: int  # columns from which on 16-bit features with stored statistics go through cuBLAS and a fused epilogue
    cublas_backward: int  # columns from which on the gradient of 16-bit features does
    programs: int  # that fill the device; a gradient with fewer tiles is split over M into as many
    e4m3: bool  # whether the device converts from float8_e4m3 itself


# By compute capability. Chosen ahead, from sizes and instruction sets; compiled for each, not yet measured.
# 128 x 128 is the largest tile that holds its sums, GELU and norms in registers. While one tile holds all columns, x is
# read once, nothing else is large, and memory is what such a product waits for. With more columns it waits for the
# tensor cores, which cuBLAS feeds better, and the epilogue's pass over [M, N] is small beside x. A gradient has few
# tiles and a long sum, which Triton splits into enough programs, two per multiprocessor; above two tiles of columns
# cuBLAS finds enough by itself. float32 is multiplied by the plain units, in IEEE precision: TF32 would drop 13 of its
# 24 bits unasked. Its tiles are small because every product of two numbers is an instruction of a thread there.
_PLAIN = Tile(64, 64, 32, 8, 3)
LAUNCHES = {
    # mma.sync; 4 stages of 16 KiB fit the 99 KiB of the consumer parts, also with the scratch for a tile's transpose
    80: Launch(Tile(128, 128, 32, 8, 4), _PLAIN, cublas=129, cublas_backward=257, programs=216, e4m3=False),
    # wgmma, 64 rows per 4 warps; steps of 64 are rows of 128 bytes; 4 stages of 32 KiB, of 227
    90: Launch(Tile(128, 128, 64, 8, 4), _PLAIN, cublas=129, cublas_backward=257, programs=264, e4m3=True),
    # tcgen05, whose sums lie in tensor memory
    100: Launch(Tile(128, 128, 64, 8, 4), _PLAIN, cublas=129, cublas_backward=257, programs=296, e4m3=True),
}


def fold(weight: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None) -> tuple[Tensor, Tensor]:
    """W'' [..., D, C] and b' [..., D] in the dtype of `weight` [..., D, C]; the rest is [..., D] or [..., C]."""
    scaled = weight if gamma is None else weight * gamma[..., None, :]
    shift = weight.new_zeros(weight.shape[:-1]) if bias is None else bias
    if beta is not None:
        shift = shift + (weight * beta[..., None, :]).sum(-1)
    return scaled - scaled.mean(-1, keepdim=True), shift


# -- what kernels share -----------------------------------------------------------------------------------------------


@triton.jit
def find_rows(table_ptr, rows):
    """Of this program's feature tensor: its number of rows, and the first one's place among those of all."""
    first = tl.cast(0, tl.int64)
    if table_ptr is not None:
        entry = table_ptr + tl.program_id(1) * 4
        rows, first = tl.load(entry), tl.load(entry + 1)
    return rows, first


@triton.jit
def find_features(table_ptr, x_ptr, stride, UNIT: tl.constexpr, ALIGN: tl.constexpr):
    """Of this program's feature tensor: its address and the stride of its rows."""
    if table_ptr is not None:
        entry = table_ptr + tl.program_id(1) * 4
        x_ptr = tl.multiple_of(tl.load(entry + 2).to(x_ptr.dtype), ALIGN)
        stride = tl.load(entry + 3)
    return x_ptr, tl.cast(stride, tl.int64) * UNIT


@triton.jit
def find_columns(tile, heads, width, PADDED: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of a column tile: each column's place among N, and whether it is one. Heads begin at multiples of PADDED."""
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    head, place = column // PADDED, column % PADDED
    return head * width + place, (head < heads) & (place < width)


@triton.jit
def exact(x):
    """Stored values as the product takes them."""
    if x.dtype == tl.uint8:  # float8_e4m3 as bits: those of a float32, but for the exponent's 127 - 7 = 120
        bits = x.to(tl.int32)
        size = ((bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 1329227995784915872903807060280344576.0
        size = tl.where((bits & 0x7F) == 0x7F, float("nan"), size)
        x = tl.where(bits > 127, -size, size)
        if not _INTERPRET:
            x = x.to(tl.bfloat16)
    elif _INTERPRET:  # its products of bfloat16 are wrong
        x = x.to(tl.float32)
    elif x.dtype.primitive_bitwidth == 8:
        x = x.to(tl.bfloat16)
    return x


# -- what launches share ----------------------------------------------------------------------------------------------


def columns_of(heads: int, width: int, whole: bool, widest: int) -> dict[str, int]:
    """How [H, D] columns are cut: into tiles of `whole` heads, or as they come; wider than `widest` only for a head."""
    if not whole:
        heads, width = 1, heads * width
    padded = triton.next_power_of_2(width)
    block = padded if whole and padded > widest else min(triton.next_power_of_2(max(heads * padded, 16)), widest)
    tiles = triton.cdiv(heads * padded, block)
    return {"heads": heads, "width": width, "PADDED": padded, "BLOCK_N": block, "tiles": tiles}


def addresses(x: Sequence[Tensor], launch: Launch) -> tuple[dict, dict]:
    """How kernels find the rows of one feature tensor, or by a table of several; and the features in them."""
    if x[0].dtype == torch.float8_e4m3fn and not launch.e4m3:
        x = [one.view(torch.uint8) for one in x]
    if len(x) == 1:
        rows = {"table_ptr": None, "rows": len(x[0])}
        return rows, {"x_ptr": x[0], "stride": x[0].stride(0), "UNIT": 1, "ALIGN": 1}
    unit = math.gcd(16, *(one.stride(0) for one in x))  # tells the compiler what divides each stride
    table = torch.tensor(
        [(len(one), at.start, one.data_ptr(), one.stride(0) // unit) for one, at in zip(x, rows_of(x), strict=True)]
    )
    if x[0].is_cuda:  # pinned, or the copy would wait for all that the device has yet to do
        table = table.pin_memory().to(x[0].device, non_blocking=True)
    align = math.gcd(16, *(one.data_ptr() for one in x))
    return {"table_ptr": table, "rows": 0}, {"x_ptr": x[0], "stride": 0, "UNIT": unit, "ALIGN": align}


def rows_of(x: Sequence[Tensor]) -> list[slice]:
    """Where each tensor's tokens are among those of all."""
    ends = list(accumulate(map(len, x), initial=0))
    return [slice(*pair) for pair in pairwise(ends)]


def through_cublas(x: Tensor, columns: int, least: int) -> bool:
    return columns >= least and x.dtype in (torch.bfloat16, torch.float16)


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b summed in float32 by cuBLAS; interpreted, by what the CPU has."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return (a.float() @ b.float()).to(dtype)


def warps_for(values: int) -> int:
    """Of a program that works on so many values, element by element: 16 per thread, while there are threads."""
    return min(max(values // 512, 4), 16)
