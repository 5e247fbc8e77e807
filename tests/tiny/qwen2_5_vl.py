"""A small Qwen2.5-VL in the published Hugging Face layout, made with the library's own classes."""

import json
import math
from pathlib import Path
from typing import Any

import torch

from spatialprobe.engine.demo.tiny.parts import qwen_tokenizer
from spatialprobe.engine.demo.tiny.qwen3_vl import (
    QWEN3_CHAT_TEMPLATE,
    drawn,
    token_ids,
    write_checkpoint,
)

SYSTEM = "{% if loop.first %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
PIXELS = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}
TURN = "{% for message in messages %}"
FILES = {
    "preprocessor_config.json": PIXELS,  # published repositories have no file of their own for videos
    "chat_template.json": {"chat_template": QWEN3_CHAT_TEMPLATE.replace(TURN, TURN + SYSTEM)},
}


def build_qwen2_5_vl(
    path: str | Path,
    *,
    num_layers: int = 4,
    heads: int = 4,
    head_dim: int = 16,
    vision_layers: int = 4,  # blocks 1 and 3 attend to the whole image, the others within windows
    window_size: int = 56,  # pixels: 2 x 2 cells; published are 112
    dtype: torch.dtype = torch.bfloat16,  # as published
    seed: int = 0,
) -> Path:
    """Writes a Qwen2.5-VL checkpoint and returns its folder. Features have `heads * head_dim` channels."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = qwen_tokenizer()
    height = width = 3 * head_dim // 16  # the published split of the rotary pairs is 16, 24, 24 for head_dim 128
    text = {
        "vocab_size": math.ceil(len(tokenizer) / 64) * 64,
        "hidden_size": heads * head_dim,
        "intermediate_size": 3 * heads * head_dim,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "max_window_layers": num_layers,
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [head_dim // 2 - height - width, height, width],
        },
    }
    vision = {
        "depth": vision_layers,
        "hidden_size": 2 * head_dim,
        "intermediate_size": 4 * head_dim,
        "num_heads": 2,
        "patch_size": PIXELS["patch_size"],
        "temporal_patch_size": PIXELS["temporal_patch_size"],
        "spatial_merge_size": PIXELS["merge_size"],
        "window_size": window_size,
        "fullatt_block_indexes": [1, 3],
        "tokens_per_second": 2,
        "out_hidden_size": heads * head_dim,
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **token_ids(tokenizer))
    model = drawn(Qwen2_5_VLForConditionalGeneration, config, dtype, seed)
    folder = write_checkpoint(path, model, tokenizer, FILES)
    published = as_published(json.loads((folder / "config.json").read_text()))
    (folder / "config.json").write_text(json.dumps(published, indent=2) + "\n")
    return folder


def as_published(config: dict[str, Any]) -> dict[str, Any]:
    """config.json as published: the decoder's fields at the top level, rotary settings by older names."""
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    vision = {"in_chans": 3, "spatial_patch_size": PIXELS["patch_size"]} | config["vision_config"]
    for name in ("in_channels", "rope_parameters", "model_type"):
        vision.pop(name, None)
    return text | config | {"vision_config": vision, "vision_token_id": config["image_token_id"] - 1}
