"""Linear layers in fp8: weights rounded once at load, a scale per output channel; inputs as they come, one per token.

Sums are float32. Needs a CUDA device of compute capability 8.9 or newer. `fp8_linear` is the specification.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from spatialprobe.engine.types import PRECISION

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0  # its largest finite value
SCALE_MIN = torch.finfo(torch.float32).tiny  # the scale of a row of zeros
MULTIPLE = 16  # of channels in and out: what torch's scaled product takes
CAPABILITY = (8, 9)


def check_precision(name: str, device: torch.device, compute_dtype: str, offload: str) -> None:
    """Raises ValueError for a precision that is unknown or that this device or compute dtype does not have."""
    if name not in PRECISION:
        raise ValueError(f"precision must be one of {', '.join(PRECISION)}, got {name!r}")
    if name == "full":
        return
    needs = f"a CUDA device of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or newer"
    if device.type != "cuda":
        raise ValueError(f"precision {name} needs {needs}, got {device.type}")
    if (there := torch.cuda.get_device_capability(device)) < CAPABILITY:
        raise ValueError(f"precision {name} needs {needs}, got {torch.cuda.get_device_name(device)} of {there}")
    if compute_dtype != "bfloat16":
        raise ValueError(f"precision {name} needs compute_dtype bfloat16 around it, got {compute_dtype}")
    if offload != "none":
        raise ValueError(f"precision {name} needs blocks that stay on one device, got offload {offload}")


# -- the definition --------------------------------------------------------------------------------------------------


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:  # [..., K] -> fp8 [..., K], float32 [..., 1]
    """`q * scale` is `x` to within 1/16 of a value, or 1/1024 of its row's scale, whichever is more.

    The largest magnitude of a row becomes 448. A row with a value that is not finite becomes NaN.
    """
    x = x.float() if x.dtype == torch.float64 else x
    peak = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True)).float()  # without |x|, a copy
    scale = (peak / FP8_MAX).clamp_min(SCALE_MIN)
    wide = x / scale  # float32, and the one copy; in 16 bits x is widened value by value
    return wide.clamp_(-FP8_MAX, FP8_MAX).to(FP8), scale  # the cast alone makes NaN of what is beyond


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # [..., K], [N, K] -> [..., N]
    """The layer as it is defined: both rounded to fp8, products summed in float32, rounded to `x`'s dtype once."""
    return scaled_product(*quantise_rows(x), *quantise_rows(weight), bias, x.dtype)


def scaled_product(
    x: Tensor,  # fp8 [..., K]
    x_scale: Tensor,  # float32 [..., 1]
    weight: Tensor,  # fp8 [N, K]
    scale: Tensor,  # float32 [N, 1]
    bias: Tensor | None,  # [N]
    dtype: torch.dtype,
) -> Tensor:  # [..., N]
    out = (x.float() @ weight.float().T) * x_scale * scale[:, 0]
    return (out if bias is None else out + bias.float()).to(dtype)


# -- the layer -------------------------------------------------------------------------------------------------------


class Fp8Linear(nn.Module):
    """Stands for an `nn.Linear`; bfloat16 in and out. `emulate`, for tests, multiplies by the definition instead."""

    def __init__(self, linear: nn.Linear, *, emulate: bool = False):
        super().__init__()
        self.emulate = emulate
        weight, scale = quantise_rows(linear.weight.detach())
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("rounded", weight)  # fp8 [N, K]; not "weight": some code casts its input to that dtype
        self.register_buffer("scale", scale)  # float32 [N, 1]
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        q, scale = quantise_rows(x.flatten(0, -2).contiguous())  # torch's product takes rows that lie row by row
        if self.emulate:
            return scaled_product(q, scale, self.rounded, self.scale, self.bias, x.dtype).unflatten(0, x.shape[:-1])
        # Without fast accumulation, which sums in fewer bits. The second operand must lie column by column.
        out = torch._scaled_mm(
            q,
            self.rounded.T,
            scale_a=scale,
            scale_b=self.scale.T,
            bias=self.bias,
            out_dtype=x.dtype,
            use_fast_accum=False,
        )
        return out.unflatten(0, x.shape[:-1])


def quantise_linears(
    blocks: Iterable[nn.Module], *, emulate: bool = False
) -> list[int]:  # [layers in fp8, all of them]
    """Puts Fp8Linear in the place of the blocks' linear layers of bfloat16.

    Layers that a library keeps in float32, and those whose channels are no multiples of 16, stay what they are. Raises
    ValueError where there is not one to quantise.
    """
    done = total = 0
    for block in blocks:
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if not isinstance(child, nn.Linear):
                    continue
                total += 1
                fits = child.in_features % MULTIPLE == 0 and child.out_features % MULTIPLE == 0
                if fits and child.weight.dtype == torch.bfloat16:
                    setattr(parent, name, Fp8Linear(child, emulate=emulate))
                    done += 1
    if not done:
        raise ValueError(
            f"precision fp8 finds none of the blocks' {total} linear layers in bfloat16 and of a fitting size"
        )
    return [done, total]
