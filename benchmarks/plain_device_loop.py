"""Feature extraction on a device the straightforward way, for `bench_device` to compare with: one clip after the other.

It works as the published extraction code is described to work: every block runs, every noise step decodes, resizes and
encodes the clip again with the VAE in tiles, a text encoder's bytes lie on the device, and full-size features are saved
in line, in float16, before the next step begins. It uses the model libraries alone and nothing of the engine.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

Noise = Callable[[str, int], Tensor]  # (clip id, step) -> standard normal noise of one clip, on the CPU


class PlainDeviceLoop:
    """What the models share. A subclass has `forward`, which runs one clip at one step up to the last block."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        *,
        layer: int,
        steps: Sequence[int | None],  # indices into a schedule of 1000; (None,) for models without noise
        device: torch.device,
        resident: int,  # bytes of a text encoder that stays on the device
    ):
        self.layer, self.steps, self.device = layer, steps, device
        self.text_encoder = torch.empty(resident, dtype=torch.uint8, device=device)
        self.outputs: list[Tensor] = []
        blocks[layer].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        self.outputs.append(output[0] if isinstance(output, tuple) else output)

    @torch.inference_mode()
    def run(self, clips: Sequence[Path], out: Path) -> None:
        """Image folders in, `<out>/<clip>/feature_t<step>.sft` out: key `feat`, float16."""
        for clip in clips:
            (out / clip.name).mkdir(parents=True)
            for step in self.steps:
                self.outputs.clear()
                feat = self.features(clip, step)
                save_file({"feat": feat.half().cpu().contiguous()}, out / clip.name / f"feature_t{step}.sft")

    def features(self, clip: Path, step: int | None) -> Tensor:
        raise NotImplementedError


def read(clip: Path, size: tuple[int, int], frames: Sequence[int], resample: Image.Resampling) -> list[Image.Image]:
    """These frames of a folder of images, one after the other."""
    paths, images = sorted(clip.iterdir()), []
    for path in (paths[frame] for frame in frames):
        with Image.open(path) as image:
            images.append(image.convert("RGB").resize((size[1], size[0]), resample))
    return images


def pixels_of(images: Sequence[Image.Image], device: torch.device, dtype: torch.dtype) -> Tensor:  # [1, 3, F, H, W]
    video = torch.from_numpy(np.stack([np.asarray(image) for image in images])).to(device)
    return (2.0 * (video.permute(3, 0, 1, 2)[None].float() / 255.0) - 1.0).to(dtype).contiguous()


class PlainWan(PlainDeviceLoop):
    """Wan 2.1 text-to-video. The VAE's tiles are the library's default ones."""

    def __init__(self, transformer, vae, scheduler, prompt: Tensor, noise: Noise, *, size, window, dtype, **common):
        super().__init__(transformer.blocks, **common)
        self.transformer, self.vae, self.scheduler, self.noise = transformer, vae, scheduler, noise
        self.prompt = prompt.to(self.device, dtype)
        self.size, self.window, self.dtype = size, window, dtype
        scheduler.set_timesteps(1000)
        vae.enable_tiling()
        self.mean, self.std = (
            torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1).to(self.device, dtype)
            for name in ("latents_mean", "latents_std")
        )

    def features(self, clip: Path, step: int) -> Tensor:  # [T, H, W, C]
        images = read(clip, self.size, range(self.window), Image.Resampling.LANCZOS)
        latents = self.vae.encode(pixels_of(images, self.device, self.dtype)).latent_dist.mean
        latents = (latents - self.mean) * (1.0 / self.std)
        timestep = self.scheduler.timesteps[step][None].to(self.device)
        noise = self.noise(clip.name, step).to(self.device, self.dtype)
        noisy = self.scheduler.add_noise(latents, noise, timestep)
        self.transformer(noisy, timestep, self.prompt, return_dict=False)
        grid = (latents.shape[2], latents.shape[3] // 2, latents.shape[4] // 2)
        return self.outputs[0][0].unflatten(0, grid)


class PlainCogVideoX(PlainDeviceLoop):
    """CogVideoX text-to-video: both halves of a window of every second frame are encoded and run."""

    def __init__(
        self, transformer, vae, scheduler, prompt: Tensor, noise: Noise, *, size, window, half, dtype, **common
    ):
        super().__init__(transformer.transformer_blocks, **common)
        self.transformer, self.vae, self.scheduler, self.noise = transformer, vae, scheduler, noise
        self.prompt = prompt.to(self.device, dtype)
        self.size, self.dtype = size, dtype
        scheduler.set_timesteps(1000)
        vae.enable_tiling()
        every = [[0, *range(1 + h, 2 * half - 1, 2)] for h in (0, 1)]
        self.frames = [[min(frame, window - 1) for frame in frames] for frames in every]
        self.rotary = self._rotary(transformer.config, 1 + (half - 1) // 4)

    def _rotary(self, config, rows: int) -> tuple[Tensor, Tensor]:
        from diffusers.models.embeddings import get_3d_rotary_pos_embed
        from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

        grid = tuple(side // (8 * config.patch_size) for side in self.size)
        base = (config.sample_width // config.patch_size, config.sample_height // config.patch_size)
        crops = get_resize_crop_region_for_grid(grid, *base)
        return get_3d_rotary_pos_embed(config.attention_head_dim, crops, grid, rows, device=self.device)

    def features(self, clip: Path, step: int) -> Tensor:  # [2, T, H, W, C]
        timestep, noise = self.scheduler.timesteps[step][None].to(self.device), self.noise(clip.name, step)
        for half, frames in enumerate(self.frames):
            images = read(clip, self.size, frames, Image.Resampling.LANCZOS)
            latents = self.vae.encode(pixels_of(images, self.device, self.dtype)).latent_dist.mean
            latents = self.vae.config.scaling_factor * latents.permute(0, 2, 1, 3, 4)
            noisy = self.scheduler.add_noise(latents, noise[:, half].to(self.device, self.dtype), timestep)
            self.transformer(noisy, self.prompt, timestep, image_rotary_emb=self.rotary, return_dict=False)
        grid = (latents.shape[1], latents.shape[3] // 2, latents.shape[4] // 2)
        return torch.stack([tokens[0].unflatten(0, grid) for tokens in self.outputs])


class PlainQwen3VL(PlainDeviceLoop):
    """Qwen3-VL: the wanted frames as images of one prompt, every decoder block run."""

    def __init__(self, model, processor, ids: Tensor, *, size, frames, budget, dtype, **common):
        super().__init__(model.language_model.layers, **common)
        self.model, self.processor, self.dtype = model, processor, dtype
        self.ids = ids.to(self.device)  # [1, N], of the prompt with a placeholder for every image token
        self.size, self.frames = size, frames
        self.budget = {"shortest_edge": budget[0], "longest_edge": budget[1]}  # pixels of an image

    def features(self, clip: Path, step: None) -> Tensor:  # [T, H, W, C]
        images = read(clip, self.size, self.frames, Image.Resampling.BICUBIC)
        inputs = self.processor(images=images, size=self.budget, return_tensors="pt")
        seen = self.ids == self.model.config.image_token_id
        grids = inputs["image_grid_thw"]
        self.model(
            input_ids=self.ids,
            mm_token_type_ids=seen.int(),
            pixel_values=inputs["pixel_values"].to(self.device, self.dtype),
            image_grid_thw=grids.to(self.device),
            use_cache=False,
        )
        return self.outputs[0][seen].unflatten(0, (len(images), int(grids[0, 1]) // 2, int(grids[0, 2]) // 2))
