"""A small Wan pipeline in the published Hugging Face layout, made with the library's own classes."""

from pathlib import Path

import torch
from torch import nn

from spatialprobe.engine.demo.tiny.parts import draw_weights, t5_tokenizer, third, whole_folder

WAN_SCHEDULER = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def build_wan_t2v(
    path: str | Path,
    *,
    num_layers: int = 4,
    heads: int = 2,
    head_dim: int = 24,  # a multiple of 6 splits evenly over time, rows and columns
    vae_dim: int = 8,
    shard_size: int | str | None = None,  # bytes or "5GB", of the transformer alone; None: about four files
    seed: int = 0,
) -> Path:
    """Writes a Wan 2.1 text-to-video pipeline in fp32, as published, and returns its folder.

    Features have `heads * head_dim` channels. Raises ValueError when `path` already holds something.
    """
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = t5_tokenizer()
    with torch.random.fork_rng(devices=[]):  # the constructors draw weights too; those are all replaced below
        text_encoder = UMT5EncoderModel(
            UMT5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        )
        vae = AutoencoderKLWan(base_dim=vae_dim, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
        transformer = WanTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            ffn_dim=4 * heads * head_dim,
            num_layers=num_layers,
            text_dim=32,
        )
    draw_weights(text_encoder, seed=seed)
    draw_weights(vae, seed=seed)
    _keep_local_colour(vae.encoder)
    _match_latents(vae, seed=seed)
    draw_weights(transformer, seed=seed)
    pipeline = WanPipeline(tokenizer, text_encoder, vae, UniPCMultistepScheduler(**WAN_SCHEDULER), transformer)
    with whole_folder(path) as folder:
        pipeline.save_config(folder)
        for name in ("tokenizer", "text_encoder", "vae", "scheduler"):
            getattr(pipeline, name).save_pretrained(folder / name)
        transformer.save_pretrained(folder / "transformer", max_shard_size=shard_size or third(transformer))
    return Path(path)


def _keep_local_colour(encoder: nn.Module) -> None:
    """Makes the kernels of a random Wan encoder averages; white ones drown the picture in aliased detail.

    Each kernel's sum is spread evenly over rows and columns and 1:3:9 over frames, the latest most: the first latent
    frame is encoded behind zero frames and would otherwise be fainter than the rest. It also skips `time_conv`,
    which therefore must not mix channels. Residual branches (they end in `conv2`) are halved.
    """
    with torch.no_grad():
        for name, conv in encoder.named_modules():
            if not isinstance(conv, nn.Conv2d | nn.Conv3d):
                continue
            total = conv.weight.flatten(2).sum(2)  # [out, in]
            if name.endswith("time_conv"):
                total = torch.eye(len(total))
                conv.bias.zero_()
            if name.endswith("conv2"):
                total = total / 2
            window = torch.ones(conv.kernel_size)
            if isinstance(conv, nn.Conv3d):
                window *= 3.0 ** torch.arange(len(window)).reshape(-1, 1, 1)
            conv.weight.copy_(total.reshape(*total.shape, *[1] * window.ndim) * window / window.sum())


def _match_latents(vae: nn.Module, *, seed: int) -> None:
    """Gives the latents of random colour patches the mean and std that the VAE's config states, per channel.

    Noise of a given sigma then hides as much of them as of the published model's. Rounded to bfloat16, so that the
    last bit of a convolution, which may vary with the thread count, does not reach the file.
    """
    colours = torch.rand(8, 3, 1, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    clips = nn.functional.interpolate(colours, size=(5, 64, 64))  # [B, C, F, H, W], nearest
    with torch.no_grad():
        std, mean = torch.std_mean(vae.encode(clips).latent_dist.mean, dim=(0, 2, 3, 4))
        conv = vae.quant_conv  # its first half makes the mean of the latents, its second half their log variance
        gain = (torch.tensor(vae.config.latents_std) / std).bfloat16().float()
        offset = torch.tensor(vae.config.latents_mean) - gain * (mean - conv.bias[: len(mean)])
        conv.weight[: len(mean)] *= gain.reshape(-1, 1, 1, 1, 1)
        conv.bias[: len(mean)] = offset.bfloat16().float()
