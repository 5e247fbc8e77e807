"""HunyuanVideo text-to-video (diffusers). Frame 0 is a row of its own, then every 4 frames share one.

Layers count the double-stream blocks, then the single-stream blocks; both put out (video, text), and features are the
video's tokens. Both text encoders are needed once, for the prompt: their outputs are cached, and they are gone before
clips run.
"""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from spatialprobe.engine.adapter import Inputs, cached, prompt_file
from spatialprobe.engine.checkpoint import Checkpoint, empty_module, load_weights, one_line
from spatialprobe.engine.configs import check_fields
from spatialprobe.engine.images import resize, signed
from spatialprobe.engine.latents import FromLatents, Latents
from spatialprobe.engine.parts.frame_groups import group_rows, whole_groups
from spatialprobe.engine.parts.vae import CHANNELS_LAST, set_up_vae
from spatialprobe.engine.types import Clip, Plan

NUM_STEPS = 1000  # steps index the scheduler's schedule when it is asked for this many


class HunyuanVideo(FromLatents):
    OPTIONS = {
        "size": (480, 832),  # pixels, height and width
        "prompt": "",
        "prompt_tokens": 256,  # after the template, which the pipeline cuts off; padding is masked
        "guidance_scale": 6.0,  # the model was distilled with it as an input: the pipeline's default
        "flow_shift": 7.0,
        "vae_tiling": False,  # in height and width; windows of over 16 frames the VAE always encodes in pieces
        **CHANNELS_LAST,
    }
    PARITY = OPTIONS
    LIBRARIES = ("diffusers", "transformers")
    PREPARES_ON_DEVICE = True

    def __init__(self, checkpoint: Checkpoint, options: dict):
        super().__init__(checkpoint, options)
        pipeline = checkpoint.json("model_index.json").get("_class_name")
        if pipeline != "HunyuanVideoPipeline":
            raise ValueError(f"{checkpoint.root} must be a HunyuanVideoPipeline, got {pipeline}")
        self.config = checkpoint.json("transformer/config.json")
        self.vae_config = checkpoint.json("vae/config.json")
        condition = self.config.get("image_condition_type")
        if condition is not None or self.config["in_channels"] != self.config["out_channels"]:
            raise ValueError(f"{checkpoint.root} is an image-to-video HunyuanVideo; this adapter runs text-to-video")
        if self.config["patch_size_t"] != 1:
            raise ValueError(f"patch_size_t must be 1, got {self.config['patch_size_t']}")
        self.num_double = self.config["num_layers"]
        self.num_layers = self.num_double + self.config["num_single_layers"]
        self.num_steps = NUM_STEPS
        self.channels = self.config["num_attention_heads"] * self.config["attention_head_dim"]
        self.group = self.vae_config["temporal_compression_ratio"]  # frames per row
        self.cell = self.vae_config["spatial_compression_ratio"] * self.config["patch_size"]  # pixels per token

    def check_options(self) -> None:
        if any(s < self.cell or s % self.cell for s in self.options["size"]):
            raise ValueError(f"size must be multiples of {self.cell} pixels, got {self.options['size']}")
        if self.options["prompt_tokens"] < 1:
            raise ValueError(f"prompt_tokens must be at least 1, got {self.options['prompt_tokens']}")
        for name in ("guidance_scale", "flow_shift"):
            if not 0 < self.options[name] < math.inf:
                raise ValueError(f"{name} must be positive, got {self.options[name]}")

    def plan(self, frames: int, query: tuple[int, ...]) -> Plan:
        height, width = self.options["size"]
        rows = group_rows(frames, self.group)
        grid = (rows[-1] + 1, height // self.cell, width // self.cell)
        return Plan(frames, tuple(range(frames)), (height, width), grid, rows)

    def prepare(self, clip: Clip, plan: Plan) -> Inputs:
        return {"video": whole_groups(resize(clip.frames, plan.size, Image.Resampling.LANCZOS), self.group)}

    def skeleton(self, depth: int) -> list[nn.Module]:
        from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel

        check_fields(self.config, HunyuanVideoTransformer3DModel, "transformer/config.json")
        check_fields(self.vae_config, AutoencoderKLHunyuanVideo, "vae/config.json")
        double = min(depth, self.num_double)
        config = {**self.config, "num_layers": double, "num_single_layers": depth - double}
        transformer = empty_module(lambda: HunyuanVideoTransformer3DModel.from_config(config))
        vae = empty_module(lambda: AutoencoderKLHunyuanVideo.from_config(self.vae_config))
        vae.decoder = vae.post_quant_conv = None  # clips are encoded, never decoded
        return [transformer, vae]

    def load(self, depth: int, device: torch.device, dtype: torch.dtype, cache: Path) -> None:
        self.device, self.dtype = device, dtype
        what = (self.options["prompt"], self.options["prompt_tokens"], dtype)
        prompt = cached(prompt_file(cache, self.checkpoint, *what), self._run_text_encoders)
        self.prompt = {name: x.to(device, dtype) for name, x in prompt.items()}  # the mask as the pipeline casts it
        self.transformer, self.vae = self.skeleton(depth)
        load_weights(self.transformer, self.checkpoint, "transformer", device=device, dtype=dtype)
        load_weights(self.vae, self.checkpoint, "vae", device=device, dtype=dtype)
        set_up_vae(self.vae, self.options)
        self.blocks = [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]
        self._schedule(device)

    def _schedule(self, device: torch.device) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        config = self.checkpoint.json("scheduler/scheduler_config.json")
        check_fields(config, FlowMatchEulerDiscreteScheduler, "scheduler/scheduler_config.json")
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config, shift=self.options["flow_shift"])
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, NUM_STEPS + 1)[:-1])  # as the pipeline asks for them
        self.steps_on_host = list(zip(scheduler.timesteps.tolist(), scheduler.sigmas.tolist()[:-1], strict=True))
        self.timesteps, self.sigmas = scheduler.timesteps.to(device), scheduler.sigmas.to(device)

    @torch.inference_mode()
    def _run_text_encoders(self) -> dict[str, Tensor]:
        from diffusers import HunyuanVideoPipeline
        from transformers import CLIPTextModel, CLIPTokenizer, LlamaModel, PreTrainedTokenizerFast

        parts = {}
        for name, cls in (("text_encoder", LlamaModel), ("text_encoder_2", CLIPTextModel)):
            folder = self.checkpoint.folder(name)
            with one_line(folder):
                parts[name] = cls.from_pretrained(folder, dtype=self.dtype, use_safetensors=True).to(self.device)
        # Llama 3's tokenizer.json says all; the older Llama class, named beside it, would build another one.
        for name, cls in (("tokenizer", PreTrainedTokenizerFast), ("tokenizer_2", CLIPTokenizer)):
            folder = self.checkpoint.folder(name)
            with one_line(folder):
                parts[name] = cls.from_pretrained(folder)
        text = HunyuanVideoPipeline(**parts, transformer=None, vae=None, scheduler=None)
        tokens, pooled, mask = text.encode_prompt(
            self.options["prompt"], device=self.device, max_sequence_length=self.options["prompt_tokens"]
        )
        named = {"tokens": tokens, "pooled": pooled, "mask": mask}
        return {name: x.cpu().contiguous() for name, x in named.items()}

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
        # In float32 as the pipeline: it keeps latents so between steps, and rounds them as they enter the model.
        return self.vae.encode(signed(video, self.dtype)).latent_dist.mean.float() * self.vae_config["scaling_factor"]

    def forward(self, state: Tensor, step: int, noise: Tensor) -> None:
        batch, sigma = len(state), self.sigmas[step]
        noisy = sigma * noise + (1.0 - sigma) * state  # the scheduler's scale_noise
        guidance = torch.full((batch,), self.options["guidance_scale"], device=noisy.device, dtype=self.dtype)
        self.transformer(
            hidden_states=noisy.to(self.dtype),
            timestep=self.timesteps[step].expand(batch),
            encoder_hidden_states=self.prompt["tokens"].expand(batch, -1, -1),
            encoder_attention_mask=self.prompt["mask"].expand(batch, -1),
            pooled_projections=self.prompt["pooled"].expand(batch, -1),
            guidance=guidance * 1000.0,
            return_dict=False,
        )

    def describe_step(self, step: int) -> dict[str, float]:
        timestep, sigma = self.steps_on_host[step]
        return {"timestep": round(timestep, 4), "sigma": round(sigma, 6)}

    def grid(self, tokens: Tensor, state: Tensor, plan: Plan) -> Tensor:
        return tokens.unflatten(1, plan.grid)
