"""A small Qwen3.5 with its vision tower in the published Hugging Face layout, made with the library's own classes."""

import json
from pathlib import Path

import torch

from spatialprobe.engine.demo.tiny.parts import qwen_tokenizer
from spatialprobe.engine.demo.tiny.qwen3_vl import (
    QWEN3_FILES,
    drawn,
    qwen3_text,
    qwen3_vision,
    token_ids,
    write_checkpoint,
)

# What published configs say and transformers' classes do not read, or read as something else.
TEXT_EXTRAS = {
    "attn_output_gate": True,
    "full_attention_interval": 4,
    "mamba_ssm_dtype": "float32",
    "mlp_only_layers": [],
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False,
}


def build_qwen3_5(
    path: str | Path,
    *,
    num_layers: int = 5,  # every fourth has full attention, the others linear
    heads: int = 4,
    head_dim: int = 16,
    vision_layers: int = 3,
    dtype: torch.dtype = torch.bfloat16,  # as published
    seed: int = 0,
) -> Path:
    """Writes a Qwen3.5 checkpoint and returns its folder. Features have `heads * head_dim` channels."""
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    tokenizer = qwen_tokenizer()
    rope = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5, "mrope_interleaved": True}
    text = qwen3_text(tokenizer, num_layers, heads, head_dim) | {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": head_dim,
        "linear_value_head_dim": head_dim,
        "rope_parameters": rope | {"mrope_section": [head_dim // 4 - 2, 1, 1]},
    }
    config = Qwen3_5Config(
        text_config=text,
        vision_config=qwen3_vision(vision_layers, 2, head_dim, heads * head_dim),
        **token_ids(tokenizer),
    )
    model = drawn(Qwen3_5ForConditionalGeneration, config, dtype, seed)
    folder = write_checkpoint(path, model, tokenizer, QWEN3_FILES)
    written = json.loads((folder / "config.json").read_text())
    written["text_config"] |= TEXT_EXTRAS
    written["vision_config"]["deepstack_visual_indexes"] = []
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    return folder
