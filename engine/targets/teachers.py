"""Models that look at one image and say how far everything in it is: the makers of geometry labels.

Depth is along the camera's z axis, in metres, as the models' own code has it after resizing to the labels' size.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from spatialprobe.engine.checkpoint import Checkpoint, one_line
from spatialprobe.engine.configs import TRANSFORMERS_4, check_fields
from spatialprobe.engine.presets import LEFT_OUT, TEACHERS

Size = tuple[int, int]  # (H, W) in pixels


@dataclass
class Maps:
    """What a teacher says of S images at the labels' size."""

    depth: Tensor  # float32 [S, H, W] metres; where it is not positive and finite, the teacher says nothing
    focal: Tensor | None = None  # float32 [S] pixels, where the model estimates it


class Teacher(ABC):
    """A family of depth models. Constructing one reads the config only."""

    AUTO_FRAMES: ClassVar[int] = 8  # images per forward

    def __init__(self, checkpoint: Checkpoint):
        from transformers import CONFIG_MAPPING

        self.checkpoint, self.config = checkpoint, checkpoint.json("config.json")
        # ZoeDepth's published configs say the width of the backbone twice.
        cls = CONFIG_MAPPING[self.config["model_type"]]
        check_fields(
            self.config, cls, f"{checkpoint.root}/config.json", harmless=TRANSFORMERS_4 | {"backbone_hidden_size"}
        )

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Reads the weights, all of them: depth comes from the last block."""
        from transformers import AutoModelForDepthEstimation

        for file in set(self.checkpoint.tensor_files().values()):
            self.checkpoint.file(file)
        root = self.checkpoint.root
        with one_line(root):
            model, info = AutoModelForDepthEstimation.from_pretrained(
                root, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
        if missing := sorted(info["missing_keys"]):  # transformers would draw them at random
            raise ValueError(f"{root} lacks {len(missing)} tensors of {type(model).__name__}, first {missing[0]}")
        self.model, self.device, self.dtype = model.to(device).eval(), device, dtype

    @abstractmethod
    def prepare(self, frames: Tensor) -> Tensor:  # uint8 [S, 3, Hi, Wi] -> float32 [S, 3, h, w]
        """Pixels as the model's own processor makes them. On the CPU, from several threads at once."""

    @abstractmethod
    def maps(self, pixels: Tensor, source: Size, size: Size) -> Maps:
        """Depth at `size` of prepared images [S, 3, h, w] that were of size `source`. On the device."""

    def processor(self, cls: Any) -> Any:
        with one_line(self.checkpoint.root):
            return cls.from_pretrained(self.checkpoint.file("preprocessor_config.json").parent)


class DepthAnything(Teacher):
    """Depth Anything V2, metric: the relative checkpoints give inverse depth of unknown scale and shift, no depth."""

    def __init__(self, checkpoint: Checkpoint):
        super().__init__(checkpoint)
        if (kind := self.config.get("depth_estimation_type", "relative")) != "metric":
            metric = TEACHERS["depth-anything-v2"]
            raise ValueError(f"{checkpoint.root} gives {kind} depth, wanted a metric checkpoint such as {metric}")
        from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

        self.process = self.processor(DPTImageProcessorPil)

    def prepare(self, frames: Tensor) -> Tensor:
        return self.process(images(frames), return_tensors="pt")["pixel_values"]

    def maps(self, pixels: Tensor, source: Size, size: Size) -> Maps:
        depth = self.model(pixels.to(self.device, self.dtype)).predicted_depth.float()
        return Maps(resized(depth, size, "bicubic"))


class ZoeDepth(Teacher):
    """ZoeDepth pads what it is shown, and its depth shows the padding: it is cut off before resizing."""

    def __init__(self, checkpoint: Checkpoint):
        super().__init__(checkpoint)
        from transformers.models.zoedepth.image_processing_pil_zoedepth import ZoeDepthImageProcessorPil

        self.process = self.processor(ZoeDepthImageProcessorPil)

    def prepare(self, frames: Tensor) -> Tensor:
        return self.process(images(frames), return_tensors="pt")["pixel_values"]

    def maps(self, pixels: Tensor, source: Size, size: Size) -> Maps:
        depth = self.model(pixels.to(self.device, self.dtype)).predicted_depth.float()
        above, beside = (int(np.sqrt(side / 2) * 3) if self.process.do_pad else 0 for side in source)
        padded = resized(depth, (source[0] + 2 * above, source[1] + 2 * beside), "bicubic")
        return Maps(resized(padded[:, above : above + source[0], beside : beside + source[1]], size, "bicubic"))


class DepthPro(Teacher):
    """Depth Pro gives inverse depth of a camera as wide as it is far, and the angle of view that makes metres of it."""

    AUTO_FRAMES = 2

    def __init__(self, checkpoint: Checkpoint):
        super().__init__(checkpoint)
        if not self.config.get("use_fov_model"):
            raise ValueError(f"{checkpoint.root} has no model of the field of view, without which depth has no scale")
        about = checkpoint.json("preprocessor_config.json")
        self.size = (about["size"]["height"], about["size"]["width"])
        self.mean, self.std = (torch.tensor(about[name]).view(1, 3, 1, 1) for name in ("image_mean", "image_std"))

    def prepare(self, frames: Tensor) -> Tensor:
        # The library's own processor needs torchvision; like it, this normalises first and resizes without smoothing.
        normal = (frames.float() / 255 - self.mean) / self.std
        return F.interpolate(normal, self.size, mode="bilinear", align_corners=False)

    def maps(self, pixels: Tensor, source: Size, size: Size) -> Maps:
        out = self.model(pixels.to(self.device, self.dtype))
        width = size[1]
        focal = 0.5 * width / torch.tan(0.5 * torch.deg2rad(out.field_of_view.float().flatten()))
        inverse = out.predicted_depth.float() * (width / focal)[:, None, None]
        return Maps(1 / resized(inverse, size, "bilinear").clamp(1e-4, 1e4), focal)


FAMILIES = {"depth_anything": DepthAnything, "depth_pro": DepthPro, "zoedepth": ZoeDepth}  # by `model_type`


def open_teacher(model: str, revision: str | None = None) -> Teacher:
    """A teacher by name, Hub id or local folder. Raises ValueError for anything that is none."""
    if model in LEFT_OUT:
        raise ValueError(f"{model} cannot be had: {LEFT_OUT[model]}")
    if not (model in TEACHERS or "/" in model or Path(model).is_dir()):
        raise ValueError(f"model {model!r} is no local folder or Hub id, and none of {', '.join(TEACHERS)}")
    checkpoint = Checkpoint.open(TEACHERS.get(model, model), revision)
    found = checkpoint.json("config.json").get("model_type")
    if found not in FAMILIES:
        raise ValueError(f"{checkpoint.root} says it is {found!r} (config.json); teachers are {', '.join(FAMILIES)}")
    return FAMILIES[found](checkpoint)


def images(frames: Tensor) -> list[Image.Image]:  # uint8 [S, 3, H, W]
    return [Image.fromarray(frame) for frame in frames.permute(0, 2, 3, 1).contiguous().numpy()]


def resized(maps: Tensor, size: Size, mode: str) -> Tensor:  # [S, h, w] -> [S, H, W]
    return F.interpolate(maps[:, None], size, mode=mode, align_corners=False)[:, 0]
