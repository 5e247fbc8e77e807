"""AetherV1 (diffusers): CogVideoX-5B that was taught depth and cameras. A window is two halves of every second frame.

Its repository holds the transformer alone; tokenizer, text encoder, VAE and scheduler are those of CogVideoX-5b-I2V.
The transformer takes noisy latents of the video (16 channels), of its disparity (16) and a ray map (24), and as
condition latents of an image or a video (16) and a ray map (24; zeros here).

The study first lets the whole model reconstruct disparity and rays of the clip, in 4 steps under the video as
condition, then adds noise to all three and reads the features under the first frame as condition: geometry
"reconstruct" and condition "image". That pass runs every block, so every block is loaded. With geometry "zero" the
two are noise around zero, which the model was not trained on, and blocks above the last wanted one are left out.

The same as in the study: frames, size, schedule, solver and its 4 timesteps, rotary positions at 8 frames per second,
latents (the posterior's mean), prompt, bfloat16 and tiled VAE under parity. Not the same: its noise had no seed, and it
drew the conditions from the VAE's posterior, where this takes the posterior's mean. The text encoder runs in the job's
compute dtype, in the study in float32 with the result rounded. Checked against its public code, not its weights.
"""

import copy
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from spatialprobe.engine.adapter import Inputs
from spatialprobe.engine.checkpoint import Checkpoint
from spatialprobe.engine.parts.cogvideox import CogVideoXParts
from spatialprobe.engine.types import Clip, Plan

BASE = "THUDM/CogVideoX-5b-I2V"
TRAINED_FPS = 12  # frames per second at which positions in time count latent frames
FPS = (8, 10, 12, 15, 24)  # rates that the model was trained at
SOLVER_STEPS = 4


@dataclass
class Encoded:
    """B windows, ready for any noise step."""

    halves: dict[int, Tensor]  # those that run: video, disparity and rays [B, latent frames, 56, h, w]
    conditions: dict[int, Tensor]  # of the same clips, [B, latent frames, 40, h, w]


class Aether(CogVideoXParts):
    OPTIONS = CogVideoXParts.OPTIONS | {
        "half_frames": 41,
        "base": "",  # folder or Hub id of CogVideoX-5b-I2V; "": the checkpoint's own folder, or the Hub's
        "geometry": "reconstruct",  # or "zero"
        "geometry_seed": 0,  # of the reconstruction's noise, drawn per (seed, clip id, half)
        "condition": "image",  # the first frame; or "video", all of them
        "fps": 8,
    }
    PARITY = {k: v for k, v in OPTIONS.items() if k not in ("base", "geometry_seed")} | {"vae_tiling": True}

    def __init__(self, checkpoint: Checkpoint, options: dict):
        base = _base(checkpoint, options["base"])
        super().__init__(checkpoint, dict(options), base)  # its own keep the name, by which it can be made again
        if base is not checkpoint:
            options["base"] = base.identity  # what the spec holds: a name alone would not say which weights
        into, out = self.config["in_channels"], self.config["out_channels"]
        if out <= 2 * self.latent_channels or into != 2 * out - self.latent_channels:
            raise ValueError(
                f"{checkpoint.root} must take the channels of an Aether, 96 in and 56 out, got {into} and {out}"
            )

    def check_options(self) -> None:
        super().check_options()
        for name, choices in (("geometry", ("reconstruct", "zero")), ("condition", ("image", "video")), ("fps", FPS)):
            if self.options[name] not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {self.options[name]!r}")

    def prepare(self, clip: Clip, plan: Plan) -> Inputs:
        inputs = super().prepare(clip, plan)
        if self.options["geometry"] == "reconstruct":
            seeds = [_seed(self.options["geometry_seed"], clip.id, half) for half in self.halves(plan)]
            inputs["geometry_seed"] = torch.tensor(seeds)
        return inputs

    def skeleton(self, depth: int) -> list[nn.Module]:
        return super().skeleton(self.num_layers if self.options["geometry"] == "reconstruct" else depth)

    def load(self, depth: int, device: torch.device, dtype: torch.dtype, cache: Path) -> None:
        super().load(depth, device, dtype, cache)
        self.whole = self.transformer
        self.transformer = _first_blocks(self.whole, depth)
        self.blocks = self.transformer.transformer_blocks

    def _load_schedule(self) -> None:
        from diffusers import CogVideoXDPMScheduler

        super()._load_schedule()
        self.solver = CogVideoXDPMScheduler.from_config(self.base.json("scheduler/scheduler_config.json"))
        self.solver.set_timesteps(SOLVER_STEPS)
        self.solver_timesteps = self.solver.timesteps.to(self.device)

    def _rotary(self, pace: float = 1.0) -> tuple[Tensor, Tensor] | None:
        return super()._rotary(TRAINED_FPS / self.options["fps"])

    def encode(self, inputs: Inputs, plan: Plan) -> Encoded:
        halves = self.halves(plan)
        videos = inputs["video"]  # uint8 [B, halves that run, F, H, W, 3]
        seeds = inputs["geometry_seed"].tolist() if "geometry_seed" in inputs else [[None] * len(halves)] * len(videos)
        latents, conditions = ({half: [] for half in halves} for _ in range(2))
        # Clip by clip: one clip fills a GPU, and its latents then cannot depend on its neighbours in the batch.
        for clip, own in zip(videos, seeds, strict=True):
            image = self.image_condition(clip[0, :1]) if self.options["condition"] == "image" else None
            for half, frames, seed in zip(halves, clip, own, strict=True):
                video = self.video_latents(frames)
                latents[half].append(torch.cat([video, self._geometry(video, seed)], 2))
                conditions[half].append(self._with_rays(video if image is None else image))
        return Encoded(*({half: torch.cat(x) for half, x in part.items()} for part in (latents, conditions)))

    def _with_rays(self, latents: Tensor) -> Tensor:
        """A condition: latents and no ray map."""
        rays = self.config["in_channels"] - self.config["out_channels"] - self.latent_channels
        return torch.cat([latents, latents.new_zeros(1, *self.latent_shape(rays))], 2)

    def _geometry(self, video: Tensor, seed: int | None) -> Tensor:  # [1, latent frames, 16, h, w] -> .. 40 ..
        """Disparity and rays: what the whole model makes of noise under the video as condition, in 4 steps."""
        channels = self.config["out_channels"]
        if seed is None:
            return video.new_zeros(1, *self.latent_shape(channels - self.latent_channels))
        from diffusers.utils.torch_utils import randn_tensor

        generator = torch.Generator().manual_seed(seed)  # on the CPU: the same noise on every machine
        shape = (1, *self.latent_shape(channels))
        x = randn_tensor(shape, generator=generator, device=video.device, dtype=video.dtype)
        condition, clean, last = self._with_rays(video), None, None
        for i, timestep in enumerate(self.solver.timesteps.tolist()):
            velocity = self.run(self.whole, torch.cat([x, condition], 2), self.solver_timesteps[i]).float()
            x, clean = self.solver.step(velocity, clean, timestep, last, x, generator=generator, return_dict=False)
            x, last = x.to(video.dtype), timestep
        return x[:, :, self.latent_channels :]

    def forward(self, state: Encoded, step: int, noise: Tensor) -> None:  # noise [B, 2, latent frames, 56, h, w]
        for half, latents in state.halves.items():
            hidden = torch.cat([self.noised(latents, step, noise[:, half]), state.conditions[half]], 2)
            self.run(self.transformer, hidden, self.timesteps[step])


def _base(checkpoint: Checkpoint, name: str) -> Checkpoint:
    if name:
        return Checkpoint.open(name)
    return checkpoint if checkpoint.has("vae/config.json") else Checkpoint.open(BASE)


def _seed(seed: int, clip_id: str, half: int) -> int:
    key = hashlib.sha256(f"geometry|{seed}|{clip_id}|{half}".encode()).digest()
    return int.from_bytes(key[:8], "little") >> 1


def _first_blocks(model: nn.Module, depth: int) -> nn.Module:
    """The same model, with the same weights, that ends after `depth` blocks."""
    short = copy.copy(model)
    short._modules = dict(model._modules)
    short.transformer_blocks = nn.ModuleList(list(model.transformer_blocks)[:depth])
    return short
