"""A small LTX-Video pipeline in the published Hugging Face layout, made with the library's own classes."""

from pathlib import Path

import torch

from spatialprobe.engine.demo.tiny.parts import draw_weights, t5_tokenizer, third, whole_folder

LTX_SCHEDULER = {
    "use_dynamic_shifting": True,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 1024,
    "max_image_seq_len": 4096,
    "shift_terminal": 0.1,
}


def build_ltx(
    path: str | Path,
    *,
    num_layers: int = 4,
    heads: int = 2,
    head_dim: int = 24,
    latent_channels: int = 16,
    vae_dim: int = 8,
    seed: int = 0,
) -> Path:
    """Writes an LTX-Video text-to-video pipeline in fp32 and returns its folder.

    Features have `heads * head_dim` channels. Raises ValueError when `path` already holds something.
    """
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )
    from transformers import T5Config, T5EncoderModel

    tokenizer = t5_tokenizer()
    with torch.random.fork_rng(devices=[]):  # the constructors draw weights too; those are all replaced below
        text = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        text_encoder = T5EncoderModel(T5Config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", **text))
        dims = (vae_dim,) * 4
        vae = AutoencoderKLLTXVideo(
            latent_channels=latent_channels,
            block_out_channels=dims,
            decoder_block_out_channels=dims,
            layers_per_block=(1,) * 5,
            decoder_layers_per_block=(1,) * 5,
        )
        transformer = LTXVideoTransformer3DModel(
            in_channels=latent_channels,
            out_channels=latent_channels,
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            cross_attention_dim=heads * head_dim,
            num_layers=num_layers,
            caption_channels=text["d_model"],
        )
    for module in (text_encoder, vae, transformer):
        draw_weights(module, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    vae.latents_mean.normal_(0, 0.1, generator=generator)
    vae.latents_std.uniform_(0.5, 1.5, generator=generator)
    scheduler = FlowMatchEulerDiscreteScheduler(**LTX_SCHEDULER)
    pipeline = LTXPipeline(scheduler, vae, text_encoder, tokenizer, transformer)
    with whole_folder(path) as folder:
        pipeline.save_config(folder)
        for name in ("tokenizer", "text_encoder", "vae", "scheduler"):
            getattr(pipeline, name).save_pretrained(folder / name)
        transformer.save_pretrained(folder / "transformer", max_shard_size=third(transformer))
    return Path(path)
