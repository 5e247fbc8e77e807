"""Cameras as numbers: bases, quaternions, relative poses, angles, similarity transforms.

Conventions as in `labels`: OpenCV cameras (x right, y down, z forward); an extrinsic is world-to-camera, [R | t] with
x_camera = R x_world + t. A quaternion is (x, y, z, w), scalar last. Everything keeps its input's dtype.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

POSE = 9  # numbers of an encoded camera: translation 3, quaternion 4, field of view 2


def inverse(extrinsic: Tensor) -> Tensor:  # [..., 3, 4]
    """Camera-to-world of world-to-camera, and the other way round."""
    turned = extrinsic[..., :3].mT
    return torch.cat([turned, -turned @ extrinsic[..., 3:]], -1)


def compose(after: Tensor, before: Tensor) -> Tensor:  # [..., 3, 4] each
    """The rigid motion that does `before`, then `after`."""
    turn = after[..., :3]
    return torch.cat([turn @ before[..., :3], turn @ before[..., 3:] + after[..., 3:]], -1)


def rebase(
    extrinsic: Tensor,  # [B, S, 3, 4]
    points: Tensor,  # [B, S, H, W, 3] world
) -> tuple[Tensor, Tensor]:
    """The same cameras and points in the first view's camera coordinates: its extrinsic becomes [I | 0]."""
    wide = extrinsic.double()
    turn, move = wide[:, :1, :, :3], wide[:, :1, :, 3:]
    back = torch.linalg.inv(turn)  # the transpose of a float32 rotation is off by 1e-7, times a far world's distance
    centre = -back @ move
    rebased = torch.cat([wide[..., :3] @ back, wide[..., :3] @ centre + wide[..., 3:]], -1)
    centred = points - centre[:, :, None, None, :, 0].to(points.dtype)
    moved = torch.einsum("bij,bshwj->bshwi", turn[:, 0].to(points.dtype), centred)
    return rebased.to(extrinsic.dtype), moved


def quaternion(rotation: Tensor) -> Tensor:  # [..., 3, 3] -> [..., 4]
    """Unit (x, y, z, w) of a rotation matrix, w >= 0; where w is 0 the largest of the others is positive.

    4 q q^T is linear in the matrix. Its row with the largest diagonal is a multiple of q and is at least as long as 1,
    so that no angle, 180 degrees included, loses digits.
    """
    (a, b, c), (d, e, f), (g, h, i) = (row.unbind(-1) for row in rotation.unbind(-2))
    rows = [
        torch.stack([1 + a - e - i, b + d, c + g, h - f], -1),
        torch.stack([b + d, 1 - a + e - i, f + h, c - g], -1),
        torch.stack([c + g, f + h, 1 - a - e + i, d - b], -1),
        torch.stack([h - f, c - g, d - b, 1 + a + e + i], -1),
    ]
    outer = torch.stack(rows, -2)
    best = outer.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None].expand(*outer.shape[:-2], 1, 4)
    q = F.normalize(outer.gather(-2, best).squeeze(-2), dim=-1)
    return torch.where(q[..., 3:] < 0, -q, q)


def rotation_matrix(quaternion: Tensor) -> Tensor:  # [..., 4] -> [..., 3, 3]
    """The rotation of (x, y, z, w) of any length; that of length 0, which is none, counts as no rotation."""
    largest = quaternion.abs().amax(-1, keepdim=True)  # squares of small numbers would vanish
    q = F.normalize(quaternion / torch.where(largest > 0, largest, 1), dim=-1)
    x, y, z, w = q.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))
    return torch.eye(3, dtype=q.dtype, device=q.device) + 2 * (w[..., None, None] * cross + cross @ cross)


def encode_cameras(
    extrinsic: Tensor,  # [..., 3, 4]
    intrinsic: Tensor,  # [..., 3, 3] pixels
    size: tuple[int, int],  # (H, W) of the images that the pixels are of
) -> Tensor:  # [..., 9]
    """Translation (3), quaternion (4), and the angles that the image's height and width span, in radians (2).

    VGGT's encoding (Wang et al. 2025). The principal point is not in it: angles are those of a centred one.
    """
    height, width = size
    view = torch.stack([height / intrinsic[..., 1, 1], width / intrinsic[..., 0, 0]], -1)
    return torch.cat([extrinsic[..., 3], quaternion(extrinsic[..., :3]), 2 * torch.atan(view / 2)], -1)


def decode_extrinsic(pose: Tensor) -> Tensor:  # [..., 9] -> [..., 3, 4]
    """The extrinsic of an encoded camera, whose quaternion may have any length."""
    return torch.cat([rotation_matrix(pose[..., 3:7]), pose[..., :3, None]], -1)


def rotation_angle(a: Tensor, b: Tensor) -> Tensor:  # [..., 3, 3] each -> [...]
    """Degrees between two rotations, 0 .. 180, from sine and cosine, so that neither end loses digits."""
    difference = a.mT @ b
    (_, r01, r02), (r10, _, r12), (r20, r21, _) = (row.unbind(-1) for row in difference.unbind(-2))
    sine = torch.stack([r21 - r12, r02 - r20, r10 - r01], -1).norm(dim=-1)
    return torch.rad2deg(torch.atan2(sine, difference.diagonal(dim1=-2, dim2=-1).sum(-1) - 1))


def line_angle(a: Tensor, b: Tensor) -> Tensor:  # [..., 3] each -> [...]
    """Degrees between two directions up to sign, 0 .. 90. A vector of length 0 has no direction: 90, the worst."""
    sine, cosine = torch.linalg.cross(a, b).norm(dim=-1), (a * b).sum(-1).abs()
    missing = (a == 0).all(-1) | (b == 0).all(-1)
    return torch.where(missing, 90.0, torch.rad2deg(torch.atan2(sine, cosine)))


@dataclass
class Similarity:
    """x -> scale * rotation x + translation."""

    scale: Tensor  # []
    rotation: Tensor  # [3, 3], a proper one: never a reflection
    translation: Tensor  # [3]

    def apply(self, points: Tensor) -> Tensor:  # [N, 3]
        return self.scale * points @ self.rotation.mT + self.translation


def umeyama(
    source: Tensor,  # [N, 3]
    target: Tensor,  # [N, 3]
) -> Similarity:
    """The similarity that brings `source` nearest to `target` in the sum of squares (Umeyama 1991).

    Source points that are all equal fix no rotation and no scale: these are then none, and 1. Points on a line fix the
    rotation but for turns about the line: one of the best. Raises ValueError without points, or for other shapes.
    """
    if source.shape != target.shape or source.ndim != 2 or source.shape[1] != 3 or not len(source):
        raise ValueError(f"wanted two [N, 3] of at least 1 point, got {list(source.shape)} and {list(target.shape)}")
    anchor = source[0]  # points that are equal then are exactly 0, which their mean might round away from
    from_anchor = source - anchor
    middle, goal = from_anchor.mean(0), target.mean(0)
    centred = from_anchor - middle
    variance = centred.square().sum(1).mean()
    if variance == 0:
        turn, scale = torch.eye(3, dtype=source.dtype, device=source.device), torch.ones_like(variance)
    else:
        u, spread, vt = torch.linalg.svd((target - goal).mT @ centred / len(source))
        sign = torch.ones_like(spread)
        sign[2] = torch.sign(torch.linalg.det(u) * torch.linalg.det(vt))
        turn, scale = u * sign @ vt, (spread * sign).sum() / variance
    return Similarity(scale, turn, goal - scale * turn @ (middle + anchor))
