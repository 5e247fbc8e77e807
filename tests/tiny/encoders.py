"""Small vision encoders in their published layouts: every family of `ImageEncoder`, made with the library's classes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from spatialprobe.engine.demo.tiny.parts import draw_weights, whole_folder

COMMON = {"num_hidden_layers": 4, "num_attention_heads": 2, "hidden_size": 32}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
HALVES = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
OPENAI = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def _steps(kind: str, resample: int, colours: dict[str, list[float]], size: Any, crop: int | None = None) -> dict:
    """A preprocessor file: `size` of a squashing processor, or of the shortest edge of one that crops."""
    steps = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}
    steps |= colours | {"image_processor_type": kind, "resample": resample, "do_center_crop": crop is not None}
    if crop is None:
        return steps | {"size": {"height": size, "width": size}}
    return steps | {"size": {"shortest_edge": size}, "crop_size": {"height": crop, "width": crop}}


def _clip(tf) -> nn.Module:
    vision = COMMON | {"intermediate_size": 64, "image_size": 64, "patch_size": 16}
    return tf.CLIPModel(tf.CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=16))


def _siglip(tf) -> nn.Module:
    vision = COMMON | {"intermediate_size": 64, "image_size": 60, "patch_size": 14}  # 4 patches and a rim, as 384 of 14
    return tf.SiglipModel(tf.SiglipConfig(text_config=TEXT | {"projection_size": 32}, vision_config=vision))


def _siglip2(tf) -> nn.Module:
    vision = COMMON | {"intermediate_size": 64, "num_patches": 25, "patch_size": 16}
    return tf.Siglip2Model(tf.Siglip2Config(text_config=TEXT | {"projection_size": 32}, vision_config=vision))


def _aimv2(tf, **more) -> nn.Module:
    config = COMMON | {"intermediate_size": 48, "image_size": 56, "patch_size": 14} | more
    return tf.Aimv2VisionModel(tf.Aimv2VisionConfig(**config))


def _dinov2(tf) -> nn.Module:
    return tf.Dinov2Model(tf.Dinov2Config(**COMMON, image_size=70, patch_size=14))  # a table of 5 x 5 for 4 x 4 patches


def _dinov2_registers(tf) -> nn.Module:
    config = tf.Dinov2WithRegistersConfig(**COMMON, image_size=70, patch_size=14, num_register_tokens=4)
    return tf.Dinov2WithRegistersModel(config)


def _dinov3(tf) -> nn.Module:
    config = COMMON | {"intermediate_size": 64, "image_size": 64, "patch_size": 16, "num_register_tokens": 4}
    return tf.DINOv3ViTModel(tf.DINOv3ViTConfig(**config))


def _vjepa2(tf) -> nn.Module:
    predictor = {f"pred_{k}": v for k, v in (COMMON | {"num_hidden_layers": 1, "num_mask_tokens": 2}).items()}
    config = COMMON | {"crop_size": 64, "patch_size": 16, "frames_per_clip": 8, "mlp_ratio": 2.0} | predictor
    return tf.VJEPA2Model(tf.VJEPA2Config(**config))


def _videomae(tf) -> nn.Module:
    decoder = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = COMMON | {"intermediate_size": 64, "image_size": 64, "patch_size": 16, "num_frames": 8}
    config |= {f"decoder_{k}": v for k, v in decoder.items()}
    model = tf.VideoMAEForPreTraining(tf.VideoMAEConfig(**config, use_mean_pooling=False))
    for name, module in model.named_modules():
        if name.endswith("attention.key"):
            module.bias = None  # some releases of transformers give keys one, published models have none
    return model


# name -> (model, file of its processor, that file)
ENCODERS: dict[str, tuple[Callable[[Any], nn.Module], str, dict]] = {
    "clip": (_clip, "preprocessor_config.json", _steps("CLIPImageProcessor", 3, OPENAI, 64, 64)),
    "siglip": (_siglip, "preprocessor_config.json", _steps("SiglipImageProcessor", 3, HALVES, 60)),
    "siglip2": (
        _siglip2,
        "preprocessor_config.json",
        {k: v for k, v in _steps("Siglip2ImageProcessor", 2, HALVES, 0).items() if k not in ("size", "do_center_crop")}
        | {"patch_size": 16, "max_num_patches": 256},
    ),
    "aimv2": (_aimv2, "preprocessor_config.json", _steps("CLIPImageProcessor", 3, OPENAI, 56, 56)),
    "aimv2-native": (
        lambda tf: _aimv2(tf, is_native=True),
        "preprocessor_config.json",
        _steps("CLIPImageProcessor", 3, OPENAI, 56) | {"size": {"shortest_edge": 56}},
    ),
    "dinov2": (_dinov2, "preprocessor_config.json", _steps("BitImageProcessor", 3, IMAGENET, 64, 56)),
    "dinov2-registers": (
        _dinov2_registers,
        "preprocessor_config.json",
        _steps("BitImageProcessor", 3, IMAGENET, 64, 56),
    ),
    "dinov3": (_dinov3, "preprocessor_config.json", _steps("DINOv3ViTImageProcessorFast", 2, IMAGENET, 64)),
    "vjepa2": (
        _vjepa2,
        "video_preprocessor_config.json",
        _steps("", 2, IMAGENET, 73, 64)
        | {"video_processor_type": "VJEPA2VideoProcessor", "image_processor_type": None},
    ),
    "videomae": (_videomae, "preprocessor_config.json", _steps("VideoMAEImageProcessor", 2, IMAGENET, 64, 64)),
}


def build_encoder(path: str | Path, name: str, *, part: str | None = None, seed: int = 0) -> Path:
    """Writes the encoder `name` of `ENCODERS` in fp32, as published, and returns its folder.

    `part` is a sub-model to write alone ("vision_model" of CLIP), its tensors named as within the whole, as published
    encoders are. Features have 32 channels. Raises ValueError when `path` already holds something.
    """
    import transformers

    build, file, steps = ENCODERS[name]
    with torch.random.fork_rng(devices=[]):
        model = build(transformers)
    draw_weights(model, seed=seed)
    _place(model, seed=seed)
    with whole_folder(path) as folder:
        whole = model if part is None else getattr(model, part)
        whole.save_pretrained(folder)
        if part is not None:
            _rename(folder, lambda name: f"{part}.{name.removeprefix(part + '.')}")
        if name == "videomae":
            _rename(folder, lambda name: name.replace("query.bias", "q_bias").replace("value.bias", "v_bias"))
        (folder / file).write_text(json.dumps(steps, indent=2) + "\n")
    return Path(path)


def _place(model: nn.Module, *, seed: int) -> None:
    """Positions and special tokens as large as the patches beside them, so that features depend on them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "position_embedding" in name or name.endswith(("cls_token", "class_embedding", "register_tokens")):
                parameter.normal_(0, 0.5, generator=generator)


def _rename(folder: Path, name: Callable[[str], str]) -> None:
    """Gives tensors their published names, where the installed transformers writes others."""
    file = folder / "model.safetensors"
    save_file({name(stored): tensor for stored, tensor in load_file(file).items()}, file, {"format": "pt"})
