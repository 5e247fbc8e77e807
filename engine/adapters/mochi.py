"""Mochi 1 (diffusers). Frame 0 is a row of its own, then every 6 frames share one; a token is 16 pixels.

Blocks put out (video, text); features are the video's tokens. The last block no longer updates the text.
The text encoder is needed once, for the prompt: its output is cached in the store, and it is gone before clips run.
"""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from spatialprobe.engine.adapter import Inputs, cached, prompt_file
from spatialprobe.engine.checkpoint import Checkpoint, empty_module, load_weights
from spatialprobe.engine.configs import check_fields
from spatialprobe.engine.images import resize, signed
from spatialprobe.engine.latents import FromLatents, Latents
from spatialprobe.engine.parts.euler_schedule import NUM_STEPS, euler_scheduler
from spatialprobe.engine.parts.frame_groups import group_rows, whole_groups
from spatialprobe.engine.parts.t5 import load_t5
from spatialprobe.engine.parts.vae import CHANNELS_LAST, set_up_vae
from spatialprobe.engine.types import Clip, Plan

NOISE_THRESHOLD = 0.025  # MochiPipeline's: the first half of the steps takes this much of the noise away


class FirstTokens:
    """MochiAttention's arithmetic, where the text's valid tokens are the first `count` of every clip.

    The library looks for them in the mask, clip by clip and block by block, and each time waits for the device.
    """

    def __init__(self, count: int):
        self.count = count

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,  # [B, N, C]
        encoder_hidden_states: Tensor,  # [B, L, D]
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],  # cosines and sines [N, heads, head_dim / 2]
    ) -> tuple[Tensor, Tensor]:
        def split(x: Tensor) -> Tensor:  # [B, tokens, heads, head_dim]
            return x.unflatten(2, (attn.heads, -1))

        video, text = hidden_states, encoder_hidden_states
        query = rotate(attn.norm_q(split(attn.to_q(video))), *image_rotary_emb)
        key = rotate(attn.norm_k(split(attn.to_k(video))), *image_rotary_emb)
        text_query = attn.norm_added_q(split(attn.add_q_proj(text)))
        text_key = attn.norm_added_k(split(attn.add_k_proj(text)))
        pairs = (query, text_query), (key, text_key), (split(attn.to_v(video)), split(attn.add_v_proj(text)))
        joined = (torch.cat([a, b[:, : self.count]], 1).transpose(1, 2) for a, b in pairs)
        out = F.scaled_dot_product_attention(*joined).transpose(1, 2).flatten(2)
        out_video, out_text = out.split([video.shape[1], self.count], 1)
        out_text = F.pad(out_text, (0, 0, 0, text.shape[1] - self.count))
        out_video = attn.to_out[1](attn.to_out[0](out_video))
        return out_video, attn.to_add_out(out_text) if hasattr(attn, "to_add_out") else out_text


def rotate(
    x: Tensor,  # [B, N, heads, head_dim], its pairs beside each other
    cosines: Tensor,  # [N, heads, head_dim / 2]
    sines: Tensor,
) -> Tensor:
    """Each pair turned by its angle, in float32."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cosines - b * sines, a * sines + b * cosines], -1).flatten(-2).to(x.dtype)


class Mochi(FromLatents):
    OPTIONS = {
        "size": (480, 848),  # pixels, height and width
        "prompt": "",
        "prompt_tokens": 256,  # padding is masked
        "vae_tiling": False,  # overlapping tiles change values; off is exact and faster
        **CHANNELS_LAST,
    }
    PARITY = OPTIONS
    LIBRARIES = ("diffusers", "transformers")
    PREPARES_ON_DEVICE = True

    def __init__(self, checkpoint: Checkpoint, options: dict):
        super().__init__(checkpoint, options)
        self.index = checkpoint.json("model_index.json")
        if self.index.get("_class_name") != "MochiPipeline":
            raise ValueError(f"{checkpoint.root} must be a MochiPipeline, got {self.index.get('_class_name')}")
        self.config = checkpoint.json("transformer/config.json")
        self.vae_config = checkpoint.json("vae/config.json")
        self.num_layers = self.config["num_layers"]
        self.num_steps = NUM_STEPS
        self.channels = self.config["num_attention_heads"] * self.config["attention_head_dim"]
        self.group = math.prod(self.vae_config["temporal_expansions"])  # frames per row
        self.cell = math.prod(self.vae_config["spatial_expansions"]) * self.config["patch_size"]  # pixels per token

    def check_options(self) -> None:
        if any(s < self.cell or s % self.cell for s in self.options["size"]):
            raise ValueError(f"size must be multiples of {self.cell} pixels, got {self.options['size']}")
        longest = self.config["max_sequence_length"]
        if not 1 <= self.options["prompt_tokens"] <= longest:
            raise ValueError(f"prompt_tokens must be 1 to {longest}, got {self.options['prompt_tokens']}")

    def plan(self, frames: int, query: tuple[int, ...]) -> Plan:
        height, width = self.options["size"]
        rows = group_rows(frames, self.group)
        grid = (rows[-1] + 1, height // self.cell, width // self.cell)
        return Plan(frames, tuple(range(frames)), (height, width), grid, rows)

    def prepare(self, clip: Clip, plan: Plan) -> Inputs:
        return {"video": whole_groups(resize(clip.frames, plan.size, Image.Resampling.LANCZOS), self.group)}

    def skeleton(self, depth: int) -> list[nn.Module]:
        from diffusers import AutoencoderKLMochi, MochiTransformer3DModel

        check_fields(self.config, MochiTransformer3DModel, "transformer/config.json")
        check_fields(self.vae_config, AutoencoderKLMochi, "vae/config.json")
        # The class makes its last block without a text branch: one block more, so that the wanted ones are whole.
        config = {**self.config, "num_layers": min(depth + 1, self.num_layers)}
        transformer = empty_module(lambda: MochiTransformer3DModel.from_config(config))
        transformer.transformer_blocks = transformer.transformer_blocks[:depth]
        vae = empty_module(lambda: AutoencoderKLMochi.from_config(self.vae_config))
        vae.decoder = None  # clips are encoded, never decoded
        return [transformer, vae]

    def load(self, depth: int, device: torch.device, dtype: torch.dtype, cache: Path) -> None:
        from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule

        self.device, self.dtype = device, dtype
        self.scheduler = euler_scheduler(self.checkpoint)
        if not self.scheduler.config.invert_sigmas:
            raise ValueError(f"{self.checkpoint.root} must have a scheduler with inverted sigmas, as Mochi was trained")
        self.scheduler.set_timesteps(sigmas=np.array(linear_quadratic_schedule(NUM_STEPS, NOISE_THRESHOLD)))
        # Inverted: the scheduler's "sigma" is the video's share, which grows, and timesteps are 1000 times that.
        self.timesteps, self.shares = (x.tolist() for x in (self.scheduler.timesteps, self.scheduler.sigmas))
        what = (self.options["prompt"], self.options["prompt_tokens"], dtype)
        prompt = cached(prompt_file(cache, self.checkpoint, *what), self._run_text_encoder)
        self.prompt, self.prompt_mask = prompt["prompt"].to(device, dtype), prompt["mask"].bool().to(device)
        valid = int(prompt["mask"].sum())
        assert prompt["mask"][:, :valid].all(), "T5's tokenizer pads on the right"
        self.transformer, self.vae = self.skeleton(depth)
        load_weights(self.transformer, self.checkpoint, "transformer", device=device, dtype=dtype)
        load_weights(self.vae, self.checkpoint, "vae", device=device, dtype=dtype)
        set_up_vae(self.vae, self.options)
        self.blocks = self.transformer.transformer_blocks
        for block in self.blocks:
            block.attn1.processor = FirstTokens(valid)

    @torch.inference_mode()
    def _run_text_encoder(self) -> dict[str, Tensor]:
        from diffusers import MochiPipeline

        encoder, tokenizer = load_t5(self.checkpoint, self.device, self.dtype)
        text = MochiPipeline(
            scheduler=None,
            vae=None,
            text_encoder=encoder,
            tokenizer=tokenizer,
            transformer=None,
            force_zeros_for_empty_prompt=self.index.get("force_zeros_for_empty_prompt", False),
        )
        embedding, mask, _, _ = text.encode_prompt(
            self.options["prompt"],
            do_classifier_free_guidance=False,
            max_sequence_length=self.options["prompt_tokens"],
        )
        return {"prompt": embedding.cpu().contiguous(), "mask": mask.long().cpu()}

    def noise_shape(self, plan: Plan) -> tuple[int, ...]:
        frames, height, width = plan.grid
        patch = self.config["patch_size"]
        return (self.vae_config["latent_channels"], frames, height * patch, width * patch)

    def latents(self, inputs: Inputs, plan: Plan) -> Latents:  # "video": float32 [B, Z, T, h, w]
        # Clip by clip: one clip fills a GPU, and its latents then cannot depend on its neighbours in the batch.
        return {"video": torch.cat([self._encode_one(video) for video in inputs["video"]])}

    def state(self, latents: Latents, plan: Plan) -> Tensor:
        return latents["video"]

    def _encode_one(self, video: Tensor) -> Tensor:  # uint8 [F, H, W, 3] -> [1, Z, T, h, w]
        # In float32, as the pipeline computes between steps. It never encodes: this undoes what it does to decode.
        latents = self.vae.encode(signed(video, self.dtype)).latent_dist.mean.float()
        config = self.vae.config  # where the file lacks a field, the class's default stands
        if config.latents_mean is None or config.latents_std is None:
            return latents * config.scaling_factor
        mean, std = (latents.new_tensor(x).view(1, -1, 1, 1, 1) for x in (config.latents_mean, config.latents_std))
        return (latents - mean) * config.scaling_factor / std

    def forward(self, state: Tensor, step: int, noise: Tensor) -> None:
        share = self.shares[step]
        noisy = (share * state + (1.0 - share) * noise).to(self.dtype)
        self.transformer(
            hidden_states=noisy,
            encoder_hidden_states=self.prompt.expand(len(noisy), -1, -1),
            timestep=noisy.new_full((len(noisy),), self.timesteps[step]),  # rounded to the dtype, as the pipeline does
            encoder_attention_mask=self.prompt_mask.expand(len(noisy), -1),
            return_dict=False,
        )

    def describe_step(self, step: int) -> dict[str, float]:
        return {"timestep": round(self.timesteps[step], 4), "sigma": round(1.0 - self.shares[step], 6)}

    def grid(self, tokens: Tensor, state: Tensor, plan: Plan) -> Tensor:
        return tokens.unflatten(1, plan.grid)
