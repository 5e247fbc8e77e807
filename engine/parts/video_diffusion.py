"""What transformers over a video VAE's latents have in common: rows, the prompt, loading, and a plan of memory.

Knows nothing of noise schedules, of how latents are scaled, or of what a transformer is called with. Frame 0 is a row
of its own, then every `group` frames share one. Text encoders run once, for the prompt: what they give is kept in the
store, and they are gone before clips run.
"""

import math
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from spatialprobe.engine.adapter import Inputs
from spatialprobe.engine.checkpoint import Checkpoint, load_weights
from spatialprobe.engine.clips.images import resize
from spatialprobe.engine.parts.frame_groups import group_rows, whole_groups
from spatialprobe.engine.parts.prompt_cache import cached, prompt_file
from spatialprobe.engine.parts.text_encoder import T5, encoder_bytes
from spatialprobe.engine.parts.vae import set_up_vae
from spatialprobe.engine.pipeline.latents import FromLatents, Latents
from spatialprobe.engine.types import Clip, Plan

NUM_STEPS = 1000  # steps index the schedule of this many


class VideoDiffusion(FromLatents):
    """The part of an adapter that these models have in common. OPTIONS has `size`, `prompt` and `prompt_tokens`."""

    PIPELINES: ClassVar[tuple[str, ...]]  # classes of diffusers that model_index.json may name
    TEXT_ENCODERS: ClassVar[dict[str, str]] = {"text_encoder": T5}  # folders, and their classes of transformers
    POSITIVE: ClassVar[tuple[str, ...]] = ()  # options that are finite numbers above 0
    LIBRARIES = ("diffusers", "transformers")
    PREPARES_ON_DEVICE = True

    # set by the family's `__init__`, from its configs
    group: int  # frames per row
    cell: int  # pixels per token, in height and in width
    patch: int  # latents per token, in height and in width
    latent_channels: int  # Z

    text: dict[str, Tensor]  # after `load`: what the transformer is given of the prompt, as `text_shapes` says

    def __init__(self, checkpoint: Checkpoint, options: dict):
        super().__init__(checkpoint, options)
        self.index = checkpoint.json("model_index.json")
        if (pipeline := self.index.get("_class_name")) not in self.PIPELINES:
            raise ValueError(f"{checkpoint.root}: its pipeline must be {' or '.join(self.PIPELINES)}, got {pipeline}")
        self.config, self.vae_config = (checkpoint.json(f"{name}/config.json") for name in ("transformer", "vae"))
        self.num_layers, self.num_steps = self.config["num_layers"], NUM_STEPS
        self.channels = self.config["num_attention_heads"] * self.config["attention_head_dim"]

    def check_options(self) -> None:
        if any(s < self.cell or s % self.cell for s in self.options["size"]):
            raise ValueError(f"size must be multiples of {self.cell} pixels, got {self.options['size']}")
        if self.options["prompt_tokens"] < 1:
            raise ValueError(f"prompt_tokens must be at least 1, got {self.options['prompt_tokens']}")
        for name in self.POSITIVE:
            if not 0 < self.options[name] < math.inf:
                raise ValueError(f"{name} must be positive, got {self.options[name]}")

    # -- geometry ---------------------------------------------------------------------------------------------------

    def plan(self, frames: int, query: tuple[int, ...]) -> Plan:
        height, width = self.options["size"]
        rows = group_rows(frames, self.group)
        grid = (rows[-1] + 1, height // self.cell, width // self.cell)
        return Plan(frames, tuple(range(frames)), (height, width), grid, rows)

    def prepare(self, clip: Clip, plan: Plan) -> Inputs:  # "video": uint8 [1 + n * group, H, W, 3]
        return {"video": whole_groups(resize(clip.frames, plan.size, Image.Resampling.LANCZOS), self.group)}

    def noise_shape(self, plan: Plan) -> tuple[int, ...]:
        frames, height, width = plan.grid
        return (self.latent_channels, frames, height * self.patch, width * self.patch)

    def grid(self, tokens: Tensor, state: Any, plan: Plan) -> Tensor:
        return tokens.unflatten(1, plan.grid)

    # -- loading ----------------------------------------------------------------------------------------------------

    def load(self, depth: int, device: torch.device, dtype: torch.dtype, cache: Path) -> None:
        self.device, self.dtype = device, dtype
        self.load_schedule()  # one that cannot be had is told before weights are read
        self.text = self.embed_prompt(cache)
        self.transformer, self.vae = self.skeleton(depth)
        self.load_transformer(self.transformer, "transformer")
        self.load_vae()
        self.blocks = self.transformer.transformer_blocks

    @abstractmethod
    def load_schedule(self) -> None:
        """Reads the scheduler's config, if steps need it; sets what `forward` and `describe_step` read."""

    def load_transformer(self, model: Any, folder: str) -> None:
        keep = tuple(model._keep_in_fp32_modules or ())
        load_weights(model, self.checkpoint, folder, device=self.device, dtype=self.dtype, keep_fp32=keep)

    def load_vae(self) -> None:
        load_weights(self.vae, self.checkpoint, "vae", device=self.device, dtype=self.dtype)
        set_up_vae(self.vae, self.options)

    # -- the prompt, once -------------------------------------------------------------------------------------------

    @abstractmethod
    def text_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor that the transformer is given of the prompt."""

    @abstractmethod
    def run_text_encoders(self) -> dict[str, Tensor]:
        """The same tensors, on the host; their dtypes may be others."""

    def embed_prompt(self, cache: Path) -> dict[str, Tensor]:
        """What `text_shapes` says; on the meta device nothing is run or read."""
        wanted = self.text_shapes()
        if self.device.type == "meta":
            return {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in wanted.items()}
        found = cached(self._prompt_file(cache, self.dtype), self.run_text_encoders)
        return {name: found[name].to(self.device, dtype) for name, (_, dtype) in wanted.items()}

    def text_encoder_bytes(self, cache: Path, dtype: torch.dtype) -> int:
        if self._prompt_file(cache, dtype).exists():
            return 0
        return encoder_bytes(self.checkpoint, self.TEXT_ENCODERS, dtype)

    def _prompt_file(self, cache: Path, dtype: torch.dtype) -> Path:
        return prompt_file(cache, self.checkpoint, self.options["prompt"], self.options["prompt_tokens"], dtype)

    # -- a clip's way to its latents --------------------------------------------------------------------------------

    def latents(self, inputs: Inputs, plan: Plan) -> Latents:  # "video": [B, Z, T, h, w]
        # Clip by clip: one clip fills a GPU, and its latents then cannot depend on its neighbours in the batch.
        return {"video": torch.cat([self.encode_one(video) for video in inputs["video"]])}

    @abstractmethod
    def encode_one(self, video: Tensor) -> Tensor:
        """Scaled latents [1, Z, T, h, w] of one clip, uint8 [F, H, W, 3]."""

    def state(self, latents: Latents, plan: Plan) -> Any:
        return latents["video"]
