"""LTX-Video text-to-video (diffusers). Frame 0 is a row of its own, then every 8 frames share one; tokens of 32 pixels.

The schedule is shifted by the number of tokens, as the pipeline does: a step's sigma depends on window and size.
The text encoder is needed once, for the prompt: its output is cached in the store, and it is gone before clips run.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from spatialprobe.engine.adapter import Inputs, cached, prompt_file
from spatialprobe.engine.checkpoint import Checkpoint, empty_module, load_weights
from spatialprobe.engine.configs import check_fields
from spatialprobe.engine.images import resize, signed
from spatialprobe.engine.latents import FromLatents
from spatialprobe.engine.parts.euler_schedule import NUM_STEPS, euler_scheduler
from spatialprobe.engine.parts.frame_groups import group_rows, whole_groups
from spatialprobe.engine.parts.t5 import load_t5
from spatialprobe.engine.parts.vae import CHANNELS_LAST, set_up_vae
from spatialprobe.engine.types import Clip, Plan


@dataclass
class Latents:
    """What `encode` gives: normalised latents, float32 [B, Z, T, H, W], and the schedule of that many tokens."""

    clean: Tensor
    schedule: list[tuple[float, float]]  # (timestep, sigma) per step


class LTX(FromLatents):
    OPTIONS = {
        "size": (512, 704),  # pixels, height and width
        "frame_rate": 25.0,  # frames per second that rotary positions are scaled to
        "prompt": "",
        "prompt_tokens": 128,
        "vae_tiling": False,  # overlapping tiles change values; off is exact and faster
        **CHANNELS_LAST,
    }
    PARITY = OPTIONS
    LIBRARIES = ("diffusers", "transformers")
    PREPARES_ON_DEVICE = True

    def __init__(self, checkpoint: Checkpoint, options: dict):
        super().__init__(checkpoint, options)
        pipeline = checkpoint.json("model_index.json").get("_class_name")
        if pipeline != "LTXPipeline":
            raise ValueError(f"{checkpoint.root} must be an LTXPipeline, got {pipeline}")
        self.config = checkpoint.json("transformer/config.json")
        self.vae_config = checkpoint.json("vae/config.json")
        patches = self.config["patch_size"], self.config["patch_size_t"]
        if patches != (1, 1):
            raise ValueError(f"{checkpoint.root} must have one latent per token, got patches of {patches}")
        self.num_layers = self.config["num_layers"]
        self.num_steps = NUM_STEPS
        self.channels = self.config["num_attention_heads"] * self.config["attention_head_dim"]
        halvings = sum(self.vae_config["spatio_temporal_scaling"])
        strides = [self.vae_config.get(f"{kind}_compression_ratio") for kind in ("temporal", "spatial")]
        self.group = strides[0] or self.vae_config["patch_size_t"] * 2**halvings  # frames per row
        self.cell = strides[1] or self.vae_config["patch_size"] * 2**halvings  # pixels per token, both ways
        self._schedules: dict[int, list[tuple[float, float]]] = {}

    def check_options(self) -> None:
        if any(s < self.cell or s % self.cell for s in self.options["size"]):
            raise ValueError(f"size must be multiples of {self.cell} pixels, got {self.options['size']}")
        if self.options["prompt_tokens"] < 1:
            raise ValueError(f"prompt_tokens must be at least 1, got {self.options['prompt_tokens']}")
        if not 0 < self.options["frame_rate"] < math.inf:
            raise ValueError(f"frame_rate must be positive, got {self.options['frame_rate']}")

    def plan(self, frames: int, query: tuple[int, ...]) -> Plan:
        height, width = self.options["size"]
        rows = group_rows(frames, self.group)
        grid = (rows[-1] + 1, height // self.cell, width // self.cell)
        return Plan(frames, tuple(range(frames)), (height, width), grid, rows)

    def prepare(self, clip: Clip, plan: Plan) -> Inputs:
        return {"video": whole_groups(resize(clip.frames, plan.size, Image.Resampling.LANCZOS), self.group)}

    def skeleton(self, depth: int) -> list[nn.Module]:
        from diffusers import AutoencoderKLLTXVideo, LTXVideoTransformer3DModel

        check_fields(self.config, LTXVideoTransformer3DModel, "transformer/config.json")
        check_fields(self.vae_config, AutoencoderKLLTXVideo, "vae/config.json")
        config = {**self.config, "num_layers": depth}
        transformer = empty_module(lambda: LTXVideoTransformer3DModel.from_config(config))
        vae = empty_module(lambda: AutoencoderKLLTXVideo.from_config(self.vae_config))
        vae.decoder = None  # clips are encoded, never decoded
        return [transformer, vae]

    def load(self, depth: int, device: torch.device, dtype: torch.dtype, cache: Path) -> None:
        self.device, self.dtype = device, dtype
        euler_scheduler(self.checkpoint)  # a schedule that cannot be had is told before weights are read
        what = (self.options["prompt"], self.options["prompt_tokens"], dtype)
        prompt = cached(prompt_file(cache, self.checkpoint, *what), self._run_text_encoder)
        self.prompt, self.prompt_mask = prompt["prompt"].to(device, dtype), prompt["mask"].bool().to(device)
        self.transformer, self.vae = self.skeleton(depth)
        load_weights(self.transformer, self.checkpoint, "transformer", device=device, dtype=dtype)
        load_weights(self.vae, self.checkpoint, "vae", device=device, dtype=dtype)
        set_up_vae(self.vae, self.options)
        self.blocks = self.transformer.transformer_blocks

    @torch.inference_mode()
    def _run_text_encoder(self) -> dict[str, Tensor]:
        from diffusers import LTXPipeline

        encoder, tokenizer = load_t5(self.checkpoint, self.device, self.dtype)
        text = LTXPipeline(scheduler=None, vae=None, text_encoder=encoder, tokenizer=tokenizer, transformer=None)
        embedding, mask, _, _ = text.encode_prompt(
            self.options["prompt"],
            do_classifier_free_guidance=False,
            max_sequence_length=self.options["prompt_tokens"],
        )
        return {"prompt": embedding.cpu().contiguous(), "mask": mask.long().cpu()}

    def noise_shape(self, plan: Plan) -> tuple[int, ...]:
        return (self.vae_config["latent_channels"], *plan.grid)

    def latents(self, inputs: Inputs, plan: Plan) -> dict[str, Tensor]:  # "video": float32 [B, Z, T, H, W]
        # Clip by clip: one clip fills a GPU, and its latents then cannot depend on its neighbours in the batch.
        return {"video": torch.cat([self._encode_one(video) for video in inputs["video"]])}

    def state(self, latents: dict[str, Tensor], plan: Plan) -> Latents:
        return Latents(latents["video"], self._schedule(plan))

    def _encode_one(self, video: Tensor) -> Tensor:  # uint8 [F, H, W, 3] -> [1, Z, T, H, W]
        # In float32 as the pipeline: it keeps latents so between steps, and rounds them as they enter the model.
        latents = self.vae.encode(signed(video, self.dtype)).latent_dist.mean.float()
        mean, std = (x.view(1, -1, 1, 1, 1).float() for x in (self.vae.latents_mean, self.vae.latents_std))
        return (latents - mean) * self.vae_config["scaling_factor"] / std

    def _schedule(self, plan: Plan) -> list[tuple[float, float]]:
        """(timestep, sigma) of every step for a clip of this plan, as LTXPipeline sets them up."""
        from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift

        tokens = math.prod(plan.grid)
        if tokens not in self._schedules:
            scheduler = euler_scheduler(self.checkpoint)  # of its own: loader threads come here side by side
            config = scheduler.config
            mu = calculate_shift(
                tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
            )
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / NUM_STEPS, NUM_STEPS), mu=mu)
            self._schedules[tokens] = list(
                zip(scheduler.timesteps.tolist(), scheduler.sigmas.tolist()[:NUM_STEPS], strict=True)
            )
        return self._schedules[tokens]

    def forward(self, state: Latents, step: int, noise: Tensor) -> None:
        timestep, sigma = state.schedule[step]
        noisy = sigma * noise + (1.0 - sigma) * state.clean
        batch, _, frames, height, width = noisy.shape
        self.transformer(
            # A transposed view, as the pipeline's: in bfloat16 the memory's order decides how products are summed.
            hidden_states=noisy.to(self.dtype).flatten(2).transpose(1, 2),
            encoder_hidden_states=self.prompt.expand(batch, -1, -1),
            timestep=noisy.new_full((batch,), timestep),
            encoder_attention_mask=self.prompt_mask.expand(batch, -1),
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(self.group / self.options["frame_rate"], self.cell, self.cell),
            return_dict=False,
        )

    def describe_clip_step(self, step: int, plan: Plan) -> dict[str, float]:
        timestep, sigma = self._schedule(plan)[step]
        return {"timestep": round(timestep, 4), "sigma": round(sigma, 6)}

    def grid(self, tokens: Tensor, state: Latents, plan: Plan) -> Tensor:
        return tokens.unflatten(1, plan.grid)
