"""Attention within pieces of one sequence, in which images, or windows of images, lie one after the other.

Without a package of flash attention, transformers' vision towers of Qwen and GLM make a call for each piece, 900 in a
block of Qwen2.5-VL that sees 20 frames of 540x960, and each block asks the device for the pieces' lengths. Here it is a
call for each length, and lengths are known beforehand: nothing waits for the device, and blocks can be compiled.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The name that transformers knows it by: one with "flash" in it is given the whole sequence.
NAME = "flash_within_pieces"


@dataclass(frozen=True)
class Layout:
    """How a sequence of N tokens is cut into pieces."""

    lengths: tuple[int, ...]  # all different
    tokens: tuple[Tensor, ...]  # of each length, the tokens of its pieces; none where all are of one length
    back: Tensor | None  # [N], where each token is among `tokens`


class Pieces:
    """How the sequences of the batch that comes next are cut.

    A block is told the number of its pieces alone, by the shape of a tensor, so that layouts are found by it. As many
    windows as images are the images themselves.
    """

    def __init__(self):
        self.layouts: dict[int, Layout] = {}  # by number of pieces
        self._made_of: Any = None

    def set(self, device: torch.device, *cuts: Sequence[int]) -> None:  # each the lengths of pieces, in their order
        wanted = {len(lengths): tuple(lengths) for lengths in cuts}
        if self._made_of != (device, wanted):
            self.layouts = {number: layout(lengths, device) for number, lengths in wanted.items()}
            self._made_of = (device, wanted)


def layout(lengths: tuple[int, ...], device: torch.device) -> Layout:
    different = tuple(dict.fromkeys(lengths))
    if len(different) == 1:
        return Layout(different, (), None)
    spans = [torch.arange(end - length, end) for length, end in zip(lengths, accumulate(lengths), strict=True)]
    tokens = [torch.cat([span for span in spans if len(span) == length]) for length in different]
    return Layout(different, tuple(x.to(device) for x in tokens), torch.cat(tokens).argsort().to(device))


def attend_within_pieces(attentions: Iterable[nn.Module]) -> Pieces:
    """Makes vision attention modules of transformers attend so. What is returned is to be set before they run."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    pieces = Pieces()
    for module in attentions:
        module.config._attn_implementation = NAME
        module.pieces = pieces
    return pieces


def attend(
    module: nn.Module,
    query: Tensor,  # [1, heads, N, D], as key and value
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,  # [pieces + 1]; the others that transformers gives follow from it
    **others: Any,
) -> tuple[Tensor, None]:  # [1, N, heads, D]
    cut, device = module.pieces.layouts[len(cu_seq_lens_q) - 1], query.device  # not its own where blocks are spread
    packed = [x[0].transpose(0, 1) for x in (query, key, value)]  # [N, heads, D]
    if cut.back is None:
        return attend_alike(*packed, cut.lengths[0], scaling)[None], None
    parts = []
    for length, tokens in zip(cut.lengths, cut.tokens, strict=True):
        parts.append(attend_alike(*(x[tokens.to(device)] for x in packed), length, scaling))
    return torch.cat(parts)[cut.back.to(device)][None], None


def attend_alike(q: Tensor, k: Tensor, v: Tensor, length: int, scaling: float) -> Tensor:  # [N, heads, D], all four
    """Attention within pieces that all have this length."""
    q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2).flatten(0, 1)
