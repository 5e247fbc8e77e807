"""Intrinsics of images of one size for images of another; whole pixel coordinates are pixel centres."""

import torch
from torch import Tensor

OFF_CENTRE = 0.25  # of an image's side: a principal point farther from the middle is that of larger or smaller images


def check_centre(intrinsic: Tensor, size: tuple[int, int]) -> None:  # [F, 3, 3] pixels, (H, W)
    """Raises ValueError for intrinsics that cannot be of images of that size."""
    centre = intrinsic[:, :2, 2] / torch.tensor([size[1], size[0]])
    if (centre - 0.5).abs().max() > OFF_CENTRE:
        raise ValueError(
            f"intrinsics have their principal point at {intrinsic[0, :2, 2].tolist()} of images of "
            f"{size[0]}x{size[1]} pixels; if they are of others (ScanNet's of 968x1296), say --intrinsic-size"
        )


def resized_intrinsic(intrinsic: Tensor, of: tuple[int, int], to: tuple[int, int]) -> Tensor:  # [F, 3, 3] -> [F, 3, 3]
    """Of images of (H, W) `of`, resized to `to`: u + 1/2 scales, u does not."""
    resizing = torch.eye(3, dtype=intrinsic.dtype)
    for axis in (0, 1):
        scale = to[1 - axis] / of[1 - axis]
        resizing[axis, axis], resizing[axis, 2] = scale, 0.5 * scale - 0.5
    return resizing @ intrinsic
