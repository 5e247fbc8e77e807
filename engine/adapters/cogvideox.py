"""CogVideoX text-to-video and image-to-video, 1.0 and 1.5 (diffusers).

A window is two halves of every second frame (see `interleave`). Frame 0 of a half is a latent frame of its own, then
every 4 share one; a row is a latent frame, in 1.5 two of them. Features are the video's tokens, without the text's.

The published study ran 2B and 5B: same frames, sizes, schedule, prompt, latents (the posterior's mean) and untiled VAE,
in float16 throughout; here all runs in the job's compute dtype. Its noise had no seed. For image-to-video it drew the
condition, frame 0, from the VAE's posterior, again without a seed; here it is the posterior's mean.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from spatialprobe.engine.adapter import Inputs
from spatialprobe.engine.checkpoint import Checkpoint
from spatialprobe.engine.parts.cogvideox import CogVideoXParts
from spatialprobe.engine.pipeline.latents import FromLatents, Latents
from spatialprobe.engine.types import Plan


@dataclass
class Encoded:
    """B windows, ready for any noise step."""

    halves: dict[int, Tensor]  # those that run: latents [B, latent frames, Z, h, w]
    condition: Tensor | None  # of image-to-video, the same shape


class CogVideoX(CogVideoXParts, FromLatents):
    OPTIONS = CogVideoXParts.OPTIONS
    PARITY = OPTIONS
    LATENT_OPTIONS = (*FromLatents.LATENT_OPTIONS, "half_frames")

    def __init__(self, checkpoint: Checkpoint, options: dict):
        super().__init__(checkpoint, options, checkpoint)
        channels, latent = self.config["in_channels"], self.latent_channels
        if channels not in (latent, 2 * latent) or self.config["out_channels"] != latent:
            raise ValueError(
                f"{checkpoint.root} must have {latent} input channels (text-to-video) or {2 * latent} "
                f"(image-to-video), got {channels}: is it a model made from CogVideoX, like Aether?"
            )
        self.from_image = channels == 2 * latent

    def check_options(self) -> None:
        super().check_options()
        learned, frames = self.config.get("use_learned_positional_embeddings"), self.config["sample_frames"]
        if learned and self.options["half_frames"] != frames:  # the library would put computed ones in their place
            raise ValueError(
                f"half_frames must be {frames}, for which this model's positions were learned, "
                f"got {self.options['half_frames']}"
            )

    def latent_facts(self) -> dict[str, int | bool]:
        return {"from_image": self.from_image, "repeats": self.repeats}

    def latents(self, inputs: Inputs, plan: Plan) -> Latents:  # "half0", "half1": of those that run; "condition"
        # Clip by clip: one clip fills a GPU, and its latents then cannot depend on its neighbours in the batch.
        videos = inputs["video"]  # uint8 [B, halves that run, F, H, W, 3]
        made = {
            f"half{half}": torch.cat([self.repeat_first(self.video_latents(video)) for video in videos[:, i]])
            for i, half in enumerate(self.halves(plan))
        }
        if self.from_image:
            made["condition"] = torch.cat([self.image_condition(image) for image in videos[:, 0, :1]])
        return made

    def state(self, latents: Latents, plan: Plan) -> Encoded:
        return Encoded({half: latents[f"half{half}"] for half in self.halves(plan)}, latents.get("condition"))

    def forward(self, state: Encoded, step: int, noise: Tensor) -> None:  # noise [B, 2, latent frames, Z, h, w]
        for half, latents in state.halves.items():
            hidden = self.noised(latents, step, noise[:, half])
            if state.condition is not None:
                hidden = torch.cat([hidden, state.condition], 2)
            self.run(self.transformer, hidden, self.timesteps[step])
