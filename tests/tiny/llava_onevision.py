"""A small LLaVA-OneVision-1.5 with the names and files of the published repository, but for its code."""

import json
import math
from pathlib import Path

import torch
from torch import nn

from spatialprobe.engine.demo.tiny.parts import draw_weights, qwen_tokenizer, third, whole_folder


def build_llava_onevision(
    path: str | Path,
    *,
    num_layers: int = 4,
    heads: int = 4,
    head_dim: int = 16,
    vision_layers: int = 3,
    vision_heads: int = 2,
    vision_head_dim: int = 16,  # a multiple of 4
    dtype: torch.dtype = torch.bfloat16,  # as published
    shard_size: int | str | None = None,  # bytes or "5GB"; None: about four files
    seed: int = 0,
) -> Path:
    """Writes a LLaVA-OneVision-1.5 checkpoint with its tokenizer and preprocessing file and returns its folder.

    Features have `heads * head_dim` channels. Raises ValueError when `path` already holds something.
    """
    from huggingface_hub import save_torch_state_dict
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from spatialprobe.engine.parts.rice_vit import RiceConfig, RiceViT

    tokenizer, width, vision_width = qwen_tokenizer(), heads * head_dim, vision_heads * vision_head_dim
    text = {
        "vocab_size": math.ceil(len(tokenizer) / 64) * 64,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "head_dim": head_dim,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": num_layers,
        "layer_types": ["full_attention"] * num_layers,
    }
    vision = {
        "model_type": "rice_vit",
        "depth": vision_layers,
        "embed_dim": vision_width,
        "hidden_size": vision_width,
        "hidden_act": "gelu",
        "intermediate_size": 4 * vision_width,
        "num_heads": vision_heads,
        "in_channels": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 1,
        "layer_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "text_hidden_size": width,
    }
    with torch.random.fork_rng(devices=[]):
        decoder = Qwen3ForCausalLM(Qwen3Config.from_dict(text))
        tower = RiceViT(RiceConfig.of(vision, "vision_config"), vision_layers, merger=True)
    draw_weights(decoder, seed=seed)
    draw_weights(tower, seed=seed + 1)
    with torch.no_grad():
        nn.init.normal_(tower.class_embedding, generator=torch.Generator().manual_seed(seed))
        nn.init.normal_(tower.class_pos_emb, generator=torch.Generator().manual_seed(seed + 1))
    tensors = decoder.to(dtype).state_dict() | {f"visual.{k}": v for k, v in tower.to(dtype).state_dict().items()}
    config = {
        "architectures": ["LLaVAOneVision1_5_ForConditionalGeneration"],
        "auto_map": {"AutoConfig": "configuration_llavaonevision1_5.Llavaonevision1_5Config"},
        "model_type": "llavaonevision1_5",
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vocab_size": text["vocab_size"],
        "torch_dtype": "bfloat16",
        "text_config": {"model_type": "LLaVAOneVision1_5_text", "image_token_id": None, "video_token_id": None} | text,
        "vision_config": vision,
    }
    pixels = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "min_pixels": 3136,
        "max_pixels": 3240000,
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 1,
    }
    with whole_folder(path) as folder:
        save_torch_state_dict(tensors, folder, max_shard_size=shard_size or third(decoder))
        tokenizer.save_pretrained(folder)
        for name, content in {"config.json": config, "preprocessor_config.json": pixels}.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    return Path(path)
