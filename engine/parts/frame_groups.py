"""Video VAEs that give frame 0 a latent of its own, and every later group of frames one. No model is known here."""

import torch
from torch import Tensor


def group_rows(frames: int, group: int) -> tuple[int, ...]:
    """Per frame its latent: 0, then 1 for frames 1..group, 2 for the next `group` of them, and so on."""
    return tuple((f + group - 1) // group for f in range(frames))


def whole_groups(
    video: Tensor,  # uint8 [F, H, W, 3]
    group: int,
) -> Tensor:  # uint8 [1 + n * group, H, W, 3]
    """The last group completed with repeats of the last frame: a VAE would drop a part of a group without a word."""
    missing = -(len(video) - 1) % group
    return torch.cat([video, video[-1:].expand(missing, -1, -1, -1)]) if missing else video
