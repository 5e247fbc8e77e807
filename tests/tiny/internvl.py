"""A small InternVL3 in either published layout: the library's own, or the one that came with its code."""

import json
import math
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from spatialprobe.engine.demo.tiny.parts import draw_weights, qwen_tokenizer, third, whole_folder

IMAGE_TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")

# An image is one placeholder token, which the caller repeats per visual token between <img> and </img>.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% elif part.type == 'video' %}{{ '<video>\n' }}"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PIXELS = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "do_normalize": True}


def build_internvl(
    path: str | Path,
    *,
    layout: Literal["native", "original"] = "native",
    text: Literal["qwen2", "qwen3"] = "qwen2",  # InternVL3, InternVL3.5
    num_layers: int = 5,
    heads: int = 4,
    head_dim: int = 16,
    vision_layers: int = 3,
    vision_heads: int = 2,
    vision_head_dim: int = 16,
    image_size: int = 84,  # pixels: 6 x 6 patches, 3 x 3 tokens
    dtype: torch.dtype = torch.bfloat16,  # as published
    shard_size: int | str | None = None,  # bytes or "5GB"; None: about four files
    seed: int = 0,
) -> Path:
    """Writes an InternVL checkpoint with its tokenizer and preprocessing files and returns its folder.

    Features have `heads * head_dim` channels. Both layouts of equal arguments hold the same weights. Raises
    ValueError when `path` already holds something.
    """
    from huggingface_hub import save_torch_state_dict
    from transformers import AddedToken, InternVLConfig, InternVLForConditionalGeneration

    tokenizer = qwen_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=True) for token in IMAGE_TOKENS])
    tokens = (image_size // 14 // 2) ** 2
    config = InternVLConfig(
        text_config={
            "model_type": text,
            "vocab_size": math.ceil(len(tokenizer) / 64) * 64,
            "hidden_size": heads * head_dim,
            "intermediate_size": 3 * heads * head_dim,
            "num_hidden_layers": num_layers,
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, heads // 2),
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0},
            "tie_word_embeddings": False,
        }
        | ({"head_dim": head_dim} if text == "qwen3" else {}),
        vision_config={
            "hidden_size": vision_heads * vision_head_dim,
            "intermediate_size": 4 * vision_heads * vision_head_dim,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": vision_heads,
            "image_size": [image_size, image_size],
            "patch_size": [14, 14],
            "attention_bias": True,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=tokens,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        model = InternVLForConditionalGeneration(config)
    draw_weights(model, seed=seed)
    model.to(dtype)
    with whole_folder(path) as folder:
        if layout == "native":
            model.save_pretrained(folder, max_shard_size=shard_size or third(model))
            files = _native_files(image_size, tokens)
        else:
            tensors = original_tensors(dict(model.state_dict()), vision_layers)
            save_torch_state_dict(tensors, folder, max_shard_size=shard_size or third(model))
            files = {"config.json": original_config(config)}
        tokenizer.save_pretrained(folder)
        if layout == "original":
            _split_tokenizer(folder)
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return Path(path)


def _native_files(image_size: int, tokens: int) -> dict[str, Any]:
    size = {"height": image_size, "width": image_size}
    return {
        "preprocessor_config.json": PIXELS
        | {"size": size, "crop_to_patches": False, "resample": 3, "image_processor_type": "GotOcr2ImageProcessorFast"},
        "video_preprocessor_config.json": PIXELS | {"size": size, "video_processor_type": "InternVLVideoProcessor"},
        "processor_config.json": {"image_seq_length": tokens, "processor_class": "InternVLProcessor"},
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
    }


def _split_tokenizer(folder: Path) -> None:
    """Turns tokenizer.json into the older vocab.json, merges.txt and added_tokens.json."""
    whole = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in whole["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (folder / "vocab.json").write_text(json.dumps(whole["model"]["vocab"], ensure_ascii=False))
    added = {token["content"]: token["id"] for token in whole["added_tokens"]}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    decoder = {token["id"]: {k: v for k, v in token.items() if k != "id"} for token in whole["added_tokens"]}
    settings |= {"added_tokens_decoder": decoder, "tokenizer_class": "Qwen2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def original_config(config: Any) -> dict[str, Any]:
    """The config of the layout that came with code, of a library's one, with what else its files hold."""
    text, vision = config.text_config.to_dict(), config.vision_config
    text = {k: v for k, v in text.items() if k not in ("rope_parameters", "dtype", "transformers_version")}
    rope = {"rope_theta": 1e6, "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}}
    code = "modeling_internvl_chat.InternVLChatModel"
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig", "AutoModel": code},
        "model_type": "internvl_chat",
        "downsample_ratio": config.downsample_ratio,
        "dynamic_image_size": True,
        "force_image_size": vision.image_size[0],
        "llm_config": text | rope | {"architectures": ["Qwen2ForCausalLM"], "moe_config": None, "use_bfloat16": True},
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "system_message": None,
        "template": "internvl2_5",
        "torch_dtype": "bfloat16",
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "auto_map": {"AutoModel": "modeling_intern_vit.InternVisionModel"},
            "model_type": "intern_vit_6b",
            "attention_dropout": 0.0,
            "drop_path_rate": 0.1,
            "dropout": 0.0,
            "hidden_act": vision.hidden_act,
            "hidden_size": vision.hidden_size,
            "image_size": vision.image_size[0],
            "initializer_factor": 0.1,
            "initializer_range": 1e-10,
            "intermediate_size": vision.intermediate_size,
            "layer_norm_eps": vision.layer_norm_eps,
            "norm_type": vision.norm_type,
            "num_attention_heads": vision.num_attention_heads,
            "num_channels": 3,
            "num_hidden_layers": vision.num_hidden_layers,
            "patch_size": vision.patch_size[0],
            "qk_normalization": False,
            "qkv_bias": True,
            "return_dict": True,
            "use_bfloat16": True,
            "use_flash_attn": True,
            "use_moe": False,
        },
    }


def original_tensors(state: dict[str, Tensor], vision_layers: int) -> dict[str, Tensor]:
    """The library's tensors under the names of the layout that came with code."""
    out = {"language_model.lm_head.weight": state["lm_head.weight"]}
    for name, tensor in state.items():
        if name.startswith("model.language_model."):
            out["language_model.model." + name.removeprefix("model.language_model.")] = tensor
    tower = "model.vision_tower.embeddings."
    out["vision_model.embeddings.class_embedding"] = state[tower + "cls_token"]
    out["vision_model.embeddings.position_embedding"] = state[tower + "position_embeddings"]
    for leaf in ("weight", "bias"):
        out[f"vision_model.embeddings.patch_embedding.{leaf}"] = state[f"{tower}patch_embeddings.projection.{leaf}"]
        for number, part in (("0", "layer_norm"), ("1", "linear_1"), ("3", "linear_2")):
            out[f"mlp1.{number}.{leaf}"] = state[f"model.multi_modal_projector.{part}.{leaf}"]
    for i in range(vision_layers):
        old, new = f"model.vision_tower.encoder.layer.{i}.", f"vision_model.encoder.layers.{i}."
        out[new + "ls1"], out[new + "ls2"] = state[old + "lambda_1"], state[old + "lambda_2"]
        for leaf in ("weight", "bias"):
            qkv = [state[f"{old}attention.{part}_proj.{leaf}"] for part in "qkv"]
            out[f"{new}attn.qkv.{leaf}"] = torch.cat(qkv)
            out[f"{new}attn.proj.{leaf}"] = state[f"{old}attention.projection_layer.{leaf}"]
            out[f"{new}norm1.{leaf}"] = state[f"{old}layernorm_before.{leaf}"]
            out[f"{new}norm2.{leaf}"] = state[f"{old}layernorm_after.{leaf}"]
            out[f"{new}mlp.fc1.{leaf}"] = state[f"{old}mlp.fc1.{leaf}"]
            out[f"{new}mlp.fc2.{leaf}"] = state[f"{old}mlp.fc2.{leaf}"]
    return out
