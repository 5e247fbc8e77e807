"""Mochi 1 (diffusers). Frame 0 is a row of its own, then every 6 frames share one; a token is 16 pixels.

Blocks put out (video, text); features are the video's tokens. The last block no longer updates the text.
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spatialprobe.engine.checkpoint import Checkpoint, empty_module
from spatialprobe.engine.clips.images import signed
from spatialprobe.engine.configs import check_fields
from spatialprobe.engine.parts.euler_schedule import euler_scheduler
from spatialprobe.engine.parts.text_encoder import load_text_encoder
from spatialprobe.engine.parts.vae import CHANNELS_LAST
from spatialprobe.engine.parts.video_diffusion import NUM_STEPS, VideoDiffusion

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


def rotary_tables(
    frequencies: Tensor,  # [3, heads, head_dim / 2]
    positions: Tensor,  # [N, 3]
) -> tuple[Tensor, Tensor]:  # cosines and sines [N, heads, head_dim / 2]
    """MochiRoPE's, without its request for autocast: all is float32, and the meta device has no autocast."""
    angles = torch.einsum("nd,dhf->nhf", positions.float(), frequencies.float())
    return angles.cos(), angles.sin()


class Mochi(VideoDiffusion):
    OPTIONS = {
        "size": (480, 848),  # pixels, height and width
        "prompt": "",
        "prompt_tokens": 256,  # padding is masked
        "vae_tiling": False,  # overlapping tiles change values; off is exact and faster
        **CHANNELS_LAST,
    }
    PARITY = OPTIONS
    PIPELINES = ("MochiPipeline",)

    def __init__(self, checkpoint: Checkpoint, options: dict):
        super().__init__(checkpoint, options)
        self.group = math.prod(self.vae_config["temporal_expansions"])
        self.patch = self.config["patch_size"]
        self.cell = math.prod(self.vae_config["spatial_expansions"]) * self.patch
        self.latent_channels = self.vae_config["latent_channels"]

    def check_options(self) -> None:
        super().check_options()
        if self.options["prompt_tokens"] > (most := self.config["max_sequence_length"]):
            raise ValueError(f"prompt_tokens must be at most {most}, got {self.options['prompt_tokens']}")

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
        super().load(depth, device, dtype, cache)
        self.transformer.rope._create_rope = rotary_tables
        valid = self._valid_tokens()
        for block in self.blocks:
            block.attn1.processor = FirstTokens(valid)

    def load_schedule(self) -> None:
        from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule

        scheduler = euler_scheduler(self.checkpoint)
        if not scheduler.config.invert_sigmas:
            raise ValueError(f"{self.checkpoint.root} must have a scheduler with inverted sigmas, as Mochi was trained")
        scheduler.set_timesteps(sigmas=np.array(linear_quadratic_schedule(NUM_STEPS, NOISE_THRESHOLD)))
        # Inverted: the scheduler's "sigma" is the video's share, which grows, and timesteps are 1000 times that.
        self.timesteps, self.shares = (x.tolist() for x in (scheduler.timesteps, scheduler.sigmas))

    def text_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        tokens, width = self.options["prompt_tokens"], self.config["text_embed_dim"]
        return {"prompt": ((1, tokens, width), self.dtype), "mask": ((1, tokens), torch.bool)}

    def _valid_tokens(self) -> int:
        mask = self.text["mask"]
        if mask.is_meta:  # memory is planned as for a prompt that fills them all
            return mask.shape[1]
        valid = int(mask.sum())
        assert mask[:, :valid].all(), "T5's tokenizer pads on the right"
        return valid

    @torch.inference_mode()
    def run_text_encoders(self) -> dict[str, Tensor]:
        from diffusers import MochiPipeline

        encoder, tokenizer = load_text_encoder(self.checkpoint, self.device, self.dtype)
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

    def encode_one(self, video: Tensor) -> Tensor:  # uint8 [F, H, W, 3] -> [1, Z, T, h, w]
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
            encoder_hidden_states=self.text["prompt"].expand(len(noisy), -1, -1),
            timestep=noisy.new_full((len(noisy),), self.timesteps[step]),  # rounded to the dtype, as the pipeline does
            encoder_attention_mask=self.text["mask"].expand(len(noisy), -1),
            return_dict=False,
        )

    def describe_step(self, step: int) -> dict[str, float]:
        return {"timestep": round(self.timesteps[step], 4), "sigma": round(1.0 - self.shares[step], 6)}
