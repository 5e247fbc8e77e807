"""What the tests of model families share: a clip, a family's features by hand, and plain hooks on a library's model."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from spatialprobe.engine.adapter import Adapter
from spatialprobe.engine.checkpoint import Checkpoint
from spatialprobe.engine.device.tap import Taps
from spatialprobe.engine.types import Clip, Plan

CPU = torch.device("cpu")


def make_adapter(cls: type[Adapter], path: Path, **options) -> Adapter:
    """Not loaded yet; `options` over the family's own."""
    return cls(Checkpoint.open(str(path)), {**cls.OPTIONS, **options})


def changed(path: Path, copy: Path, file: str, change: dict) -> Path:
    """A copy of a checkpoint with other fields in one of its configs."""
    shutil.copytree(path, copy)
    config = copy / file
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    return copy


def make_clip(frames: int = 9, size: tuple[int, int] = (48, 80), seed: int = 1) -> Clip:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (frames, 3, *size), dtype=torch.uint8, generator=generator)
    return Clip(f"clip{seed}", pixels, torch.arange(frames))


def shown(clip: Clip, plan: Plan) -> Clip:
    """The frames of a whole window that the model is given."""
    frames = list(plan.shown)
    return replace(clip, frames=clip.frames[frames], index=clip.index[frames], window=len(clip.frames))


def make_noise(adapter: Adapter, plan: Plan, seeds: Sequence[int] = (5,)) -> Tensor | None:
    """[B, *noise_shape], each clip's by a seed of its own."""
    shape = adapter.noise_shape(plan)
    if shape is None:
        return None
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.inference_mode()
def features(
    adapter: Adapter,
    clips: Clip | Sequence[Clip],
    layers: Sequence[int],
    *,
    query: tuple[int, ...] | None = None,  # None: every frame
    step: int | None = None,
    noise: Tensor | None = None,  # None: `make_noise`'s
) -> dict[int, Tensor]:
    """{layer: [B, T, H, W, C]} of whole windows as one batch, the way the engine calls a loaded adapter."""
    clips = [clips] if isinstance(clips, Clip) else list(clips)
    frames = len(clips[0].frames)
    plan = adapter.plan(frames, query or tuple(range(frames)))
    prepared = [adapter.prepare(shown(clip, plan), plan) for clip in clips]
    noise = make_noise(adapter, plan, range(5, 5 + len(clips))) if noise is None else noise
    out: dict[int, Tensor] = {}
    taps = Taps(adapter.blocks, tuple(sorted(layers)))
    state = adapter.encode({name: torch.stack([p[name] for p in prepared]) for name in prepared[0]}, plan)
    with taps.into(lambda layer, x: out.__setitem__(layer, adapter.grid(x, state, plan).clone()), plan.passes):
        adapter.forward(state, step, noise)
    taps.remove()
    for layer, x in out.items():
        assert x.shape == (len(clips), *plan.grid, adapter.channels), f"layer {layer}"
    return out


def aligned(model: nn.Module) -> nn.Module:
    """The model with its weights copied: CPU kernels round differently on mapped files, which are less aligned."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval()


@torch.inference_mode()
def hooked(blocks: Mapping[int, nn.Module], call: Callable[[], object]) -> dict[int, Tensor]:
    """What plain forward hooks see of these blocks during `call()`; of a tuple, its first tensor."""
    seen: dict[int, Tensor] = {}

    def keep(layer: int):
        return lambda module, args, out: seen.__setitem__(layer, (out[0] if isinstance(out, tuple) else out).clone())

    hooks = [block.register_forward_hook(keep(layer)) for layer, block in blocks.items()]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def assert_batch_agrees(
    adapter: Adapter, layers: Sequence[int], *, frames: int = 9, step: int | None = None, query=None
):
    """Three clips as a batch have the features that each has alone, up to how a batch's products are summed."""
    clips = [make_clip(frames, seed=seed) for seed in (1, 2, 3)]
    plan = adapter.plan(frames, query or tuple(range(frames)))
    noise = make_noise(adapter, plan, (5, 6, 7))
    together = features(adapter, clips, layers, query=query, step=step, noise=noise)
    assert not torch.allclose(together[max(layers)][0], together[max(layers)][1])
    for b, clip in enumerate(clips):
        own = None if noise is None else noise[b : b + 1]
        alone = features(adapter, clip, layers, query=query, step=step, noise=own)
        for layer in layers:
            scale = float(alone[layer].abs().max())
            torch.testing.assert_close(together[layer][b : b + 1], alone[layer], rtol=1e-4, atol=1e-5 * max(1, scale))


def bytes_by_depth(make: Callable[[], Adapter], depths: Sequence[int], cache: Path) -> dict[int, int]:
    """Bytes of tensors read from the files to load each depth."""
    read = {}
    for depth in depths:
        adapter = make()
        adapter.load(depth, CPU, torch.float32, cache)
        assert len(adapter.blocks) == depth
        read[depth] = adapter.checkpoint.bytes_read
    return read
