"""A small HunyuanVideo VAE, which Open-Sora 2.0 uses too."""

from typing import Any

import torch
from torch import nn

from spatialprobe.engine.demo.tiny.parts import draw_weights


def hunyuan_vae(*, dim: int, groups: int, seed: int) -> Any:
    """AutoencoderKLHunyuanVideo in fp32 with `dim` channels everywhere, normalised in `groups`; published: 32."""
    from diffusers import AutoencoderKLHunyuanVideo

    with torch.random.fork_rng(devices=[]):  # the constructor draws weights too; they are all replaced
        vae = AutoencoderKLHunyuanVideo(block_out_channels=[dim] * 4, layers_per_block=1, norm_num_groups=groups)
    draw_weights(vae, seed=seed)
    _keep_local(vae.encoder)
    return vae


def _keep_local(encoder: nn.Module) -> None:
    """Makes the kernels of a random encoder averages, which keep a patch of the picture in its place.

    Each kernel's sum is spread evenly over rows and columns and 1:3:9 over frames, the latest most. The attention over
    whole frames is halved.
    """
    with torch.no_grad():
        for conv in encoder.modules():
            if isinstance(conv, nn.Conv3d):
                window = torch.ones(conv.kernel_size) * 3.0 ** torch.arange(conv.kernel_size[0]).reshape(-1, 1, 1)
                total = conv.weight.flatten(2).sum(2)  # [out, in]
                conv.weight.copy_(total[:, :, None, None, None] * window / window.sum())
        for attention in encoder.mid_block.attentions:
            attention.to_out[0].weight /= 2
