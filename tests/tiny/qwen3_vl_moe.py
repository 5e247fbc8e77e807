"""A small Qwen3-VL with experts in the published Hugging Face layout, made with the library's own classes."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spatialprobe.engine.demo.tiny.parts import qwen_tokenizer
from spatialprobe.engine.demo.tiny.qwen3_vl import (
    QWEN3_FILES,
    drawn,
    qwen3_text,
    qwen3_vision,
    token_ids,
    write_checkpoint,
)

FORMAT = {"format": "pt"}  # transformers asks for this note


def build_qwen3_vl_moe(
    path: str | Path,
    *,
    num_layers: int = 4,
    heads: int = 4,
    head_dim: int = 16,
    experts: int = 6,
    vision_layers: int = 4,  # at least 3, for DeepStack
    dtype: torch.dtype = torch.bfloat16,  # as published
    seed: int = 0,
) -> Path:
    """Writes a checkpoint whose blocks have `experts` experts, 2 of them per token, and returns its folder.

    The experts of a block are two tensors, [experts, in, out], as published. Features have `heads * head_dim` channels.
    """
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    tokenizer = qwen_tokenizer()
    mixture = {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": 3 * head_dim // 2}
    config = Qwen3VLMoeConfig(
        text_config=qwen3_text(tokenizer, num_layers, heads, head_dim) | mixture | {"tie_word_embeddings": False},
        vision_config=qwen3_vision(vision_layers, 2, head_dim, heads * head_dim)
        | {"deepstack_visual_indexes": [0, 1, 2]},
        tie_word_embeddings=False,
        **token_ids(tokenizer),
    )
    model = drawn(Qwen3VLMoeForConditionalGeneration, config, dtype, seed)
    folder = write_checkpoint(path, model, tokenizer, QWEN3_FILES)
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        save_file({name: as_published(name, x, heads * head_dim) for name, x in tensors.items()}, shard, FORMAT)
    return folder


def as_published(name: str, x: Tensor, channels: int) -> Tensor:
    """Experts' matrices as [in, out]: newer releases of transformers write [out, in]."""
    turned = name.endswith("experts.gate_up_proj") and x.shape[2] == channels
    turned |= name.endswith("experts.down_proj") and x.shape[1] == channels
    return x.transpose(1, 2).contiguous() if turned else x
