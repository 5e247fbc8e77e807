"""Cosmos-Predict2 Video2World (diffusers). Frame 0 is a row of its own, then every 4 frames share one.

The model goes on from given frames: as in its pipeline, the first `condition_rows` rows enter clean and only the others
are noised. (The Text2Image checkpoints see single frames, so they have no features of clips.)
"""

from pathlib import Path

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

# What Cosmos2VideoToWorldPipeline writes into its scheduler's config before it uses it.
SIGMAS = {"sigma_max": 80.0, "sigma_min": 0.002, "sigma_data": 1.0, "final_sigmas_type": "sigma_min"}
CONDITION_SIGMA = 0.0001  # the noise level that the pipeline tells the model for the clean rows


class Cosmos(VideoDiffusion):
    OPTIONS = {
        "size": (704, 1280),  # pixels, height and width
        "condition_rows": 1,  # 1 as the pipeline given an image (frame 0), 2 as given 5 frames
        "fps": 16.0,  # frames per second that rotary positions are scaled to
        "prompt": "",
        "prompt_tokens": 512,  # padding is zeroed, and attended to
        "vae_tiling": False,  # overlapping tiles change values; off is exact and faster
        **CHANNELS_LAST,
    }
    PARITY = OPTIONS
    PIPELINES = ("Cosmos2VideoToWorldPipeline",)  # of Cosmos-Predict2 Video2World
    POSITIVE = ("fps",)

    def __init__(self, checkpoint: Checkpoint, options: dict):
        super().__init__(checkpoint, options)
        if self.config["in_channels"] != self.vae_config["z_dim"] + 1 or self.config["patch_size"][0] != 1:
            raise ValueError(
                f"{checkpoint.root} must take {self.vae_config['z_dim']} latents and a mask in patches of one frame, "
                f"got in_channels {self.config['in_channels']}, patch_size {self.config['patch_size']}"
            )
        self.group = 2 ** sum(self.vae_config["temperal_downsample"])
        self.patch = self.config["patch_size"][1]
        self.cell = 2 ** len(self.vae_config["temperal_downsample"]) * self.patch
        self.latent_channels = self.vae_config["z_dim"]

    def check_options(self) -> None:
        super().check_options()
        if self.options["condition_rows"] < 1:
            raise ValueError(f"condition_rows must be at least 1, got {self.options['condition_rows']}")

    def plan(self, frames: int, query: tuple[int, ...]) -> Plan:
        plan, given = super().plan(frames, query), self.options["condition_rows"]
        if given >= plan.grid[0]:
            raise ValueError(
                f"a window of {frames} frames has {plan.grid[0]} rows, of which {given} would be conditions: "
                "none would be left to noise"
            )
        longest = max(s // p for s, p in zip(self.config["max_size"], self.config["patch_size"], strict=True))
        if max(plan.grid) > longest:
            raise ValueError(
                f"rotary positions go up to {longest} rows, tokens high and wide, got a grid of {plan.grid}"
            )
        return plan

    def skeleton(self, depth: int) -> list[nn.Module]:
        from diffusers import AutoencoderKLWan, CosmosTransformer3DModel

        check_fields(self.config, CosmosTransformer3DModel, "transformer/config.json")
        check_fields(self.vae_config, AutoencoderKLWan, "vae/config.json")
        # The padding mask is all zeros, and the library resizes it with torchvision: here it is one more channel of
        # the condition mask instead. The weights and the sums are the same.
        config = {**self.config, "num_layers": depth, "concat_padding_mask": False}
        config["in_channels"] += self._padding_channels
        transformer = empty_module(lambda: CosmosTransformer3DModel.from_config(config))
        vae = empty_module(lambda: AutoencoderKLWan.from_config(self.vae_config))
        vae.decoder = vae.post_quant_conv = None  # clips are encoded, never decoded
        return [transformer, vae]

    @property
    def _padding_channels(self) -> int:
        return int(self.config["concat_padding_mask"])

    def load(self, depth: int, device: torch.device, dtype: torch.dtype, cache: Path) -> None:
        super().load(depth, device, dtype, cache)
        shape = (1, -1, 1, 1, 1)
        self.latent_mean = torch.tensor(self.vae_config["latents_mean"], device=device).view(shape)
        self.latent_std = torch.tensor(self.vae_config["latents_std"], device=device).view(shape)

    def load_schedule(self) -> None:
        scheduler = euler_scheduler(self.checkpoint, harmless=SIGMAS)
        if not scheduler.config.use_karras_sigmas:
            raise ValueError(f"{self.checkpoint.root} must have a scheduler with use_karras_sigmas, as Cosmos-Predict2")
        scheduler.register_to_config(**SIGMAS)
        scheduler.set_timesteps(sigmas=torch.linspace(0, 1, NUM_STEPS, dtype=torch.float64))
        sigmas = scheduler.sigmas[:NUM_STEPS]
        self.sigmas, self.timesteps = sigmas.tolist(), (sigmas / (sigmas + 1)).tolist()
        condition = torch.tensor(CONDITION_SIGMA)
        self.condition_timestep = float(condition / (condition + 1))

    def text_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"prompt": ((1, self.options["prompt_tokens"], self.config["text_embed_dim"]), self.dtype)}

    @torch.inference_mode()
    def run_text_encoders(self) -> dict[str, Tensor]:
        # By hand: the pipeline cannot be made without a package that checks what it generates.
        encoder, tokenizer = load_text_encoder(self.checkpoint, self.device, self.dtype)
        tokens = tokenizer(
            self.options["prompt"],
            padding="max_length",
            max_length=self.options["prompt_tokens"],
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        mask = tokens.attention_mask.bool()
        embedding = encoder(tokens.input_ids, attention_mask=mask).last_hidden_state
        return {"prompt": embedding.masked_fill(~mask[..., None], 0).to(self.dtype).cpu().contiguous()}

    def encode_one(self, video: Tensor) -> Tensor:  # uint8 [F, H, W, 3] -> [1, Z, T, h, w]
        latents = self.vae.encode(signed(video, self.dtype)).latent_dist.mean.float()
        return (latents - self.latent_mean) / self.latent_std * SIGMAS["sigma_data"]

    def forward(self, state: Tensor, step: int, noise: Tensor) -> None:
        # Karras et al. 2022: x = x0 + sigma eps, scaled for the model by 1 / (sigma + 1).
        batch, _, frames, height, width = state.shape
        given, timestep = self.options["condition_rows"], self.timesteps[step]
        scaled = (state + self.sigmas[step] * noise) * (1.0 - timestep)
        scaled[:, :, :given] = state[:, :, :given]
        timesteps = state.new_full((batch, 1, frames, 1, 1), timestep)
        timesteps[:, :, :given] = self.condition_timestep
        masks = state.new_zeros((batch, 1 + self._padding_channels, frames, height, width), dtype=self.dtype)
        masks[:, 0, :given] = 1  # the condition; what follows is the padding
        self.transformer(
            hidden_states=scaled.to(self.dtype),
            timestep=timesteps.to(self.dtype),
            encoder_hidden_states=self.text["prompt"].expand(batch, -1, -1),
            fps=self.options["fps"],
            condition_mask=masks,
            return_dict=False,
        )

    def describe_step(self, step: int) -> dict[str, float]:
        return {"timestep": round(self.timesteps[step], 6), "sigma": round(self.sigmas[step], 6)}
