"""Resizing frames as the models' own processors do: with Pillow, in 8 bits."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def resize(
    frames: Tensor,  # uint8 [F, 3, Hi, Wi]
    size: tuple[int, int],  # (H, W)
    resample: Image.Resampling,
) -> Tensor:  # uint8 [F, H, W, 3]
    """Each frame squashed to `size`; a frame that has it already is passed through untouched."""
    pixels = frames.permute(0, 2, 3, 1).contiguous()
    if tuple(pixels.shape[1:3]) == size:
        return pixels
    out = np.empty((len(frames), *size, 3), np.uint8)
    for f, frame in enumerate(pixels.numpy()):
        out[f] = Image.fromarray(frame).resize((size[1], size[0]), resample)
    return torch.from_numpy(out)


def signed(video: Tensor, dtype: torch.dtype) -> Tensor:  # uint8 [F, H, W, 3] -> [1, 3, F, H, W] in -1..1
    """Pixels as diffusers' video processors hand them to a VAE, rounded as they round them."""
    return (2.0 * (video.permute(3, 0, 1, 2)[None].float() / 255.0) - 1.0).to(dtype).contiguous()
