"""Cameras as matrices: intrinsics of images of another size, and points of depth. Whole pixel coordinates are pixel
centres."""

import torch
from torch import Tensor

OFF_CENTRE = 0.25  # of an image's side: a principal point farther from the middle is that of larger or smaller images


def check_centre(intrinsic: Tensor, size: tuple[int, int]) -> None:  # [F, 3, 3] pixels, (H, W)
    """Raises ValueError for intrinsics that cannot be of images of that size."""
    off = (intrinsic[:, :2, 2] / torch.tensor([size[1], size[0]]) - 0.5).abs().amax(1)
    if off.max() > OFF_CENTRE:
        raise ValueError(
            f"intrinsics have their principal point at {intrinsic[off.argmax(), :2, 2].tolist()} of images of "
            f"{size[0]}x{size[1]} pixels; if they are of others (ScanNet's of 968x1296), say --intrinsic-size"
        )


def resized_intrinsic(intrinsic: Tensor, of: tuple[int, int], to: tuple[int, int]) -> Tensor:  # [F, 3, 3] -> [F, 3, 3]
    """Of images of (H, W) `of`, resized to `to`: u + 1/2 scales, u does not."""
    resizing = torch.eye(3, dtype=intrinsic.dtype)
    for axis in (0, 1):
        scale = to[1 - axis] / of[1 - axis]
        resizing[axis, axis], resizing[axis, 2] = scale, 0.5 * scale - 0.5
    return resizing @ intrinsic


def unproject(
    depth: Tensor,  # [F, H, W]
    extrinsic: Tensor,  # [F, 3, 4] world-to-camera
    intrinsic: Tensor,  # [F, 3, 3] pixels
) -> Tensor:  # float32 [F, H, W, 3]
    """World points of depth maps."""
    height, width = depth.shape[1:]
    v, u = torch.arange(height).double()[:, None, None], torch.arange(width).double()[:, None]
    points = torch.empty(*depth.shape, 3)
    for f, (distance, camera) in enumerate(zip(depth, extrinsic.double(), strict=True)):  # all at once would be GB
        turn, move = camera[:, :3].T, camera[:, 3]
        rays = turn @ intrinsic[f].double().inverse()  # x_world = turn (K^-1 [u v 1] depth - move)
        directions = u * rays[:, 0] + v * rays[:, 1] + rays[:, 2]  # [H, W, 3]
        points[f] = directions * distance[..., None].double() - turn @ move
    return points
