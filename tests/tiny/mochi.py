"""A small Mochi pipeline in the published Hugging Face layout, made with the library's own classes."""

from pathlib import Path

import torch

from spatialprobe.engine.demo.tiny.parts import draw_weights, t5_tokenizer, third, whole_folder


def build_mochi(
    path: str | Path,
    *,
    num_layers: int = 3,
    heads: int = 2,
    head_dim: int = 24,
    text_width: int = 16,  # of the text tokens inside the blocks
    seed: int = 0,
) -> Path:
    """Writes a Mochi pipeline in fp32 and returns its folder.

    Features have `heads * head_dim` channels. Raises ValueError when `path` already holds something.
    """
    from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel
    from transformers import T5Config, T5EncoderModel

    tokenizer = t5_tokenizer()
    with torch.random.fork_rng(devices=[]):  # the constructors draw weights too; those are all replaced below
        text = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        text_encoder = T5EncoderModel(T5Config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", **text))
        dims = (32,) * 4  # the class norms and attends in groups of 32 channels
        vae = AutoencoderKLMochi(
            encoder_block_out_channels=dims, decoder_block_out_channels=dims, layers_per_block=(1,) * 5
        )
        transformer = MochiTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            num_layers=num_layers,
            pooled_projection_dim=text_width,
            text_embed_dim=text["d_model"],
            time_embed_dim=16,
        )
    for module in (text_encoder, vae, transformer):
        draw_weights(module, seed=seed)
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    pipeline = MochiPipeline(scheduler, vae, text_encoder, tokenizer, transformer)
    with whole_folder(path) as folder:
        pipeline.save_config(folder)
        for name in ("tokenizer", "text_encoder", "vae", "scheduler"):
            getattr(pipeline, name).save_pretrained(folder / name)
        transformer.save_pretrained(folder / "transformer", max_shard_size=third(transformer))
    return Path(path)
