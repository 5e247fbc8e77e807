"""What CogVideoX and the models made from it share: the VAE, the prompt, the schedule, and windows of two halves.

Knows nothing of what a model is given beside the noisy latents. The frames of a window are dealt out to two halves (see
`interleave`); a half that no wanted frame belongs to is neither decoded for, encoded nor run.
"""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from spatialprobe.engine.adapter import Adapter, Inputs
from spatialprobe.engine.checkpoint import Checkpoint, empty_module, load_weights
from spatialprobe.engine.clips.images import resize, signed
from spatialprobe.engine.configs import check_fields
from spatialprobe.engine.parts.interleave import HALVES, half_frames, halves_for, interleaved_rows, longest
from spatialprobe.engine.parts.prompt_cache import cached, prompt_file
from spatialprobe.engine.parts.text_encoder import T5, encoder_bytes, load_text_encoder
from spatialprobe.engine.parts.vae import CHANNELS_LAST, set_up_vae
from spatialprobe.engine.types import Clip, Plan

NUM_STEPS = 1000  # steps index the scheduler's schedule when it is asked for this many


class CogVideoXParts(Adapter):
    """The part of an adapter that does not depend on how a model is conditioned."""

    OPTIONS = {
        "size": (480, 720),  # pixels, height and width
        "half_frames": 49,  # of each half; a shorter window is completed with its last frame
        "prompt": "",
        "prompt_tokens": 226,  # padding is attended to
        "vae_tiling": False,  # overlapping tiles change values
        **CHANNELS_LAST,
    }
    LIBRARIES = ("diffusers", "transformers")
    PREPARES_ON_DEVICE = True

    def __init__(self, checkpoint: Checkpoint, options: dict, base: Checkpoint):
        """`base` holds the VAE, the text encoder and the scheduler's config."""
        super().__init__(checkpoint, options)
        self.base = base
        self.config, self.vae_config = checkpoint.json("transformer/config.json"), base.json("vae/config.json")
        classes = {"CogVideoXTransformer3DModel": self.config, "AutoencoderKLCogVideoX": self.vae_config}
        for wanted, config in classes.items():
            if config.get("_class_name") != wanted:
                raise ValueError(f"{checkpoint.root} must have a {wanted}, got {config.get('_class_name')}")
        self.num_layers, self.num_steps = self.config["num_layers"], NUM_STEPS
        self.channels = self.config["num_attention_heads"] * self.config["attention_head_dim"]
        self.latent_channels = self.vae_config["latent_channels"]
        self.time_stride = self.vae_config["temporal_compression_ratio"]
        self.vae_stride = 2 ** (len(self.vae_config["block_out_channels"]) - 1)
        self.cell = self.vae_stride * self.config["patch_size"]  # pixels per token, in height and in width
        frames = (options["half_frames"] - 1) // self.time_stride + 1  # latent frames of a half
        time_patch = self.config.get("patch_size_t") or 1  # 2 in CogVideoX 1.5
        self.repeats = -frames % time_patch  # copies of the first latent frame that come before it
        self.latent_frames = frames + self.repeats
        self.time_patch, self.half_rows = time_patch, self.latent_frames // time_patch

    def check_options(self) -> None:
        config, size, length = self.config, self.options["size"], self.options["half_frames"]
        if any(s < self.cell or s % self.cell for s in size):
            raise ValueError(f"size must be multiples of {self.cell} pixels, got {size}")
        if length < 5 or length % self.time_stride != 1:
            raise ValueError(f"half_frames must be {self.time_stride}k+1 and at least 5, got {length}")
        if self.options["prompt_tokens"] < 1:
            raise ValueError(f"prompt_tokens must be at least 1, got {self.options['prompt_tokens']}")
        tables = (config["sample_height"] * self.vae_stride, config["sample_width"] * self.vae_stride)
        learned, rotary = (config.get(f"use_{kind}_positional_embeddings") for kind in ("learned", "rotary"))
        if learned and size != tables:
            raise ValueError(f"size must be {tables}, for which this model's positions were learned, got {size}")
        if self.time_patch > 1 and any(s > most for s, most in zip(size, tables, strict=True)):
            raise ValueError(f"size must be at most {tables}, where this model's positions end, got {size}")
        if (learned or not rotary) and self.options["prompt_tokens"] != config["max_text_seq_length"]:
            wanted = f"{config['max_text_seq_length']}, for which this model has positions"
            raise ValueError(f"prompt_tokens must be {wanted}, got {self.options['prompt_tokens']}")

    # -- geometry ---------------------------------------------------------------------------------------------------

    def plan(self, frames: int, query: tuple[int, ...]) -> Plan:
        (height, width), length = self.options["size"], self.options["half_frames"]
        if frames > longest(length):
            raise ValueError(
                f"a window may have at most {longest(length)} frames for two halves of {length} (half_frames), "
                f"got {frames}"
            )
        halves = halves_for(query) if len(query) < frames else tuple(range(HALVES))
        shown = sorted({f for half in halves for f in half_frames(half, length, frames)})
        rows = interleaved_rows(frames, halves, self.half_rows, self._row_of)
        grid = (HALVES * self.half_rows, height // self.cell, width // self.cell)
        return Plan(frames, tuple(shown), (height, width), grid, rows, passes=len(halves))

    def _row_of(self, place: int) -> int:
        """Row of a half that sees its frame at this place: frame 0 is a latent frame, then every 4."""
        latent = -(-place // self.time_stride)
        return (self.repeats + latent) // self.time_patch

    def halves(self, plan: Plan) -> tuple[int, ...]:
        """Which of the two halves run."""
        if plan.passes == HALVES:
            return tuple(range(HALVES))
        return (max(plan.rows) // self.half_rows,)  # frames of the other have no row

    def latent_shape(self, channels: int) -> tuple[int, int, int, int]:  # of one half
        height, width = (s // self.vae_stride for s in self.options["size"])
        return (self.latent_frames, channels, height, width)

    def noise_shape(self, plan: Plan) -> tuple[int, ...]:
        # For both halves, whichever runs: a half's noise must not depend on the other.
        return (HALVES, *self.latent_shape(self.config["out_channels"]))

    def prepare(self, clip: Clip, plan: Plan) -> Inputs:
        pixels = resize(clip.frames, plan.size, Image.Resampling.LANCZOS)  # of the shown frames, uint8 [S, H, W, 3]
        place = {frame: i for i, frame in enumerate(plan.shown)}
        halves = [half_frames(half, self.options["half_frames"], plan.frames) for half in self.halves(plan)]
        return {"video": pixels[torch.tensor([[place[frame] for frame in frames] for frames in halves])]}

    def grid(self, tokens: Tensor, state: object, plan: Plan) -> Tensor:
        x = tokens.unflatten(1, (plan.passes, self.half_rows, *plan.grid[1:]))
        if plan.passes < HALVES:  # rows of a half that did not run are never kept: NaN, should somebody keep them
            whole = x.new_full((len(x), HALVES, *x.shape[2:]), torch.nan)
            whole[:, self.halves(plan)[0]] = x[:, 0]
            x = whole
        return x.flatten(1, 2)

    # -- models -----------------------------------------------------------------------------------------------------

    def skeleton(self, depth: int) -> list[nn.Module]:
        from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

        check_fields(self.config, CogVideoXTransformer3DModel, "transformer/config.json")
        check_fields(self.vae_config, AutoencoderKLCogVideoX, "vae/config.json", harmless=("sample_size",))
        config = {**self.config, "num_layers": depth}
        transformer = empty_module(lambda: CogVideoXTransformer3DModel.from_config(config))
        vae = empty_module(lambda: AutoencoderKLCogVideoX.from_config(self.vae_config))
        vae.decoder = vae.post_quant_conv = None  # clips are encoded, never decoded
        return [transformer, vae]

    def load(self, depth: int, device: torch.device, dtype: torch.dtype, cache: Path) -> None:
        self.device, self.dtype = device, dtype
        self._load_schedule()
        self.prompt = self._embed_prompt(cache).to(device, dtype)  # [1, prompt_tokens, D]
        transformer, vae = self.skeleton(depth)
        load_weights(transformer, self.checkpoint, "transformer", device=device, dtype=dtype)
        load_weights(vae, self.base, "vae", device=device, dtype=dtype)
        set_up_vae(vae, self.options)
        self.transformer, self.vae, self.blocks = transformer, vae, transformer.transformer_blocks
        self.rotary = self._rotary()
        if self.rotary is not None:
            self.rotary = tuple(x.to(device) for x in self.rotary)

    def _load_schedule(self) -> None:
        from diffusers import CogVideoXDDIMScheduler

        config = self.base.json("scheduler/scheduler_config.json")
        check_fields(config, CogVideoXDDIMScheduler, "scheduler/scheduler_config.json")
        scheduler = CogVideoXDDIMScheduler.from_config(config)
        scheduler.set_timesteps(NUM_STEPS)
        # Squares of how much of the latents is left, rounded as the scheduler's add_noise rounds them.
        rounded = scheduler.alphas_cumprod.to(self.dtype)[scheduler.timesteps]
        self.timesteps = scheduler.timesteps.to(self.device)
        self.signals, self.sigmas = ((x**0.5).to(self.device) for x in (rounded, 1 - rounded))
        exact = scheduler.alphas_cumprod[scheduler.timesteps]
        self.schedule = [  # noisy latents are signal * latents + sigma * noise
            {"timestep": int(timestep), "signal": round(float(a) ** 0.5, 6), "sigma": round(float(1 - a) ** 0.5, 6)}
            for timestep, a in zip(scheduler.timesteps, exact, strict=True)
        ]

    def describe_step(self, step: int) -> dict[str, float]:
        return self.schedule[step]

    def _rotary(self, pace: float = 1.0) -> tuple[Tensor, Tensor] | None:  # [half_rows * H * W, head_dim] cos, sin
        """Rotary tables, if the model has rotary positions. `pace`: how far apart in time latent frames are."""
        from diffusers.models.embeddings import get_1d_rotary_pos_embed
        from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

        if not self.config.get("use_rotary_positional_embeddings"):
            return None
        grid = tuple(s // self.cell for s in self.options["size"])
        if self.time_patch > 1:
            along = [torch.arange(n, dtype=torch.float32) for n in grid]
        else:  # positions are those of the size that the model was trained at, stretched and cropped
            base = [self.config[f"sample_{side}"] // self.config["patch_size"] for side in ("width", "height")]
            starts, stops = get_resize_crop_region_for_grid(grid, *base)
            along = [
                torch.linspace(a, b * (n - 1) / n, n, dtype=torch.float32)
                for a, b, n in zip(starts, stops, grid, strict=True)
            ]
        dim = self.config["attention_head_dim"]
        positions = [torch.arange(self.half_rows, dtype=torch.float32) * pace, *along]  # of time, rows, columns
        tables = [
            get_1d_rotary_pos_embed(part, at, use_real=True)
            for part, at in zip((dim // 4, dim // 8 * 3, dim // 8 * 3), positions, strict=True)
        ]
        time, rows, columns = torch.meshgrid(*(torch.arange(len(at)) for at in positions), indexing="ij")
        places = (time.flatten(), rows.flatten(), columns.flatten())
        cos, sin = (
            torch.cat([x[place] for x, place in zip(side, places, strict=True)], 1)
            for side in zip(*tables, strict=True)
        )
        return cos, sin

    def _prompt_file(self, cache: Path, dtype: torch.dtype) -> Path:
        return prompt_file(cache, self.base, self.options["prompt"], self.options["prompt_tokens"], dtype)

    def _embed_prompt(self, cache: Path) -> Tensor:
        if self.device.type == "meta":
            return torch.empty(1, self.options["prompt_tokens"], self.config["text_embed_dim"], device="meta")
        return cached(self._prompt_file(cache, self.dtype), self._run_text_encoder)["prompt"]

    def text_encoder_bytes(self, cache: Path, dtype: torch.dtype) -> int:
        if self._prompt_file(cache, dtype).exists():
            return 0
        return encoder_bytes(self.base, {"text_encoder": T5}, dtype)

    @torch.inference_mode()
    def _run_text_encoder(self) -> dict[str, Tensor]:
        encoder, tokenizer = load_text_encoder(self.base, self.device, self.dtype)
        length = self.options["prompt_tokens"]
        ids = tokenizer(self.options["prompt"], padding="max_length", max_length=length, return_tensors="pt").input_ids
        if ids.shape[1] > length:
            raise ValueError(f"the prompt has {ids.shape[1]} tokens and prompt_tokens is {length}")
        embedding = encoder(ids.to(self.device))[0]  # no mask: the model attends to the padding
        return {"prompt": embedding.cpu().contiguous()}

    # -- a clip's way through ---------------------------------------------------------------------------------------

    def video_latents(self, video: Tensor) -> Tensor:  # uint8 [F, H, W, 3] -> [1, latent frames, Z, h, w]
        return self.vae_config["scaling_factor"] * self._encoded(video)

    def repeat_first(self, latents: Tensor) -> Tensor:
        """CogVideoX 1.5 takes latent frames in twos, and has the first of an odd number twice."""
        return torch.cat([latents[:, : self.repeats], latents], 1)

    def image_condition(self, image: Tensor) -> Tensor:  # uint8 [1, H, W, 3] -> [1, latent frames, Z, h, w]
        """Latents of one frame, followed by zeros."""
        scale = self.vae_config["scaling_factor"]
        # Some models were trained on images whose latents were divided by the factor instead.
        scale = 1 / scale if self.vae_config.get("invert_scale_latents") else scale
        latent = scale * self._encoded(image)
        return torch.cat([latent, latent.new_zeros(1, self.latent_frames - 1, *latent.shape[2:])], 1)

    def _encoded(self, video: Tensor) -> Tensor:
        return self.vae.encode(signed(video, self.dtype)).latent_dist.mean.permute(0, 2, 1, 3, 4)

    def noised(self, latents: Tensor, step: int, noise: Tensor) -> Tensor:
        return self.signals[step] * latents + self.sigmas[step] * noise.to(latents.dtype)

    def run(self, model: nn.Module, hidden: Tensor, timestep: Tensor) -> Tensor:  # [B, latent frames, channels, h, w]
        """One pass of the transformer over one half of each of B windows."""
        return model(
            hidden_states=hidden,
            encoder_hidden_states=self.prompt.expand(len(hidden), -1, -1),
            timestep=timestep.expand(len(hidden)),
            ofs=hidden.new_full((1,), 2.0) if self.config.get("ofs_embed_dim") else None,  # as its pipeline has it
            image_rotary_emb=self.rotary,
            return_dict=False,
        )[0]
