"""The text encoder of a pipeline, loaded for the one prompt of a run and dropped after it, and what it weighs."""

from collections.abc import Mapping
from typing import Any

import torch

from spatialprobe.engine.checkpoint import Checkpoint, empty_module, one_line

T5 = "T5EncoderModel"


def load_text_encoder(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    *,
    kind: str = T5,  # class of transformers
) -> tuple[Any, Any]:
    """(encoder on `device`, tokenizer) of the folders `text_encoder` and `tokenizer`."""
    import transformers

    encoder_folder, tokenizer_folder = (checkpoint.folder(name) for name in ("text_encoder", "tokenizer"))
    with one_line(encoder_folder):
        encoder = getattr(transformers, kind).from_pretrained(encoder_folder, dtype=dtype, use_safetensors=True)
    with one_line(tokenizer_folder):
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder, trust_remote_code=False)
    return encoder.to(device), tokenizer


def encoder_bytes(
    checkpoint: Checkpoint,
    kinds: Mapping[str, str],  # class of transformers by folder, "" for the checkpoint's own
    dtype: torch.dtype,
) -> int:
    """Of the weights of text encoders that are loaded together. Reads their configs alone."""
    import transformers

    total = 0
    for folder, kind in kinds.items():
        cls = getattr(transformers, kind)
        stored = checkpoint.json(f"{folder}/config.json".lstrip("/"))
        # A whole CLIP's folder holds the text part's config within its own.
        config = cls.config_class.from_dict(stored.get("text_config", stored))
        encoder = empty_module(lambda cls=cls, config=config: cls(config))
        encoder.tie_weights()  # without memory a shared embedding is there twice
        total += sum(p.numel() for p in encoder.parameters()) * dtype.itemsize
    return total
