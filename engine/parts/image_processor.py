"""What a vision encoder's own image processor does to frames, read from its preprocessor file. Knows no model.

Frames stay 8-bit pixels until they are on the device, where `normalise` looks each value up in a table: the numbers
are those of transformers' Pillow processors, bit for bit, and a quarter of the bytes travel. torchvision is not used.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from spatialprobe.engine.clips.images import resize

# Fields that say nothing about the pixels, or about batching, padding and sampling that the engine does itself.
NEUTRAL = frozenset(
    "processor_class image_processor_type video_processor_type feature_extractor_type do_convert_rgb data_format "
    "input_data_format default_to_square do_pad pad_size device disable_grouping return_tensors image_seq_length "
    "do_sample_frames fps num_frames video_metadata return_metadata size_divisor model_input_names".split()
)
MEANT = frozenset(
    "do_resize do_rescale do_normalize do_center_crop size crop_size resample rescale_factor image_mean "
    "image_std".split()
)


@dataclass(frozen=True)
class ImageProcessor:
    size: tuple[int, int] | None  # (H, W) pixels that the model sees; None: it depends on the frame's shape
    edge: int | None  # pixels of the shortest edge before the centre is cut out; None: the processor squashes
    resample: Image.Resampling
    scale: float  # what an 8-bit value is multiplied by
    mean: tuple[float, ...]  # of the scaled values, per colour
    std: tuple[float, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str) -> "ImageProcessor":
        """Of a preprocessor file's fields. Raises ValueError for one whose steps are others than these."""
        if unknown := sorted(
            k for k, v in config.items() if k not in NEUTRAL | MEANT and v is not None and k[0] != "_"
        ):
            raise ValueError(f"{where} has fields that this reader does not know: {', '.join(unknown)}")
        for name in ("do_resize", "do_rescale", "do_normalize"):
            if config.get(name, True) is not True:
                raise ValueError(f"{where}: wanted {name} to be true, got {config[name]}")
        size, crops = config["size"], bool(config.get("do_center_crop", False))
        size = {"shortest_edge": size} if isinstance(size, int) else size
        if set(size) == {"height", "width"}:
            whole, edge = (size["height"], size["width"]), None
            if crops and _sides(config["crop_size"]) != whole:
                raise ValueError(f"{where}: wanted a crop of the resized {whole}, got {config['crop_size']}")
        elif set(size) == {"shortest_edge"} and crops:
            whole, edge = _sides(config["crop_size"]), size["shortest_edge"]
            if edge < max(whole):
                raise ValueError(f"{where}: wanted a shortest edge of at least the crop's {max(whole)}, got {edge}")
        elif set(size) == {"shortest_edge"}:
            whole, edge = None, None
        else:
            raise ValueError(f"{where}: wanted a size of height and width or of a shortest_edge, got {size}")
        return cls(
            whole,
            edge,
            Image.Resampling(config["resample"]),
            config.get("rescale_factor", 1 / 255),
            tuple(config["image_mean"]),
            tuple(config["image_std"]),
        )

    def pixels(
        self, frames: Tensor, size: tuple[int, int], crop: bool
    ) -> Tensor:  # uint8 [S, 3, Hi, Wi] -> [S, H, W, 3]
        """Frames squashed to `size`, or (`crop`) their centres as the processor cuts them, which has its own size."""
        if not crop:
            return resize(frames, size, self.resample)
        assert self.edge is not None
        assert size == self.size
        height, width = frames.shape[2:]
        short, long = sorted((height, width))
        length = int(self.edge * long / short)
        scaled = (length, self.edge) if width <= height else (self.edge, length)
        top, left = ((s - c) // 2 for s, c in zip(scaled, size, strict=True))
        return resize(frames, scaled, self.resample)[:, top : top + size[0], left : left + size[1]].contiguous()

    def table(self) -> Tensor:  # float32 [3, 256]
        """The model's input for each 8-bit value of each colour, rounded as transformers' `rescale`, `normalize` do."""
        scaled = (np.arange(256, dtype=np.float64) * self.scale).astype(np.float32)
        mean, std = (np.array(x, np.float32)[:, None] for x in (self.mean, self.std))
        return torch.from_numpy((scaled - mean) / std)


def normalise(pixels: Tensor, table: Tensor) -> Tensor:  # uint8 [..., H, W, 3] -> [..., 3, H, W] of the table's dtype
    """Looks up every value. Runs on the device of `table` [3, 256]."""
    planes = [table[c].index_select(0, pixels[..., c].flatten().int()) for c in range(3)]
    return torch.stack([plane.view(pixels.shape[:-1]) for plane in planes], dim=-3)


def _sides(size: int | Mapping[str, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size["height"], size["width"])
