"""LTX-Video text-to-video (diffusers). Frame 0 is a row of its own, then every 8 frames share one; tokens of 32 pixels.

The schedule is shifted by the number of tokens, as the pipeline does: a step's sigma depends on window and size.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from spatialprobe.engine.checkpoint import Checkpoint, empty_module
from spatialprobe.engine.clips.images import signed
from spatialprobe.engine.configs import check_fields
from spatialprobe.engine.parts.euler_schedule import euler_scheduler
from spatialprobe.engine.parts.text_encoder import load_text_encoder
from spatialprobe.engine.parts.vae import CHANNELS_LAST
from spatialprobe.engine.parts.video_diffusion import NUM_STEPS, VideoDiffusion
from spatialprobe.engine.types import Plan


@dataclass
class Latents:
    """What `encode` gives: normalised latents, float32 [B, Z, T, H, W], and the schedule of that many tokens."""

    clean: Tensor
    schedule: list[tuple[float, float]]  # (timestep, sigma) per step


class LTX(VideoDiffusion):
    OPTIONS = {
        "size": (512, 704),  # pixels, height and width
        "frame_rate": 25.0,  # frames per second that rotary positions are scaled to
        "prompt": "",
        "prompt_tokens": 128,
        "vae_tiling": False,  # overlapping tiles change values; off is exact and faster
        **CHANNELS_LAST,
    }
    PARITY = OPTIONS
    PIPELINES = ("LTXPipeline",)
    POSITIVE = ("frame_rate",)

    def __init__(self, checkpoint: Checkpoint, options: dict):
        super().__init__(checkpoint, options)
        patches = self.config["patch_size"], self.config["patch_size_t"]
        if patches != (1, 1):
            raise ValueError(f"{checkpoint.root} must have one latent per token, got patches of {patches}")
        halvings = sum(self.vae_config["spatio_temporal_scaling"])
        strides = [self.vae_config.get(f"{kind}_compression_ratio") for kind in ("temporal", "spatial")]
        self.group = strides[0] or self.vae_config["patch_size_t"] * 2**halvings
        self.cell = strides[1] or self.vae_config["patch_size"] * 2**halvings
        self.patch, self.latent_channels = 1, self.vae_config["latent_channels"]
        self._schedules: dict[int, list[tuple[float, float]]] = {}

    def skeleton(self, depth: int) -> list[nn.Module]:
        from diffusers import AutoencoderKLLTXVideo, LTXVideoTransformer3DModel

        check_fields(self.config, LTXVideoTransformer3DModel, "transformer/config.json")
        check_fields(self.vae_config, AutoencoderKLLTXVideo, "vae/config.json")
        config = {**self.config, "num_layers": depth}
        transformer = empty_module(lambda: LTXVideoTransformer3DModel.from_config(config))
        vae = empty_module(lambda: AutoencoderKLLTXVideo.from_config(self.vae_config))
        vae.decoder = None  # clips are encoded, never decoded
        return [transformer, vae]

    def load_schedule(self) -> None:
        euler_scheduler(self.checkpoint)  # can it be had? What a step is, only a clip's tokens say

    def text_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        tokens, width = self.options["prompt_tokens"], self.config["caption_channels"]
        return {"prompt": ((1, tokens, width), self.dtype), "mask": ((1, tokens), torch.bool)}

    @torch.inference_mode()
    def run_text_encoders(self) -> dict[str, Tensor]:
        from diffusers import LTXPipeline

        encoder, tokenizer = load_text_encoder(self.checkpoint, self.device, self.dtype)
        text = LTXPipeline(scheduler=None, vae=None, text_encoder=encoder, tokenizer=tokenizer, transformer=None)
        embedding, mask, _, _ = text.encode_prompt(
            self.options["prompt"],
            do_classifier_free_guidance=False,
            max_sequence_length=self.options["prompt_tokens"],
        )
        return {"prompt": embedding.cpu().contiguous(), "mask": mask.long().cpu()}

    def state(self, latents: dict[str, Tensor], plan: Plan) -> Latents:
        return Latents(latents["video"], self._schedule(plan))

    def encode_one(self, video: Tensor) -> Tensor:  # uint8 [F, H, W, 3] -> [1, Z, T, H, W]
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
            encoder_hidden_states=self.text["prompt"].expand(batch, -1, -1),
            timestep=noisy.new_full((batch,), timestep),
            encoder_attention_mask=self.text["mask"].expand(batch, -1),
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(self.group / self.options["frame_rate"], self.cell, self.cell),
            return_dict=False,
        )

    def describe_clip_step(self, step: int, plan: Plan) -> dict[str, float]:
        timestep, sigma = self._schedule(plan)[step]
        return {"timestep": round(timestep, 4), "sigma": round(sigma, 6)}
