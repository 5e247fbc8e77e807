"""A small Open-Sora 2.0 in the published layout: two files without configs, and two folders of text encoders."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from spatialprobe.engine.demo.tiny.parts import draw_weights, t5_tokenizer, whole_folder
from spatialprobe.engine.parts.open_sora_blocks import OpenSoraTransformer, Sizes
from tiny.clip_text import clip_text
from tiny.hunyuan_vae import hunyuan_vae

FINAL = ("final_layer.linear", "final_layer.adaLN_modulation.1")  # in the released file, and not needed for features


def build_open_sora(
    path: str | Path,
    *,
    double: int = 2,  # blocks of two streams
    single: int = 2,  # and of one
    heads: int = 2,
    head_dim: int = 32,  # a multiple of 32
    vae_dim: int = 32,  # a multiple of 32, the published number of groups in normalisations
    dtype: torch.dtype = torch.float32,  # of the transformer; bfloat16 as published
    seed: int = 0,
) -> Path:
    """Writes an Open-Sora 2.0 checkpoint and returns its folder.

    Features have `heads * head_dim` channels. Raises ValueError when `path` already holds something.
    """
    from transformers import T5Config, T5EncoderModel

    width = heads * head_dim
    sizes = Sizes(double, single, width, head_dim, 4 * width, patch=64, condition=68, text=32, pooled=32)
    tokenizer = t5_tokenizer()
    with torch.random.fork_rng(devices=[]):  # the constructors draw weights too; those are all replaced below
        transformer = OpenSoraTransformer(sizes, double + single)
        t5 = T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4))
    draw_weights(transformer, seed=seed)
    draw_weights(t5, seed=seed)
    weights = {name: x.to(dtype).contiguous() for name, x in transformer.state_dict().items()}
    for name, rows in zip(FINAL, (sizes.patch, 2 * width), strict=True):
        weights |= {
            f"{name}.weight": torch.zeros(rows, width, dtype=dtype),
            f"{name}.bias": torch.zeros(rows, dtype=dtype),
        }
    vae = hunyuan_vae(dim=vae_dim, groups=32, seed=seed)
    clip, clip_tokenizer = clip_text(width=32, seed=seed)
    encoders = {"google/t5-v1_1-xxl": (t5, tokenizer), "openai/clip-vit-large-patch14": (clip, clip_tokenizer)}
    with whole_folder(path) as folder:
        save_file(weights, folder / "Open_Sora_v2.safetensors")
        save_file(vae.state_dict(), folder / "hunyuan_vae.safetensors")  # its library's names are the released ones
        for name, parts in encoders.items():
            for part in parts:
                part.save_pretrained(folder / name)
    return Path(path)
