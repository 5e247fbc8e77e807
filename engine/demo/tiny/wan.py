"""Small Wan pipelines in the published Hugging Face layout, made with the library's own classes."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
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
    from diffusers import WanPipeline

    parts = _parts(seed, _vae(vae_dim, seed))
    transformer = _transformer(num_layers, heads, head_dim, seed=seed)
    return _save(path, WanPipeline(**parts, transformer=transformer), shard_size)


def build_wan_i2v(path: str | Path, *, num_layers: int = 4, seed: int = 0) -> Path:
    """Writes a Wan 2.1 image-to-video pipeline: as text-to-video, with CLIP's image tower and more input channels."""
    from diffusers import WanImageToVideoPipeline
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    parts = _parts(seed, _vae(4, seed), flow_shift=5.0)
    transformer = _transformer(num_layers, in_channels=36, image_dim=32, added_kv_proj_dim=48, seed=seed)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    pipeline = WanImageToVideoPipeline(
        **parts, transformer=transformer, image_encoder=_clip(seed), image_processor=processor
    )
    return _save(path, pipeline)


def build_wan_ti2v(path: str | Path, *, num_layers: int = 4, seed: int = 0) -> Path:
    """Writes a Wan 2.2 TI2V pipeline: a timestep for every token, and a VAE with shortcuts that halves once more."""
    from diffusers import AutoencoderKLWan, WanPipeline

    generator = torch.Generator().manual_seed(seed)
    mean = [round(x, 4) for x in torch.randn(48, generator=generator).mul(0.2).tolist()]
    std = [round(x, 4) for x in torch.rand(48, generator=generator).add(0.4).tolist()]
    with torch.random.fork_rng(devices=[]):
        vae = AutoencoderKLWan(
            base_dim=4,
            decoder_base_dim=4,
            z_dim=48,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=mean,
            latents_std=std,
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=16,
        )
    draw_weights(vae, seed=seed)
    _keep_local_colour(vae.encoder)
    _match_latents(vae, seed=seed)
    parts = _parts(seed, vae, flow_shift=5.0)
    transformer = _transformer(num_layers, in_channels=48, out_channels=48, seed=seed)
    return _save(path, WanPipeline(**parts, transformer=transformer, expand_timesteps=True))


def build_wan_experts(path: str | Path, *, image: bool = False, num_layers: int = 4, seed: int = 0) -> Path:
    """Writes a Wan 2.2 A14B pipeline, text-to-video or image-to-video: two transformers, and where they change over."""
    from diffusers import WanImageToVideoPipeline, WanPipeline

    channels = {"in_channels": 36} if image else {}
    high, low = (_transformer(num_layers, **channels, seed=seed + i) for i in (0, 1))
    parts = _parts(seed, _vae(4, seed)) | {"transformer": high, "transformer_2": low}
    pipeline = (
        WanImageToVideoPipeline(**parts, boundary_ratio=0.9) if image else WanPipeline(**parts, boundary_ratio=0.875)
    )
    return _save(path, pipeline)


def _parts(seed: int, vae: nn.Module, **schedule) -> dict[str, Any]:
    """What every Wan pipeline has beside its transformer."""
    from diffusers import UniPCMultistepScheduler
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = t5_tokenizer()
    with torch.random.fork_rng(devices=[]):  # the constructors draw weights too; those are all replaced
        text_encoder = UMT5EncoderModel(
            UMT5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        )
    draw_weights(text_encoder, seed=seed)
    scheduler = UniPCMultistepScheduler(**WAN_SCHEDULER | schedule)
    return {"tokenizer": tokenizer, "text_encoder": text_encoder, "vae": vae, "scheduler": scheduler}


def _transformer(num_layers: int, heads: int = 2, head_dim: int = 24, *, seed: int, **config) -> nn.Module:
    from diffusers import WanTransformer3DModel

    with torch.random.fork_rng(devices=[]):
        transformer = WanTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            ffn_dim=4 * heads * head_dim,
            num_layers=num_layers,
            text_dim=32,
            **config,
        )
    draw_weights(transformer, seed=seed)
    return transformer


def _vae(dim: int, seed: int) -> nn.Module:
    from diffusers import AutoencoderKLWan

    with torch.random.fork_rng(devices=[]):
        vae = AutoencoderKLWan(base_dim=dim, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    draw_weights(vae, seed=seed)
    _keep_local_colour(vae.encoder)
    _match_latents(vae, seed=seed)
    return vae


def _clip(seed: int) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    with torch.random.fork_rng(devices=[]):
        clip = CLIPVisionModel(CLIPVisionConfig(**sizes, num_hidden_layers=3, hidden_act="gelu"))
    draw_weights(clip, seed=seed)
    return clip


def _save(path: str | Path, pipeline: Any, shard_size: int | str | None = None) -> Path:
    with whole_folder(path) as folder:
        pipeline.save_config(folder)
        for name, part in pipeline.components.items():
            if name.startswith("transformer") and part is not None:
                part.save_pretrained(folder / name, max_shard_size=shard_size or third(part))
            elif name == "image_encoder" and part is not None:
                _save_clip(folder / name, part)
            elif part is not None:
                part.save_pretrained(folder / name)
    return Path(path)


def _save_clip(folder: Path, clip: nn.Module) -> None:
    """With the tensor names of the published file, which the class itself no longer writes."""
    clip.config.architectures = [type(clip).__name__]
    clip.config.save_pretrained(folder)
    prefix = "vision_model."
    named = {prefix + name.removeprefix(prefix): value.contiguous() for name, value in clip.state_dict().items()}
    save_file(named, folder / "model.safetensors", {"format": "pt"})


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
