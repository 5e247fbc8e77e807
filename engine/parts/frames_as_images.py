"""What vision-language models share that take every wanted frame as an image of one prompt: each frame is a row."""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from spatialprobe.engine.types import Plan

TAPS = ("decoder", "vision")  # whose blocks layers count: the language model's, or those of its vision tower
INTRODUCTION = "The following images are consecutive frames from a video.\n"


def plan_images(frames: int, query: tuple[int, ...], size: tuple[int, int], grid: tuple[int, int]) -> Plan:
    """The plan of a model that sees only the frames of `query`, each as a `grid` of tokens."""
    row_of = {frame: row for row, frame in enumerate(query)}
    return Plan(frames, query, size, (len(query), *grid), tuple(row_of.get(f, -1) for f in range(frames)))


def numbered(images: Iterable[str]) -> str:
    """ "Frame1: <image>\\nFrame2: <image>\\n", as the published study wrote it before its question."""
    return "".join(f"Frame{i + 1}: {image}\n" for i, image in enumerate(images))


def check_tap(options: dict[str, Any]) -> None:
    if options["tap"] not in TAPS:
        raise ValueError(f"tap must be one of {', '.join(TAPS)}, got {options['tap']!r}")


def check_words(options: dict[str, Any], names: Collection[str], special: Collection[str]) -> None:
    """Raises ValueError for an option that holds one of the model's special tokens: the images would shift."""
    for name in names:
        held = [token for token in special if token in options[name]]
        if held:
            raise ValueError(f"{name} must hold no special tokens, got {held[0]!r} in {options[name]!r}")


def image_tokens(tokens: Tensor, positions: Tensor, plan: Plan) -> Tensor:  # [B, N, C] -> [B, T, H, W, C]
    """A decoder block's output at the image tokens.

    `positions` is [B, T * H * W]: equal plans have equal prompts, so those of the first clip hold for all.
    """
    return tokens[:, positions[0]].unflatten(1, plan.grid)


def put_images(words: Tensor, images: Tensor, positions: Tensor) -> Tensor:  # [B, N, C], any shape, [B, T * H * W]
    """The prompt's embeddings with those of the images in their places: no mask to count, so nothing waits."""
    return words.index_copy(1, positions[0], images.reshape(len(words), positions.shape[1], -1).to(words.dtype))


def token_places(ids: Tensor) -> Tensor:  # [B, N] -> int64 [1, N]
    """0, 1, 2 .. where the ids are, for decoders that are given embeddings and would count on their own.

    They look at what they count, which a plan of memory can do where ids are, and not where embeddings are.
    """
    return torch.arange(ids.shape[1], device=ids.device)[None]


def stored_prefix(names: Collection[str], candidates: Iterable[str], tensor: str) -> str:
    """Under which of these prefixes a checkpoint keeps `tensor`: libraries of different age write different ones.

    The first where it has none of them, for `load_weights` to report.
    """
    candidates = tuple(candidates)
    return next((prefix for prefix in candidates if prefix + tensor in names), candidates[0])
