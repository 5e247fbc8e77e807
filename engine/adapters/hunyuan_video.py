"""HunyuanVideo text-to-video (diffusers). Frame 0 is a row of its own, then every 4 frames share one.

Layers count the double-stream blocks, then the single-stream blocks; both put out (video, text), and features are the
video's tokens.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from spatialprobe.engine.checkpoint import Checkpoint, empty_module, one_line
from spatialprobe.engine.clips.images import signed
from spatialprobe.engine.configs import check_fields
from spatialprobe.engine.parts.vae import CHANNELS_LAST
from spatialprobe.engine.parts.video_diffusion import NUM_STEPS, VideoDiffusion


class HunyuanVideo(VideoDiffusion):
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
    PIPELINES = ("HunyuanVideoPipeline",)
    TEXT_ENCODERS = {"text_encoder": "LlamaModel", "text_encoder_2": "CLIPTextModel"}
    POSITIVE = ("guidance_scale", "flow_shift")

    def __init__(self, checkpoint: Checkpoint, options: dict):
        super().__init__(checkpoint, options)
        condition = self.config.get("image_condition_type")
        if condition is not None or self.config["in_channels"] != self.config["out_channels"]:
            raise ValueError(f"{checkpoint.root} is an image-to-video HunyuanVideo; this adapter runs text-to-video")
        if self.config["patch_size_t"] != 1:
            raise ValueError(f"patch_size_t must be 1, got {self.config['patch_size_t']}")
        self.num_double = self.config["num_layers"]
        self.num_layers = self.num_double + self.config["num_single_layers"]
        self.group = self.vae_config["temporal_compression_ratio"]
        self.patch = self.config["patch_size"]
        self.cell = self.vae_config["spatial_compression_ratio"] * self.patch
        self.latent_channels = self.vae_config["latent_channels"]

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
        super().load(depth, device, dtype, cache)
        self.blocks = [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]

    def load_schedule(self) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        config = self.checkpoint.json("scheduler/scheduler_config.json")
        check_fields(config, FlowMatchEulerDiscreteScheduler, "scheduler/scheduler_config.json")
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config, shift=self.options["flow_shift"])
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, NUM_STEPS + 1)[:-1])  # as the pipeline asks for them
        self.steps_on_host = list(zip(scheduler.timesteps.tolist(), scheduler.sigmas.tolist()[:-1], strict=True))
        self.timesteps, self.sigmas = scheduler.timesteps.to(self.device), scheduler.sigmas.to(self.device)

    def text_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        tokens, config = self.options["prompt_tokens"], self.config
        shapes = {"tokens": (1, tokens, config["text_embed_dim"]), "pooled": (1, config["pooled_projection_dim"])}
        shapes["mask"] = (1, tokens)
        return {name: (shape, self.dtype) for name, shape in shapes.items()}  # the mask as the pipeline casts it

    @torch.inference_mode()
    def run_text_encoders(self) -> dict[str, Tensor]:
        import transformers
        from diffusers import HunyuanVideoPipeline
        from transformers import CLIPTokenizer, PreTrainedTokenizerFast

        parts = {}
        for name, kind in self.TEXT_ENCODERS.items():
            folder, cls = self.checkpoint.folder(name), getattr(transformers, kind)
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

    def encode_one(self, video: Tensor) -> Tensor:  # uint8 [F, H, W, 3] -> [1, Z, T, h, w]
        # In float32 as the pipeline: it keeps latents so between steps, and rounds them as they enter the model.
        return self.vae.encode(signed(video, self.dtype)).latent_dist.mean.float() * self.vae_config["scaling_factor"]

    def forward(self, state: Tensor, step: int, noise: Tensor) -> None:
        batch, sigma = len(state), self.sigmas[step]
        noisy = sigma * noise + (1.0 - sigma) * state  # the scheduler's scale_noise
        guidance = torch.full((batch,), self.options["guidance_scale"], device=noisy.device, dtype=self.dtype)
        self.transformer(
            hidden_states=noisy.to(self.dtype),
            timestep=self.timesteps[step].expand(batch),
            encoder_hidden_states=self.text["tokens"].expand(batch, -1, -1),
            encoder_attention_mask=self.text["mask"].expand(batch, -1),
            pooled_projections=self.text["pooled"].expand(batch, -1),
            guidance=guidance * 1000.0,
            return_dict=False,
        )

    def describe_step(self, step: int) -> dict[str, float]:
        timestep, sigma = self.steps_on_host[step]
        return {"timestep": round(timestep, 4), "sigma": round(sigma, 6)}
