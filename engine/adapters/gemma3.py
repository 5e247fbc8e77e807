"""Gemma 3 (transformers). The wanted frames go in as separate images of one prompt; each is a row.

Tokens of one image attend to each other in both directions; to everything else, decoder blocks are causal.
"""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from spatialprobe.engine.adapter import Adapter, Inputs
from spatialprobe.engine.checkpoint import Checkpoint, empty_module, load_weights, one_line
from spatialprobe.engine.configs import TRANSFORMERS_4, check_fields, table_of
from spatialprobe.engine.parts.frames_as_images import (
    INTRODUCTION,
    check_tap,
    check_words,
    image_tokens,
    numbered,
    plan_images,
    put_images,
    stored_prefix,
)
from spatialprobe.engine.parts.image_processor import ImageProcessor, normalise
from spatialprobe.engine.types import Clip, Plan

SPECIAL = ("<start_of_", "<end_of_", "<image_soft_token>", "<bos>", "<eos>", "<pad>", "<unk>")


class Gemma3(Adapter):
    OPTIONS = {
        "tap": "decoder",  # or "vision": blocks of the SigLIP tower, on the grid before its 4 x 4 patches are pooled
        "prompt": "Describe this video.",
    }
    PARITY = OPTIONS
    LIBRARIES = ("transformers",)
    AUTO_BATCH = 2

    def __init__(self, checkpoint: Checkpoint, options: dict):
        super().__init__(checkpoint, options)
        self.config = checkpoint.json("config.json")
        if self.config.get("model_type") != "gemma3" or "vision_config" not in self.config:
            raise ValueError(
                f"{checkpoint.root} is no Gemma 3 with vision: its model_type is {_model_type(self.config)}"
            )
        self._check_fields()
        config = self._library_config()  # published files leave out what the library has defaults for
        vision, text = config.vision_config, config.text_config
        self.image, patches = vision.image_size, vision.image_size // vision.patch_size
        side = int(config.mm_tokens_per_image**0.5)
        if side**2 != config.mm_tokens_per_image or patches % side:
            raise ValueError(
                f"{checkpoint.root}: {patches} patches a side cannot be pooled to {config.mm_tokens_per_image} tokens"
            )
        self.vision = options["tap"] == "vision"
        part, side = (vision, patches) if self.vision else (text, side)
        self.num_layers, self.channels, self.grid_size = part.num_hidden_layers, part.hidden_size, (side, side)
        self.num_steps, self.image_token = 0, config.image_token_index

    def _check_fields(self) -> None:
        from transformers import Gemma3Config, Gemma3TextConfig, SiglipVisionConfig

        where = f"{self.checkpoint.root}/config.json"
        check_fields(self.config, Gemma3Config, where, harmless=TRANSFORMERS_4)
        harmless = TRANSFORMERS_4 | {"vision_use_head"}  # of what comes after; unknown to transformers 5.17
        for part, cls in (("text_config", Gemma3TextConfig), ("vision_config", SiglipVisionConfig)):
            check_fields(table_of(self.config, part, where), cls, f"{where}, {part}", harmless=harmless)

    def _library_config(self):
        from transformers import Gemma3Config

        config = Gemma3Config.from_dict(copy.deepcopy(self.config))
        config._attn_implementation = "sdpa"
        return config

    def check_options(self) -> None:
        check_tap(self.options)
        check_words(self.options, ("prompt",), SPECIAL)

    def plan(self, frames: int, query: tuple[int, ...]) -> Plan:
        return plan_images(frames, query, (self.image, self.image), self.grid_size)

    def skeleton(self, depth: int) -> list[nn.Module]:
        from transformers import Gemma3Model, SiglipVisionModel

        config = self._library_config()
        if self.vision:
            config.vision_config.num_hidden_layers, config.vision_config.vision_use_head = depth, False
            tower = empty_module(lambda: SiglipVisionModel(config.vision_config))
            _inner(tower).post_layernorm = nn.Identity()  # above the tap
            return [tower]
        config.text_config.num_hidden_layers = depth
        config.text_config.layer_types = config.text_config.layer_types[:depth]
        model = empty_module(lambda: Gemma3Model(config))  # without the language head
        model.language_model.norm = nn.Identity()  # above the tap
        return [model]

    def load(self, depth: int, device: torch.device, dtype: torch.dtype, cache: Path) -> None:
        self.device, self.dtype = device, dtype
        (self.model,) = self.skeleton(depth)
        load_weights(self.model, self.checkpoint, device=device, dtype=dtype, rename=self._names())
        self.blocks = _inner(self.model).encoder.layers if self.vision else self.model.language_model.layers
        self.processor = self._read_processor()
        self.table = self.processor.table().to(device, dtype)
        if not self.vision:
            self._load_tokenizer()

    def _read_processor(self) -> ImageProcessor:
        where = f"{self.checkpoint.root}/preprocessor_config.json"
        fields = self.checkpoint.json("preprocessor_config.json").items()
        processor = ImageProcessor.from_config({k: v for k, v in fields if "pan_and_scan" not in k}, where)
        if processor.size != (self.image, self.image):
            raise ValueError(f"{where} must have size {(self.image, self.image)}, got {processor.size}")
        return processor

    def _names(self):  # -> rename, for `load_weights`
        names = self.checkpoint.tensor_files()
        language = stored_prefix(names, ("language_model.model.", "model.language_model."), "embed_tokens.weight")
        towers = (
            "vision_tower.vision_model.",
            "model.vision_tower.vision_model.",
            "vision_tower.",
            "model.vision_tower.",
        )
        tower = stored_prefix(names, towers, "embeddings.patch_embedding.weight")
        other = "model." if tower.startswith("model.") else ""

        def rename(name: str) -> str:
            part, _, rest = name.partition(".")
            if self.vision or part == "vision_tower":
                return tower + (name if self.vision else rest).removeprefix("vision_model.")
            return language + rest if part == "language_model" else other + name

        return rename

    def _load_tokenizer(self) -> None:
        from transformers import AutoTokenizer

        root = self.checkpoint.root
        with one_line(root):
            self.tokenizer = AutoTokenizer.from_pretrained(root, trust_remote_code=False)
        if self.tokenizer.convert_tokens_to_ids("<image_soft_token>") != self.image_token:
            raise ValueError(f"{root}: its tokenizer does not know <image_soft_token> as token {self.image_token}")

    def prepare(self, clip: Clip, plan: Plan) -> Inputs:
        pixels = self.processor.pixels(clip.frames, plan.size, crop=False)  # uint8 [T, H, W, 3]
        if self.vision:
            return {"pixels": pixels}
        ids = self.tokenizer(self._text(plan), add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        positions = (ids == self.image_token).nonzero()[:, 0]  # here, not on the device
        return {"pixels": pixels, "input_ids": ids, "image_positions": positions}

    def _text(self, plan: Plan) -> str:
        """The prompt as the model's chat template writes it, with a placeholder per image token."""
        rows, height, width = plan.grid
        image = f"\n\n<start_of_image>{'<image_soft_token>' * (height * width)}<end_of_image>\n\n"
        question = (INTRODUCTION + numbered([image] * rows) + self.options["prompt"]).strip()
        return f"<bos><start_of_turn>user\n{question}<end_of_turn>\n<start_of_turn>model\n"

    def encode(self, inputs: Inputs, plan: Plan) -> Inputs:
        # Without noise steps there is one forward per clip, so the vision tower runs inside it, once.
        return inputs | {"pixel_values": normalise(inputs["pixels"].flatten(0, 1), self.table)}  # [B * T, 3, H, W]

    def forward(self, state: Inputs, step: None, noise: None) -> None:
        pixels = state["pixel_values"]
        if self.vision:
            self.model(pixel_values=pixels)
            return
        ids = state["input_ids"]
        images = self.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
        self.model(
            inputs_embeds=put_images(self.model.get_input_embeddings()(ids), images, state["image_positions"]),
            token_type_ids=(ids == self.image_token).int(),  # what makes attention within an image go both ways
            use_cache=False,
        )

    def grid(self, tokens: Tensor, state: Inputs, plan: Plan) -> Tensor:
        if self.vision:  # [B * T, H * W, C]
            return tokens.unflatten(0, (-1, plan.grid[0])).unflatten(2, plan.grid[1:])
        return image_tokens(tokens, state["image_positions"], plan)


def _inner(tower: nn.Module) -> nn.Module:
    """The module that holds a SigLIP tower's blocks: itself, or in older transformers one inside it."""
    return getattr(tower, "vision_model", tower)


def _model_type(config: dict) -> str:
    return f"{config.get('model_type')!r}" + ("" if "vision_config" in config else ", without a vision_config")
