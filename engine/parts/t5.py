"""The T5 text encoder of a diffusers pipeline, loaded for the one prompt of a run and dropped after it."""

from typing import Any

import torch

from spatialprobe.engine.checkpoint import Checkpoint, one_line


def load_t5(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """(T5EncoderModel on `device`, tokenizer) of the folders `text_encoder` and `tokenizer`."""
    from transformers import AutoTokenizer, T5EncoderModel

    encoder_folder, tokenizer_folder = (checkpoint.folder(name) for name in ("text_encoder", "tokenizer"))
    with one_line(encoder_folder):
        encoder = T5EncoderModel.from_pretrained(encoder_folder, dtype=dtype, use_safetensors=True)
    with one_line(tokenizer_folder):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, trust_remote_code=False)
    return encoder.to(device), tokenizer
