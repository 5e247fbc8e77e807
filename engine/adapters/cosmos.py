"""Cosmos-Predict2 Video2World (diffusers). Frame 0 is a row of its own, then every 4 frames share one.

The model goes on from given frames: as in its pipeline, the first `condition_rows` rows enter clean and only the others
are noised. (The Text2Image checkpoints see single frames, so they have no features of clips.) The text encoder is
needed once, for the prompt: its output is cached in the store, and it is gone before clips run.
"""

import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

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

# What Cosmos2VideoToWorldPipeline writes into its scheduler's config before it uses it.
SIGMAS = {"sigma_max": 80.0, "sigma_min": 0.002, "sigma_data": 1.0, "final_sigmas_type": "sigma_min"}
CONDITION_SIGMA = 0.0001  # the noise level that the pipeline tells the model for the clean rows


class Cosmos(FromLatents):
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
    LIBRARIES = ("diffusers", "transformers")
    PREPARES_ON_DEVICE = True

    def __init__(self, checkpoint: Checkpoint, options: dict):
        super().__init__(checkpoint, options)
        pipeline = checkpoint.json("model_index.json").get("_class_name")
        if pipeline != "Cosmos2VideoToWorldPipeline":
            raise ValueError(
                f"{checkpoint.root} must be a Cosmos2VideoToWorldPipeline (Cosmos-Predict2 Video2World), got {pipeline}"
            )
        self.config = checkpoint.json("transformer/config.json")
        self.vae_config = checkpoint.json("vae/config.json")
        if self.config["in_channels"] != self.vae_config["z_dim"] + 1 or self.config["patch_size"][0] != 1:
            raise ValueError(
                f"{checkpoint.root} must take {self.vae_config['z_dim']} latents and a mask in patches of one frame, "
                f"got in_channels {self.config['in_channels']}, patch_size {self.config['patch_size']}"
            )
        self.num_layers = self.config["num_layers"]
        self.num_steps = NUM_STEPS
        self.channels = self.config["num_attention_heads"] * self.config["attention_head_dim"]
        self.group = 2 ** sum(self.vae_config["temperal_downsample"])  # frames per row
        vae_stride = 2 ** len(self.vae_config["temperal_downsample"])
        self.cell = vae_stride * self.config["patch_size"][1]  # pixels per token, in height and in width

    def check_options(self) -> None:
        if any(s < self.cell or s % self.cell for s in self.options["size"]):
            raise ValueError(f"size must be multiples of {self.cell} pixels, got {self.options['size']}")
        if self.options["condition_rows"] < 1:
            raise ValueError(f"condition_rows must be at least 1, got {self.options['condition_rows']}")
        if not 0 < self.options["fps"] < math.inf:
            raise ValueError(f"fps must be positive, got {self.options['fps']}")
        if self.options["prompt_tokens"] < 1:
            raise ValueError(f"prompt_tokens must be at least 1, got {self.options['prompt_tokens']}")

    def plan(self, frames: int, query: tuple[int, ...]) -> Plan:
        height, width = self.options["size"]
        rows = group_rows(frames, self.group)
        if self.options["condition_rows"] > rows[-1]:
            raise ValueError(
                f"a window of {frames} frames has {rows[-1] + 1} rows, of which "
                f"{self.options['condition_rows']} would be conditions: none would be left to noise"
            )
        grid = (rows[-1] + 1, height // self.cell, width // self.cell)
        longest = max(s // p for s, p in zip(self.config["max_size"], self.config["patch_size"], strict=True))
        if max(grid) > longest:
            raise ValueError(f"rotary positions go up to {longest} rows, tokens high and wide, got a grid of {grid}")
        return Plan(frames, tuple(range(frames)), (height, width), grid, rows)

    def prepare(self, clip: Clip, plan: Plan) -> Inputs:
        return {"video": whole_groups(resize(clip.frames, plan.size, Image.Resampling.LANCZOS), self.group)}

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
        self.device, self.dtype = device, dtype
        self.scheduler = euler_scheduler(self.checkpoint, harmless=SIGMAS)
        if not self.scheduler.config.use_karras_sigmas:
            raise ValueError(f"{self.checkpoint.root} must have a scheduler with use_karras_sigmas, as Cosmos-Predict2")
        self.scheduler.register_to_config(**SIGMAS)
        self.scheduler.set_timesteps(sigmas=torch.linspace(0, 1, NUM_STEPS, dtype=torch.float64))
        sigmas = self.scheduler.sigmas[:NUM_STEPS]
        self.sigmas, self.timesteps = sigmas.tolist(), (sigmas / (sigmas + 1)).tolist()
        condition = torch.tensor(CONDITION_SIGMA)
        self.condition_timestep = float(condition / (condition + 1))
        what = (self.options["prompt"], self.options["prompt_tokens"], dtype)
        prompt = cached(prompt_file(cache, self.checkpoint, *what), self._run_text_encoder)
        self.prompt = prompt["prompt"].to(device, dtype)
        self.transformer, self.vae = self.skeleton(depth)
        keep_fp32 = tuple(self.transformer._keep_in_fp32_modules)
        load_weights(self.transformer, self.checkpoint, "transformer", device=device, dtype=dtype, keep_fp32=keep_fp32)
        load_weights(self.vae, self.checkpoint, "vae", device=device, dtype=dtype)
        set_up_vae(self.vae, self.options)
        self.blocks = self.transformer.transformer_blocks
        shape = (1, -1, 1, 1, 1)
        self.latent_mean = torch.tensor(self.vae_config["latents_mean"], device=device).view(shape)
        self.latent_std = torch.tensor(self.vae_config["latents_std"], device=device).view(shape)

    @torch.inference_mode()
    def _run_text_encoder(self) -> dict[str, Tensor]:
        # By hand: the pipeline cannot be made without a package that checks what it generates.
        encoder, tokenizer = load_t5(self.checkpoint, self.device, self.dtype)
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

    def noise_shape(self, plan: Plan) -> tuple[int, ...]:
        frames, height, width = plan.grid
        _, patch_height, patch_width = self.config["patch_size"]
        return (self.vae_config["z_dim"], frames, height * patch_height, width * patch_width)

    def latents(self, inputs: Inputs, plan: Plan) -> Latents:  # "video": float32 [B, Z, T, h, w]
        # Clip by clip: one clip fills a GPU, and its latents then cannot depend on its neighbours in the batch.
        return {"video": torch.cat([self._encode_one(video) for video in inputs["video"]])}

    def state(self, latents: Latents, plan: Plan) -> Tensor:
        return latents["video"]

    def _encode_one(self, video: Tensor) -> Tensor:  # uint8 [F, H, W, 3] -> [1, Z, T, h, w]
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
            encoder_hidden_states=self.prompt.expand(batch, -1, -1),
            fps=self.options["fps"],
            condition_mask=masks,
            return_dict=False,
        )

    def describe_step(self, step: int) -> dict[str, float]:
        return {"timestep": round(self.timesteps[step], 6), "sigma": round(self.sigmas[step], 6)}

    def grid(self, tokens: Tensor, state: Tensor, plan: Plan) -> Tensor:
        return tokens.unflatten(1, plan.grid)
