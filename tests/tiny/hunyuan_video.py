"""A small HunyuanVideo pipeline in the published Hugging Face layout, made with the library's own classes."""

from pathlib import Path
from typing import Any

import torch

from spatialprobe.engine.demo.tiny.parts import WORDS, draw_weights, third, whole_folder
from tiny.clip_text import clip_text
from tiny.hunyuan_vae import hunyuan_vae


def build_hunyuan_video(
    path: str | Path,
    *,
    num_layers: int = 2,  # blocks of two streams
    num_single_layers: int = 2,  # and of one
    heads: int = 2,
    head_dim: int = 32,
    vae_dim: int = 8,  # a multiple of 4
    shard_size: int | str | None = None,  # bytes or "5GB", of the transformer alone; None: about four files
    seed: int = 0,
) -> Path:
    """Writes a HunyuanVideo text-to-video pipeline in fp32 and returns its folder.

    Features have `heads * head_dim` channels. Raises ValueError when `path` already holds something.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
    from transformers import LlamaConfig, LlamaModel

    tokenizer = llama3_tokenizer()
    with torch.random.fork_rng(devices=[]):  # the constructors draw weights too; those are all replaced below
        text_encoder = LlamaModel(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=4,  # features are taken below the last two
                num_attention_heads=4,
                num_key_value_heads=2,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        transformer = HunyuanVideoTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            num_layers=num_layers,
            num_single_layers=num_single_layers,
            num_refiner_layers=1,
            text_embed_dim=32,
            pooled_projection_dim=32,
            rope_axes_dim=[head_dim // 8, 7 * head_dim // 16, 7 * head_dim // 16],  # 16, 56, 56 of 128, as published
        )
    text_encoder_2, tokenizer_2 = clip_text(width=32, seed=seed)
    vae = hunyuan_vae(dim=vae_dim, groups=4, seed=seed)
    for module in (text_encoder, transformer):
        draw_weights(module, seed=seed)
    pipeline = HunyuanVideoPipeline(
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
    )
    with whole_folder(path) as folder:
        pipeline.save_config(folder)
        for name in ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "vae", "scheduler"):
            getattr(pipeline, name).save_pretrained(folder / name)
        transformer.save_pretrained(folder / "transformer", max_shard_size=shard_size or third(transformer))
    return Path(path)


def llama3_tokenizer() -> Any:
    """Byte-level BPE as Llama 3's, trained on the pipeline's template, so that the template is short as published."""
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
    from tokenizers import ByteLevelBPETokenizer, processors
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    special = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<pad>"]
    text = [DEFAULT_PROMPT_TEMPLATE["template"], " ".join(WORDS)] * 4
    bpe.train_from_iterator(text, vocab_size=700, special_tokens=special, show_progress=False)
    begin = special[0]
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, bpe.token_to_id(begin))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=begin, eos_token="<|eot_id|>", pad_token="<pad>"
    )
