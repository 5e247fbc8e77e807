"""What a job needs of a device's memory, before any weight is read: one batch is run on the meta device and counted.

The figure is of live tensors in eager mode, those within composite operations too. What kernels allocate inside
(cuDNN's workspaces) and what the allocator loses to fragments is not in it; cuBLAS's workspace is, as documented.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spatialprobe.engine.adapter import Adapter, plan_clip
from spatialprobe.engine.device.attention import with_attention
from spatialprobe.engine.device.blocks import each_block
from spatialprobe.engine.device.live_bytes import META, LiveBytes
from spatialprobe.engine.device.precision import quantise_linears
from spatialprobe.engine.device.tap import Taps
from spatialprobe.engine.types import COMPUTE_DTYPES, STORE_DTYPES, Clip, FeatureSpec, Plan
from spatialprobe.kernels.pool_features import QUANTISED_MAX, accumulate, pool_features

CUBLAS_WORKSPACE = 32 << 20  # bytes, on Hopper; less on older GPUs


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the device."""

    weights: int  # and constants, all that stays
    prompt: int  # the text encoder's weights, alone, before the others are loaded; 0 where it need not run
    encode: int  # peak while the batch is encoded, weights included
    blocks: int  # peak while the blocks run, weights included
    workspace: int

    @property
    def running(self) -> int:
        """Peak once the model is loaded."""
        return max(self.encode, self.blocks) + self.workspace

    @property
    def peak(self) -> int:
        return max(self.prompt, self.running)

    def __str__(self) -> str:
        parts = {"weights": self.weights, "encode": self.encode, "blocks": self.blocks}
        parts |= {"text encoder alone": self.prompt} if self.prompt else {}
        return f"peak {_gb(self.peak)} (" + ", ".join(f"{name} {_gb(nbytes)}" for name, nbytes in parts.items()) + ")"


def plan_memory(adapter: Adapter, spec: FeatureSpec, depth: int, batch: int, frames: int, cache: Path) -> MemoryPlan:
    """For windows of `frames` frames. `adapter` stays as it is."""
    dtype, device = COMPUTE_DTYPES[spec.compute_dtype], torch.device(spec.device)
    model = type(adapter)(adapter.checkpoint, dict(adapter.options))
    model.steps = spec.steps
    plan, rows = plan_clip(frames, model, spec)
    with torch.inference_mode():
        model.load(depth, META, dtype, cache)
        if spec.precision == "fp8":
            quantise_linears(each_block(model.blocks))
        if spec.attention == "math":  # the one kernel whose scores are tensors
            for block in each_block(model.blocks):
                block.forward = with_attention(block.forward, "math")
        peaks: dict[str, int] = {}
        with LiveBytes() as count:
            count.see([list(m.parameters()) + list(m.buffers()) for m in modules_of(model)])
            weights = count.live
            taps = Taps(model.blocks, spec.layers)
            run_once(model, spec, plan, rows, taps, shapes_of(model, plan, batch), count, peaks, device)
            taps.remove()
    prompt = model.text_encoder_bytes(cache, dtype)
    workspace = CUBLAS_WORKSPACE if device.type == "cuda" else 0
    return MemoryPlan(weights, prompt, peaks["encode"], peaks["blocks"], workspace)


def modules_of(adapter: Adapter) -> list[torch.nn.Module]:
    """The modules that a loaded adapter holds."""
    held = [x for value in vars(adapter).values() for x in (value.values() if isinstance(value, dict) else [value])]
    return [x for x in held if isinstance(x, torch.nn.Module)]


def shapes_of(model: Adapter, plan: Plan, batch: int) -> dict[str, Tensor]:
    """The inputs of a batch: pixels without memory, token ids and grids as they are."""
    where = META if model.PREPARES_ON_DEVICE else torch.device("cpu")
    pixels = torch.zeros((len(plan.shown), *plan.size, 3), dtype=torch.uint8, device=where).permute(0, 3, 1, 2)
    clip = Clip("none", pixels, torch.zeros(len(plan.shown), dtype=torch.int64), window=plan.frames)
    inputs = {name: torch.stack([x] * batch) for name, x in model.prepare(clip, plan).items()}
    return {name: x if x.dtype == torch.int64 else x.to(META) for name, x in inputs.items()}


def run_once(
    adapter: Adapter,
    spec: FeatureSpec,
    plan: Plan,
    rows: tuple[int, ...],
    taps: Taps,
    inputs: dict[str, Tensor],
    count: LiveBytes,
    peaks: dict[str, int],
    device: torch.device,
) -> None:
    """One batch as `extract.run_batch` runs it, with the peak of each phase in `peaks`."""
    count.see(inputs)
    with count.phase(peaks, "encode"):
        state = adapter.encode(inputs, plan)
    batch = len(next(iter(inputs.values())))
    shape, merged = adapter.noise_shape(plan), {}
    for step in spec.steps or (None,):

        def receive(layer: int, tokens: Tensor, step: int | None = step) -> None:
            x, onto = adapter.grid(tokens, state, plan), merged.pop(layer, None)
            if spec.merge_steps and step != spec.steps[-1]:
                merged[layer] = onto if onto is not None else _pooled(x, rows, spec, torch.float32, device)
            else:
                _pooled(x, rows, spec, STORE_DTYPES[spec.dtype], device, onto)

        with count.phase(peaks, "blocks"):
            where = next(iter(inputs.values())).device if inputs else META
            noise = None if shape is None else torch.empty((batch, *shape), device=META if where == META else where)
            with taps.into(receive, plan.passes):
                adapter.forward(state, step, noise)


def _pooled(
    x: Tensor,
    rows: tuple[int, ...],
    spec: FeatureSpec,
    dtype: torch.dtype,
    device: torch.device,
    onto: Tensor | None = None,
) -> Any:
    """What the end of a block's pass leaves; on CUDA one kernel writes it, elsewhere torch has tensors between."""
    if device.type != "cuda":
        if dtype == torch.float32:
            return accumulate(x, rows, spec.pool, onto)
        return pool_features(x, rows, spec.pool, dtype=dtype, onto=onto)
    tokens = (len(x), len(rows), *(spec.pool or x.shape[2:4]))
    stats = [x.new_empty(tokens, dtype=torch.float32) for _ in range(4 if dtype in QUANTISED_MAX else 3)]
    data = x.new_empty((*tokens, x.shape[-1]), dtype=dtype)
    return data if dtype == torch.float32 else (data, stats)


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"
