"""Resizing 8-bit frames on any device, bit for bit as Pillow resizes them on the CPU.

Pillow resamples along one side, rounds to 8 bits, then resamples along the other. A filter grows with the scale when an
image shrinks, its weights are whole numbers of 2**-22, and sums are integers: so they are the same in any order, and on
any device. Which side comes first depends on Pillow's release (see `columns_first`); releases are compared with this
definition by tests, and by `images.resize` on the first frame of every shape.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from PIL.Image import Resampling
from torch import Tensor

PRECISION = 22  # bits after the point of a weight: 32, less 8 of a pixel and 2 for sums of negative and positive lobes
HAMMING = tuple(float(np.float32(x)) for x in (0.54, 0.46))  # Pillow has these two in single precision
CHUNK = 1 << 25  # values of the int32 sums that exist at a time


def _box(x: float) -> float:
    return float(-0.5 < x <= 0.5)


def _triangle(x: float) -> float:
    return max(0.0, 1.0 - abs(x))


def _hamming(x: float) -> float:
    x = abs(x)
    if x == 0 or x >= 1:
        return float(x == 0)
    return math.sin(math.pi * x) / (math.pi * x) * (HAMMING[0] + HAMMING[1] * math.cos(math.pi * x))


def _cubic(x: float) -> float:
    """Keys' cubic with a = -0.5."""
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2 else 0.0


def _sinc(x: float) -> float:
    return 1.0 if x == 0 else math.sin(math.pi * x) / (math.pi * x)


def _lanczos(x: float) -> float:
    return _sinc(x) * _sinc(x / 3) if -3 <= x < 3 else 0.0


FILTERS: dict[Resampling, tuple[float, Callable[[float], float]]] = {  # half the width, and the filter
    Resampling.BOX: (0.5, _box),
    Resampling.BILINEAR: (1.0, _triangle),
    Resampling.HAMMING: (1.0, _hamming),
    Resampling.BICUBIC: (2.0, _cubic),
    Resampling.LANCZOS: (3.0, _lanczos),
}


def resize_on_device(
    frames: Tensor,  # uint8 [F, H, W, 3], on any device
    size: tuple[int, int],  # (h, w)
    resample: Resampling,
) -> Tensor:  # uint8 [F, h, w, 3], on the same device
    """Each frame as `PIL.Image.resize(size, resample)` makes it. Raises ValueError for a filter that is not here."""
    if resample not in FILTERS:
        raise ValueError(f"resample must be one of {', '.join(f.name for f in FILTERS)}, got {resample!r}")
    if frames.dtype != torch.uint8 or frames.ndim != 4 or min(size) < 1:
        raise ValueError(
            f"wanted uint8 frames [F, H, W, 3] and a size of at least 1x1, got {frames.dtype} "
            f"{tuple(frames.shape)} and {size}"
        )
    height, width = frames.shape[1:3]
    out = frames.new_empty((len(frames), *size, frames.shape[3]))
    at_once = max(1, CHUNK // (max(height, size[0]) * size[1] * frames.shape[3]))
    for start in range(0, len(frames), at_once):
        x = frames[start : start + at_once]
        for dim in (1, 2) if columns_first((height, width), size) else (2, 1):
            x = _resample(x, dim, size[dim - 1], resample)
        out[start : start + at_once] = x
    return out


def columns_first(source: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether the installed Pillow resamples along columns first: the rounding between the passes differs."""
    shrinks = size[0] < source[0] and source[0] - size[0] > 2 * (source[1] - size[1])
    return shrinks and _pillow_chooses()


@lru_cache
def _pillow_chooses() -> bool:
    """Older releases always begin with rows; newer ones with columns where that leaves clearly fewer pixels."""
    noise = torch.randint(0, 256, (1, 61, 23, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    by_pillow = torch.from_numpy(np.array(Image.fromarray(noise[0].numpy()).resize((37, 29), Resampling.BICUBIC)))
    x = _resample(_resample(noise, 1, 29, Resampling.BICUBIC), 2, 37, Resampling.BICUBIC)
    return torch.equal(x[0], by_pillow)


def _resample(x: Tensor, dim: int, length: int, resample: Resampling) -> Tensor:
    """One pass along `dim`: the weighted sums, rounded, cut to 0 .. 255. None where the length stays."""
    if x.shape[dim] == length:
        return x
    places, weights = _taps(x.shape[dim], length, resample, x.device)
    shape = [1] * x.ndim
    shape[dim] = length
    total = None
    for place, weight in zip(places, weights, strict=True):
        part = x.index_select(dim, place) * weight.view(shape)  # int32
        total = part.add_(1 << (PRECISION - 1)) if total is None else total.add_(part)
    return total.bitwise_right_shift_(PRECISION).clamp_(0, 255).to(torch.uint8)


@lru_cache(maxsize=64)
def _taps(source: int, length: int, resample: Resampling, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of every output place the input places it sums, int64 [K, length], and their weights, int32 [K, length]."""
    rows = [_weights(source, length, place, resample) for place in range(length)]
    most = max(len(weights) for _, weights in rows)
    places = torch.tensor([[min(first + k, source - 1) for first, _ in rows] for k in range(most)])
    weights = torch.tensor([[w[k] if k < len(w) else 0 for _, w in rows] for k in range(most)], dtype=torch.int32)
    return places.to(device), weights.to(device)


def _weights(source: int, length: int, place: int, resample: Resampling) -> tuple[int, list[int]]:
    """The first input place that one output place sums, and the weights from there on, in units of 2**-22."""
    half, function = FILTERS[resample]
    scale = source / length
    stretch = max(scale, 1.0)  # against aliasing: a shrunk image's filter spans as many pixels as it shrinks
    center = (place + 0.5) * scale
    first = max(0, int(center - half * stretch + 0.5))
    stop = min(source, int(center + half * stretch + 0.5))
    values = [function((i - center + 0.5) * (1.0 / stretch)) for i in range(first, stop)]
    total = sum(values)
    if total != 0:
        values = [v / total for v in values]
    return first, [int(v * (1 << PRECISION) + math.copysign(0.5, v)) for v in values]
