"""Wan 2.1 and 2.2 (diffusers), text-to-video and image-to-video. Frame 0 is a row of its own, then 4 frames share one.

Of Wan 2.2's two experts only those are loaded that the job's steps run; TI2V-5B runs as text-to-video.
"""

import math
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from spatialprobe.engine.adapter import Inputs
from spatialprobe.engine.checkpoint import Checkpoint, empty_module
from spatialprobe.engine.clips.images import resize, signed
from spatialprobe.engine.configs import check_fields
from spatialprobe.engine.parts import clip_vision, experts
from spatialprobe.engine.parts.flow_schedule import FlowSchedule
from spatialprobe.engine.parts.text_encoder import load_text_encoder
from spatialprobe.engine.parts.vae import CHANNELS_LAST
from spatialprobe.engine.parts.video_diffusion import VideoDiffusion
from spatialprobe.engine.pipeline.latents import Latents
from spatialprobe.engine.types import COMPUTE_DTYPES, Clip, Plan

ENCODER = "UMT5EncoderModel"
SCHEDULER = "scheduler/scheduler_config.json"
HIGH_NOISE, LOW_NOISE = "transformer", "transformer_2"  # the experts' folders; models without experts have the first


class Wan(VideoDiffusion):
    OPTIONS = {
        "size": (480, 832),  # pixels, height and width
        "prompt": "",
        "prompt_tokens": 226,  # padding is attended to; the generation pipeline itself pads to 512
        "flow_shift": 0.0,  # 0: the checkpoint's own. For Wan 2.1, 3 is the model's value for 480p, 5 for 720p
        "vae_tiling": False,  # overlapping tiles change values; off is exact and faster
        **CHANNELS_LAST,
    }
    PARITY = OPTIONS | {"flow_shift": 3.0, "vae_tiling": True}
    PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")
    TEXT_ENCODERS = {"text_encoder": ENCODER}

    def __init__(self, checkpoint: Checkpoint, options: dict):
        super().__init__(checkpoint, options)
        self.expand_timesteps = bool(self.index.get("expand_timesteps"))  # TI2V-5B: a timestep for every token
        # Share of the training timesteps where the low-noise expert begins.
        self.boundary = self.index.get("boundary_ratio")
        self._check_experts((self.index.get("transformer_2") or [None])[0] is not None)
        self.group = 2 ** sum(self.vae_config["temperal_downsample"])
        self.patch = self.config["patch_size"][1]
        vae_stride = 2 ** len(self.vae_config["temperal_downsample"]) * (self.vae_config.get("patch_size") or 1)
        self.cell = vae_stride * self.patch
        self.latent_channels = self.vae_config["z_dim"]
        self._check_kind()

    def _check_experts(self, two: bool) -> None:
        root = self.checkpoint.root
        if two != (self.boundary is not None):
            raise ValueError(f"{root}: model_index.json must name both transformer_2 and boundary_ratio, or neither")
        if two and (other := self.checkpoint.json(f"{LOW_NOISE}/config.json")) != self.config:
            differing = sorted(k for k in other.keys() | self.config.keys() if other.get(k) != self.config.get(k))
            if any(not name.startswith("_") for name in differing):
                raise ValueError(f"{root}: configs of its two experts must be equal, but differ in {differing}")

    def _check_kind(self) -> None:
        if self.config.get("image_dim") is not None or self.config["in_channels"] != self.vae_config["z_dim"]:
            raise ValueError(f"{self.checkpoint.root} is an image-to-video Wan; name its family, --family wan_i2v")

    def check_options(self) -> None:
        super().check_options()
        if not 0 <= self.options["flow_shift"] < math.inf:
            raise ValueError(f"flow_shift must be positive, or 0 for the own, got {self.options['flow_shift']}")
        if self.options["flow_shift"] == 0 and "flow_shift" not in self.checkpoint.json(SCHEDULER):
            raise ValueError(f"{self.checkpoint.root / SCHEDULER} has no flow_shift: give one as an option")

    # -- noise steps and experts: known before weights are ---------------------------------------------------------

    @cached_property
    def schedule(self) -> FlowSchedule:
        return FlowSchedule(self.checkpoint.json(SCHEDULER), SCHEDULER, self.options["flow_shift"])

    def expert(self, step: int) -> str:
        """Folder of the transformer that runs a step."""
        return HIGH_NOISE if self.boundary is None or self.schedule.is_high_noise(step, self.boundary) else LOW_NOISE

    def wanted_experts(self) -> list[str]:
        """Those that `steps` run; all of them if no steps are named."""
        known = [HIGH_NOISE] if self.boundary is None else [HIGH_NOISE, LOW_NOISE]
        return [name for name in known if not self.steps or any(self.expert(step) == name for step in self.steps)]

    def describe_step(self, step: int) -> dict[str, float | str]:
        about = self.schedule.describe(step)
        return about if self.boundary is None else about | {"expert": self.expert(step)}

    # -- loading ---------------------------------------------------------------------------------------------------

    def skeleton(self, depth: int) -> list[nn.Module]:
        from diffusers import AutoencoderKLWan, WanTransformer3DModel

        check_fields(self.config, WanTransformer3DModel, "transformer/config.json")
        check_fields(self.vae_config, AutoencoderKLWan, "vae/config.json", harmless=("clip_output",))
        config = {**self.config, "num_layers": depth}
        transformers = [empty_module(lambda: WanTransformer3DModel.from_config(config)) for _ in self.wanted_experts()]
        known = {name: value for name, value in self.vae_config.items() if name != "clip_output"}  # of the decoder
        vae = empty_module(lambda: AutoencoderKLWan.from_config(known))
        vae.decoder = vae.post_quant_conv = None  # clips are encoded, never decoded
        return [vae, *transformers]

    def load(self, depth: int, device: torch.device, dtype: torch.dtype, cache: Path) -> None:
        self.device, self.dtype = device, dtype
        self.load_schedule()
        self.text = self.embed_prompt(cache)
        self.vae, *transformers = Wan.skeleton(self, depth)  # a subclass loads what it adds
        self.experts = dict(zip(self.wanted_experts(), transformers, strict=True))
        for folder, model in self.experts.items():
            self.load_transformer(model, folder)
        self.load_vae()
        self.blocks = experts.join(self.experts)
        shape = (1, -1, 1, 1, 1)
        self.latent_mean = torch.tensor(self.vae_config["latents_mean"], device=device).view(shape)
        self.latent_std = torch.tensor(self.vae_config["latents_std"], device=device).view(shape)

    def load_schedule(self) -> None:
        self.schedule.to(self.device)

    def text_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"prompt": ((1, self.options["prompt_tokens"], self.config["text_dim"]), self.dtype)}

    @torch.inference_mode()
    def run_text_encoders(self) -> dict[str, Tensor]:
        from diffusers import WanPipeline

        encoder, tokenizer = load_text_encoder(self.checkpoint, self.device, self.dtype, kind=ENCODER)
        text = WanPipeline(tokenizer, encoder, vae=None, scheduler=None)
        embedding, _ = text.encode_prompt(
            self.options["prompt"],
            do_classifier_free_guidance=False,
            max_sequence_length=self.options["prompt_tokens"],
        )
        return {"prompt": embedding.cpu().contiguous()}

    # -- running ---------------------------------------------------------------------------------------------------

    def encode_one(self, video: Tensor) -> Tensor:  # uint8 [F, H, W, 3] -> [1, Z, T, h, w]
        return self._latents(signed(video, self.dtype), self.dtype)

    def _latents(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:  # [1, 3, F, H, W] -> [1, Z, T, h, w] of `dtype`
        latents = self.vae.encode(pixels).latent_dist.mean.to(dtype)
        return (latents - self.latent_mean.to(dtype)) * (1.0 / self.latent_std.to(dtype))

    def forward(self, state: Any, step: int, noise: Tensor) -> None:
        self._run(self.schedule.add_noise(state, noise, step), step)

    def _run(self, x: Tensor, step: int, image: Tensor | None = None) -> None:
        timestep, expert = self.schedule.timesteps[step].expand(len(x)), self.expert(step)
        if self.expand_timesteps:
            tokens = math.prod(
                side // patch for side, patch in zip(x.shape[2:], self.config["patch_size"], strict=True)
            )
            timestep = timestep[:, None].float().expand(-1, tokens)
        experts.use(self.blocks, expert)
        prompt = self.text["prompt"].expand(len(x), -1, -1)
        self.experts[expert](x, timestep, prompt, encoder_hidden_states_image=image, return_dict=False)


class WanI2V(Wan):
    """The first frame goes in once more: as latents beside the noisy ones and, in Wan 2.1, as tokens of CLIP."""

    OPTIONS = Wan.OPTIONS | {"clip_dtype": "float16"}  # of CLIP, where the model has it; the original code's choice
    PARITY = OPTIONS
    LATENT_OPTIONS = (*Wan.LATENT_OPTIONS, "clip_dtype")
    PREPARES_ON_DEVICE = False  # CLIP's own processor wants the first frame on the host

    def _check_kind(self) -> None:
        root, takes = self.checkpoint.root, self.config["in_channels"]
        wanted = 2 * self.vae_config["z_dim"] + self.group  # noisy latents, the first frame's, and a mask
        if takes != wanted:
            raise ValueError(f"{root} is no image-to-video Wan: its transformer takes {takes} channels, not {wanted}")
        if self.config.get("pos_embed_seq_len") is not None:
            raise ValueError(f"{root} is a Wan between a first and a last frame; this adapter gives the first alone")
        has_clip = self.config.get("image_dim") is not None
        self.clip_config = self.checkpoint.json(f"{clip_vision.FOLDER}/config.json") if has_clip else None

    def check_options(self) -> None:
        super().check_options()
        if self.options["clip_dtype"] not in COMPUTE_DTYPES:
            dtypes = ", ".join(COMPUTE_DTYPES)
            raise ValueError(f"clip_dtype must be one of {dtypes}, got {self.options['clip_dtype']!r}")

    def prepare(self, clip: Clip, plan: Plan) -> Inputs:
        inputs = super().prepare(clip, plan)
        size = condition_size(clip.frames.shape[2:], plan.size, self.cell)
        image = resize(clip.frames[:1], size, Image.Resampling.BICUBIC)
        inputs["image"] = resize(image.permute(0, 3, 1, 2), plan.size, Image.Resampling.LANCZOS)  # uint8 [1, H, W, 3]
        if self.clip_config:
            inputs["clip_pixels"] = clip_vision.pixels(self.processor, image[0])
        return inputs

    def skeleton(self, depth: int) -> list[nn.Module]:
        clip = [clip_vision.skeleton(self.clip_config)] if self.clip_config else []
        return super().skeleton(depth) + clip

    def load(self, depth: int, device: torch.device, dtype: torch.dtype, cache: Path) -> None:
        super().load(depth, device, dtype, cache)
        if self.clip_config:
            self.clip = clip_vision.skeleton(self.clip_config)
            clip_vision.load(self.clip, self.checkpoint, device, COMPUTE_DTYPES[self.options["clip_dtype"]])
            self.processor = clip_vision.processor(self.checkpoint)

    def encoders(self) -> dict:
        clip = {"clip": (self.clip, self.clip_config)} if self.clip_config else {}
        return super().encoders() | clip

    def latent_facts(self) -> dict[str, Any]:
        """What CLIP is shown: a frame of a size that the model's own cell decides, as CLIP's processor makes it."""
        if not self.clip_config:
            return {}
        return {"cell": self.cell, "image_processor": clip_vision.processor_config(self.checkpoint)}

    def latents(self, inputs: Inputs, plan: Plan) -> Latents:
        state = super().latents(inputs, plan)
        frames = inputs["video"].shape[1]
        state["condition"] = torch.cat([self._condition(image, frames) for image in inputs["image"]])
        if self.clip_config:
            tokens = [clip_vision.tokens(self.clip, pixels[None]) for pixels in inputs["clip_pixels"]]
            state["image"] = torch.cat(tokens).to(self.dtype)
        return state

    def state(self, latents: Latents, plan: Plan) -> Latents:
        return latents

    def _condition(self, image: Tensor, frames: int) -> Tensor:  # uint8 [1, H, W, 3] -> [1, 4 + Z, T, h, w]
        pixels = signed(image, self.dtype)
        rest = pixels.new_zeros(*pixels.shape[:2], frames - 1, *pixels.shape[3:])  # mid-grey, as the pipeline has it
        latents = self._latents(torch.cat([pixels, rest], 2), torch.float32)
        mask = latents.new_zeros(1, self.group, *latents.shape[2:])
        mask[:, :, 0] = 1
        return torch.cat([mask, latents], 1).to(self.dtype)

    def forward(self, state: dict[str, Tensor], step: int, noise: Tensor) -> None:
        noisy = self.schedule.add_noise(state["video"], noise, step)
        self._run(torch.cat([noisy, state["condition"]], 1), step, state.get("image"))


def condition_size(source: tuple[int, int], size: tuple[int, int], cell: int) -> tuple[int, int]:
    """The first frame's size, its aspect ratio kept: about the area of `size`, in multiples of `cell`.

    As in the model's published examples, which hand the pipeline a frame of this size.
    """
    area, aspect = size[0] * size[1], source[0] / source[1]
    return tuple(max(cell, round(math.sqrt(side)) // cell * cell) for side in (area * aspect, area / aspect))
