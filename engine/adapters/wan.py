"""Wan 2.1 text-to-video (diffusers). Frame 0 is a row of its own, then every 4 frames share one.

The text encoder is needed once, for the prompt: its output is cached in the store, and it is gone before clips run.
"""

import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from spatialprobe.engine.adapter import Adapter, Inputs, cached, prompt_file
from spatialprobe.engine.checkpoint import Checkpoint, empty_module, load_weights, one_line
from spatialprobe.engine.images import resize, signed
from spatialprobe.engine.types import Clip, Plan

NUM_STEPS = 1000  # steps index the scheduler's schedule when it is asked for this many


class Wan(Adapter):
    OPTIONS = {
        "size": (480, 832),  # pixels, height and width
        "prompt": "",
        "prompt_tokens": 226,  # padding is attended to; the generation pipeline itself pads to 512
        "flow_shift": 3.0,  # 3 is the model's value for 480p, 5 for 720p
        "vae_tiling": False,  # overlapping tiles change values; off is exact and faster
    }
    PARITY = OPTIONS | {"vae_tiling": True}
    LIBRARIES = ("diffusers", "transformers")

    def __init__(self, checkpoint: Checkpoint, options: dict):
        super().__init__(checkpoint, options)
        self.config = checkpoint.json("transformer/config.json")
        self.vae_config = checkpoint.json("vae/config.json")
        if self.config.get("image_dim") is not None or self.config["in_channels"] != self.config["out_channels"]:
            raise ValueError(f"{checkpoint.root} is an image-to-video Wan; this adapter runs text-to-video")
        index = checkpoint.json("model_index.json")
        two_experts = (index.get("transformer_2") or [None])[0] is not None or index.get("boundary_ratio") is not None
        if two_experts or index.get("expand_timesteps") or self.vae_config.get("is_residual"):
            raise ValueError(f"{checkpoint.root} is a Wan 2.2; this adapter runs Wan 2.1 text-to-video")
        self.num_layers = self.config["num_layers"]
        self.num_steps = NUM_STEPS
        self.channels = self.config["num_attention_heads"] * self.config["attention_head_dim"]
        self.time_stride = 2 ** sum(self.vae_config["temperal_downsample"])
        vae_stride = 2 ** len(self.vae_config["temperal_downsample"])
        self.cell = vae_stride * self.config["patch_size"][1]  # pixels per token, in height and in width

    def check_options(self) -> None:
        if any(s < self.cell or s % self.cell for s in self.options["size"]):
            raise ValueError(f"size must be multiples of {self.cell} pixels, got {self.options['size']}")
        if self.options["prompt_tokens"] < 1:
            raise ValueError(f"prompt_tokens must be at least 1, got {self.options['prompt_tokens']}")
        if not 0 < self.options["flow_shift"] < math.inf:
            raise ValueError(f"flow_shift must be positive, got {self.options['flow_shift']}")

    def plan(self, frames: int, query: tuple[int, ...]) -> Plan:
        height, width = self.options["size"]
        rows = tuple(math.ceil(f / self.time_stride) for f in range(frames))
        grid = (rows[-1] + 1, height // self.cell, width // self.cell)
        return Plan(frames, tuple(range(frames)), (height, width), grid, rows)

    def prepare(self, clip: Clip, plan: Plan) -> Inputs:
        # The last group of 4 is completed with its last frame: the VAE would silently drop a part of a group.
        missing = 1 + (plan.grid[0] - 1) * self.time_stride - plan.frames
        video = resize(clip.frames, plan.size, Image.Resampling.LANCZOS)  # uint8 [F, H, W, 3]
        if missing:
            video = torch.cat([video, video[-1:].expand(missing, -1, -1, -1)])
        return {"video": video}

    def skeleton(self, depth: int) -> list[nn.Module]:
        from diffusers import AutoencoderKLWan, WanTransformer3DModel

        transformer = empty_module(lambda: WanTransformer3DModel.from_config({**self.config, "num_layers": depth}))
        vae = empty_module(lambda: AutoencoderKLWan.from_config(self.vae_config))
        vae.decoder = vae.post_quant_conv = None  # clips are encoded, never decoded
        return [transformer, vae]

    def load(self, depth: int, device: torch.device, dtype: torch.dtype, cache: Path) -> None:
        from diffusers import UniPCMultistepScheduler

        self.device, self.dtype = device, dtype
        self.prompt = self._embed_prompt(cache).to(device, dtype)  # [1, prompt_tokens, D]
        transformer, vae = self.skeleton(depth)
        load_weights(
            transformer,
            self.checkpoint,
            "transformer",
            device=device,
            dtype=dtype,
            keep_fp32=tuple(transformer._keep_in_fp32_modules),
        )
        load_weights(vae, self.checkpoint, "vae", device=device, dtype=dtype)
        if self.options["vae_tiling"]:
            vae.enable_tiling()
        self.transformer, self.vae, self.blocks = transformer, vae, transformer.blocks
        self.scheduler = UniPCMultistepScheduler.from_config(
            self.checkpoint.json("scheduler/scheduler_config.json"), flow_shift=self.options["flow_shift"]
        )
        self.scheduler.set_timesteps(NUM_STEPS)
        self.timesteps, self.sigmas = (x.to(device) for x in (self.scheduler.timesteps, self.scheduler.sigmas))
        shape = (1, -1, 1, 1, 1)
        self.latent_mean = torch.tensor(self.vae_config["latents_mean"]).view(shape).to(device, dtype)
        self.latent_inverse_std = 1.0 / torch.tensor(self.vae_config["latents_std"]).view(shape).to(device, dtype)

    def _embed_prompt(self, cache: Path) -> Tensor:
        what = (self.options["prompt"], self.options["prompt_tokens"], self.dtype)
        return cached(prompt_file(cache, self.checkpoint, *what), self._run_text_encoder)["prompt"]

    @torch.inference_mode()
    def _run_text_encoder(self) -> dict[str, Tensor]:
        from diffusers import WanPipeline
        from transformers import AutoTokenizer, UMT5EncoderModel

        folders = [self.checkpoint.folder(name) for name in ("text_encoder", "tokenizer")]
        with one_line(folders[0]):
            encoder = UMT5EncoderModel.from_pretrained(folders[0], dtype=self.dtype, use_safetensors=True)
        with one_line(folders[1]):
            tokenizer = AutoTokenizer.from_pretrained(folders[1], trust_remote_code=False)
        text = WanPipeline(tokenizer, encoder.to(self.device), vae=None, scheduler=None)
        embedding, _ = text.encode_prompt(
            self.options["prompt"],
            do_classifier_free_guidance=False,
            max_sequence_length=self.options["prompt_tokens"],
        )
        return {"prompt": embedding.cpu().contiguous()}

    def noise_shape(self, plan: Plan) -> tuple[int, ...]:
        frames, height, width = plan.grid
        _, patch_height, patch_width = self.config["patch_size"]
        return (self.vae_config["z_dim"], frames, height * patch_height, width * patch_width)

    def encode(self, inputs: Inputs, plan: Plan) -> Tensor:  # -> latents [B, Z, T, h, w]
        # Clip by clip: one clip fills a GPU, and its latents then cannot depend on its neighbours in the batch.
        return torch.cat([self._encode_one(video) for video in inputs["video"]])

    def _encode_one(self, video: Tensor) -> Tensor:  # uint8 [F, H, W, 3] -> [1, Z, T, h, w]
        return (
            self.vae.encode(signed(video, self.dtype)).latent_dist.mean - self.latent_mean
        ) * self.latent_inverse_std

    def forward(self, state: Tensor, step: int, noise: Tensor) -> None:
        # The scheduler's add_noise, without its search for the timestep on the device, which would stall the queue.
        sigma = self.sigmas[self._sigma_index(step)].to(state.dtype)
        noisy = (1 - sigma) * state + sigma * noise.to(state.dtype)
        timestep = self.timesteps[step].expand(len(state))
        self.transformer(noisy, timestep, self.prompt.expand(len(state), -1, -1), return_dict=False)

    def _sigma_index(self, step: int) -> int:
        # Integer timesteps repeat in a schedule of 1000; add_noise takes the sigma of the second of a pair.
        return self.scheduler.index_for_timestep(self.scheduler.timesteps[step])

    def describe_step(self, step: int) -> dict[str, float]:
        sigma = self.scheduler.sigmas[self._sigma_index(step)]
        return {"timestep": int(self.scheduler.timesteps[step]), "sigma": round(float(sigma), 6)}

    def grid(self, tokens: Tensor, state: Tensor, plan: Plan) -> Tensor:
        return tokens.unflatten(1, plan.grid)
