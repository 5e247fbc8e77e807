"""Feature extraction the straightforward way, for benchmarks to compare with: one clip at a time, nothing overlapped.

It does what the published extraction code is described to do: every block runs, each noise step decodes, resizes and
encodes the clip again, the text encoder stays in memory, and each layer's full-size features are saved before the
next step begins. It uses the model libraries alone and nothing of the engine.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

TIME_STRIDE = 4  # frames per latent frame, after a first one that stands alone
PIXEL_STRIDE = 16  # pixels per token: 8 of the VAE, 2 of the transformer's patches


class PlainLoop:
    def __init__(
        self,
        checkpoint: Path,  # a Wan 2.1 text-to-video pipeline in diffusers' layout
        *,
        size: tuple[int, int],  # pixels of the model's input, height and width
        layers: Sequence[int],
        steps: Sequence[int],  # indices into a schedule of 1000
        noise: Callable[[str, int], Tensor],  # (clip id, step) -> [1, Z, T, h, w]
    ):
        pipeline = WanPipeline.from_pretrained(checkpoint)
        for module in (pipeline.text_encoder, pipeline.vae, pipeline.transformer):
            _copy_weights(module)
        self.pipeline, self.vae, self.transformer = pipeline, pipeline.vae, pipeline.transformer
        self.scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config, flow_shift=3.0)
        self.scheduler.set_timesteps(1000)
        self.prompt, _ = pipeline.encode_prompt("", do_classifier_free_guidance=False, max_sequence_length=226)
        shape = (1, -1, 1, 1, 1)
        self.latent_mean = torch.tensor(self.vae.config.latents_mean).view(shape)
        self.latent_inverse_std = 1.0 / torch.tensor(self.vae.config.latents_std).view(shape)
        self.size, self.steps, self.noise = size, steps, noise
        self.outputs: dict[int, Tensor] = {}
        for layer in layers:
            self.transformer.blocks[layer].register_forward_hook(self._keep(layer))

    def _keep(self, layer: int):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            self.outputs[layer] = output

        return hook

    @torch.inference_mode()
    def run(self, clips: Sequence[Path], out: Path) -> None:
        """Image folders in, `<out>/<clip>/feature_t<step>_layer<layer>.sft` out: key `feat`, float16 [T, H, W, C]."""
        for clip in clips:
            (out / clip.name).mkdir(parents=True)
            for step in self.steps:
                video = self.read(clip)
                latents = self.encode(video)
                self.forward(latents, step, self.noise(clip.name, step))
                for layer, tokens in self.outputs.items():
                    self.save(tokens, len(video), out / clip.name / f"feature_t{step}_layer{layer}.sft")

    def read(self, clip: Path) -> Tensor:  # uint8 [F, H, W, 3]
        height, width = self.size
        frames = []
        for path in sorted(clip.iterdir()):
            with Image.open(path) as image:
                frames.append(np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)))
        return torch.from_numpy(np.stack(frames))

    def encode(self, video: Tensor) -> Tensor:  # uint8 [F, H, W, 3] -> [1, Z, T, h, w]
        pixels = (2.0 * (video.permute(3, 0, 1, 2)[None].float() / 255.0) - 1.0).contiguous()
        return (self.vae.encode(pixels).latent_dist.mean - self.latent_mean) * self.latent_inverse_std

    def forward(self, latents: Tensor, step: int, noise: Tensor) -> None:
        timestep = self.scheduler.timesteps[step][None]
        noisy = self.scheduler.add_noise(latents, noise, timestep)
        self.transformer(noisy, timestep, self.prompt, return_dict=False)

    def save(self, tokens: Tensor, frames: int, path: Path) -> None:  # tokens [1, N, C]
        height, width = self.size
        grid = ((frames - 1) // TIME_STRIDE + 1, height // PIXEL_STRIDE, width // PIXEL_STRIDE)
        save_file({"feat": tokens[0].unflatten(0, grid).half().contiguous()}, path)


def _copy_weights(module: nn.Module) -> None:
    """Moves weights out of the mapped file: CPU kernels round differently on memory that is not 64-byte aligned."""
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
