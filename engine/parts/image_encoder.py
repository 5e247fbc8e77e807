"""What vision encoders of transformers have in common: frames in as they are, patch tokens out, no prompt, no noise.

`ImageEncoder` sees every wanted frame by itself, a row each; `VideoEncoder` sees the whole window in groups of frames,
a row each. A family says which classes and names it has, where its blocks are and how it knows where a patch lies.
"""

import copy
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spatialprobe.engine.adapter import Adapter, Inputs
from spatialprobe.engine.checkpoint import Checkpoint, empty_module, load_weights
from spatialprobe.engine.configs import TRANSFORMERS_4, check_fields
from spatialprobe.engine.parts.frames_as_images import plan_images
from spatialprobe.engine.parts.image_processor import ImageProcessor, normalise
from spatialprobe.engine.types import Clip, Plan

POSITIONS = ("native", "none", "shuffled")
SHUFFLE_SEED = 0
HARMLESS = TRANSFORMERS_4 | {"dropout", "tie_word_embeddings"}  # of training, and of text


class ImageEncoder(Adapter):
    OPTIONS = {
        "size": (0, 0),  # pixels, height and width; 0x0 stands for the model's own, as its processor says
        "crop": False,  # False squashes whole frames, so that tokens lie where labels do; True cuts the centre out
        "pos_embed": "native",  # none: no positions; shuffled: each patch has another patch's, always the same one
    }
    PARITY = OPTIONS
    LIBRARIES = ("transformers",)
    AUTO_BATCH = 4

    CONFIGS: ClassVar[dict[str, str]]  # `model_type` -> name of transformers' config class
    PROCESSOR_FILES: ClassVar[tuple[str, ...]] = ("preprocessor_config.json",)  # the first that is there counts
    PREFIXES: ClassVar[tuple[str, ...]] = ("",)  # of the encoder's tensors on disk, within models of several parts
    RENAMES: ClassVar[dict[str, str]] = {}  # parts of names: as the library has them -> as published
    HARMLESS: ClassVar[frozenset[str]] = frozenset()  # fields of published configs that the library leaves out

    special: int = 0  # class and register tokens before the patches
    resizes: bool = True  # whether the model's positions can be had for other sizes than its own

    def __init__(self, checkpoint: Checkpoint, options: dict[str, Any]):
        super().__init__(checkpoint, options)
        self.config = self._read_config()
        file = next((f for f in self.PROCESSOR_FILES if checkpoint.has(f)), self.PROCESSOR_FILES[0])
        self.processor = self.read_processor(checkpoint.json(file), str(checkpoint.root / file))
        self.num_layers, self.num_steps = self.config.num_hidden_layers, 0
        self.channels, self.patch = self.config.hidden_size, self.config.patch_size
        self.size = self.processor.size if tuple(options["size"]) == (0, 0) else tuple(options["size"])

    def _read_config(self) -> Any:
        """The encoder's own config, of a checkpoint that is all encoder or of a model that holds one."""
        import transformers

        where, raw = f"{self.checkpoint.root}/config.json", self.checkpoint.json("config.json")
        kind = raw.get("model_type")
        if kind not in self.CONFIGS:
            raise ValueError(f"{where} says it is {kind}; {type(self).__name__} runs {' and '.join(self.CONFIGS)}")
        cls = getattr(transformers, self.CONFIGS[kind])
        harmless = HARMLESS | self.HARMLESS
        check_fields(raw, cls, where, harmless=harmless)
        if "vision_config" in cls.sub_configs:
            vision = cls.sub_configs["vision_config"]
            check_fields(raw.get("vision_config") or {}, vision, f"{where}, vision_config", harmless=harmless)
            return cls.from_dict(copy.deepcopy(raw)).vision_config
        return cls.from_dict(copy.deepcopy(raw))

    def read_processor(self, config: dict[str, Any], where: str) -> ImageProcessor:
        return ImageProcessor.from_config(config, where)

    def check_options(self) -> None:
        name, own, crop = type(self).__name__, self.processor.size, self.options["crop"]
        if self.options["pos_embed"] not in POSITIONS:
            raise ValueError(f"pos_embed must be one of {', '.join(POSITIONS)}, got {self.options['pos_embed']!r}")
        if self.size is None:
            raise ValueError(f"size must be given: what this {name}'s processor makes depends on a frame's shape")
        if not self.resizes and self.size != ((side := self.config.image_size), side):
            raise ValueError(f"size must be the {side}x{side} that this {name} has positions for, got {self.size}")
        if self.size != own and any(s < self.patch or s % self.patch for s in self.size):
            raise ValueError(f"size must be multiples of {self.patch} pixels, got {self.size}")
        if crop and self.processor.edge is None:
            raise ValueError(f"crop is for models whose processor crops; this {name}'s does not")
        if crop and self.size != own:
            raise ValueError(f"crop must have the processor's own size of {own[0]}x{own[1]}, got {self.size}")

    def plan(self, frames: int, query: tuple[int, ...]) -> Plan:
        height, width = (s // self.patch for s in self.size)
        return plan_images(frames, query, self.size, (height, width))

    # -- what a family says ------------------------------------------------------------------------------------------

    @abstractmethod
    def build(self, config: Any) -> nn.Module:
        """transformers' model of `config`, with `nn.Identity` or None for what comes after its blocks."""

    @abstractmethod
    def blocks_of(self, model: nn.Module) -> Sequence[nn.Module]:
        """The model's blocks, in order."""

    @abstractmethod
    def run(self, pixels: Tensor) -> None:
        """Calls `self.model` on its input, [N, 3, H, W] or, of videos, [B, F, 3, H, W]."""

    @abstractmethod
    def change_positions(self) -> None:
        """Makes the loaded `self.model` use other positions than its own: `changed` ones."""

    # -- the same for all --------------------------------------------------------------------------------------------

    def skeleton(self, depth: int) -> list[nn.Module]:
        config = copy.deepcopy(self.config)
        config.num_hidden_layers = depth
        config._attn_implementation = "sdpa"
        return [empty_module(lambda: self.build(config))]

    def load(self, depth: int, device: torch.device, dtype: torch.dtype, cache: Path) -> None:
        self.device, self.dtype = device, dtype
        (self.model,) = self.skeleton(depth)
        load_weights(self.model, self.checkpoint, device=device, dtype=dtype, rename=self._stored_name())
        self.blocks = self.blocks_of(self.model)
        self.values = self.processor.table().to(device, dtype)  # [3, 256]
        if self.options["pos_embed"] != "native":
            with torch.no_grad():
                self.change_positions()

    def _stored_name(self) -> Callable[[str], str]:
        """A parameter's name -> the checkpoint's: published names, or those of the installed library."""
        stored = self.checkpoint.tensor_files()

        def rename(name: str) -> str:
            published = name
            for new, old in self.RENAMES.items():
                published = published.replace(new, old)
            known = [prefix + n for n in (published, name) for prefix in self.PREFIXES]
            return next((n for n in known if n in stored), known[0])

        return rename

    def changed(
        self,
        positions: Tensor,  # [..., special + N, D]
        special: int = 0,  # rows of class tokens, which are not shuffled
        nowhere: float = 0.0,  # the value that stands for no position
    ) -> Tensor:
        """Positions as `pos_embed` wants them: all `nowhere`, or each patch with another's."""
        if self.options["pos_embed"] == "none":
            return torch.full_like(positions, nowhere)
        order = shuffle(positions.shape[-2] - special).to(positions.device)
        return torch.cat([positions[..., :special, :], positions[..., special:, :].index_select(-2, order)], -2)

    def change_table(self, embeddings: nn.Module, special: int) -> None:
        """For models that resample their table to the input's grid: changed after that, or it would be averaged."""
        grid = [s // self.patch for s in self.size]
        like = torch.empty(1, special + grid[0] * grid[1], self.channels, device="meta")  # only its shape is looked at
        table = self.changed(embeddings.interpolate_pos_encoding(like, *self.size), special)
        embeddings.interpolate_pos_encoding = lambda *args: table

    PREPARES_ON_DEVICE = True

    def prepare(self, clip: Clip, plan: Plan) -> Inputs:
        return {"pixels": self.processor.pixels(clip.frames, plan.size, self.options["crop"])}  # uint8 [S, H, W, 3]

    def encode(self, inputs: Inputs, plan: Plan) -> Tensor:  # -> [B, S, 3, H, W]
        return normalise(inputs["pixels"], self.values)

    def forward(self, state: Tensor, step: None, noise: None) -> None:
        self.run(state.flatten(0, 1))

    def grid(self, tokens: Tensor, state: Tensor, plan: Plan) -> Tensor:  # [B * S, special + H * W, C]
        return tokens[:, self.special :].unflatten(1, plan.grid[1:]).unflatten(0, (-1, plan.grid[0]))


class VideoEncoder(ImageEncoder):
    """Encoders whose tokens each see `stride` frames. Positions and their changes are of time, rows and columns."""

    AUTO_BATCH = 1

    def __init__(self, checkpoint: Checkpoint, options: dict[str, Any]):
        super().__init__(checkpoint, options)
        self.stride = self.config.tubelet_size  # frames per row

    def plan(self, frames: int, query: tuple[int, ...]) -> Plan:
        rows = tuple(f // self.stride for f in range(frames))
        grid = (rows[-1] + 1, *(s // self.patch for s in self.size))
        return Plan(frames, tuple(range(frames)), self.size, grid, rows)

    def prepare(self, clip: Clip, plan: Plan) -> Inputs:
        pixels = super().prepare(clip, plan)["pixels"]
        missing = plan.grid[0] * self.stride - plan.frames  # the last group is completed with its last frame
        return {"pixels": torch.cat([pixels, pixels[-1:].expand(missing, -1, -1, -1)]) if missing else pixels}

    def forward(self, state: Tensor, step: None, noise: None) -> None:
        self.run(state)

    def grid(self, tokens: Tensor, state: Tensor, plan: Plan) -> Tensor:
        return tokens.unflatten(1, plan.grid)


def shuffle(count: int) -> Tensor:  # int64 [count]
    """Which patch's position each patch has under `pos_embed=shuffled`: the same in every run and for every clip."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(SHUFFLE_SEED))
