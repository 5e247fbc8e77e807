"""Small depth models in the published Hugging Face layout, made with the library's own classes."""

import json
from pathlib import Path

import torch
from torch import nn

from spatialprobe.engine.demo.tiny.parts import draw_weights, whole_folder

VIT = {"num_hidden_layers": 4, "num_attention_heads": 2, "mlp_ratio": 2}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
NECK = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8}
STAGES = {"out_features": ["stage1", "stage2", "stage3", "stage4"], "reshape_hidden_states": False}
PROCESSORS = {  # the published ones, but for their sizes
    "depth_anything": IMAGENET
    | {"image_processor_type": "DPTImageProcessor", "size": {"height": 56, "width": 56}, "resample": 3}
    | {"keep_aspect_ratio": True, "ensure_multiple_of": 14, "do_pad": False, "size_divisor": None},
    "zoedepth": {"image_processor_type": "ZoeDepthImageProcessor", "size": {"height": 32, "width": 64}, "resample": 2}
    | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "keep_aspect_ratio": True, "ensure_multiple_of": 32}
    | {"do_pad": True},
    "depth_pro": {"image_processor_type": "DepthProImageProcessor", "size": {"height": 64, "width": 64}, "resample": 2}
    | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
}


def build_teacher(path: str | Path, kind: str, *, relative: bool = False, fov: bool = True, seed: int = 0) -> Path:
    """Writes a depth model of `kind`, a key of PROCESSORS, and returns its folder."""
    with torch.random.fork_rng(devices=[]):
        model = {"depth_anything": _depth_anything, "zoedepth": _zoedepth, "depth_pro": _depth_pro}[kind](relative, fov)
    draw_weights(model, seed=seed)
    if kind == "depth_pro" and fov:
        with torch.no_grad():  # some 60 degrees wide and nowhere infinitely far, as random numbers would be
            model.fov_model.head.layers[-1].bias.fill_(60.0)
            model.head.layers[4].weight *= 0.1
            model.head.layers[4].bias.fill_(1.0)
    with whole_folder(path) as folder:
        model.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[kind], indent=2) + "\n")
    return Path(path)


def _depth_anything(relative: bool, fov: bool) -> nn.Module:
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    backbone = Dinov2Config(hidden_size=32, image_size=56, patch_size=14, apply_layernorm=True, **VIT, **STAGES)
    kind = {} if relative else {"depth_estimation_type": "metric", "max_depth": 20}
    config = DepthAnythingConfig(
        backbone_config=backbone, patch_size=14, reassemble_hidden_size=32, head_hidden_size=8, **NECK, **kind
    )
    return DepthAnythingForDepthEstimation(config)


def _zoedepth(relative: bool, fov: bool) -> nn.Module:
    from transformers import BeitConfig, ZoeDepthConfig, ZoeDepthForDepthEstimation

    backbone = BeitConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8,
        use_relative_position_bias=True, use_absolute_position_embeddings=False, **STAGES,
    )  # fmt: skip
    config = ZoeDepthConfig(
        backbone_config=backbone, bottleneck_features=8, num_relative_features=8, backbone_hidden_size=32,
        num_attractors=[4, 2, 2, 1], bin_embedding_dim=8,
        bin_configurations=[{"n_bins": 8, "min_depth": 0.1, "max_depth": 10.0}], **NECK,
    )  # fmt: skip
    return ZoeDepthForDepthEstimation(config)


def _depth_pro(relative: bool, fov: bool) -> nn.Module:
    from transformers import DepthProConfig, DepthProForDepthEstimation, Dinov2Config

    encoders = {
        f"{name}_model_config": Dinov2Config(hidden_size=16, image_size=16, patch_size=4, **VIT)
        for name in ("image", "patch", "fov")
    }
    config = DepthProConfig(
        fusion_hidden_size=8, patch_size=16, intermediate_hook_ids=[3, 1], intermediate_feature_dims=[8, 8],
        scaled_images_feature_dims=[16, 8, 8], use_fov_model=fov, num_fov_head_layers=0, **encoders,
    )  # fmt: skip
    return DepthProForDepthEstimation(config)
