"""Open-Sora 2.0 (the two released files). Frame 0 is a row of its own, then every 4 frames share one.

Layers count the 19 double-stream blocks, then the 38 single-stream blocks: the study's "layer 20" is single block 20,
here block 39. The checkpoint has no configs, so `--family open_sora` or a preset says what it is. Its text encoders are
needed once, for the prompt: their outputs are cached, and they are gone before clips run.
"""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from spatialprobe.engine.adapter import Inputs
from spatialprobe.engine.checkpoint import Checkpoint, content_hash, empty_module, load_weights, one_line
from spatialprobe.engine.clips.images import resize, signed
from spatialprobe.engine.parts.frame_groups import group_rows, whole_groups
from spatialprobe.engine.parts.open_sora_blocks import OpenSoraTransformer, Sizes, pack
from spatialprobe.engine.parts.prompt_cache import cached, prompt_file
from spatialprobe.engine.parts.text_encoder import T5, encoder_bytes
from spatialprobe.engine.parts.vae import CHANNELS_LAST, set_up_vae
from spatialprobe.engine.pipeline.latents import FromLatents
from spatialprobe.engine.types import Clip, Plan

TRANSFORMER, VAE = "Open_Sora_v2.safetensors", "hunyuan_vae.safetensors"
NUM_STEPS = 1000  # the schedule's length: step 750 is t = .25 before the shift
GROUP, STRIDE, PATCH = 4, 8, 2  # frames per row, pixels per latent, latents per token in height and in width
LATENT_SCALE = 0.476986
SIGMA_MIN = 1e-5  # of the noise that is left without any timestep
ENCODERS = {"text_encoder": T5, "pooled_text_encoder": "CLIPTextModel"}  # options, and their classes of transformers
POOLED_TOKENS = 77  # that CLIP is shown


@dataclass
class Latents:
    """What `encode` gives of a batch: unscaled means, and standard deviations where they are sampled."""

    mean: Tensor  # [B, Z, T, h, w]
    std: Tensor | None
    first: Tensor | None  # [B, Z, 1, h, w]: the first frame, encoded alone
    first_std: Tensor | None


class OpenSora(FromLatents):
    OPTIONS = {
        "size": (480, 848),  # pixels, height and width
        "prompt": "",
        "prompt_tokens": 512,  # padding is attended to
        "first_frame": True,  # given to the model as a condition, as the study did; False: no condition (text-to-video)
        "vae_sample": False,  # the latents are drawn from their distribution, from the clip's noise; False: its mean
        "vae_tiling": True,  # in height and width, as released; without, attention over all latents needs their square
        **CHANNELS_LAST,
        "text_encoder": "google/t5-v1_1-xxl",  # a folder of the checkpoint, else a local folder or Hub id
        "pooled_text_encoder": "openai/clip-vit-large-patch14",  # likewise
    }
    PARITY = {k: v for k, v in OPTIONS.items() if not k.endswith("text_encoder")} | {"vae_sample": True}
    LIBRARIES = ("diffusers", "transformers")
    LATENT_OPTIONS = (*FromLatents.LATENT_OPTIONS, "first_frame", "vae_sample")
    PREPARES_ON_DEVICE = True

    def __init__(self, checkpoint: Checkpoint, options: dict):
        super().__init__(checkpoint, options)
        self.sizes = Sizes.of(checkpoint.shapes(TRANSFORMER), TRANSFORMER)
        self.vae_config = vae_config(checkpoint.shapes(VAE))
        self.latent_channels = self.vae_config["latent_channels"]
        if self.sizes.patch != PATCH**2 * self.latent_channels:
            raise ValueError(f"{TRANSFORMER} takes {self.sizes.patch} numbers per token, {VAE} gives other latents")
        self.num_layers = self.sizes.double + self.sizes.single
        self.num_steps = NUM_STEPS
        self.channels = self.sizes.width
        self.cell = STRIDE * PATCH  # pixels per token, in height and in width

    def check_options(self) -> None:
        if any(s < self.cell or s % self.cell for s in self.options["size"]):
            raise ValueError(f"size must be multiples of {self.cell} pixels, got {self.options['size']}")
        if self.options["prompt_tokens"] < 1:
            raise ValueError(f"prompt_tokens must be at least 1, got {self.options['prompt_tokens']}")
        for name in ENCODERS:
            if not self.options[name]:
                raise ValueError(f"{name} must be a folder of the checkpoint, a local folder or a Hub id, got ''")

    def plan(self, frames: int, query: tuple[int, ...]) -> Plan:
        height, width = self.options["size"]
        rows = group_rows(frames, GROUP)
        grid = (rows[-1] + 1, height // self.cell, width // self.cell)
        return Plan(frames, tuple(range(frames)), (height, width), grid, rows)

    def prepare(self, clip: Clip, plan: Plan) -> Inputs:
        return {"video": whole_groups(resize(clip.frames, plan.size, Image.Resampling.BICUBIC), GROUP)}

    def skeleton(self, depth: int) -> list[nn.Module]:
        from diffusers import AutoencoderKLHunyuanVideo

        transformer = empty_module(lambda: OpenSoraTransformer(self.sizes, depth))
        vae = empty_module(lambda: AutoencoderKLHunyuanVideo(**self.vae_config))
        vae.decoder = vae.post_quant_conv = None  # clips are encoded, never decoded
        return [transformer, vae]

    def load(self, depth: int, device: torch.device, dtype: torch.dtype, cache: Path) -> None:
        self.device, self.dtype = device, dtype
        prompt = self._embed_prompt(cache)
        self.text, self.pooled = (prompt[name].to(device, dtype) for name in self.text_shapes())
        self.transformer, self.vae = self.skeleton(depth)
        load_weights(self.transformer, self.checkpoint, TRANSFORMER, device=device, dtype=dtype)
        load_weights(self.vae, self.checkpoint, VAE, device=device, dtype=dtype)  # both name their parts alike
        self.vae.use_framewise_encoding = False  # the released code encodes all frames at once
        set_up_vae(self.vae, self.options)
        self.blocks = [*self.transformer.double_blocks, *self.transformer.single_blocks]

    # -- the prompt, once --------------------------------------------------------------------------------------------

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of what the transformer is given of the prompt."""
        return {"text": (1, self.options["prompt_tokens"], self.sizes.text), "pooled": (1, self.sizes.pooled)}

    def _embed_prompt(self, cache: Path) -> dict[str, Tensor]:
        """What `text_shapes` says; on the meta device nothing is run or read."""
        if self.device.type == "meta":
            return {name: torch.empty(shape, device="meta") for name, shape in self.text_shapes().items()}
        owners = self._find_encoders()
        prompt = cached(self._prompt_file(cache, self.dtype, owners), lambda: self._run_text_encoders(owners))
        for option, (name, shape) in zip(ENCODERS, self.text_shapes().items(), strict=True):
            if prompt[name].shape[-1] != shape[-1]:
                got = f"{prompt[name].shape[-1]} of {self.options[option]}"
                raise ValueError(f"{option} must give {shape[-1]} channels, as the transformer takes, got {got}")
        return prompt

    def text_encoder_bytes(self, cache: Path, dtype: torch.dtype) -> int:
        owners = self._find_encoders()
        if self._prompt_file(cache, dtype, owners).exists():
            return 0
        return max(encoder_bytes(owner, {folder: ENCODERS[name]}, dtype) for name, (owner, folder) in owners.items())

    def _find_encoders(self) -> dict[str, tuple[Checkpoint, str]]:
        return {name: self._find_encoder(name) for name in ENCODERS}

    def _prompt_file(self, cache: Path, dtype: torch.dtype, owners: dict[str, tuple[Checkpoint, str]]) -> Path:
        identities = [self._identity(*owner) for owner in owners.values()]
        return prompt_file(
            cache, self.checkpoint, self.options["prompt"], self.options["prompt_tokens"], dtype, *identities
        )

    def _find_encoder(self, option: str) -> tuple[Checkpoint, str]:
        """The checkpoint that holds an encoder, and the folder in it."""
        name = self.options[option]
        if self.checkpoint.has(f"{name}/config.json"):
            return self.checkpoint, name
        try:
            return Checkpoint.open(name), ""
        except ValueError as error:
            raise ValueError(
                f"{option} {name!r} is no folder of {self.checkpoint.root} and cannot be had otherwise ({error}); "
                f"name a local folder or a Hub id with --option {option}=..."
            ) from None

    def _identity(self, owner: Checkpoint, folder: str) -> str:
        if owner.repo:
            return f"{owner.identity}/{folder}"
        return content_hash(owner.root / folder)

    @torch.inference_mode()
    def _run_text_encoders(self, owners: dict[str, tuple[Checkpoint, str]]) -> dict[str, Tensor]:
        tokens = (self.options["prompt_tokens"], POOLED_TOKENS)
        # One after the other: the first is gone when the second is loaded.
        text, pooled = (self._encode_text(name, *owners[name], n) for name, n in zip(ENCODERS, tokens, strict=True))
        named = {"text": text.last_hidden_state, "pooled": pooled.pooler_output}
        return {name: x.cpu().contiguous() for name, x in named.items()}

    def _encode_text(self, name: str, owner: Checkpoint, folder: str, tokens: int) -> Any:
        import transformers

        cls, path = getattr(transformers, ENCODERS[name]), owner.folder(folder)
        with one_line(path):
            encoder = cls.from_pretrained(path, dtype=self.dtype, use_safetensors=True).to(self.device)
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        ids = tokenizer(
            self.options["prompt"], padding="max_length", max_length=tokens, truncation=True, return_tensors="pt"
        )["input_ids"]
        return encoder(input_ids=ids.to(self.device), attention_mask=None)  # padding is seen, as in training

    # -- clips -------------------------------------------------------------------------------------------------------

    def noise_shape(self, plan: Plan) -> tuple[int, ...]:
        """Of the noise, then, one after the other in time, of the draws of the latents and of the first frame's."""
        frames, height, width = plan.grid
        draws = (frames + self.options["first_frame"]) if self.options["vae_sample"] else 0
        return (self.latent_channels, frames + draws, PATCH * height, PATCH * width)

    def latents(self, inputs: Inputs, plan: Plan) -> dict[str, Tensor]:  # the fields of `Latents` that are there
        # Clip by clip: one clip fills a GPU, and its latents then cannot depend on its neighbours in the batch.
        encoded = [self._encode_one(signed(video, self.dtype)) for video in inputs["video"]]
        parts = zip((f.name for f in fields(Latents)), zip(*encoded, strict=True), strict=True)
        return {name: torch.cat(x) for name, x in parts if x[0] is not None}

    def state(self, latents: dict[str, Tensor], plan: Plan) -> Latents:
        return Latents(**{f.name: latents.get(f.name) for f in fields(Latents)})

    def _encode_one(self, video: Tensor) -> tuple[Tensor | None, ...]:  # [1, 3, F, H, W]
        parts: list[Tensor | None] = []
        for frames in (video, video[:, :, :1] if self.options["first_frame"] else None):
            if frames is None:
                parts += [None, None]
                continue
            found = self.vae.encode(frames).latent_dist
            parts += [found.mean, found.std if self.options["vae_sample"] else None]
        return tuple(parts)

    def forward(self, state: Latents, step: int, noise: Tensor) -> None:
        batch, channels, frames, height, width = state.mean.shape
        grid = (frames, height // PATCH, width // PATCH)
        noise, draws, first_draw = noise.to(self.dtype).tensor_split((frames, 2 * frames), dim=2)
        latents = drawn(state.mean, state.std, draws)
        condition = torch.zeros_like(latents[:, :1]).repeat(1, 1 + channels, 1, 1, 1)  # mask, then latents
        if state.first is not None:
            condition[:, :1, :1] = 1
            condition[:, 1:, :1] = drawn(state.first, state.first_std, first_draw)
        time = self._time(step, grid)
        noisy = (1 - time) * latents + (time + SIGMA_MIN * (1 - time)) * noise
        self.transformer(
            pack(noisy),
            pack(condition),
            self.text.expand(batch, -1, -1),
            self.pooled.expand(batch, -1),
            torch.full((batch,), time, device=noisy.device),
            grid,
        )

    def _time(self, step: int, grid: tuple[int, int, int]) -> float:
        """The step's time, 1 - step / 1000, shifted towards noise by the numbers of tokens and rows, as released.

        Rounded to the compute dtype, which is what the released code works with.
        """
        time, tokens = 1 - step / NUM_STEPS, grid[1] * grid[2]
        alpha = (1 + 2 * (tokens - 256) / (4096 - 256)) * math.sqrt(grid[0])  # 1 at 256 tokens a row, 3 at 4096
        return float(torch.tensor(alpha * time / (1 + (alpha - 1) * time)).to(self.dtype))

    def describe_clip_step(self, step: int, plan: Plan) -> dict[str, float]:
        time = self._time(step, plan.grid)
        return {"timestep": round(1000 * time, 4), "sigma": round(time + SIGMA_MIN * (1 - time), 6)}

    def grid(self, tokens: Tensor, state: Latents, plan: Plan) -> Tensor:
        # Double blocks put out the video's tokens first, single blocks one sequence that begins with the text.
        return tokens[:, -math.prod(plan.grid) :].unflatten(1, plan.grid)


def drawn(mean: Tensor, std: Tensor | None, draw: Tensor) -> Tensor:
    """Latents as the transformer takes them."""
    return LATENT_SCALE * (mean if std is None else mean + std * draw)


def vae_config(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """What AutoencoderKLHunyuanVideo must be told to have these tensors. Strides and groups are the published ones."""
    kernel = "encoder.down_blocks.{}.resnets.{}.conv1.conv.weight"
    if "quant_conv.weight" not in shapes or kernel.format(0, 0) not in shapes:
        raise ValueError(f"{VAE} has no tensor {kernel.format(0, 0)} or quant_conv.weight: is it HunyuanVideo's VAE?")
    widths = [shapes[kernel.format(i, 0)][0] for i in range(4) if kernel.format(i, 0) in shapes]
    layers = sum(kernel.format(0, j) in shapes for j in range(len(shapes)))
    return {
        "latent_channels": shapes["quant_conv.weight"][0] // 2,
        "block_out_channels": widths,
        "layers_per_block": layers,
    }
