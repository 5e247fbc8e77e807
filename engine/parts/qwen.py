"""Qwen-VL and its kin in transformers: the wanted frames go in as images of one prompt, each of them is a row.

Layers are the decoder's blocks or, with tap=vision, those of the vision tower before it, whose grid is of patches.
What tells the families apart is in their adapters.
"""

import copy
import math
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from spatialprobe.engine.adapter import Adapter, Inputs
from spatialprobe.engine.checkpoint import Checkpoint, empty_module, load_weights, one_line
from spatialprobe.engine.clips.images import resize
from spatialprobe.engine.configs import check_fields, table_of
from spatialprobe.engine.parts.frames_as_images import (
    INTRODUCTION,
    check_tap,
    check_words,
    image_tokens,
    numbered,
    plan_images,
)
from spatialprobe.engine.parts.image_grid import fit_pixels, patch_places, pixel_range, window_lengths
from spatialprobe.engine.parts.packed_attention import attend_within_pieces
from spatialprobe.engine.types import Clip, Plan

PARTS = ("text_config", "vision_config")
ANY = object()  # of an ignored field: whatever it says, no feature depends on it
# Fields of any decoder's table: of the language head, older spellings of rope_parameters, which transformers reads, and
# ids that older releases wrote at both levels, of which the top one counts.
TEXT = dict.fromkeys(
    (
        *("tie_word_embeddings", "rope_scaling", "rope_theta", "partial_rotary_factor"),
        *("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id"),
    ),
    ANY,
)


class QwenKin(Adapter):
    OPTIONS = {
        "size": (540, 960),  # pixels every frame is first resized to; the processor then rounds to whole cells
        "prompt": "Describe this video.",
        "tap": "decoder",  # or "vision"
    }
    PARITY = OPTIONS
    LIBRARIES = ("transformers",)
    AUTO_BATCH = 4

    MODEL_TYPE: ClassVar[str]  # in config.json
    MODEL: ClassVar[str]  # transformers' class below the language head; its config is found through it
    PROCESSOR = "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl:Qwen2VLImageProcessorPil"  # no torchvision
    IMAGE = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")  # the middle one is repeated for every token
    TURN = ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")  # the chat template around a question
    CONTROL: ClassVar[tuple[str, ...]] = ("<|",)  # what special tokens are spelled with
    # Fields of published configs that transformers' classes ignore, with the value that they work by.
    IGNORED: ClassVar[dict[str, dict[str, Any]]] = {}

    def __init__(self, checkpoint: Checkpoint, options: dict):
        super().__init__(checkpoint, options)
        raw = checkpoint.json("config.json")
        if raw.get("model_type") != self.MODEL_TYPE:
            raise ValueError(f"{checkpoint.root} is a {raw.get('model_type')}; this adapter runs {self.MODEL_TYPE}")
        parts = self.config_parts(raw)
        self._check_parts(parts)
        self.config = self._config_class().from_dict(copy.deepcopy(raw))
        self.image_config = checkpoint.json("preprocessor_config.json")
        video = "video_preprocessor_config.json"
        self.video_config = checkpoint.json(video) if checkpoint.has(video) else self.image_config
        text, vision = self.config.text_config, self.config.vision_config  # with the library's defaults
        self.patch, self.merge = vision.patch_size, vision.spatial_merge_size
        self.cell = self.patch * self.merge  # pixels per token of the decoder, in height and in width
        self.vision = options["tap"] == "vision"
        self.num_layers = vision.depth if self.vision else text.num_hidden_layers
        self.num_steps = 0
        self.channels = vision.hidden_size if self.vision else text.hidden_size

    def config_parts(self, raw: dict) -> dict[str, dict]:
        """The three tables of config.json. What its top level says just as the decoder's table does is left out."""
        text, vision = (table_of(raw, part, f"{self.checkpoint.root}/config.json") for part in PARTS)
        top = {name: value for name, value in raw.items() if name not in text or text[name] != value}
        return {"config.json": top, "text_config": text, "vision_config": vision}

    def _config_class(self) -> type:
        import transformers

        return getattr(transformers, self.MODEL).config_class

    def _check_parts(self, parts: dict[str, dict]) -> None:
        """Raises ValueError for fields of config.json that the installed transformers does not heed."""
        from transformers.utils import logging

        cls, verbosity = self._config_class(), logging.get_verbosity()
        logging.set_verbosity_error()  # it would tell of the default configs that are made to list their fields
        try:
            for part, fields in parts.items():
                where = f"{self.checkpoint.root}/config.json" + ("" if part == "config.json" else f" ({part})")
                ignored = self.IGNORED.get(part, {}) | (TEXT if part == "text_config" else {})
                for name, value in ignored.items():
                    if value is not ANY and fields.get(name, value) != value:
                        raise ValueError(
                            f"{where} has {name}={fields[name]!r}, but transformers always does as with {value!r}"
                        )
                check_fields(fields, cls.sub_configs.get(part, cls), where, harmless=ignored)
        finally:
            logging.set_verbosity(verbosity)

    def check_options(self) -> None:
        height, width = self.options["size"]
        if min(height, width) < 1 or max(height, width) > 200 * min(height, width):
            raise ValueError(f"size must be positive with an aspect ratio below 200, got {self.options['size']}")
        check_words(self.options, ["prompt"], self.CONTROL)
        check_tap(self.options)

    # -- geometry ---------------------------------------------------------------------------------------------------

    def plan(self, frames: int, query: tuple[int, ...]) -> Plan:
        height, width = self.fitted_size(*self.pixel_budget(len(query)))
        unit = self.patch if self.vision else self.cell
        return plan_images(frames, query, (height, width), (height // unit, width // unit))

    def pixel_budget(self, images: int) -> tuple[int, int]:
        """Least and most pixels of one image: alone its processor's own, among several a share of a video's."""
        if images == 1:
            return pixel_range(self.image_config)
        least, most = pixel_range(self.video_config)
        stride = self.video_config["temporal_patch_size"]
        share = math.ceil(images / stride) * stride
        return max(self.cell, least // share), most // share

    def fitted_size(self, least: int, most: int) -> tuple[int, int]:
        """Pixels (height, width) to which the image processor brings a frame of the wanted size."""
        return fit_pixels(*self.options["size"], self.cell, least, most)

    def window(self) -> int | None:
        """Cells per attention window of the vision tower, in height and in width; None for a tower without windows."""
        return None

    # -- weights ----------------------------------------------------------------------------------------------------

    def skeleton(self, depth: int) -> list[nn.Module]:
        import transformers

        config = copy.deepcopy(self.config)
        config._attn_implementation = "sdpa"
        text = config.text_config
        text.num_hidden_layers = 1 if self.vision else depth
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[: text.num_hidden_layers]
        if self.vision:
            config.vision_config.depth = depth
        model = empty_module(lambda: getattr(transformers, self.MODEL)(config))
        if self.vision:
            self.cut_tower(model.visual)
            return [model.visual]
        model.language_model.norm = nn.Identity()  # above the tap
        return [model]

    def cut_tower(self, tower: nn.Module) -> None:
        """Takes off what lies above the tower's blocks."""
        tower.merger = nn.Identity()
        if hasattr(tower, "deepstack_merger_list"):  # Qwen3-VL's: beside the blocks, for the decoder's first ones
            tower.deepstack_visual_indexes, tower.deepstack_merger_list = [], nn.ModuleList()

    def stored_name(self, name: str) -> str:
        """A parameter's name in the checkpoint, from its name in `MODEL`."""
        return f"model.{name}"

    def load(self, depth: int, device: torch.device, dtype: torch.dtype, cache: Path) -> None:
        self.device, self.dtype = device, dtype
        (self.model,) = self.skeleton(depth)
        prefix = "visual." if self.vision else ""
        rename = lambda name: self.stored_name(prefix + name)  # noqa: E731
        load_weights(self.model, self.checkpoint, device=device, dtype=dtype, rename=rename)
        self.blocks = self.model.blocks if self.vision else self.model.language_model.layers
        tower = self.model if self.vision else self.model.visual
        self.pieces = attend_within_pieces(block.attn for block in tower.blocks)
        module, name = self.PROCESSOR.split(":")
        with one_line(self.checkpoint.root):
            self.processor = getattr(import_module(module), name).from_pretrained(self.checkpoint.root)
        if not self.vision:
            self.tokenizer = self._read_tokenizer()

    def _read_tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        root, token, wanted = self.checkpoint.root, self.IMAGE[1], self.config.image_token_id
        with one_line(root):
            tokenizer = AutoTokenizer.from_pretrained(root, trust_remote_code=False)
        if tokenizer.convert_tokens_to_ids(token) != wanted:
            raise ValueError(f"{root}: its tokenizer does not know {token} as token {wanted}")
        return tokenizer

    # -- the life of a clip -----------------------------------------------------------------------------------------

    def prepare(self, clip: Clip, plan: Plan) -> Inputs:
        frames = resize(clip.frames, self.options["size"], Image.Resampling.BICUBIC)
        least, most = self.pixel_budget(len(plan.shown))
        images = self.processor(
            images=[Image.fromarray(f) for f in frames.numpy()],
            size={"shortest_edge": least, "longest_edge": most},
            return_tensors="pt",
        )
        pixels = {
            "pixel_values": images["pixel_values"].to(self.dtype),
            "image_grid_thw": images["image_grid_thw"],
        }
        if self.vision:
            return pixels | {"places": patch_places(*plan.grid[1:], self.merge, self.window())}
        ids = self.tokenizer(self.text(plan), add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        places = (ids == self.config.image_token_id).nonzero()[:, 0]  # here, not on the device
        return pixels | {"input_ids": ids, "places": places}

    def text(self, plan: Plan) -> str:
        """The prompt as the model's chat template writes it, with a placeholder per image token."""
        start, token, end = self.IMAGE
        image = f"{start}{token * (plan.grid[1] * plan.grid[2])}{end}"
        question = INTRODUCTION + numbered([image] * plan.grid[0]) + self.options["prompt"]
        return f"{self.TURN[0]}{question}{self.TURN[1]}"

    def encode(self, inputs: Inputs, plan: Plan) -> Inputs:
        """Without noise steps there is one forward per clip, so the vision tower runs inside it, once."""
        height, width = (side // self.patch for side in plan.size)
        images = len(inputs["pixel_values"]) * plan.grid[0]
        cut = [[height * width]]
        if self.window() is not None:
            cut.append(window_lengths(height, width, self.merge, self.window()))
        self.pieces.set(self.device, *(images * lengths for lengths in cut))
        return inputs

    def forward(self, state: Inputs, step: None, noise: None) -> None:
        pixels, sizes = state["pixel_values"].flatten(0, 1), state["image_grid_thw"].flatten(0, 1)
        if self.vision:
            self.model(pixels, grid_thw=sizes)
            return
        ids = state["input_ids"]
        self.model(
            input_ids=ids,
            # Without it Qwen2.5-VL would give image tokens the positions of text, and not say so.
            mm_token_type_ids=(ids == self.config.image_token_id).int(),
            pixel_values=pixels,
            image_grid_thw=sizes,
            use_cache=False,
        )

    def grid(self, tokens: Tensor, state: Inputs, plan: Plan) -> Tensor:
        places = state["places"]  # equal plans have equal prompts and sizes, so the first clip's are every clip's
        if not self.vision:
            return image_tokens(tokens, places, plan)
        tokens = tokens.unflatten(0, (len(places), plan.grid[0], -1))  # [B * T * H * W, C]: one image after the other
        return tokens[:, :, places[0]].unflatten(2, plan.grid[1:])
