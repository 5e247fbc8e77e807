"""A small CLIP text encoder with its tokenizer, as several video models have one beside a larger text encoder."""

import string
from typing import Any

import torch

from spatialprobe.engine.demo.tiny.parts import draw_weights


def clip_text(*, width: int, seed: int) -> tuple[Any, Any]:
    """(CLIPTextModel, CLIPTokenizer) over letters; the pooled output has `width` channels."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = sorted(string.ascii_lowercase + string.digits + ".,:;!?'-")
    symbols = letters + [f"{letter}</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)
    config = CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=vocab["<|startoftext|>"],
        eos_token_id=vocab["<|endoftext|>"],
        pad_token_id=vocab["<|endoftext|>"],
    )
    with torch.random.fork_rng(devices=[]):
        model = CLIPTextModel(config)
    draw_weights(model, seed=seed)
    return model, tokenizer
