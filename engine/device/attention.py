"""Which kernel computes attention in a model's blocks. Every family calls torch's `scaled_dot_product_attention`.

All kernels compute the same thing up to rounding: relative L2 to `math` in float64 is at most 1e-6 in float32, 5e-3 in
bfloat16 and 1e-3 in float16 per call (tests/test_attention.py, for those there are on a CPU).
"""

import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn import attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from spatialprobe.engine.types import ATTENTION

BACKENDS = {  # name -> torch's switch for it
    "math": SDPBackend.MATH,  # the definition, written out: all scores in memory
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash3": SDPBackend.FLASH_ATTENTION,  # with another implementation in its place
    "flash4": SDPBackend.FLASH_ATTENTION,
}
IMPLEMENTATIONS = {"flash3": "FA3", "flash4": "FA4"}  # as torch calls them; packages of their own bring the kernels
PACKAGES = {"flash3": "flash_attn_interface", "flash4": "flash_attn"}  # as they are imported
CANNOT = ("No available kernel", "No viable backend")  # how torch says that no allowed kernel can do a call


def resolve_attention(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The name as a spec has it: "auto" is "sdpa", torch's own choice per call among the exact kernels that it has.

    Raises ValueError for one that this device, dtype and installation do not have.
    """
    if name not in ("auto", *ATTENTION):
        raise ValueError(f"attention must be one of auto, {', '.join(ATTENTION)}, got {name!r}")
    if name in ("auto", "sdpa"):
        return "sdpa"
    if not is_there(name, device, dtype):
        there = ", ".join(other for other in BACKENDS if is_there(other, device, dtype))
        raise ValueError(f"attention {name} is not there for {dtype} on {device}; there are auto, sdpa, {there}")
    return name


def kernel_versions(name: str) -> dict[str, str]:
    """Distribution -> version of what brings a kernel that torch does not: a field of the spec."""
    if name not in PACKAGES:
        return {}
    found = metadata.packages_distributions().get(PACKAGES[name], [])
    return {each: metadata.version(each) for each in sorted(set(found))} or {PACKAGES[name]: "unknown"}


def is_there(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a small call without a mask runs with this kernel."""
    if name in IMPLEMENTATIONS and device.type != "cuda":
        return False
    q = torch.zeros(1, 1, 16, 64, device=device, dtype=dtype)
    try:
        activate(name)
        with warnings.catch_warnings(), torch.inference_mode(), sdpa_kernel(BACKENDS[name]):
            warnings.simplefilter("ignore")  # torch warns of each reason why a kernel cannot be used
            F.scaled_dot_product_attention(q, q, q)
    except (RuntimeError, ImportError, AttributeError, ValueError):  # the last two: of a torch that does not know it
        return False
    finally:
        activate("sdpa")
    return True


def with_attention(run: Callable, name: str) -> Callable:
    """`run`, with only this kernel for attention in it; `run` itself for "sdpa".

    To be compiled with the choice inside: a compiled program keeps the kernel that it was made with, in the process
    and on disk, and nothing but the choice in its own code tells it from one with another.
    """
    if name == "sdpa":
        return run
    backend = BACKENDS[name]

    def forward(*args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(backend):
            return run(*args, **kwargs)

    return forward


def activate(name: str) -> None:
    """Puts another implementation in flash attention's place, for the whole process, or the usual one back."""
    if name in IMPLEMENTATIONS:
        attention.activate_flash_attention_impl(IMPLEMENTATIONS[name])
    elif getattr(attention, "current_flash_attention_impl", lambda: None)() is not None:
        attention.restore_flash_attention_impl()
