"""Geometry of the images that Qwen-VL's kin look at: sizes in pixels, and the order in which a tower sees patches."""

import math
from typing import Any

import torch
from torch import Tensor


def pixel_range(processor: dict[str, Any]) -> tuple[int, int]:
    """Least and most pixels of an image, from a processor's config; there are two spellings of it."""
    size = processor.get("size") or processor
    pair = ("min_pixels", "max_pixels") if "max_pixels" in size else ("shortest_edge", "longest_edge")
    return size[pair[0]], size[pair[1]]


def fit_pixels(height: int, width: int, cell: int, least: float, most: float) -> tuple[int, int]:
    """The size that Qwen-VL's processors choose: multiples of `cell` within a budget of pixels, aspect ratio kept.

    After `smart_resize` of transformers' `image_processing_qwen2_vl.py`.
    """
    h, w = round(height / cell) * cell, round(width / cell) * cell
    if h * w > most:
        shrink = math.sqrt(height * width / most)
        return tuple(max(cell, math.floor(s / shrink / cell) * cell) for s in (height, width))
    if h * w < least:
        grow = math.sqrt(least / (height * width))
        return tuple(math.ceil(s * grow / cell) * cell for s in (height, width))
    return h, w


def patch_places(
    height: int,  # patches
    width: int,
    merge: int,  # patches per cell, in height and in width; a cell becomes one token of the decoder
    window: int | None = None,  # cells per attention window, in height and in width
) -> Tensor:  # int64 [height * width]
    """Where an image's patches are in a tower's sequence, patch by patch from the top left along the rows.

    The patches of a cell follow each other; with windows the cells of a window do too (transformers'
    `get_vision_window_index`).
    """
    rows, columns = height // merge, width // merge
    if window is None:
        place = torch.arange(rows * columns)
    else:
        i, j = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        across = math.ceil(columns / window)
        key = (i // window * across + j // window) * window**2 + i % window * window + j % window
        place = key.flatten().argsort().argsort()  # keys are distinct: the rank of each cell
    inside = torch.arange(merge**2).view(merge, 1, merge)
    return (place.view(rows, 1, columns, 1) * merge**2 + inside).flatten()


def window_lengths(
    height: int,  # patches
    width: int,
    merge: int,
    window: int,  # cells, as above
) -> list[int]:
    """Patches in each attention window of an image, in the order in which the tower sees windows."""
    rows, columns = height // merge, width // merge
    cells = (
        min(window, rows - i) * min(window, columns - j)
        for i in range(0, rows, window)
        for j in range(0, columns, window)
    )
    return [merge**2 * count for count in cells]
