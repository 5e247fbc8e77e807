"""LLaVA-OneVision-1.5: the vision tower in `engine/parts/rice_vit.py`, the decoder is transformers' Qwen3.

The published repository brings its own code, which is never run; its tensors are read by their names. The wanted
frames go in as separate images of one prompt; each is a row.
"""

from dataclasses import MISSING, fields
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from spatialprobe.engine.adapter import Adapter, Inputs
from spatialprobe.engine.checkpoint import Checkpoint, empty_module, load_weights, one_line
from spatialprobe.engine.clips.images import resize
from spatialprobe.engine.configs import TRANSFORMERS_4, check_fields, must_hold, table_of
from spatialprobe.engine.parts.frames_as_images import (
    INTRODUCTION,
    check_tap,
    check_words,
    image_tokens,
    numbered,
    plan_images,
    put_images,
    stored_prefix,
    token_places,
)
from spatialprobe.engine.parts.image_grid import fit_pixels, pixel_range
from spatialprobe.engine.parts.rice_vit import RiceConfig, RiceViT, merged_order, rotary_angles
from spatialprobe.engine.types import Clip, Plan

TOP = frozenset(
    "image_token_id video_token_id vision_start_token_id vision_end_token_id vocab_size text_config vision_config "
    "tie_word_embeddings".split()
)


class LlavaOneVision(Adapter):
    OPTIONS = {
        "size": (540, 960),  # pixels every frame is first resized to; the processor then rounds to whole cells
        "system": "You are a helpful assistant.",  # "" leaves the turn out
        "prompt": "Describe this video.",
        "tap": "decoder",  # or "vision": blocks of the vision tower, on the grid before its 2 x 2 patches are joined
    }
    PARITY = OPTIONS
    LIBRARIES = ("transformers",)
    AUTO_BATCH = 4

    def __init__(self, checkpoint: Checkpoint, options: dict):
        super().__init__(checkpoint, options)
        self.config = checkpoint.json("config.json")
        where = f"{checkpoint.root}/config.json"
        if self.config.get("model_type") != "llavaonevision1_5":
            raise ValueError(f"{where}: model_type must be llavaonevision1_5, got {self.config.get('model_type')!r}")
        must_hold(self.config, ("image_token_id",), where)
        self._check_fields(where)
        self.rice = RiceConfig.of(self.config["vision_config"], f"{where}, vision_config")
        self.text = self.config["text_config"]
        if self.rice.text_hidden_size != self.text["hidden_size"]:
            raise ValueError(
                f"{where}: text_hidden_size of the vision tower must be the decoder's hidden_size, "
                f"{self.text['hidden_size']}, got {self.rice.text_hidden_size}"
            )
        self.cell = self.rice.patch_size * self.rice.spatial_merge_size  # pixels per token, in height and in width
        self.vision = options["tap"] == "vision"
        self.num_layers = self.rice.depth if self.vision else self.text["num_hidden_layers"]
        self.channels = self.rice.hidden_size if self.vision else self.text["hidden_size"]
        self.num_steps, self.image_token = 0, self.config["image_token_id"]
        self.least, self.most = pixel_range(checkpoint.json("preprocessor_config.json"))

    def _check_fields(self, where: str) -> None:
        from transformers import PreTrainedConfig, Qwen3Config

        check_fields(self.config, PreTrainedConfig, where, harmless=TOP | TRANSFORMERS_4)
        tokens = {"image_token_id", "video_token_id"}
        harmless = TRANSFORMERS_4 | tokens
        text = table_of(self.config, "text_config", where, ("num_hidden_layers", "hidden_size"))
        check_fields(text, Qwen3Config, f"{where}, text_config", harmless=harmless)
        needs = [field.name for field in fields(RiceConfig) if field.default is MISSING]
        vision = table_of(self.config, "vision_config", where, needs)
        check_fields(vision, RiceConfig, f"{where}, vision_config", harmless=TRANSFORMERS_4)

    def check_options(self) -> None:
        height, width = self.options["size"]
        if min(height, width) < 1 or max(height, width) > 200 * min(height, width):
            raise ValueError(f"size must be positive with an aspect ratio below 200, got {self.options['size']}")
        check_tap(self.options)
        check_words(self.options, ("system", "prompt"), ("<|",))

    def plan(self, frames: int, query: tuple[int, ...]) -> Plan:
        size = fit_pixels(*self.options["size"], self.cell, self.least, self.most)
        unit = self.rice.patch_size if self.vision else self.cell
        return plan_images(frames, query, size, (size[0] // unit, size[1] // unit))

    def skeleton(self, depth: int) -> list[nn.Module]:
        if self.vision:
            return [empty_module(lambda: RiceViT(self.rice, depth, merger=False))]
        from transformers import Qwen3Config, Qwen3Model

        text = {name: value for name, value in self.text.items() if name != "model_type"}  # it names the code's class
        config = Qwen3Config.from_dict(text | {"layer_types": None, "num_hidden_layers": depth})
        config._attn_implementation = "sdpa"
        decoder = empty_module(lambda: Qwen3Model(config))  # without the language head
        decoder.norm = nn.Identity()  # above the tap
        return [empty_module(lambda: RiceViT(self.rice, self.rice.depth, merger=True)), decoder]

    def load(self, depth: int, device: torch.device, dtype: torch.dtype, cache: Path) -> None:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.device, self.dtype = device, dtype
        self.tower, *decoder = self.skeleton(depth)
        names = self.checkpoint.tensor_files()
        visual = stored_prefix(names, ("visual.", "model.visual."), "class_embedding")
        words = stored_prefix(names, ("model.", "model.language_model."), "embed_tokens.weight")
        for module, prefix in zip([self.tower, *decoder], (visual, words), strict=False):
            rename = lambda name, prefix=prefix: prefix + name  # noqa: E731
            load_weights(module, self.checkpoint, device=device, dtype=dtype, rename=rename)
        root = self.checkpoint.root
        with one_line(root):
            self.processor = Qwen2VLImageProcessorPil.from_pretrained(root)
        if self.vision:
            self.blocks = self.tower.blocks
        else:
            self.decoder, self.blocks = decoder[0], decoder[0].layers
            self._load_tokenizer()

    def _load_tokenizer(self) -> None:
        from transformers import Qwen2Tokenizer  # by name: the repository's config would ask for its code

        root = self.checkpoint.root
        with one_line(root):
            self.tokenizer = Qwen2Tokenizer.from_pretrained(root)
        if self.tokenizer.convert_tokens_to_ids("<|image_pad|>") != self.image_token:
            raise ValueError(f"{root}: its tokenizer does not know <|image_pad|> as token {self.image_token}")

    def prepare(self, clip: Clip, plan: Plan) -> Inputs:
        frames = resize(clip.frames, self.options["size"], Image.Resampling.BICUBIC)
        patches = self.processor(
            images=[Image.fromarray(frame) for frame in frames.numpy()],
            size={"shortest_edge": self.least, "longest_edge": self.most},
            patch_size=self.rice.patch_size,
            merge_size=self.rice.spatial_merge_size,
            temporal_patch_size=1,
            return_tensors="pt",
        )["pixel_values"].to(self.dtype)
        inputs = {"patches": patches.unflatten(0, (len(frames), -1))}  # [T, N, 3 * patch * patch]
        if self.vision:
            return inputs
        ids = self.tokenizer(self._text(plan), return_tensors="pt")["input_ids"][0]
        positions = (ids == self.image_token).nonzero()[:, 0]  # here, not on the device
        return inputs | {"input_ids": ids, "image_positions": positions}

    def _text(self, plan: Plan) -> str:
        """The prompt in the decoder's chat turns, with a placeholder per image token."""
        rows, height, width = plan.grid
        image = f"<|vision_start|>{'<|image_pad|>' * (height * width)}<|vision_end|>"
        question = INTRODUCTION + numbered([image] * rows) + self.options["prompt"]
        system = f"<|im_start|>system\n{self.options['system']}<|im_end|>\n" if self.options["system"] else ""
        return f"{system}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"

    def encode(self, inputs: Inputs, plan: Plan) -> Inputs:
        # Without noise steps there is one forward per clip, so the vision tower runs inside it, once.
        patch = self.rice.patch_size
        angles = rotary_angles(self.rice, plan.size[0] // patch, plan.size[1] // patch, inputs["patches"].device)
        return inputs | {"angles": angles}

    def forward(self, state: Inputs, step: None, noise: None) -> None:
        images = self.tower(state["patches"].flatten(0, 1), state["angles"])
        if self.vision:
            return
        ids = state["input_ids"]
        embeddings = put_images(self.decoder.embed_tokens(ids), images, state["image_positions"])
        self.decoder(inputs_embeds=embeddings, position_ids=token_places(ids), use_cache=False)

    def grid(self, tokens: Tensor, state: Inputs, plan: Plan) -> Tensor:
        if not self.vision:
            return image_tokens(tokens, state["image_positions"], plan)
        rows, height, width = plan.grid  # tokens: [B * T, 1 + H * W, C], the class token first
        reading = merged_order(height, width, self.rice.spatial_merge_size, tokens.device).argsort() + 1
        return tokens[:, reading].unflatten(0, (-1, rows)).unflatten(2, (height, width))
