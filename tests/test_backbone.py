"""The shared trunk against a slow float64 version of it, and the symmetries that it must and must not have."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spatialprobe.probes.backbone import SPECIAL, Backbone, Block, rotate

E, HEADS, GRID = 16, 2, (3, 4)
HEAD = E // HEADS
N = GRID[0] * GRID[1]


def make(depth: int = 2, position: str = "2d", *, seed: int = 0, **settings) -> Backbone:
    """In float64 with every parameter drawn anew: at its start the model hardly differs from doing nothing."""
    backbone = Backbone(E, depth, heads=HEADS, position=position, **settings).double().eval()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng, dtype=torch.float64) * 0.4)
    return backbone


def features(batch: int = 2, views: int = 3, *, seed: int = 1) -> Tensor:
    return torch.randn(batch, views, *GRID, E, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- the slow version -------------------------------------------------------------------------------------------------


def slow_backbone(x: Tensor, weights: dict[str, Tensor], depth: int, position: str) -> list[Tensor]:
    """The pairs, one clip, one token and one head after the other."""
    batch, views = x.shape[:2]
    places = [(0, 0)] * SPECIAL + [(y + 1, x + 1) for y in range(GRID[0]) for x in range(GRID[1])]
    raster = [0] * SPECIAL + [1 + n for n in range(N)]
    special = [weights["special"][0 if view == 0 else 1] for view in range(views)]
    state = [[torch.cat([special[v], x[b, v].reshape(N, E)]) for v in range(views)] for b in range(batch)]
    pairs = []
    for pair in range(depth):
        where = [turn(n, p, position) for n, p in zip(raster, places, strict=True)]
        state = [[slow_block(tokens, weights, f"within.{pair}.", where) for tokens in clip] for clip in state]
        joint = [slow_block(torch.cat(clip), weights, f"across.{pair}.", where * views) for clip in state]
        after = [list(tokens.split(SPECIAL + N)) for tokens in joint]
        halves = [torch.stack([torch.stack(clip) for clip in clips]) for clips in (state, after)]
        pairs.append(torch.cat(halves, -1))
        state = after
    return pairs


def turn(raster: int, place: tuple[int, int], position: str) -> list[complex]:
    """By what each pair of channels of a head is multiplied."""
    half = HEAD // 2
    if position == "none":
        return [1.0] * half
    axes = [(raster, half)] if position == "1d" else [(place[0], half // 2), (place[1], half // 2)]
    return [complex(math.cos(a), math.sin(a)) for at, n in axes for a in (at * 100.0 ** (-i / n) for i in range(n))]


def slow_block(x: Tensor, weights: dict[str, Tensor], name: str, where: list[list[complex]]) -> Tensor:
    w = {key.removeprefix(name): value for key, value in weights.items() if key.startswith(name)}
    qkv = norm(x, w, "norm1") @ w["qkv.weight"].T + w["qkv.bias"]
    mixed = torch.empty_like(x)
    turns = torch.tensor(where, dtype=torch.complex128)
    for head in range(HEADS):
        at = slice(head * HEAD, (head + 1) * HEAD)
        q, k, v = (qkv[:, i * E : (i + 1) * E][:, at] for i in range(3))
        q, k = (turned(norm(side, w, which), turns) for side, which in ((q, "q_norm"), (k, "k_norm")))
        for row in range(len(x)):
            weight = ((k * q[row]).sum(-1) / HEAD**0.5).exp()
            mixed[row, at] = (weight[:, None] * v).sum(0) / weight.sum()
    x = x + w["scale1"] * (mixed @ w["proj.weight"].T + w["proj.bias"])
    hidden = norm(x, w, "norm2") @ w["mlp.0.weight"].T + w["mlp.0.bias"]
    hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    return x + w["scale2"] * (hidden @ w["mlp.3.weight"].T + w["mlp.3.bias"])


def norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    unit = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return unit * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def turned(x: Tensor, turns: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    z = torch.complex(a, b) * turns
    return torch.cat([z.real, z.imag], -1)


@pytest.mark.parametrize("position", ["none", "1d", "2d"])
@pytest.mark.parametrize(("depth", "views"), [(1, 3), (2, 2), (1, 1)])
def test_pairs_equal_the_slow_version(depth, views, position):
    backbone, x = make(depth, position), features(2, views)
    found = backbone(x)
    wanted = slow_backbone(x, dict(backbone.named_parameters()), depth, position)
    assert found.grid == GRID
    assert backbone.width == 2 * E
    assert len(found.pairs) == depth
    for ours, theirs in zip(found.pairs, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # angles are float32
    torch.testing.assert_close(found.patches, wanted[-1][:, :, SPECIAL:], rtol=0, atol=1e-5)


def test_depth_0_passes_features_on():
    backbone, x = Backbone(E, 0, heads=HEADS), features()
    assert list(backbone.parameters()) == []
    assert backbone.width == E
    tokens = backbone(x)
    assert tokens.grid == GRID
    assert torch.equal(tokens.patches, x.flatten(2, 3))
    assert len(tokens.pairs) == 1


# -- blocks -----------------------------------------------------------------------------------------------------------


def test_queries_and_keys_are_normalised():
    """Their size before the norm, which is what makes attention saturate, makes no difference; that of values does."""
    block = Block(E, HEADS, 4.0, 0.0, 1.0).double()
    x, larger = features().flatten(1, 3), Block(E, HEADS, 4.0, 0.0, 1.0).double()
    larger.load_state_dict(block.state_dict())
    for part, same in (("qk", True), ("v", False)):
        with torch.no_grad():
            rows = slice(0, 2 * E) if part == "qk" else slice(2 * E, 3 * E)
            larger.qkv.weight[rows] *= 30
            larger.qkv.bias[rows] *= 30
        off = (larger(x, None) - block(x, None)).abs().max()
        assert (off < 1e-3) == same, f"{part}: {off}"


def test_layer_scale_0_changes_nothing_and_scales_start_where_they_are_set():
    backbone, x = Backbone(E, 2, heads=HEADS, layer_scale=0.0).double(), features()
    for pair in backbone(x).pairs:
        for half in pair.chunk(2, -1):
            assert torch.equal(half[:, :, SPECIAL:], x.flatten(2, 3))
    scales = [p for name, p in Backbone(E, 1, heads=HEADS, layer_scale=0.03).named_parameters() if "scale" in name]
    assert len(scales) == 4
    assert all(torch.equal(p, torch.full((E,), 0.03)) for p in scales)


def test_dropout_is_drawn_in_training_alone():
    backbone, x = make(1, dropout=0.5), features()
    once, again = backbone(x).patches, backbone(x).patches
    assert torch.equal(once, again)
    backbone.train()
    torch.manual_seed(0)
    first, second = backbone(x).patches, backbone(x).patches
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(backbone(x).patches, first)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("views", [1, 3])
def test_gradients_reach_every_parameter(depth, views):
    backbone = make(depth)
    tokens = backbone(features(1, views))
    rng = torch.Generator().manual_seed(5)
    sum((pair * torch.randn(pair.shape, generator=rng)).sum() for pair in tokens.pairs).backward()
    for name, parameter in backbone.named_parameters():
        if name == "special" and views == 1:
            assert parameter.grad[0].abs().min() > 0
            assert not parameter.grad[1].any()  # of views that are not there
        else:
            # a key's bias before its norm and after would cancel in the softmax, but not once keys are turned
            assert parameter.grad.abs().max() > 1e-6, name


# -- views ------------------------------------------------------------------------------------------------------------


def test_within_blocks_keep_views_apart_and_across_blocks_mix_them():
    backbone, x = make(1), features()
    changed = x.clone()
    changed[:, 2] = features(seed=9)[:, 2]
    before, after = backbone(x).pairs[0], backbone(changed).pairs[0]
    assert torch.equal(before[:, :2, :, :E], after[:, :2, :, :E])
    assert (before[:, :2, :, E:] != after[:, :2, :, E:]).any(-1).all()
    assert (before[:, 2, :, :E] != after[:, 2, :, :E]).any(-1).all()


def test_views_but_the_first_are_alike():
    backbone, x = make(2), features()
    tokens = backbone(x).pairs[-1]
    swapped = backbone(x[:, [0, 2, 1]]).pairs[-1]
    torch.testing.assert_close(swapped, tokens[:, [0, 2, 1]], rtol=0, atol=1e-10)
    moved = backbone(x[:, [1, 0, 2]]).pairs[-1]
    assert (moved - tokens[:, [1, 0, 2]]).abs().max() > 1e-2, "the first view has no tokens of its own"
    with torch.no_grad():
        backbone.special[1] = backbone.special[0]
    alike, moved = backbone(x).pairs[-1], backbone(x[:, [1, 0, 2]]).pairs[-1]
    torch.testing.assert_close(moved, alike[:, [1, 0, 2]], rtol=0, atol=1e-10)


# -- positions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", ["none", "1d", "2d"])
def test_only_positions_tell_patches_apart(position):
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    backbone, x = make(1, position), features()
    shuffled = x.flatten(2, 3)[:, :, order].unflatten(2, GRID)
    off = (backbone(shuffled).patches - backbone(x).patches[:, :, order]).abs().max()
    assert off < 1e-10 if position == "none" else off > 1e-2


def test_special_tokens_stand_at_0_and_patches_from_1():
    for position in ("1d", "2d"):
        turns = make(1, position)._turns(*GRID, torch.device("cpu"))
        assert turns.shape == (2, SPECIAL + N, HEAD // 2)
        assert torch.equal(turns[0, :SPECIAL], torch.ones(SPECIAL, HEAD // 2))
        assert torch.equal(turns[1, :SPECIAL], torch.zeros(SPECIAL, HEAD // 2))
        # the fastest pair of channels turns by 1 radian per place
        places = [1 + n for n in range(N)] if position == "1d" else [1 + n // GRID[1] for n in range(N)]
        torch.testing.assert_close(turns[1, SPECIAL:, 0], torch.tensor(places).float().sin())
    columns = torch.tensor([1.0 + n % GRID[1] for n in range(N)])
    torch.testing.assert_close(turns[1, SPECIAL:, HEAD // 4], columns.sin())


@pytest.mark.parametrize("position", ["1d", "2d"])
def test_what_two_patches_make_of_each_other_depends_on_the_way_between_them(position):
    grid = (4, 5)
    turns = Backbone(E, 1, heads=HEADS, position=position)._turns(*grid, torch.device("cpu"))[:, SPECIAL:].double()
    q, k = torch.randn(2, 1, 1, 1, HEAD, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    q, k = (rotate(side.expand(1, 1, turns.shape[1], HEAD), turns)[0, 0] for side in (q, k))
    score, seen = q @ k.T, {}
    for a in range(len(score)):
        for b in range(len(score)):
            (ya, xa), (yb, xb) = divmod(a, grid[1]), divmod(b, grid[1])
            seen.setdefault(b - a if position == "1d" else (yb - ya, xb - xa), []).append(score[a, b])
    assert max(len(of_one) for of_one in seen.values()) == len(score)
    means = torch.tensor([torch.stack(of_one).mean() for of_one in seen.values()])
    assert max((torch.stack(of_one) - of_one[0]).abs().max() for of_one in seen.values()) < 1e-5
    assert means.diff().abs().min() > 1e-4, "two ways look alike"


def test_turning_keeps_lengths():
    turns = Backbone(E, 1, heads=HEADS)._turns(*GRID, torch.device("cpu"))
    x = torch.randn(2, HEADS, SPECIAL + N, HEAD)
    torch.testing.assert_close(rotate(x, turns).norm(dim=-1), x.norm(dim=-1))
    assert rotate(x, None) is x


# -- bad input --------------------------------------------------------------------------------------------------------


def test_settings_that_do_not_fit():
    with pytest.raises(ValueError, match="depth must be 0 or more pairs of blocks, got -1"):
        Backbone(E, -1, heads=HEADS)
    with pytest.raises(ValueError, match="position must be one of none, 1d, 2d, got '3d'"):
        Backbone(E, 1, heads=HEADS, position="3d")
    with pytest.raises(ValueError, match="embed must be 3 heads of a multiple of 4 channels each, got 16"):
        Backbone(E, 1, heads=3)
    with pytest.raises(ValueError, match="embed must be 8 heads of a multiple of 4 channels each, got 16"):
        Backbone(E, 1, heads=8)
    assert Backbone(10, 0, heads=3).width == 10  # a read-out has no heads


def test_half_precision_keeps_its_dtype():
    """Under autocast products are bfloat16 and the tokens stay what they were: no block adds in bfloat16."""
    backbone, x = make(1).float(), features().float()
    exact = backbone(x).patches
    with torch.autocast("cpu", torch.bfloat16):
        rounded = backbone(x).patches
    assert rounded.dtype == torch.float32
    assert F.cosine_similarity(rounded.flatten(), exact.flatten(), 0) > 0.999
    assert not torch.equal(rounded, exact)
