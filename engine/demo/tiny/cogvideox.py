"""Small CogVideoX pipelines in the published Hugging Face layout, and Aethers, made with the library's own classes."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from spatialprobe.engine.demo.tiny.parts import draw_weights, t5_tokenizer, third, whole_folder

SCHEDULER = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": False,
}
KINDS = {  # fields of the published transformers' and schedulers' configs in which they differ
    "2b": ({}, 3.0),
    "5b": ({"use_rotary_positional_embeddings": True}, 1.0),
    "5b-i2v": (
        {"in_channels": 32, "use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": True},
        1.0,
    ),
    "1.5-5b": ({"use_rotary_positional_embeddings": True, "patch_size_t": 2, "patch_bias": False}, 1.0),
}


def build_cogvideox(
    path: str | Path,
    kind: str = "5b",
    *,
    num_layers: int = 4,
    heads: int = 2,
    head_dim: int = 32,  # a multiple of 16 splits over time, rows and columns
    size: tuple[int, int] = (64, 96),  # pixels that learned positions are made for
    frames: int = 9,  # the same, of one half
    seed: int = 0,
) -> Path:
    """Writes a CogVideoX pipeline of one of `KINDS` in fp32 and returns its folder.

    Features have `heads * head_dim` channels. Raises ValueError for another kind or a `path` that holds something.
    """
    from diffusers import CogVideoXDDIMScheduler, CogVideoXImageToVideoPipeline, CogVideoXPipeline

    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    fields, shift = KINDS[kind]
    tokenizer = t5_tokenizer()
    text_encoder, vae = _text_encoder(len(tokenizer), seed), _vae(seed)
    transformer = _transformer(num_layers, heads, head_dim, size, seed, sample_frames=frames, **fields)
    pipeline_class = CogVideoXImageToVideoPipeline if kind.endswith("i2v") else CogVideoXPipeline
    scheduler = CogVideoXDDIMScheduler(**SCHEDULER, snr_shift_scale=shift)
    pipeline = pipeline_class(tokenizer, text_encoder, vae, transformer, scheduler)
    with whole_folder(path) as folder:
        pipeline.save_config(folder)
        for name in ("tokenizer", "text_encoder", "vae", "scheduler"):
            getattr(pipeline, name).save_pretrained(folder / name)
        transformer.save_pretrained(folder / "transformer", max_shard_size=third(transformer))
    return Path(path)


def build_aether(
    path: str | Path,
    *,
    num_layers: int = 4,
    heads: int = 2,
    head_dim: int = 32,
    size: tuple[int, int] = (64, 96),
    seed: int = 0,
) -> Path:
    """Writes an Aether transformer, which is all that its repository holds, and returns its folder."""
    channels = {"in_channels": 96, "out_channels": 56, "use_rotary_positional_embeddings": True}
    transformer = _transformer(num_layers, heads, head_dim, size, seed, **channels)
    with whole_folder(path) as folder:
        transformer.save_pretrained(folder / "transformer", max_shard_size=third(transformer))
    return Path(path)


def _transformer(layers: int, heads: int, head_dim: int, size: tuple[int, int], seed: int, **fields: Any):
    from diffusers import CogVideoXTransformer3DModel

    with torch.random.fork_rng(devices=[]):  # the constructors draw weights too; those are all replaced
        transformer = CogVideoXTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            time_embed_dim=16,
            text_embed_dim=32,
            num_layers=layers,
            sample_height=size[0] // 8,
            sample_width=size[1] // 8,
            **fields,
        )
    draw_weights(transformer, seed=seed)
    if fields.get("use_learned_positional_embeddings"):  # a buffer, which starts as the sines that others compute
        table = transformer.patch_embed.pos_embedding
        table += 0.3 * torch.randn(table.shape, generator=torch.Generator().manual_seed(seed))
    return transformer


def _text_encoder(vocabulary: int, seed: int):
    from transformers import T5Config, T5EncoderModel

    with torch.random.fork_rng(devices=[]):
        config = T5Config(vocab_size=vocabulary, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        encoder = T5EncoderModel(config)
    draw_weights(encoder, seed=seed)
    return encoder


def _vae(seed: int):
    from diffusers import AutoencoderKLCogVideoX

    with torch.random.fork_rng(devices=[]):
        vae = AutoencoderKLCogVideoX(
            block_out_channels=(4, 8, 8, 8),
            latent_channels=16,
            layers_per_block=1,
            norm_num_groups=2,
            scaling_factor=0.7,
        )
    draw_weights(vae, seed=seed)
    _keep_local_colour(vae.encoder)
    return vae


def _keep_local_colour(encoder: nn.Module) -> None:
    """Makes the kernels of a random encoder averages, so that a patch of the picture stays where it is.

    Each kernel's sum is spread evenly over rows and columns and 1:3:9 over frames, the latest most. Residual branches
    (they end in `conv2`) are halved.
    """
    with torch.no_grad():
        for name, conv in encoder.named_modules():
            if isinstance(conv, nn.Conv2d | nn.Conv3d):
                total = conv.weight.flatten(2).sum(2)  # [out, in]
                window = torch.ones(conv.kernel_size)
                if isinstance(conv, nn.Conv3d):
                    window *= 3.0 ** torch.arange(len(window)).reshape(-1, 1, 1)
                if name.endswith("conv2.conv"):
                    total = total / 2
                conv.weight.copy_(total.reshape(*total.shape, *[1] * window.ndim) * window / window.sum())
