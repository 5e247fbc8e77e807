"""CLIP's image tower (transformers), up to the last block but one, which image-to-video models are conditioned on."""

from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from spatialprobe.engine.checkpoint import Checkpoint, empty_module, load_weights, one_line
from spatialprobe.engine.configs import check_fields

FOLDER, PROCESSOR = "image_encoder", "image_processor"  # of a pipeline


def skeleton(config: dict) -> nn.Module:
    """The tower without its last block, whose output is not used, on the meta device."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    check_fields(config, CLIPVisionConfig, f"{FOLDER}/config.json", harmless=("dropout",))  # of training
    config = CLIPVisionConfig.from_dict({**config, "num_hidden_layers": config["num_hidden_layers"] - 1})
    config._attn_implementation = "sdpa"
    return empty_module(lambda: CLIPVisionModel(config))


def load(tower: nn.Module, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
    stored, prefix = checkpoint.tensor_files(FOLDER), "vision_model."  # on disk; in the class only up to some release

    def rename(name: str) -> str:
        bare = name.removeprefix(prefix)
        return bare if bare in stored else prefix + bare

    load_weights(tower, checkpoint, FOLDER, device=device, dtype=dtype, rename=rename)


def processor(checkpoint: Checkpoint) -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = checkpoint.folder(PROCESSOR)
    with one_line(folder):
        return CLIPImageProcessorPil.from_pretrained(folder)  # the other one needs torchvision


def processor_config(checkpoint: Checkpoint) -> dict[str, Any]:
    return checkpoint.json(f"{PROCESSOR}/preprocessor_config.json")


def pixels(processor: Any, image: Tensor) -> Tensor:  # uint8 [H, W, 3] -> float32 [3, h, w]
    return processor(images=Image.fromarray(image.numpy()), return_tensors="pt")["pixel_values"][0]


def tokens(tower: nn.Module, pixels: Tensor) -> Tensor:  # [B, 3, h, w] -> [B, 1 + patches, D]
    return tower(pixels).last_hidden_state
