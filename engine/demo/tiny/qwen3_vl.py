"""A small Qwen3-VL in the published Hugging Face layout, made with the library's own classes."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spatialprobe.engine.demo.tiny.parts import draw_weights, qwen_tokenizer, third, whole_folder

# One turn per message; an image or a video is one placeholder token, which the caller repeats per visual token.
QWEN3_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

QWEN3_VISION = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}
QWEN3_PIXELS = QWEN3_VISION | {
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
}
# Published repositories keep these three apart; transformers 5 would save one processor_config.json. Sizes in pixels.
QWEN3_FILES = {
    "preprocessor_config.json": QWEN3_PIXELS
    | {"size": {"shortest_edge": 65536, "longest_edge": 16777216}, "image_processor_type": "Qwen2VLImageProcessorFast"},
    "video_preprocessor_config.json": QWEN3_PIXELS
    | {"size": {"shortest_edge": 4096, "longest_edge": 25165824}, "video_processor_type": "Qwen3VLVideoProcessor"},
    "chat_template.json": {"chat_template": QWEN3_CHAT_TEMPLATE},
}


def build_qwen3_vl(
    path: str | Path,
    *,
    num_layers: int = 5,
    heads: int = 4,
    head_dim: int = 16,
    vision_layers: int = 4,  # at least 3, for DeepStack
    vision_heads: int = 2,
    vision_head_dim: int = 16,
    tie_word_embeddings: bool = False,  # False as 8B (lm_head on disk), True as 2B and 4B
    dtype: torch.dtype = torch.bfloat16,  # as published
    shard_size: int | str | None = None,  # bytes or "5GB"; None: about four files
    seed: int = 0,
) -> Path:
    """Writes a Qwen3-VL checkpoint with its tokenizer and preprocessing files and returns its folder.

    Features have `heads * head_dim` channels. Raises ValueError when `path` already holds something.
    """
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    if vision_layers < 3:
        raise ValueError(f"wanted vision_layers of at least 3 (DeepStack takes blocks 0, 1 and 2), got {vision_layers}")
    tokenizer = qwen_tokenizer()
    config = Qwen3VLConfig(
        text_config=qwen3_text(tokenizer, num_layers, heads, head_dim) | {"tie_word_embeddings": tie_word_embeddings},
        vision_config=qwen3_vision(vision_layers, vision_heads, vision_head_dim, heads * head_dim)
        | {"deepstack_visual_indexes": [0, 1, 2]},
        tie_word_embeddings=tie_word_embeddings,
        **token_ids(tokenizer),
    )
    model = drawn(Qwen3VLForConditionalGeneration, config, dtype, seed)
    return write_checkpoint(path, model, tokenizer, QWEN3_FILES, shard_size)


def qwen3_text(tokenizer: Any, num_layers: int, heads: int, head_dim: int) -> dict[str, Any]:
    """Fields of the decoder's config."""
    height = width = 5 * head_dim // 32  # the published split of the rotary pairs is 24, 20, 20 for head_dim 128
    return {
        "vocab_size": math.ceil(len(tokenizer) / 64) * 64,  # larger than the tokenizer's, as published
        "hidden_size": heads * head_dim,
        "intermediate_size": 3 * heads * head_dim,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "head_dim": head_dim,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [head_dim // 2 - height - width, height, width],
            "mrope_interleaved": True,
        },
    }


def qwen3_vision(layers: int, heads: int, head_dim: int, out_hidden_size: int) -> dict[str, Any]:
    """Fields of the vision tower's config."""
    return {
        "depth": layers,
        "hidden_size": heads * head_dim,
        "intermediate_size": 4 * heads * head_dim,
        "num_heads": heads,
        "patch_size": QWEN3_VISION["patch_size"],
        "temporal_patch_size": QWEN3_VISION["temporal_patch_size"],
        "spatial_merge_size": QWEN3_VISION["merge_size"],
        "out_hidden_size": out_hidden_size,
        "num_position_embeddings": 256,  # 16 x 16, resampled to each image's grid
    }


def token_ids(tokenizer: Any) -> dict[str, int]:
    """Of the tokens around and in the place of images, as config.json names them."""
    ids = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    ids |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in ids.items()}


def drawn(cls: type, config: Any, dtype: torch.dtype, seed: int) -> nn.Module:
    """A model with random weights, drawn in float32."""
    with torch.random.fork_rng(devices=[]):
        model = cls(config)
    draw_weights(model, seed=seed)
    return model.to(dtype)


def write_checkpoint(
    path: str | Path, model: nn.Module, tokenizer: Any, files: dict[str, dict], shard_size: int | str | None = None
) -> Path:
    with whole_folder(path) as folder:
        model.save_pretrained(folder, max_shard_size=shard_size or third(model))
        tokenizer.save_pretrained(folder)
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    return Path(path)
