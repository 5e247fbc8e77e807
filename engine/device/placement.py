"""Where a model's weights lie: on one device, its blocks in host memory, or its blocks spread over several GPUs."""

from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from spatialprobe.engine.adapter import Adapter

OFFLOAD = ("none", "host", "spread")


def check_fits(adapter: Adapter, depth: int, dtype: torch.dtype, device: torch.device, offload: str) -> None:
    """Raises ValueError if the weights of the first `depth` blocks alone cannot fit, and says what depth would."""
    weights = partial(adapter.weight_bytes, dtype=dtype)  # builds the model's modules each time
    # The first block stands for one that is held at a time: where blocks are of two kinds, it is of the larger.
    needed = weights(1 if offload == "host" and device.type == "cuda" else depth)
    places = every_gpu() if offload == "spread" else [device]
    free = sum(free_bytes(place) for place in places)
    if needed > free:
        fit = bisect_right(range(1, depth), free, key=weights)
        deepest = f"{fit} would fit (layers up to {fit - 1})" if fit else "not one would fit"
        raise ValueError(
            f"{depth} blocks need {needed / 1e9:.1f} GB for their weights, and "
            f"{', '.join(map(str, places))} has {free / 1e9:.1f} GB free: {deepest}; see also --offload"
        )
    if offload != "host":
        return
    before = 2 * weights(1) - weights(2)
    in_host, host_free = weights(depth) - before, free_bytes(torch.device("cpu"))
    if in_host > host_free:
        fit = bisect_right(range(1, depth), host_free + before, key=weights)
        raise ValueError(f"{depth} blocks need {in_host / 1e9:.1f} GB of host memory: {fit} blocks would fit")


def every_gpu() -> list[torch.device]:
    return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def place(adapter: Adapter, device: torch.device, offload: str) -> None:
    """Moves a model that was loaded on the CPU: all but the blocks to `device`, and the blocks as `offload` says.

    "host": a block's weights come to the device while it runs. "spread": consecutive blocks lie on each CUDA device
    in turn, as many as its share of the free memory; the last one's output comes back to `device`.
    """
    from accelerate import cpu_offload
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module
    from accelerate.utils import send_to_device

    blocks = list(adapter.blocks)
    for name, value in list(vars(adapter).items()):
        setattr(adapter, name, moved(value, blocks, device))
    adapter.device = device
    if offload == "host":
        for block in blocks:
            cpu_offload(block, execution_device=device, offload_buffers=True)
        return
    places = every_gpu()
    shares = spread(len(blocks), [free_bytes(p) for p in places])
    for block, number in zip(blocks, shares, strict=True):
        block.to(places[number])
        add_hook_to_module(block, AlignDevicesHook(places[number]))
    blocks[-1].register_forward_hook(lambda block, given, out: send_to_device(out, device))


def moved(value: Any, kept: Sequence[nn.Module], device: torch.device) -> Any:
    """`value` with its tensors and modules on `device`; modules are changed in place."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, nn.Module):
        move_all_but(value, kept, device)
    elif isinstance(value, dict):
        return {key: moved(x, kept, device) for key, x in value.items()}
    elif type(value) in (list, tuple):
        return type(value)(moved(x, kept, device) for x in value)
    return value


def move_all_but(module: nn.Module, kept: Sequence[nn.Module], device: torch.device) -> None:
    """`module.to(device)`, but for these modules inside it, and with tensors that it holds without saying so."""
    if any(module is block for block in kept):
        return
    for child in module.children():
        move_all_but(child, kept, device)
    for name, parameter in module.named_parameters(recurse=False):
        setattr(module, name, nn.Parameter(parameter.to(device), requires_grad=False))
    for name, buffer in module.named_buffers(recurse=False):
        module._buffers[name] = buffer.to(device)
    for name, value in list(vars(module).items()):
        if isinstance(value, Tensor):
            setattr(module, name, value.to(device))


def spread(blocks: int, free: Sequence[int]) -> list[int]:
    """The device of each block: consecutive blocks together, in the devices' shares of the free memory."""
    total, bounds, so_far = sum(free), [], 0
    for share in free:
        so_far += share
        bounds.append(round(blocks * so_far / total))
    return [next(number for number, bound in enumerate(bounds) if i < bound) for i in range(blocks)]
