"""How a video VAE is set up before clips run: in tiles, and with what memory layout. No model is known here."""

from typing import Any

import torch
from torch import nn

# Weights of convolutions with channels last, for which GPUs have other, often faster kernels: other last bits too.
CHANNELS_LAST = {"vae_channels_last": False}


def set_up_vae(vae: nn.Module, options: dict[str, Any]) -> None:
    """As the options `vae_tiling` and `vae_channels_last` say."""
    if options["vae_tiling"]:
        vae.enable_tiling()
    if options["vae_channels_last"]:
        with torch.no_grad():
            for module in vae.modules():
                if isinstance(module, nn.Conv3d):
                    module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
