"""DINOv3's vision transformers (transformers), trained on images alone to agree with a teacher, patch by patch too.

A class token, registers, then the patches; rotary positions of the patches alone, of any size. Its processor resizes
after scaling, in floating point: that is done here as torchvision does it, with torch's own interpolation.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate

from spatialprobe.engine.adapter import Inputs
from spatialprobe.engine.checkpoint import Checkpoint
from spatialprobe.engine.parts.image_encoder import ImageEncoder
from spatialprobe.engine.types import Clip, Plan


class DINOv3(ImageEncoder):
    CONFIGS = {"dinov3_vit": "DINOv3ViTConfig"}
    RENAMES = {"model.layer.": "layer."}

    def __init__(self, checkpoint: Checkpoint, options: dict[str, Any]):
        super().__init__(checkpoint, options)
        self.special = 1 + self.config.num_register_tokens
        if self.processor.resample != Image.Resampling.BILINEAR:
            raise ValueError(f"{checkpoint.root}: wanted a bilinear processor, got {self.processor.resample.name}")

    def build(self, config) -> nn.Module:
        from transformers import DINOv3ViTModel

        model = DINOv3ViTModel(config)
        model.norm = nn.Identity()
        return model

    def blocks_of(self, model: nn.Module) -> Sequence[nn.Module]:
        return model.model.layer if hasattr(model, "model") else model.layer

    PREPARES_ON_DEVICE = False  # this processor resizes in float32, where devices round differently

    def prepare(self, clip: Clip, plan: Plan) -> Inputs:
        x = clip.frames.contiguous() * self.processor.scale  # float32 [S, 3, Hi, Wi]
        if tuple(x.shape[2:]) != plan.size:
            x = interpolate(x, plan.size, mode="bilinear", align_corners=False, antialias=True)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.processor.mean, self.processor.std))
        return {"pixels": ((x - mean) / std).to(self.dtype)}

    def encode(self, inputs: Inputs, plan: Plan) -> Tensor:
        return inputs["pixels"]

    def run(self, pixels: Tensor) -> None:
        self.model(pixels)

    def change_positions(self) -> None:
        def changed(module, args, rotation):
            cos, sin = rotation  # each [patches, head's channels]
            return self.changed(cos, nowhere=1.0), self.changed(sin)

        self.model.rope_embeddings.register_forward_hook(changed)
