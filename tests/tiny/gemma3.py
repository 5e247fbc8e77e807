"""A small Gemma 3 with vision in the published Hugging Face layout, made with the library's own classes."""

import json
import math
import string
from pathlib import Path
from typing import Any

import torch

from spatialprobe.engine.demo.tiny.parts import draw_weights, third, whole_folder

SPECIAL_TOKENS = ("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>")

# An image is one <start_of_image>, which the caller replaces by that, a placeholder per token and <end_of_image>.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}"
    "{% if message.content is string %}{{ message.content | trim }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}{{ '<start_of_image>' }}{% else %}{{ part.text | trim }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Published configs say it in words that transformers 5 reads as rope_parameters and layer_types.
ROPE = {"rope_theta": 1000000, "rope_local_base_freq": 10000, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}


def gemma_tokenizer() -> Any:
    """Gemma's class over letters and bytes, with its own special tokens."""
    from transformers import AddedToken, GemmaTokenizer

    symbols = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    symbols += ["▁", "\n", "\n\n", *string.ascii_letters, *string.digits, *string.punctuation]
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    tokenizer = GemmaTokenizer(vocab=vocab, merges=[("\n", "\n")], model_max_length=131072)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def build_gemma3(
    path: str | Path,
    *,
    num_layers: int = 5,
    heads: int = 4,
    head_dim: int = 16,
    sliding_window: int = 16,  # tokens
    sliding_pattern: int = 3,  # every third block sees everything
    vision_layers: int = 3,
    vision_heads: int = 2,
    vision_head_dim: int = 16,
    image_size: int = 84,  # pixels: 6 x 6 patches, pooled to 3 x 3 tokens
    tokens: int = 9,
    dtype: torch.dtype = torch.bfloat16,  # as published
    shard_size: int | str | None = None,  # bytes or "5GB"; None: about four files
    seed: int = 0,
) -> Path:
    """Writes a Gemma 3 checkpoint with its tokenizer and preprocessing files and returns its folder.

    Features have `heads * head_dim` channels. Raises ValueError when `path` already holds something.
    """
    from huggingface_hub import save_torch_state_dict
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    tokenizer = gemma_tokenizer()
    text = {
        "model_type": "gemma3_text",
        "vocab_size": math.ceil(len(tokenizer) / 64) * 64,
        "hidden_size": heads * head_dim,
        "intermediate_size": 3 * heads * head_dim,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "head_dim": head_dim,
        "query_pre_attn_scalar": head_dim,
        "sliding_window": sliding_window,
        "sliding_window_pattern": sliding_pattern,
        "cache_implementation": "hybrid",
        **ROPE,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": vision_heads * vision_head_dim,
        "intermediate_size": 4 * vision_heads * vision_head_dim,
        "num_hidden_layers": vision_layers,
        "num_attention_heads": vision_heads,
        "image_size": image_size,
        "patch_size": 14,
        "vision_use_head": False,
    }
    ids = {"boi_token_index": "<start_of_image>", "eoi_token_index": "<end_of_image>"}
    ids |= {"image_token_index": "<image_soft_token>"}
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": vision,
        "mm_tokens_per_image": tokens,
        "torch_dtype": "bfloat16",
        **{key: tokenizer.convert_tokens_to_ids(token) for key, token in ids.items()},
    }
    with torch.random.fork_rng(devices=[]):
        model = Gemma3ForConditionalGeneration(Gemma3Config.from_dict(json.loads(json.dumps(config))))
    draw_weights(model, seed=seed)
    model.to(dtype)
    with whole_folder(path) as folder:
        tensors = {published_name(name): tensor for name, tensor in model.state_dict().items() if "lm_head" not in name}
        save_torch_state_dict(tensors, folder, max_shard_size=shard_size or third(model))
        tokenizer.save_pretrained(folder)
        for name, content in ({"config.json": config} | _files(image_size, tokens)).items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    return Path(path)


def published_name(name: str) -> str:
    """The name on disk of a tensor that transformers 5 has moved; the head is not there, it is the embedding."""
    name = name.removeprefix("model.")
    if name.startswith("language_model."):
        return name.replace("language_model.", "language_model.model.", 1)
    if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
        return name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    return name


def _files(image_size: int, tokens: int) -> dict[str, Any]:
    return {
        "preprocessor_config.json": {
            "do_convert_rgb": None,
            "do_normalize": True,
            "do_pan_and_scan": None,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": "Gemma3ImageProcessor",
            "image_seq_length": tokens,
            "image_std": [0.5, 0.5, 0.5],
            "processor_class": "Gemma3Processor",
            "resample": 2,
            "rescale_factor": 1 / 255,
            "size": {"height": image_size, "width": image_size},
        },
        "processor_config.json": {"image_seq_length": tokens, "processor_class": "Gemma3Processor"},
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
    }
