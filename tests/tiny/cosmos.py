"""A small Cosmos-Predict2 Video2World pipeline in the published Hugging Face layout, of the library's own classes."""

import json
from pathlib import Path

import torch

from spatialprobe.engine.demo.tiny.parts import draw_weights, t5_tokenizer, third, whole_folder

# Written by hand: the pipeline's class cannot be made without the package that checks what it generates.
COSMOS_INDEX = {
    "_class_name": "Cosmos2VideoToWorldPipeline",
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "CosmosTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}


def build_cosmos(
    path: str | Path,
    *,
    num_layers: int = 4,
    heads: int = 2,
    head_dim: int = 24,  # a multiple of 6 splits evenly over time, rows and columns
    vae_dim: int = 8,
    seed: int = 0,
) -> Path:
    """Writes a Cosmos-Predict2 Video2World pipeline in fp32 and returns its folder.

    Features have `heads * head_dim` channels. Raises ValueError when `path` already holds something.
    """
    from diffusers import AutoencoderKLWan, CosmosTransformer3DModel, FlowMatchEulerDiscreteScheduler
    from transformers import T5Config, T5EncoderModel

    tokenizer = t5_tokenizer()
    with torch.random.fork_rng(devices=[]):  # the constructors draw weights too; those are all replaced below
        text = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        text_encoder = T5EncoderModel(T5Config(vocab_size=len(tokenizer), **text))
        vae = AutoencoderKLWan(base_dim=vae_dim, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
        transformer = CosmosTransformer3DModel(
            in_channels=17,  # 16 latents and the condition mask
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            num_layers=num_layers,
            text_embed_dim=text["d_model"],
            adaln_lora_dim=16,
            rope_scale=(1.0, 3.0, 3.0),
            extra_pos_embed_type=None,
        )
    for module in (text_encoder, vae, transformer):
        draw_weights(module, seed=seed)
    parts = {"tokenizer": tokenizer, "text_encoder": text_encoder, "vae": vae}
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    with whole_folder(path) as folder:
        (folder / "model_index.json").write_text(json.dumps(COSMOS_INDEX, indent=2) + "\n")
        for name, part in parts.items():
            part.save_pretrained(folder / name)
        transformer.save_pretrained(folder / "transformer", max_shard_size=third(transformer))
    return Path(path)
