"""Published architectures with random weights: a folder that the engine loads as any other, weights from no download.

The weight files are hollow: all header, then a hole that takes no disk and reads as zeros. `draw` fills what was
loaded, on its device, each tensor from its own name: models of 21 and of 40 blocks then agree in the first 21.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spatialprobe.engine.checkpoint import empty_module
from spatialprobe.engine.demo.tiny.cogvideox import SCHEDULER as COGVIDEOX_SCHEDULER
from spatialprobe.engine.demo.tiny.parts import qwen_tokenizer
from spatialprobe.engine.demo.tiny.qwen3_vl import QWEN3_FILES, token_ids
from spatialprobe.engine.demo.tiny.wan import WAN_SCHEDULER

PUBLISHED = Path(__file__).parent.parent / "tests/published"
# Of the encoder half of T5 XXL and of UMT5 XXL, as google/t5-v1_1-xxl and google/umt5-xxl have them.
T5_XXL = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
VOCABULARY = {"wan": 256384, "cogvideox": 32128}

Modules = dict[str, nn.Module]  # by folder of the checkpoint; "" is the checkpoint itself


def published(name: str, smaller: dict[str, dict]) -> dict[str, dict]:
    """{file: config} of `tests/published/<name>.json`, with the fields of `smaller` over them, table by table."""
    configs = json.loads((PUBLISHED / f"{name}.json").read_text())
    for file, fields in smaller.items():
        for key, value in fields.items():
            table = isinstance(value, dict) and isinstance(configs[file].get(key), dict)
            configs[file][key] = configs[file][key] | value if table else value
    return configs


def whole_modules(family: str, configs: dict[str, dict]) -> Modules:
    """Every part that the published code holds on the device but the text encoder, on the meta device."""
    if family == "qwen3_vl":
        from transformers import Qwen3VLConfig, Qwen3VLModel

        config = Qwen3VLConfig.from_dict(configs["config.json"])
        config._attn_implementation = "sdpa"
        return {"": empty_module(lambda: Qwen3VLModel(config))}
    import diffusers

    transformer, vae = {
        "wan": (diffusers.WanTransformer3DModel, diffusers.AutoencoderKLWan),
        "cogvideox": (diffusers.CogVideoXTransformer3DModel, diffusers.AutoencoderKLCogVideoX),
    }[family]
    return {
        "transformer": empty_module(lambda: transformer.from_config(configs["transformer/config.json"])),
        "vae": empty_module(lambda: vae.from_config(configs["vae/config.json"])),
    }


def with_tokens(configs: dict[str, dict]) -> dict[str, dict]:
    """The configs of a Qwen3-VL with the numbers that the tiny tokenizer gives its special tokens."""
    config = configs["config.json"] | token_ids(qwen_tokenizer())
    return configs | {"config.json": config}


def write_hollow_checkpoint(root: Path, family: str, configs: dict[str, dict], dtype: torch.dtype) -> Modules:
    """Writes configs, schedulers or tokenizers, and hollow weights; returns `whole_modules`."""
    modules = whole_modules(family, configs)
    if family == "qwen3_vl":
        qwen_tokenizer().save_pretrained(root)
        files = {name: content | configs.get(name, {}) for name, content in QWEN3_FILES.items()}
        files |= {"config.json": configs["config.json"]}
    else:
        files = {"model_index.json": configs["model_index.json"], "scheduler/scheduler_config.json": schedule(family)}
        for folder, module in modules.items():
            files[f"{folder}/config.json"] = dict(module.config)  # with the class's defaults, which are the published
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(content))
    for folder, module in modules.items():
        stem, prefix = ("diffusion_pytorch_model", "") if folder else ("model", "model.")
        tensors = {prefix + name: (tuple(x.shape), own_dtype(module, name, dtype)) for name, x in stored(module)}
        write_hollow(root / folder / f"{stem}.safetensors", tensors)
    return modules


def schedule(family: str) -> dict[str, Any]:
    return WAN_SCHEDULER if family == "wan" else COGVIDEOX_SCHEDULER | {"snr_shift_scale": 1.0}


def stored(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return iter(module.state_dict().items())


def own_dtype(module: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    """Some parts of Wan stay float32."""
    keep = getattr(module, "_keep_in_fp32_modules", None) or ()
    return torch.float32 if any(part in keep for part in name.split(".")) else dtype


def write_hollow(path: Path, tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
    """A safetensors file of these tensors, all zero, that takes the disk of its header."""
    names, header, at = {torch.float32: "F32", torch.bfloat16: "BF16"}, {}, 0
    for name, (shape, dtype) in sorted(tensors.items(), key=lambda item: -item[1][1].itemsize):  # so all are aligned
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)


@torch.no_grad()
def materialise(module: nn.Module, folder: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A module of `whole_modules` on the device, with drawn weights."""
    for name, parameter in list(module.named_parameters()):
        owner, leaf = module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        empty = torch.empty(parameter.shape, device=device, dtype=own_dtype(module, name, dtype))
        setattr(owner, leaf, nn.Parameter(empty, requires_grad=False))
    for owner in module.modules():
        for leaf, buffer in list(owner.named_buffers(recurse=False)):
            owner._buffers[leaf] = buffer.to(device)
    draw(module, folder)
    return module.eval()


@torch.no_grad()
def draw(module: nn.Module, folder: str) -> None:
    """Fills every parameter where it lies: products N(0, 1/fan-in), biases and embeddings small, scales one."""
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in module.named_parameters():
        seed = int.from_bytes(hashlib.sha256(f"{folder}/{name}".encode()).digest()[:7], "little")
        generator = torch.Generator(parameter.device).manual_seed(seed)
        if id(parameter) in embeddings or name.endswith("bias"):
            parameter.normal_(0, 0.1, generator=generator)
        elif name.endswith("scale_shift_table"):
            parameter.normal_(0, 0.3, generator=generator)
        elif parameter.squeeze().ndim > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.fill_(1)


def text_encoder_bytes(family: str) -> int:
    """Of the text encoder that the published code keeps on the device, in bfloat16; 0 for a model without one."""
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    if family not in VOCABULARY:
        return 0
    config, model = (UMT5Config, UMT5EncoderModel) if family == "wan" else (T5Config, T5EncoderModel)
    encoder = empty_module(lambda: model(config(**T5_XXL, vocab_size=VOCABULARY[family])))
    # embed_tokens is `shared` again: one tensor of a model that is loaded, two of one without memory
    return 2 * sum(p.numel() for name, p in encoder.named_parameters() if "embed_tokens" not in name)
