"""InternVL3 and InternVL3.5 (transformers). The wanted frames go in as separate images of one tile; each is a row.

Reads both published layouts: the library's own (OpenGVLab/InternVL3-8B-hf) and the one that came with code
(OpenGVLab/InternVL3-8B), by the names of its tensors; that code is never run.
"""

import copy
import re
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from spatialprobe.engine.adapter import Adapter, Inputs
from spatialprobe.engine.checkpoint import Checkpoint, Stored, empty_module, load_weights, one_line
from spatialprobe.engine.configs import TRANSFORMERS_4, check_fields, must_hold, table_of
from spatialprobe.engine.parts.frames_as_images import (
    check_tap,
    check_words,
    image_tokens,
    numbered,
    plan_images,
    put_images,
    stored_prefix,
    token_places,
)
from spatialprobe.engine.parts.image_processor import ImageProcessor, normalise
from spatialprobe.engine.types import Clip, Plan

SYSTEM = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"  # noqa: RUF001
SPECIAL = ("<|", "<img>", "</img>", "<IMG_CONTEXT>")
TEXT_CONFIGS = {"qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}  # model_type -> class

# The original layout. Its vision config's names -> the library's; the rest of that config is about training.
VISION_FIELDS = {
    "qkv_bias": "attention_bias",
    "qk_normalization": "use_qk_norm",
    "attention_dropout": "attention_dropout",
    "hidden_act": "hidden_act",
    "hidden_size": "hidden_size",
    "image_size": "image_size",
    "intermediate_size": "intermediate_size",
    "layer_norm_eps": "layer_norm_eps",
    "norm_type": "norm_type",
    "num_attention_heads": "num_attention_heads",
    "num_channels": "num_channels",
    "num_hidden_layers": "num_hidden_layers",
    "patch_size": "patch_size",
}
VISION_TRAINING = frozenset(
    "capacity_factor drop_path_rate dropout eval_capacity_factor initializer_factor laux_allreduce moe_coeff_ratio "
    "moe_intermediate_size moe_output_scale noisy_gate_policy num_experts num_routed_experts num_shared_experts "
    "shared_expert_intermediate_size use_fa3 use_flash_attn use_moe use_residual use_rts use_weighted_residual".split()
)
TEXT_TRAINING = frozenset("debug ep_size micro_forward moe_config skip_checkpoint use_deepep".split())
CHAT_FIELDS = frozenset(
    "dynamic_image_size force_image_size hidden_size image_fold llm_config max_dynamic_patch min_dynamic_patch "
    "pad2square ps_version select_layer system_message template use_backbone_lora use_llm_lora use_thumbnail".split()
)
# What the code of the original layout can do otherwise, and this adapter cannot.
CHAT_WANTED = {"template": "internvl2_5", "ps_version": "v2", "select_layer": -1}

# Of the original layout's code, which reads no file.
PIXELS = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": Image.Resampling.BICUBIC}
TILES = ("crop_to_patches", "min_patches", "max_patches")  # how a processor cuts wide images up; here each is one tile
NAMES = (  # of tensors, the library's -> the original layout's
    ("vision_tower.", "vision_model."),
    (".encoder.layer.", ".encoder.layers."),
    (".cls_token", ".class_embedding"),
    (".position_embeddings", ".position_embedding"),
    (".patch_embeddings.projection.", ".patch_embedding."),
    (".lambda_", ".ls"),
    (".attention.projection_layer.", ".attn.proj."),
    (".attention.", ".attn."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    ("multi_modal_projector.layer_norm.", "mlp1.0."),
    ("multi_modal_projector.linear_1.", "mlp1.1."),
    ("multi_modal_projector.linear_2.", "mlp1.3."),
)


class InternVL(Adapter):
    OPTIONS = {
        "tap": "decoder",  # or "vision": blocks of the vision tower, on the grid before its 2 x 2 patches are joined
        "system": SYSTEM,  # the model's own; "" leaves the turn out
        "prompt": "",
    }
    PARITY = OPTIONS
    LIBRARIES = ("transformers",)
    AUTO_BATCH = 4

    def __init__(self, checkpoint: Checkpoint, options: dict):
        super().__init__(checkpoint, options)
        stored = checkpoint.json("config.json")
        self.original = stored.get("model_type") == "internvl_chat"
        if not self.original and stored.get("model_type") != "internvl":
            raise ValueError(f"{checkpoint.root} is no InternVL: its model_type is {stored.get('model_type')!r}")
        check_sizes(stored, "llm_config" if self.original else "text_config", checkpoint.root)
        self.config = native_config(stored, checkpoint.root) if self.original else stored
        check_configs(self.config, checkpoint.root)
        vision, text = self.config["vision_config"], self.config["text_config"]
        self.image = _side(vision["image_size"])
        patches = self.image // _side(vision["patch_size"])
        self.vision = options["tap"] == "vision"
        part, side = (vision, patches) if self.vision else (text, int(patches * self.config["downsample_ratio"]))
        self.num_layers, self.channels, self.grid_size = part["num_hidden_layers"], part["hidden_size"], (side, side)
        self.num_steps = 0

    def check_options(self) -> None:
        check_tap(self.options)
        check_words(self.options, ("system", "prompt"), SPECIAL)

    def plan(self, frames: int, query: tuple[int, ...]) -> Plan:
        return plan_images(frames, query, (self.image, self.image), self.grid_size)

    def skeleton(self, depth: int) -> list[nn.Module]:
        from transformers import InternVLConfig, InternVLModel
        from transformers.models.internvl.modeling_internvl import InternVLVisionModel

        config = InternVLConfig.from_dict(copy.deepcopy(self.config))
        config._attn_implementation = "sdpa"
        if self.vision:
            config.vision_config.num_hidden_layers = depth
            return [empty_module(lambda: InternVLVisionModel(config.vision_config))]
        config.text_config.num_hidden_layers = depth
        config.text_config.layer_types = config.text_config.layer_types[:depth]
        model = empty_module(lambda: InternVLModel(config))  # without the language head
        model.language_model.norm = nn.Identity()  # above the tap
        return [model]

    def load(self, depth: int, device: torch.device, dtype: torch.dtype, cache: Path) -> None:
        self.device, self.dtype = device, dtype
        (self.model,) = self.skeleton(depth)
        load_weights(self.model, self.checkpoint, device=device, dtype=dtype, rename=self._names())
        self.blocks = self.model.encoder.layer if self.vision else self.model.language_model.layers
        self.processor = self._read_processor()
        self.table = self.processor.table().to(device, dtype)
        if not self.vision:
            self._load_tokenizer()

    def _read_processor(self) -> ImageProcessor:
        size = {"height": self.image, "width": self.image}
        if self.original:
            return ImageProcessor.from_config(PIXELS | {"size": size}, "the original layout")
        where = f"{self.checkpoint.root}/preprocessor_config.json"
        fields = {k: v for k, v in self.checkpoint.json("preprocessor_config.json").items() if k not in TILES}
        processor = ImageProcessor.from_config(fields, where)
        if processor.size != (self.image, self.image):
            raise ValueError(f"{where} must have size {size}, got {processor.size}")
        return processor

    def _names(self):  # -> rename, for `load_weights`
        names = self.checkpoint.tensor_files()
        language = stored_prefix(names, ("language_model.model.", "model.language_model."), "embed_tokens.weight")
        other = stored_prefix(names, ("", "model."), "vision_tower.embeddings.cls_token")
        width = self.config["vision_config"]["hidden_size"]

        def rename(name: str) -> Stored:
            name = f"vision_tower.{name}" if self.vision else name
            if name.startswith("language_model."):
                return language + name.removeprefix("language_model.")
            return original_name(name, width) if self.original else other + name

        return rename

    def _load_tokenizer(self) -> None:
        from transformers import Qwen2Tokenizer  # by name: the original layout's config would ask for its code

        root = self.checkpoint.root
        with one_line(root):
            self.tokenizer = Qwen2Tokenizer.from_pretrained(root)
        token = self.tokenizer.get_vocab().get("<IMG_CONTEXT>")
        if token is None or token != self.config.get("image_token_id", token):
            raise ValueError(f"{root}: its tokenizer does not know <IMG_CONTEXT> as the config's token")
        self.image_token = token

    def prepare(self, clip: Clip, plan: Plan) -> Inputs:
        pixels = self.processor.pixels(clip.frames, plan.size, crop=False)  # uint8 [T, H, W, 3]
        if self.vision:
            return {"pixels": pixels}
        ids = self.tokenizer(self._text(plan), return_tensors="pt")["input_ids"][0]
        positions = (ids == self.image_token).nonzero()[:, 0]  # here, not on the device
        return {"pixels": pixels, "input_ids": ids, "image_positions": positions}

    def _text(self, plan: Plan) -> str:
        """The prompt as the published study wrote it, with a placeholder per image token."""
        rows, height, width = plan.grid
        question = numbered([f"<img>{'<IMG_CONTEXT>' * (height * width)}</img>"] * rows) + self.options["prompt"]
        system = f"<|im_start|>system\n{self.options['system']}<|im_end|>\n" if self.options["system"] else ""
        return f"{system}<|im_start|>user\n{question.rstrip(chr(10))}<|im_end|>\n<|im_start|>assistant\n"

    def encode(self, inputs: Inputs, plan: Plan) -> Inputs:
        # Without noise steps there is one forward per clip, so the vision tower runs inside it, once.
        return inputs | {"pixel_values": normalise(inputs["pixels"].flatten(0, 1), self.table)}  # [B * T, 3, H, W]

    def forward(self, state: Inputs, step: None, noise: None) -> None:
        pixels = state["pixel_values"]
        if self.vision:
            self.model(pixel_values=pixels)
            return
        images = self.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
        ids = state["input_ids"]
        embeddings = put_images(self.model.get_input_embeddings()(ids), images, state["image_positions"])
        self.model.language_model(inputs_embeds=embeddings, position_ids=token_places(ids), use_cache=False)

    def grid(self, tokens: Tensor, state: Inputs, plan: Plan) -> Tensor:
        if self.vision:  # [B * T, 1 + H * W, C]: the class token comes first
            return tokens[:, 1:].unflatten(0, (-1, plan.grid[0])).unflatten(2, plan.grid[1:])
        return image_tokens(tokens, state["image_positions"], plan)


def check_sizes(stored: dict[str, Any], text: str, root: Path) -> None:
    """Raises ValueError for a config that lacks a table or a size. `text` is the decoder's table."""
    where, stack = f"{root}/config.json", ("num_hidden_layers", "hidden_size")
    table_of(stored, text, where, stack)
    table_of(stored, "vision_config", where, (*stack, "image_size", "patch_size"))
    must_hold(stored, ("downsample_ratio",), where)


def native_config(stored: dict[str, Any], root: Path) -> dict[str, Any]:
    """The original layout's config in the library's words. Raises ValueError for what the library cannot do."""
    from transformers import InternVLConfig
    from transformers.models.internvl.configuration_internvl import InternVLVisionConfig

    vision = stored["vision_config"]
    wanted = CHAT_WANTED | {"force_image_size": vision["image_size"], "use_backbone_lora": 0, "use_llm_lora": 0}
    for name, value in wanted.items():
        if stored.get(name, value) != value:
            raise ValueError(f"{root}: {name} must be {value!r}, got {stored[name]!r}")
    if vision.get("use_moe", False):
        raise ValueError(f"{root}: a vision tower with experts (use_moe) is not supported")
    check_fields(stored, InternVLConfig, f"{root}/config.json", harmless=CHAT_FIELDS | TRANSFORMERS_4)
    known = VISION_FIELDS.keys() | VISION_TRAINING | TRANSFORMERS_4
    check_fields(vision, InternVLVisionConfig, f"{root}/config.json, vision_config", harmless=known)
    return {
        "model_type": "internvl",
        "downsample_ratio": stored["downsample_ratio"],
        "text_config": {k: v for k, v in stored["llm_config"].items() if k not in ("auto_map", "_name_or_path")},
        "vision_config": {new: vision[old] for old, new in VISION_FIELDS.items() if old in vision},
    }


def check_configs(config: dict[str, Any], root: Path) -> None:
    import transformers
    from transformers.models.internvl.configuration_internvl import InternVLVisionConfig

    vision, text = config["vision_config"], config["text_config"]
    if text.get("model_type") not in TEXT_CONFIGS:
        wanted = " or ".join(TEXT_CONFIGS)
        raise ValueError(f"{root}: the language model must be {wanted}, got {text.get('model_type')!r}")
    patches = _side(vision["image_size"]) / _side(vision["patch_size"])
    if not (patches * config["downsample_ratio"]).is_integer():
        raise ValueError(f"{root}: {patches:g} patches a side cannot be joined at {config['downsample_ratio']}")
    check_fields(config, transformers.InternVLConfig, f"{root}/config.json", harmless=TRANSFORMERS_4)
    harmless = TRANSFORMERS_4 | VISION_TRAINING
    check_fields(vision, InternVLVisionConfig, f"{root}/config.json, vision_config", harmless=harmless)
    text_class = getattr(transformers, TEXT_CONFIGS[text["model_type"]])
    check_fields(text, text_class, f"{root}/config.json, text config", harmless=TRANSFORMERS_4 | TEXT_TRAINING)


def original_name(name: str, width: int) -> Stored:
    """The original layout's name of a tensor; q, k and v of the vision tower are thirds of one, `width` rows each."""
    for native, original in NAMES:
        name = name.replace(native, original)
    part = re.fullmatch(r"(vision_model\..*\.attn\.)([qkv])_proj\.(weight|bias)", name)
    if part is None:
        return name
    third = "qkv".index(part[2])
    return f"{part[1]}qkv.{part[3]}", slice(third * width, (third + 1) * width)


def _side(size: int | list[int]) -> int:
    """Of a square given as a number or as (height, width)."""
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(f"image and patch size must be square, got {size}")
    return sides.pop()
