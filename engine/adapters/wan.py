"""Wan 2.1 and 2.2 (diffusers), text-to-video and image-to-video. Frame 0 is a row of its own, then 4 frames share one.

The text encoder is needed once, for the prompt: its output is cached in the store, and it is gone before clips run.
Of Wan 2.2's two experts only those are loaded that the job's steps run; TI2V-5B runs as text-to-video.
"""

import math
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from spatialprobe.engine.adapter import Inputs, cached, prompt_file
from spatialprobe.engine.checkpoint import Checkpoint, empty_module, load_weights, one_line
from spatialprobe.engine.configs import check_fields
from spatialprobe.engine.images import resize, signed
from spatialprobe.engine.latents import FromLatents, Latents
from spatialprobe.engine.parts import clip_vision, experts
from spatialprobe.engine.parts.flow_schedule import NUM_STEPS, FlowSchedule
from spatialprobe.engine.parts.vae import CHANNELS_LAST, set_up_vae
from spatialprobe.engine.types import COMPUTE_DTYPES, Clip, Plan

PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")
SCHEDULER = "scheduler/scheduler_config.json"
HIGH_NOISE, LOW_NOISE = "transformer", "transformer_2"  # the experts' folders; models without experts have the first


class Wan(FromLatents):
    OPTIONS = {
        "size": (480, 832),  # pixels, height and width
        "prompt": "",
        "prompt_tokens": 226,  # padding is attended to; the generation pipeline itself pads to 512
        "flow_shift": 0.0,  # 0: the checkpoint's own. For Wan 2.1, 3 is the model's value for 480p, 5 for 720p
        "vae_tiling": False,  # overlapping tiles change values; off is exact and faster
        **CHANNELS_LAST,
    }
    PARITY = OPTIONS | {"flow_shift": 3.0, "vae_tiling": True}
    LIBRARIES = ("diffusers", "transformers")
    PLANS_MEMORY = PREPARES_ON_DEVICE = True

    def __init__(self, checkpoint: Checkpoint, options: dict):
        super().__init__(checkpoint, options)
        index = checkpoint.json("model_index.json")
        if (pipeline := index.get("_class_name")) not in PIPELINES:
            raise ValueError(f"{checkpoint.root} must be a {' or '.join(PIPELINES)}, got {pipeline}")
        self.config = checkpoint.json("transformer/config.json")
        self.vae_config = checkpoint.json("vae/config.json")
        self.expand_timesteps = bool(index.get("expand_timesteps"))  # TI2V-5B: a timestep for every token
        self.boundary = index.get("boundary_ratio")  # share of the training timesteps where the low-noise expert begins
        self._check_experts((index.get("transformer_2") or [None])[0] is not None)
        self.num_layers = self.config["num_layers"]
        self.num_steps = NUM_STEPS
        self.channels = self.config["num_attention_heads"] * self.config["attention_head_dim"]
        self.time_stride = 2 ** sum(self.vae_config["temperal_downsample"])
        vae_stride = 2 ** len(self.vae_config["temperal_downsample"]) * (self.vae_config.get("patch_size") or 1)
        self.cell = vae_stride * self.config["patch_size"][1]  # pixels per token, in height and in width
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
        if any(s < self.cell or s % self.cell for s in self.options["size"]):
            raise ValueError(f"size must be multiples of {self.cell} pixels, got {self.options['size']}")
        if self.options["prompt_tokens"] < 1:
            raise ValueError(f"prompt_tokens must be at least 1, got {self.options['prompt_tokens']}")
        if not 0 <= self.options["flow_shift"] < math.inf:
            raise ValueError(f"flow_shift must be positive, or 0 for the own, got {self.options['flow_shift']}")
        if self.options["flow_shift"] == 0 and "flow_shift" not in self.checkpoint.json(SCHEDULER):
            raise ValueError(f"{self.checkpoint.root / SCHEDULER} has no flow_shift: give one as an option")

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
        self.prompt = self._embed_prompt(cache).to(device, dtype)  # [1, prompt_tokens, D]
        self.vae, *transformers = Wan.skeleton(self, depth)  # a subclass loads what it adds
        self.experts = dict(zip(self.wanted_experts(), transformers, strict=True))
        for folder, model in self.experts.items():
            keep = tuple(model._keep_in_fp32_modules)
            load_weights(model, self.checkpoint, folder, device=device, dtype=dtype, keep_fp32=keep)
        load_weights(self.vae, self.checkpoint, "vae", device=device, dtype=dtype)
        set_up_vae(self.vae, self.options)
        self.blocks = experts.join(self.experts)
        self.schedule.to(device)
        shape = (1, -1, 1, 1, 1)
        self.latent_mean = torch.tensor(self.vae_config["latents_mean"], device=device).view(shape)
        self.latent_std = torch.tensor(self.vae_config["latents_std"], device=device).view(shape)

    def _prompt_file(self, cache: Path, dtype: torch.dtype) -> Path:
        return prompt_file(cache, self.checkpoint, self.options["prompt"], self.options["prompt_tokens"], dtype)

    def _embed_prompt(self, cache: Path) -> Tensor:
        if self.device.type == "meta":
            return torch.empty(1, self.options["prompt_tokens"], self.config["text_dim"], device="meta")
        return cached(self._prompt_file(cache, self.dtype), self._run_text_encoder)["prompt"]

    def text_encoder_bytes(self, cache: Path, dtype: torch.dtype) -> int:
        from transformers import UMT5Config, UMT5EncoderModel

        if self._prompt_file(cache, dtype).exists():
            return 0
        config = UMT5Config.from_dict(self.checkpoint.json("text_encoder/config.json"))
        encoder = empty_module(lambda: UMT5EncoderModel(config))
        encoder.tie_weights()
        return sum(p.numel() for p in encoder.parameters()) * dtype.itemsize

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

    # -- running ---------------------------------------------------------------------------------------------------

    def noise_shape(self, plan: Plan) -> tuple[int, ...]:
        frames, height, width = plan.grid
        _, patch_height, patch_width = self.config["patch_size"]
        return (self.vae_config["z_dim"], frames, height * patch_height, width * patch_width)

    def latents(self, inputs: Inputs, plan: Plan) -> Latents:  # "video": [B, Z, T, h, w]
        # Clip by clip: one clip fills a GPU, and its latents then cannot depend on its neighbours in the batch.
        return {"video": torch.cat([self._encode_one(video) for video in inputs["video"]])}

    def state(self, latents: Latents, plan: Plan) -> Any:
        return latents["video"]

    def _encode_one(self, video: Tensor) -> Tensor:  # uint8 [F, H, W, 3] -> [1, Z, T, h, w]
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
        prompt = self.prompt.expand(len(x), -1, -1)
        self.experts[expert](x, timestep, prompt, encoder_hidden_states_image=image, return_dict=False)

    def grid(self, tokens: Tensor, state: Any, plan: Plan) -> Tensor:
        return tokens.unflatten(1, plan.grid)


class WanI2V(Wan):
    """The first frame goes in once more: as latents beside the noisy ones and, in Wan 2.1, as tokens of CLIP."""

    OPTIONS = Wan.OPTIONS | {"clip_dtype": "float16"}  # of CLIP, where the model has it; the original code's choice
    PARITY = OPTIONS
    LATENT_OPTIONS = (*Wan.LATENT_OPTIONS, "clip_dtype")
    PREPARES_ON_DEVICE = False  # CLIP's own processor wants the first frame on the host

    def _check_kind(self) -> None:
        root, takes = self.checkpoint.root, self.config["in_channels"]
        wanted = 2 * self.vae_config["z_dim"] + self.time_stride  # noisy latents, the first frame's, and a mask
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
        mask = latents.new_zeros(1, self.time_stride, *latents.shape[2:])
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
