"""A small GLM-4.1V in the published Hugging Face layout, made with the library's own classes."""

import math
from pathlib import Path
from typing import Any

import torch

from spatialprobe.engine.demo.tiny.parts import qwen_tokenizer
from spatialprobe.engine.demo.tiny.qwen3_vl import drawn, write_checkpoint

SPECIAL_TOKENS = (
    "[MASK] [gMASK] [sMASK] <sop> <eop> <|system|> <|user|> <|assistant|> <|observation|> <|begin_of_image|> "
    "<|end_of_image|> <|begin_of_video|> <|end_of_video|> <|image|> <|video|>"
).split()
CHAT_TEMPLATE = (
    "[gMASK]<sop>{% for message in messages %}{{ '<|' + message.role + '|>\n' }}"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|begin_of_image|><|image|><|end_of_image|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
VISION = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
PIXELS = VISION | {
    "size": {"shortest_edge": 12544, "longest_edge": 9633792},
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Glm4vImageProcessor",
    "processor_class": "Glm4vProcessor",
}
FILES = {"preprocessor_config.json": PIXELS}


def build_glm4v(
    path: str | Path,
    *,
    num_layers: int = 4,
    heads: int = 4,
    head_dim: int = 16,
    vision_layers: int = 3,
    dtype: torch.dtype = torch.bfloat16,  # as published
    seed: int = 0,
) -> Path:
    """Writes a GLM-4.1V checkpoint and returns its folder. Features have `heads * head_dim` channels."""
    from transformers import Glm4vConfig, Glm4vForConditionalGeneration

    tokenizer = glm_tokenizer()
    pairs = head_dim // 4  # half of each head is rotated; the published split is 8, 12, 12 of 32
    text = {
        "vocab_size": math.ceil(len(tokenizer) / 64) * 64,
        "hidden_size": heads * head_dim,
        "intermediate_size": 3 * heads * head_dim,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "mrope_section": [pairs - 2, 1, 1],
        },
    }
    vision = {
        "depth": vision_layers,
        "hidden_size": 2 * head_dim,
        "intermediate_size": 6 * head_dim,
        "num_heads": 2,
        "image_size": 112,
        "patch_size": VISION["patch_size"],
        "temporal_patch_size": VISION["temporal_patch_size"],
        "spatial_merge_size": VISION["merge_size"],
        "out_hidden_size": heads * head_dim,
    }
    names = ("image", "video")
    ids = {f"{name}_token_id": f"<|{name}|>" for name in names}
    ids |= {f"{name}_start_token_id": f"<|begin_of_{name}|>" for name in names}
    ids |= {f"{name}_end_token_id": f"<|end_of_{name}|>" for name in names}
    config = Glm4vConfig(
        text_config=text,
        vision_config=vision,
        **{key: tokenizer.convert_tokens_to_ids(token) for key, token in ids.items()},
    )
    model = drawn(Glm4vForConditionalGeneration, config, dtype, seed)
    return write_checkpoint(path, model, tokenizer, FILES)


def glm_tokenizer() -> Any:
    """The bytes and words of the tiny Qwen tokenizer, with GLM's special tokens and template."""
    from transformers import AddedToken, PreTrainedTokenizerFast

    words = qwen_tokenizer().backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<|endoftext|>", eos_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )
    tokenizer.add_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return tokenizer
