"""Cameras of all views from one token per view, by refining a first guess.

B clips, S views, D width of the tokens. How a camera's numbers are to be read is `geometry.py`'s.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spatialprobe.probes.backbone import Block, Tokens
from spatialprobe.probes.geometry import POSE

ROLE_STD = 0.02


class CameraDecoder(nn.Module):
    """VGGT's camera head (Wang et al. 2025): blocks across views, told the pose so far, say how to change it.

    Reads each view's camera token after the last pair of blocks. With `readout` (a backbone of depth 0, which has none)
    it reads the mean of the view's patches, plus a learned vector that says whether the view is the first one, whose
    camera is the coordinate frame. Angles of view go through a softplus, so that they are positive and, other than
    with VGGT's ReLU, never without a gradient.
    """

    def __init__(
        self,
        width: int,  # D
        *,
        readout: bool,
        refinements: int = 4,
        layers: int = 4,
        heads: int = 16,
        mlp_ratio: float = 4.0,
        layer_scale: float = 0.01,
    ):
        super().__init__()
        if refinements < 1 or layers < 1:
            raise ValueError(f"refinements and camera_layers must be at least 1, got {refinements} and {layers}")
        if width % heads:
            raise ValueError(f"the camera head reads tokens of {heads} heads of equal width, got {width} channels")
        self.refinements = refinements
        if readout:
            self.role = nn.Parameter(torch.randn(2, width) * ROLE_STD)  # first view, other views
        self.norm = nn.LayerNorm(width)
        self.start = nn.Parameter(torch.zeros(POSE))  # what the first refinement is told
        self.embed = nn.Linear(POSE, width)
        self.modulate = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, 0.0, layer_scale) for _ in range(layers))
        self.read = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, POSE)
        )

    def forward(self, tokens: Tokens) -> Tensor:  # [B, S, refinements, 9]
        """Translation, quaternion of any length, angles of view in radians, after each refinement.

        No gradient flows from one refinement into the one before.
        """
        x = self.norm(self._per_view(tokens))
        plain = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        pose, poses = self.start.expand(*x.shape[:2], POSE), []
        for i in range(self.refinements):
            shift, scale, gate = self.modulate(self.embed(pose)).chunk(3, -1)
            y = x + gate * (plain * (1 + scale) + shift)
            for block in self.blocks:
                y = block(y, None)
            change = self.read(y)
            pose = change if i == 0 else pose + change
            poses.append(torch.cat([pose[..., :7], F.softplus(pose[..., 7:])], -1))
            pose = pose.detach()
        return torch.stack(poses, 2)

    def _per_view(self, tokens: Tokens) -> Tensor:  # [B, S, D]
        if not hasattr(self, "role"):
            return tokens.pairs[-1][:, :, 0]
        first, rest = self.role
        mean = tokens.patches.mean(2)
        return mean + torch.stack([first] + [rest] * (mean.shape[1] - 1))
