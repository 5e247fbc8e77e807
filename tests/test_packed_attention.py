"""Attention within pieces of a sequence: the bits of a call per piece, in a call per length, and nothing asked."""

from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from families import features, make_clip
from tiny_models import MODELS

from spatialprobe.engine.parts.image_grid import window_lengths
from spatialprobe.engine.parts.packed_attention import Pieces, attend

CPU = torch.device("cpu")
CUTS = [(5,), (12, 12, 12), (16, 8, 16, 8, 4, 2), (1, 61, 1, 300, 61)]


def boundaries(lengths) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def drawn(lengths, dtype):
    """[1, heads, N, D] as transformers has them, which are not contiguous."""
    generator = torch.Generator().manual_seed(sum(lengths))
    qkv = torch.randn(sum(lengths), 3, 2, 16, generator=generator).to(dtype)
    return [x.transpose(0, 1)[None] for x in qkv.permute(1, 0, 2, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", CUTS)
def test_attention_stays_within_its_piece(lengths, dtype):
    """As the definition has it, and to the bit as a call for each piece does it."""
    q, k, v = drawn(lengths, dtype)
    pieces = Pieces()
    pieces.set(CPU, lengths)
    out, _ = attend(SimpleNamespace(pieces=pieces), q, k, v, None, scaling=0.3, cu_seq_lens_q=boundaries(lengths))
    assert out.shape == (1, sum(lengths), 2, 16)
    split = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
    each = [F.scaled_dot_product_attention(*qkv, scale=0.3).transpose(1, 2) for qkv in split]
    assert torch.equal(out, torch.cat(each, dim=1))
    piece = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    scores = (0.3 * q.double() @ k.double().mT).masked_fill(piece[:, None] != piece, -torch.inf)
    expected = (scores.softmax(-1) @ v.double()).transpose(1, 2)
    bound = {torch.float32: 1e-6, torch.bfloat16: 5e-3}[dtype]
    assert float((out.double() - expected).norm() / expected.norm()) < bound


def test_a_batch_of_another_size_is_cut_anew_and_the_same_one_is_not():
    pieces = Pieces()
    pieces.set(CPU, [8, 8], [4, 2, 2, 4, 2, 2])
    before = pieces.layouts
    assert {n: cut.lengths for n, cut in before.items()} == {2: (8,), 6: (4, 2)}
    pieces.set(CPU, [8, 8], [4, 2, 2, 4, 2, 2])
    assert pieces.layouts is before
    pieces.set(CPU, [8, 8], [4, 2, 2, 2, 4, 2])
    assert pieces.layouts is not before
    assert pieces.layouts[6].tokens[0].tolist() == [0, 1, 2, 3, 10, 11, 12, 13]


@pytest.mark.parametrize(("height", "width"), [(2, 2), (8, 8), (10, 14), (38, 68), (6, 18)])
@pytest.mark.parametrize("window", [1, 3, 4])
def test_windows_have_the_lengths_that_transformers_gives_them(height, width, window):
    from transformers.vision_utils import get_vision_window_index

    _, ends = get_vision_window_index(torch.tensor([[1, height, width]] * 2), 2, window * 28, 14)
    assert 2 * window_lengths(height, width, 2, window) == ends.diff().tolist()


@pytest.mark.parametrize(
    ("name", "ours", "theirs"), [("qwen2_5_vl", {1, 2}, {3, 6}), ("qwen3_vl", {1}, {3}), ("glm4v", {1}, {3})]
)
def test_a_block_makes_a_call_per_length_and_asks_for_none(name, ours, theirs, tmp_path, monkeypatch):
    """Of three images, and of windows of two lengths; transformers makes a call for each, and asks thrice a block."""
    tiny = MODELS[name]
    adapter, clip = tiny.load(tmp_path), make_clip(tiny.frames)
    blocks, calls, asked = adapter.model.visual.blocks, [], []
    inside = [False]
    for block in blocks:
        block.attn.register_forward_pre_hook(lambda *given: inside.__setitem__(0, True) or calls.append(0))
        block.attn.register_forward_hook(lambda *given: inside.__setitem__(0, False))
    attention, tolist, item = F.scaled_dot_product_attention, torch.Tensor.tolist, torch.Tensor.item

    def count(*args, **kwargs):
        calls[-1] += inside[0]
        return attention(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", count)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: (inside[0] and asked.append(x), tolist(x))[1])
    monkeypatch.setattr(torch.Tensor, "item", lambda x: (inside[0] and asked.append(x), item(x))[1])
    layers = range(len(adapter.blocks))
    got = features(adapter, clip, layers, query=tiny.query)
    assert (set(calls), len(calls), len(asked)) == (ours, len(blocks), 0)

    blocks[0].attn.config._attn_implementation = "sdpa"
    calls.clear()
    plain = features(adapter, clip, layers, query=tiny.query)
    assert (set(calls), len(calls), len(asked)) == (theirs, len(blocks), 3 * len(blocks))
    assert all(torch.equal(got[layer], plain[layer]) for layer in layers)
