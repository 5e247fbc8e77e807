"""SigLIP 2's image encoder of any aspect ratio, NaFlex (transformers). SigLIP 2 of a fixed size is SigLIP's class.

Frames are squashed to the whole patches that its processor would make of a frame of `size`. All frames of a job have
that shape, so none is padded, and the model's mask, which it would wait for the device to look at, is not needed.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spatialprobe.engine.checkpoint import Checkpoint
from spatialprobe.engine.parts.image_encoder import ImageEncoder
from spatialprobe.engine.parts.image_processor import ImageProcessor


class SigLIP2(ImageEncoder):
    OPTIONS = ImageEncoder.OPTIONS | {
        "size": (540, 960),  # of a frame, in pixels: its shape and `patches` decide on the grid
        "patches": 256,  # most of one frame; the published processor's number
    }
    PARITY = OPTIONS
    CONFIGS = {"siglip2": "Siglip2Config", "siglip2_vision_model": "Siglip2VisionConfig"}
    PREFIXES = ("vision_model.", "")
    RENAMES = {"vision_model.": ""}  # some releases of transformers have it in the encoder's own names too

    def __init__(self, checkpoint: Checkpoint, options: dict[str, Any]):
        super().__init__(checkpoint, options)
        self.size = fit_patches(*options["size"], self.patch, options["patches"])

    def read_processor(self, config: dict[str, Any], where: str) -> ImageProcessor:
        steps = {name: value for name, value in config.items() if name not in ("patch_size", "max_num_patches")}
        return ImageProcessor.from_config(steps | {"size": {"shortest_edge": 0}}, where)  # whatever the frame has

    def check_options(self) -> None:
        super().check_options()
        if min(self.options["size"]) < 1:
            raise ValueError(f"size must be positive, got {self.options['size']}")
        if self.options["patches"] < 1:
            raise ValueError(f"patches must be at least 1, got {self.options['patches']}")

    def build(self, config) -> nn.Module:
        from transformers import Siglip2VisionModel

        config.vision_use_head = False
        model = Siglip2VisionModel(config)
        _encoder(model).post_layernorm = nn.Identity()
        return model

    def blocks_of(self, model: nn.Module) -> Sequence[nn.Module]:
        return _encoder(model).encoder.layers

    def load(self, depth: int, device: torch.device, dtype: torch.dtype, cache: Path) -> None:
        super().load(depth, device, dtype, cache)
        with torch.no_grad():
            self._fix_positions(_encoder(self.model).embeddings)

    def _fix_positions(self, embeddings: nn.Module) -> None:
        """The model resamples its table for one image after the other, all to the same grid: once is enough."""
        side = embeddings.position_embedding_size
        self.grid_shape = torch.tensor([[s // self.patch for s in self.size]])  # on the CPU: the model reads it
        positions = embeddings.position_embedding.weight.view(side, side, -1)
        table = embeddings.resize_positional_embeddings(positions, self.grid_shape, int(self.grid_shape.prod()))
        embeddings.table = table if self.options["pos_embed"] == "native" else self.changed(table)  # [1, H * W, C]
        embeddings.resize_positional_embeddings = lambda positions, shapes, max_length: embeddings.table

    def run(self, pixels: Tensor) -> None:  # [N, 3, H, W]
        patches = pixels.unflatten(2, (-1, self.patch)).unflatten(4, (-1, self.patch))  # [N, 3, h, p, w, p]
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # [N, h * w, p * p * 3]
        self.model(patches, pixel_attention_mask=None, spatial_shapes=self.grid_shape)

    def change_positions(self) -> None:
        pass  # with the resampling, in `load`


def _encoder(model: nn.Module) -> nn.Module:
    return getattr(model, "vision_model", model)


def fit_patches(height: int, width: int, patch: int, most: int) -> tuple[int, int]:
    """Pixels (H, W) of the most patches that a frame of this shape fills, its sides rounded up to whole ones.

    The bisection of `get_image_size_for_max_num_patches` in transformers' `image_processing_siglip2.py`, to its last
    step: how far it goes decides on ties.
    """

    def sides(scale: float) -> tuple[int, int]:
        return tuple(max(1, math.ceil(s * scale / patch)) for s in (height, width))

    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        middle = (low + high) / 2
        low, high = (middle, high) if math.prod(sides(middle)) <= most else (low, middle)
    return tuple(s * patch for s in sides(low))
