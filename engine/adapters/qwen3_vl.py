"""Qwen3-VL (transformers). The wanted frames go in as separate images of one prompt; each is a row.

Layers are the decoder's blocks. A tap on blocks 0 to 2 sees the value before the model adds its DeepStack features.
"""

import json
import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from spatialprobe.engine.adapter import Adapter, Inputs
from spatialprobe.engine.checkpoint import Checkpoint, empty_module, load_weights, one_line
from spatialprobe.engine.images import resize
from spatialprobe.engine.types import Clip, Plan

INTRODUCTION = "The following images are consecutive frames from a video.\n"


class Qwen3VL(Adapter):
    OPTIONS = {
        "size": (540, 960),  # pixels every frame is first resized to; the processor then rounds to whole patches
        "prompt": "Describe this video.",
    }
    PARITY = OPTIONS
    LIBRARIES = ("transformers",)
    AUTO_BATCH = 4

    def __init__(self, checkpoint: Checkpoint, options: dict):
        super().__init__(checkpoint, options)
        self.config = checkpoint.json("config.json")
        self.image_config = checkpoint.json("preprocessor_config.json")
        self.video_config = checkpoint.json("video_preprocessor_config.json")
        self.num_layers = self.config["text_config"]["num_hidden_layers"]
        self.num_steps = 0
        self.channels = self.config["text_config"]["hidden_size"]
        vision = self.config["vision_config"]
        self.patch, self.merge = vision["patch_size"], vision["spatial_merge_size"]

    def check_options(self) -> None:
        height, width = self.options["size"]
        if min(height, width) < 1 or max(height, width) > 200 * min(height, width):
            raise ValueError(f"size must be positive with an aspect ratio below 200, got {self.options['size']}")
        if "<|" in self.options["prompt"]:
            raise ValueError(f"prompt must hold no special tokens, got {self.options['prompt']!r}")

    def plan(self, frames: int, query: tuple[int, ...]) -> Plan:
        cell = self.patch * self.merge  # pixels per token
        height, width = fit_pixels(*self.options["size"], cell, *self._pixel_budget(len(query)))
        row_of = {frame: row for row, frame in enumerate(query)}
        grid = (len(query), height // cell, width // cell)
        return Plan(frames, query, (height, width), grid, tuple(row_of.get(f, -1) for f in range(frames)))

    def _pixel_budget(self, images: int) -> tuple[int, int]:
        """Least and most pixels of one image: alone its processor's own, among several a share of a video's."""
        if images == 1:
            size = self.image_config["size"]
            return size["shortest_edge"], size["longest_edge"]
        size, stride = self.video_config["size"], self.video_config["temporal_patch_size"]
        share = math.ceil(images / stride) * stride
        return max(self.patch * self.merge, size["shortest_edge"] // share), size["longest_edge"] // share

    def skeleton(self, depth: int) -> list[nn.Module]:
        from transformers import Qwen3VLConfig, Qwen3VLModel

        config = Qwen3VLConfig.from_dict(json.loads(json.dumps(self.config)))
        config.text_config.num_hidden_layers = depth
        config._attn_implementation = "sdpa"
        return [empty_module(lambda: Qwen3VLModel(config))]  # the model below the language head

    def load(self, depth: int, device: torch.device, dtype: torch.dtype, cache: Path) -> None:
        from transformers import AutoTokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.device, self.dtype = device, dtype
        (self.model,) = self.skeleton(depth)
        load_weights(self.model, self.checkpoint, device=device, dtype=dtype, rename=lambda name: f"model.{name}")
        self.blocks = self.model.language_model.layers
        root = self.checkpoint.root
        with one_line(root):
            self.processor = Qwen2VLImageProcessorPil.from_pretrained(root)  # the other one needs torchvision
            self.tokenizer = AutoTokenizer.from_pretrained(root, trust_remote_code=False)
        if self.tokenizer.convert_tokens_to_ids("<|image_pad|>") != self.config["image_token_id"]:
            raise ValueError(
                f"{root}: its tokenizer does not know <|image_pad|> as token {self.config['image_token_id']}"
            )

    def prepare(self, clip: Clip, plan: Plan) -> Inputs:
        frames = resize(clip.frames, self.options["size"], Image.Resampling.BICUBIC)
        least, most = self._pixel_budget(len(plan.shown))
        images = self.processor(
            images=[Image.fromarray(f) for f in frames.numpy()],
            size={"shortest_edge": least, "longest_edge": most},
            return_tensors="pt",
        )
        ids = self.tokenizer(self._text(plan), return_tensors="pt")["input_ids"][0]
        return {
            "pixel_values": images["pixel_values"].to(self.dtype),
            "image_grid_thw": images["image_grid_thw"],
            "input_ids": ids,
            "image_positions": (ids == self.config["image_token_id"]).nonzero()[:, 0],  # here, not on the device
        }

    def _text(self, plan: Plan) -> str:
        """The prompt as the model's chat template writes it, with a placeholder per image token."""
        image = f"<|vision_start|>{'<|image_pad|>' * (plan.grid[1] * plan.grid[2])}<|vision_end|>"
        frames = "".join(f"Frame{i + 1}: {image}\n" for i in range(plan.grid[0]))
        return f"<|im_start|>user\n{INTRODUCTION}{frames}{self.options['prompt']}<|im_end|>\n<|im_start|>assistant\n"

    def encode(self, inputs: Inputs, plan: Plan) -> Inputs:
        # Without noise steps there is one forward per clip, so the vision tower runs inside it, once.
        return inputs

    def forward(self, state: Inputs, step: None, noise: None) -> None:
        ids = state["input_ids"]
        self.model(
            input_ids=ids,
            mm_token_type_ids=(ids == self.config["image_token_id"]).int(),
            pixel_values=state["pixel_values"].flatten(0, 1),
            image_grid_thw=state["image_grid_thw"].flatten(0, 1),
            use_cache=False,
        )

    def grid(self, tokens: Tensor, state: Inputs, plan: Plan) -> Tensor:
        # Equal plans have equal prompts, so the image tokens are at the same places in every clip of the batch.
        return tokens[:, state["image_positions"][0]].unflatten(1, plan.grid)


def fit_pixels(height: int, width: int, cell: int, least: int, most: int) -> tuple[int, int]:
    """The size that Qwen-VL's processors choose: multiples of `cell` within a budget of pixels, aspect ratio kept.

    After `smart_resize` of transformers' `image_processing_qwen2_vl.py`.
    """
    h, w = round(height / cell) * cell, round(width / cell) * cell
    if h * w > most:
        shrink = math.sqrt(height * width / most)
        return tuple(max(cell, math.floor(s / shrink / cell) * cell) for s in (height, width))
    if h * w < least:
        grow = math.sqrt(least / (height * width))
        return tuple(math.ceil(s * grow / cell) * cell for s in (height, width))
    return h, w
