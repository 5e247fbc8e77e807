"""Resizing frames as the models' own processors do: in 8 bits, by Pillow on the CPU, with its bits on a device."""

from functools import lru_cache

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from spatialprobe.engine.device.resize import resize_on_device


def resize(
    frames: Tensor,  # uint8 [F, 3, Hi, Wi]
    size: tuple[int, int],  # (H, W)
    resample: Image.Resampling,
) -> Tensor:  # uint8 [F, H, W, 3]
    """Each frame squashed to `size`; a frame that has it already is passed through untouched. Runs where frames are."""
    pixels = frames.permute(0, 2, 3, 1).contiguous()
    if tuple(pixels.shape[1:3]) == size:
        return pixels
    if not on_host(frames):
        if frames.device.type != "meta":
            check_against_pillow(tuple(pixels.shape[1:3]), size, resample, frames.device)
        return resize_on_device(pixels, size, resample)
    return by_pillow(pixels, size, resample)


def on_host(frames: Tensor) -> bool:
    return frames.device.type == "cpu"


def by_pillow(pixels: Tensor, size: tuple[int, int], resample: Image.Resampling) -> Tensor:  # uint8 [F, H, W, 3]
    out = np.empty((len(pixels), *size, 3), np.uint8)
    for f, frame in enumerate(pixels.numpy()):
        out[f] = Image.fromarray(frame).resize((size[1], size[0]), resample)
    return torch.from_numpy(out)


@lru_cache(maxsize=256)
def check_against_pillow(
    source: tuple[int, int], size: tuple[int, int], resample: Image.Resampling, device: torch.device
) -> None:
    """Once per shape, on noise: raises RuntimeError if the installed Pillow resizes otherwise than the device does."""
    noise = torch.randint(0, 256, (1, *source, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    if not torch.equal(resize_on_device(noise.to(device), size, resample).cpu(), by_pillow(noise, size, resample)):
        raise RuntimeError(
            f"Pillow {PIL.__version__} does not resize {source} to {size} as {device} does: run with --resize host"
        )


def signed(video: Tensor, dtype: torch.dtype) -> Tensor:  # uint8 [F, H, W, 3] -> [1, 3, F, H, W] in -1..1
    """Pixels as diffusers' video processors hand them to a VAE, rounded as they round them."""
    x = video.permute(3, 0, 1, 2)[None].float()
    return x.div_(255.0).mul_(2.0).sub_(1.0).to(dtype).contiguous()  # in place: of a window it is half a gigabyte
