"""The geometry task's heads, truth and losses against slow float64 definitions; and what it must and cannot learn."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.transform import Rotation
from torch import nn

from spatialprobe.probes.backbone import SPECIAL, Backbone, Tokens
from spatialprobe.probes.geometry import compose, decode_extrinsic, inverse, rotation_matrix
from spatialprobe.probes.heads.camera import CameraDecoder
from spatialprobe.probes.heads.dense import DenseDecoder, position_signal, stage_pairs
from spatialprobe.probes.metrics.geometry import area_under_curve, pair_errors
from spatialprobe.probes.tasks.geometry import (
    GEOMETRY,
    GeometryFacts,
    GeometryHead,
    camera_loss,
    confident_error,
    geometry_facts,
    geometry_loss,
    geometry_targets,
    inverse_log,
    parse_out_size,
)

SIZE, GRID, VIEWS = (6, 8), (3, 4), 2
FACTS = GeometryFacts(*SIZE)


def small(**settings):
    """The task's defaults at a size for the CPU."""
    dense = {"features": 8, "stages": (8, 8, 8, 8), "camera_layers": 1, "refinements": 2}
    return GEOMETRY.defaults.with_settings(**{"embed": 16, "heads": 2, "depth": 1, "dropout": 0.0, **dense, **settings})


def tokens_of(depth, width=16, clips=2, views=3, seed=0):
    """What a backbone of `depth` pairs gives, random."""
    random = torch.Generator().manual_seed(seed)
    length = GRID[0] * GRID[1] + (SPECIAL if depth else 0)
    return Tokens([torch.randn(clips, views, length, width, generator=random) for _ in range(max(depth, 1))], GRID)


def scenes(clips, views=VIEWS, size=SIZE, seed=0):
    """Labels of smooth random surfaces before random cameras, all consistent with each other."""
    random = torch.Generator().manual_seed(seed)
    (height, width), focal = size, 0.9 * size[1]
    turn = torch.cat([0.3 * torch.randn(clips, views, 3, generator=random), torch.ones(clips, views, 1)], -1)
    extrinsic = torch.cat([rotation_matrix(turn), torch.randn(clips, views, 3, 1, generator=random)], -1)
    coarse = 3 * torch.rand(clips, views, 3, 4, generator=random) + 1
    depth = F.interpolate(coarse, size, mode="bilinear")
    v, u = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    rays = torch.stack([(u - (width - 1) / 2) / focal, (v - (height - 1) / 2) / focal, torch.ones(size)], -1)
    back = inverse(extrinsic)
    points = torch.einsum("bsij,bshwj->bshwi", back[..., :3], rays * depth[..., None]) + back[:, :, None, None, :, 3]
    intrinsic = torch.tensor([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])
    return {
        "depth": depth,
        "points": points,
        "confidence": torch.rand(clips, views, *size, generator=random) + 0.5,
        "extrinsic": extrinsic,
        "intrinsic": intrinsic.expand(clips, views, 3, 3),
    }


def outputs_of(clips=2, views=VIEWS, size=SIZE, seed=0, refinements=3):
    """Random outputs of a head."""
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(clips, views, *shape, generator=random)  # noqa: E731
    return {
        "depth": draw(*size).exp(),
        "points": draw(*size, 3),
        "depth_confidence": 1 + draw(*size).exp(),
        "points_confidence": 1 + draw(*size).exp(),
        "poses": draw(refinements, 9),
    }


# -- truth ------------------------------------------------------------------------------------------------------------


def test_targets_are_in_the_first_view_at_the_scale_of_its_points():
    labels = scenes(2, views=3)
    targets = geometry_targets(labels, small(), FACTS)
    for b in range(2):
        pose = [np.vstack([e.double().numpy(), [0, 0, 0, 1]]) for e in labels["extrinsic"][b]]
        points = labels["points"][b].double().numpy() @ pose[0][:3, :3].T + pose[0][:3, 3]
        scale = np.linalg.norm(points[0], axis=-1).mean()  # of the first view alone
        np.testing.assert_allclose(targets["points"][b], points / scale, atol=1e-5)
        np.testing.assert_allclose(targets["depth"][b], labels["depth"][b] / scale, rtol=1e-5)
        for s in range(3):
            moved = pose[s] @ np.linalg.inv(pose[0])
            np.testing.assert_allclose(targets["extrinsic"][b, s, :, :3], moved[:3, :3], atol=1e-6)
            np.testing.assert_allclose(targets["extrinsic"][b, s, :, 3], moved[:3, 3] / scale, atol=1e-5)
            turn = Rotation.from_matrix(moved[:3, :3]).as_quat(canonical=True)
            np.testing.assert_allclose(targets["pose"][b, s, 3:7], turn, atol=1e-5)
    focal = 0.9 * SIZE[1]
    view = torch.tensor([2 * math.atan(n / 2 / focal) for n in SIZE])
    torch.testing.assert_close(targets["pose"][..., 7:], view.expand(2, 3, 2))
    first = torch.tensor([0.0, 0, 0, 0, 0, 0, 1])
    torch.testing.assert_close(targets["pose"][:, 0, :7], first.expand(2, 7), rtol=0, atol=1e-6)


def test_points_depth_and_cameras_of_the_targets_agree():
    targets = geometry_targets(scenes(2, views=3), small(), FACTS)
    e = targets["extrinsic"]
    in_view = torch.einsum("bsij,bshwj->bshwi", e[..., :3], targets["points"]) + e[:, :, None, None, :, 3]
    torch.testing.assert_close(in_view[..., 2], targets["depth"], rtol=1e-5, atol=1e-5)


def test_targets_do_not_depend_on_the_world_or_its_unit():
    labels = scenes(2)
    expected = geometry_targets(labels, small(), FACTS)
    world = torch.cat([rotation_matrix(torch.tensor([0.3, -0.2, 0.9, 0.4])), torch.tensor([[5.0], [6], [7]])], 1)
    back = inverse(world)
    moved = labels | {
        "points": 10 * (labels["points"] @ back[:, :3].T + back[:, 3]),
        "depth": 10 * labels["depth"],
        "extrinsic": compose(labels["extrinsic"], world.expand(2, VIEWS, 3, 4)),
    }
    moved["extrinsic"][..., 3] *= 10
    for name, x in geometry_targets(moved, small(), FACTS).items():
        torch.testing.assert_close(x, expected[name], rtol=1e-4, atol=1e-5)


def test_labels_of_another_size_are_read_under_pixel_centres():
    labels = scenes(1, size=(9, 10))
    labels["confidence"][0, 0, 4, 5] = 0
    facts = GeometryFacts(3, 4)
    rows, columns = ([int((i + 0.5) * full / n) for i in range(n)] for n, full in ((3, 9), (4, 10)))
    assert (rows[1], columns[2]) == (4, 6)
    labels["depth"][0, 1, 4, 6] = math.inf
    chosen = labels | {n: labels[n][:, :, rows][:, :, :, columns] for n in ("depth", "points", "confidence")}
    expected = geometry_targets(chosen, small(), facts)
    expected["pose"] = geometry_targets(labels, small(), GeometryFacts(9, 10))["pose"].clone()
    ours = geometry_targets(labels, small(), facts)
    assert ours["valid"].sum() == 2 * 12 - 1
    for name in ("depth", "points", "confidence", "valid"):
        torch.testing.assert_close(ours[name], expected[name])
    torch.testing.assert_close(ours["pose"][..., 3:], expected["pose"][..., 3:])  # translation has another scale


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("confidence", x) for x in (0.0, -1.0, math.nan, math.inf)),
        *(("depth", x) for x in (0.0, -1.0, math.nan, math.inf)),
        *(("points", x) for x in (math.nan, math.inf)),
    ],
)
def test_a_pixel_without_truth_counts_for_nothing(name, value):
    clean, labels = scenes(2), scenes(2)
    labels[name][0, 0, 2, 3] = value
    targets = geometry_targets(labels, small(), FACTS)
    assert (~targets["valid"]).nonzero().tolist() == [[0, 0, 2, 3]]
    assert all(x.isfinite().all() for x in targets.values())
    distance = geometry_targets(clean, small(), FACTS)["points"][0, 0].double().norm(dim=-1)
    keep = torch.ones(SIZE, dtype=torch.bool)
    keep[2, 3] = False
    torch.testing.assert_close(
        targets["points"][0, 0][keep].double().norm(dim=-1), distance[keep] / distance[keep].mean(), rtol=1e-5, atol=0
    )


def test_a_clip_whose_first_view_has_no_truth_counts_for_nothing():
    labels = scenes(2)
    labels["confidence"][0, 0] = 0
    targets = geometry_targets(labels, small(), FACTS)
    assert targets["scaled"].tolist() == [False, True]
    assert targets["valid"].flatten(1).any(1).tolist() == [False, True]
    outputs = outputs_of()
    alone = geometry_loss({n: x[1:] for n, x in outputs.items()}, {n: x[1:] for n, x in targets.items()}, small(), None)
    for name, part in geometry_loss(outputs, targets, small(), None).items():
        torch.testing.assert_close(part, alone[name])


# -- losses -----------------------------------------------------------------------------------------------------------


def slow_dense_losses(outputs, targets, weight, alpha):
    """Points and depth, pixel by pixel."""
    sums, count = {"points": 0.0, "depth": 0.0}, 0
    for b in range(len(targets["valid"])):
        pixels = targets["valid"][b].nonzero().tolist()
        mean = {}
        for side, x in (("outputs", outputs), ("targets", targets)):
            lengths = [float(x["points"][b][tuple(p)].double().norm()) for p in pixels]
            mean[side] = min(max(sum(lengths) / len(lengths), 1e-3), 1e3)
        for p in map(tuple, pixels):
            predicted, true = (x["points"][b][p].double() for x in (outputs, targets))
            error = {
                "points": float((predicted / mean["outputs"] - true / mean["targets"]).norm()),
                "depth": abs(float(outputs["depth"][b][p]) - float(targets["depth"][b][p])),
            }
            for name, e in error.items():
                if weight == "labels":
                    sums[name] += float(targets["confidence"][b][p]) * e
                else:
                    c = float(outputs[f"{name}_confidence"][b][p])
                    sums[name] += c * e - alpha * math.log(c)
            count += 1
    return {name: x / count for name, x in sums.items()}


def slow_camera_loss(poses, truth):
    total, n = 0.0, poses.shape[2]
    for i in range(n):
        for part, weight in ((slice(0, 3), 1.0), (slice(3, 7), 1.0), (slice(7, 9), 0.5)):
            off = (poses[:, :, i, part] - truth[:, :, part]).double().abs().flatten().tolist()
            huber = [0.5 * x * x if x < 1 else x - 0.5 for x in off]
            total += 0.6 ** (n - 1 - i) * weight * sum(huber) / len(huber)
    return total / n


@pytest.mark.parametrize(("weight", "alpha"), [("learned", 0.2), ("learned", 1.5), ("labels", 0.2)])
def test_loss_is_the_slow_one(weight, alpha):
    labels = scenes(2)
    labels["confidence"][torch.rand(labels["confidence"].shape, generator=torch.Generator().manual_seed(1)) < 0.3] = 0
    config = small(weight=weight, alpha=alpha)
    outputs, targets = outputs_of(), geometry_targets(labels, config, FACTS)
    expected = slow_dense_losses(outputs, targets, weight, alpha)
    expected["camera"] = slow_camera_loss(outputs["poses"], targets["pose"])
    ours = geometry_loss(outputs, targets, config, None)
    assert {n: float(x) for n, x in ours.items()} == pytest.approx(
        {"loss": sum(expected.values()), **expected}, rel=1e-5
    )


def test_scale_is_free_for_points_and_fixed_for_depth_and_cameras():
    config, outputs = small(weight="labels"), outputs_of()
    targets = geometry_targets(scenes(2), config, FACTS)
    before = geometry_loss(outputs, targets, config, None)
    after = geometry_loss(outputs | {n: 3 * outputs[n] for n in ("points", "depth", "poses")}, targets, config, None)
    torch.testing.assert_close(after["points"], before["points"])
    assert after["depth"] > 2 * before["depth"]
    assert after["camera"] > 2 * before["camera"]


def test_a_batch_without_truth_has_loss_0_and_no_gradient():
    labels = scenes(2)
    labels["confidence"][:] = 0
    labels["points"][:] = math.nan
    outputs = {n: x.requires_grad_() for n, x in outputs_of().items()}
    loss = geometry_loss(outputs, geometry_targets(labels, small(), FACTS), small(), None)["loss"]
    loss.backward()
    assert loss == 0
    assert all((x.grad == 0).all() for x in outputs.values() if x.grad is not None)
    assert sum(x.grad is not None for x in outputs.values()) == 5


def test_gradients_stay_finite_where_prediction_and_truth_agree_or_vanish():
    targets = geometry_targets(scenes(2), small(), FACTS)
    same = {"depth": targets["depth"].clone(), "points": targets["points"].clone()}
    nothing = {"depth": torch.zeros_like(same["depth"]), "points": torch.zeros_like(same["points"])}
    for predicted in (same, nothing):
        outputs = {n: x.requires_grad_() for n, x in (outputs_of() | predicted).items()}
        geometry_loss(outputs, targets, small(), None)["loss"].backward()
        assert all(x.grad.isfinite().all() for x in outputs.values())


def test_confidence_learns_alpha_over_error():
    error = torch.tensor([[[[0.01, 0.05, 5.0]]]])
    logit = torch.zeros(1, 1, 1, 3, requires_grad=True)
    optimizer = torch.optim.Adam([logit], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        confident_error(error, 1 + logit.exp(), torch.ones(1, 1, 1, 3, dtype=torch.bool)).backward()
        optimizer.step()
    np.testing.assert_allclose(1 + logit.detach().exp().flatten(), [20, 4, 1], rtol=0.02)  # at least 1


def test_camera_loss_leaves_out_clips_that_do_not_count():
    poses, truth = torch.randn(3, 2, 4, 9), torch.randn(3, 2, 9)
    kept = torch.tensor([True, False, True])
    assert camera_loss(poses, truth, kept).item() == pytest.approx(slow_camera_loss(poses[kept], truth[kept]), rel=1e-5)


# -- heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "pairs"),
    [(0, [0] * 4), (1, [0] * 4), (2, [0, 0, 1, 1]), (3, [0, 1, 2, 2]), (4, [0, 1, 2, 3]), (8, [1, 3, 5, 7])],
)
def test_dense_decoder_reads_the_patches_of_evenly_spread_pairs(depth, pairs):
    assert stage_pairs(depth) == pairs
    decoder = DenseDecoder(16, 2, SIZE, depth=depth, features=8, stages=(8, 4, 8, 4))
    tokens = tokens_of(depth)
    for x in tokens.pairs:
        x.requires_grad_()
    decoder(tokens).square().sum().backward()
    for i, x in enumerate(tokens.pairs):
        patches = GRID[0] * GRID[1]
        assert (x.grad is not None) == (i in pairs)
        if x.grad is not None:
            assert (x.grad[:, :, -patches:].abs().sum(-1) > 0).all()
            assert not x.grad[:, :, :-patches].any()


def slow_dense(decoder, tokens):
    """DPT one view at a time, each step written out."""
    height, width = tokens.grid
    relu, grow = torch.relu, lambda x, size: F.interpolate(x, size, mode="bilinear")
    unit = lambda m, x: x + m.conv2(relu(m.conv1(relu(x))))  # noqa: E731
    out = []
    for clip in range(len(tokens.pairs[0])):
        for view in range(tokens.pairs[0].shape[1]):
            stages = []
            for stage, pair in enumerate(stage_pairs(len(tokens.pairs))):
                x = F.layer_norm(tokens.pairs[pair][clip, view, SPECIAL:], (16,)) * decoder.norm.weight
                x = decoder.project[stage]((x + decoder.norm.bias).T.reshape(1, 16, height, width))
                x = x + slow_position(x.shape[1], height, width)
                stages.append(decoder.narrow[stage](decoder.resize[stage](x)))
            assert [s.shape[2] for s in stages] == [4 * height, 2 * height, height, -(-height // 2)]
            x = decoder.fuse[3].out(grow(unit(decoder.fuse[3].joint, stages[3]), stages[2].shape[2:]))
            for stage in (2, 1, 0):
                f, size = decoder.fuse[stage], stages[stage - 1].shape[2:] if stage else (8 * height, 8 * width)
                x = f.out(grow(unit(f.joint, x + unit(f.own, stages[stage])), size))
            x = grow(decoder.lower(x), SIZE)
            x = decoder.last[0](x + slow_position(x.shape[1], *SIZE))
            out.append(decoder.last[2](relu(x))[0].permute(1, 2, 0))
    return torch.stack(out).view(*tokens.pairs[0].shape[:2], *out[0].shape)


def slow_position(channels, height, width):
    """Element by element."""
    aspect, quarter = SIZE[1] / SIZE[0], channels // 4
    diagonal = math.hypot(1, aspect)
    signal = torch.zeros(channels, height, width)
    for y in range(height):
        for x in range(width):
            places = ((2 * x + 1 - width) / width * aspect / diagonal, (2 * y + 1 - height) / height / diagonal)
            for half, place in enumerate(places):
                for k in range(quarter):
                    angle = place * 100 ** (-k / quarter)
                    signal[2 * quarter * half + k, y, x] = 0.1 * math.sin(angle)
                    signal[2 * quarter * half + quarter + k, y, x] = 0.1 * math.cos(angle)
    return signal


def test_dense_decoder_is_the_one_written_out():
    torch.manual_seed(0)
    decoder = DenseDecoder(16, 4, SIZE, depth=4, features=8, stages=(8, 4, 12, 4))
    nn.init.normal_(decoder.norm.weight)
    nn.init.normal_(decoder.norm.bias)
    tokens = tokens_of(4)
    with torch.no_grad():
        torch.testing.assert_close(decoder(tokens), slow_dense(decoder, tokens), rtol=1e-4, atol=1e-5)
    x = torch.zeros(2, 12, 3, 5)
    torch.testing.assert_close(position_signal(x, SIZE[1] / SIZE[0]), slow_position(12, 3, 5))


def test_camera_decoder_is_the_one_written_out():
    torch.manual_seed(0)
    head = CameraDecoder(16, readout=False, refinements=3, layers=2, heads=2, layer_scale=1.0)
    nn.init.normal_(head.start)
    tokens, expected = tokens_of(2), []
    for clip in tokens.pairs[-1][:, :, 0]:  # [S, 16]
        x = head.norm(clip)
        centred = x - x.mean(1, keepdim=True)
        plain = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
        pose, poses = torch.zeros(1, 9), []
        for i in range(3):
            told = head.embed(head.start[None] if i == 0 else pose)
            shift, scale, gate = (told * told.sigmoid() @ head.modulate[1].weight.T + head.modulate[1].bias).split(
                16, 1
            )
            y = (x + gate * (shift + plain + plain * scale))[None]
            for block in head.blocks:
                y = block(y, None)
            pose = pose + head.read(y)[0]
            poses.append(torch.cat([pose[:, :7], (1 + pose[:, 7:].exp()).log()], 1))
        expected.append(torch.stack(poses, 1))
    torch.testing.assert_close(head(tokens), torch.stack(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("readout", [False, True])
def test_camera_decoder_knows_views_as_the_first_and_the_others(readout):
    torch.manual_seed(0)
    head = CameraDecoder(16, readout=readout, refinements=2, layers=2, heads=2, layer_scale=1.0)
    tokens = tokens_of(0 if readout else 2, views=4)
    poses = head(tokens)
    order = [0, 3, 1, 2]
    swapped = head(Tokens([x[:, order] for x in tokens.pairs], GRID))
    torch.testing.assert_close(swapped, poses[:, order], rtol=1e-4, atol=1e-5)
    first = head(Tokens([x[:, [1, 0, 2, 3]] for x in tokens.pairs], GRID))[:, [1, 0, 2, 3]]
    difference = (first - poses).abs().amax()
    assert difference > 1e-3 if readout else difference < 1e-5  # with a backbone the camera tokens differ already


@pytest.mark.parametrize("readout", [False, True])
def test_camera_decoder_reads_the_camera_token_or_the_mean_patch(readout):
    head = CameraDecoder(16, readout=readout, refinements=2, layers=1, heads=2)
    tokens = tokens_of(0 if readout else 2)
    for x in tokens.pairs:
        x.requires_grad_()
    head(tokens).square().sum().backward()
    used = tokens.pairs[-1].grad
    if readout:
        torch.testing.assert_close(used, used.mean(2, keepdim=True).expand_as(used))  # all patches alike
        assert used.any()
    else:
        assert (used[:, :, 0].abs().sum(-1) > 0).all()
        assert not used[:, :, 1:].any()
        assert tokens.pairs[0].grad is None


def test_without_a_backbone_cameras_see_all_patches_in_any_order():
    torch.manual_seed(0)
    head, tokens = GeometryHead(16, small(depth=0), FACTS), tokens_of(0)
    shuffled = Tokens([x[:, :, torch.randperm(GRID[0] * GRID[1])] for x in tokens.pairs], GRID)
    before, after = head(tokens), head(shuffled)
    torch.testing.assert_close(after["poses"], before["poses"])
    assert (after["depth"] - before["depth"]).abs().max() > 1e-3


def test_refinements_build_on_each_other_without_gradient_between_them():
    torch.manual_seed(0)
    two, four = (CameraDecoder(16, readout=False, refinements=n, layers=1, heads=2) for n in (2, 4))
    two.load_state_dict(four.state_dict())
    tokens = tokens_of(1)
    poses = four(tokens)
    torch.testing.assert_close(two(tokens), poses[:, :, :2])
    assert (poses[:, :, 1] - poses[:, :, 0]).abs().max() > 1e-3
    assert (poses[..., 7:] > 0).all()  # angles of view
    for i in range(4):
        gradient = torch.autograd.grad(poses[:, :, i].sum(), four.start, retain_graph=True)[0]
        assert gradient.any() == (i == 0)  # `start` is what the first one is told


def test_activations():
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    expected = [math.copysign(math.exp(abs(v)) - 1, v) for v in x.tolist()]
    np.testing.assert_allclose(inverse_log(x), expected, rtol=1e-12)
    head = GeometryHead(16, small(), FACTS)
    nn.init.zeros_(head.depth.last[2].weight)
    nn.init.zeros_(head.points.last[2].weight)
    head.depth.last[2].bias.data = torch.tensor([0.5, -1.0])
    head.points.last[2].bias.data = torch.tensor([0.5, -0.5, 2.0, 1.0])
    outputs = head(tokens_of(1))
    for name, value in (
        ("depth", math.exp(0.5)),
        ("depth_confidence", 1 + math.exp(-1)),
        ("points_confidence", 1 + math.e),
    ):
        assert outputs[name].shape == (2, 3, *SIZE)
        torch.testing.assert_close(outputs[name], torch.full_like(outputs[name], value))
    points = torch.tensor([math.expm1(0.5), -math.expm1(0.5), math.expm1(2)])
    torch.testing.assert_close(outputs["points"], points.expand(2, 3, *SIZE, 3))


def test_heads_compute_in_float32_within_autocast():
    head = GeometryHead(16, small(), FACTS)
    tokens = tokens_of(1)
    half = Tokens([x.bfloat16() for x in tokens.pairs], GRID)
    with torch.no_grad():
        expected = head(Tokens([x.float() for x in half.pairs], GRID))
        with torch.autocast("cpu", torch.bfloat16):
            ours = head(half)
    for name, x in ours.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_gradients_reach_every_parameter(depth):
    torch.manual_seed(0)
    config = small(depth=depth)
    backbone = Backbone(16, depth, heads=2)
    head = GEOMETRY.head(backbone.width, config, FACTS)
    outputs = head(backbone(torch.randn(2, VIEWS, *GRID, 16)))
    loss = geometry_loss(outputs, geometry_targets(scenes(2), config, FACTS), config, None)
    loss["loss"].backward()
    named = [*backbone.named_parameters(), *head.named_parameters()]
    assert [n for n, p in named if p.grad is None or not p.grad.any() or not p.grad.isfinite().all()] == []


def test_heads_say_what_they_want():
    with pytest.raises(ValueError, match=r"4 stages of a multiple of 4 channels.*got \[8, 6, 8, 8\] and 8"):
        GeometryHead(16, small(stages=(8, 6, 8, 8)), FACTS)
    with pytest.raises(ValueError, match=r"features a multiple of 8, got \[8, 8, 8\] and 12"):
        GeometryHead(16, small(stages=(8, 8, 8), features=12), FACTS)
    with pytest.raises(ValueError, match="tokens of 3 heads of equal width, got 16 channels"):
        GeometryHead(16, small(heads=3), FACTS)
    with pytest.raises(ValueError, match="refinements and camera_layers must be at least 1, got 0 and 1"):
        GeometryHead(16, small(refinements=0), FACTS)
    with pytest.raises(ValueError, match=r"at least 1 x 1, got \(0, 8\)"):
        GeometryHead(16, small(), GeometryFacts(0, 8))


# -- the task ---------------------------------------------------------------------------------------------------------


class DepthLabels:
    """Labels of which only the size of depth matters."""

    def read(self, clip_id, frames, wanted):
        assert (clip_id, frames, wanted) == ("a", [0], ("depth",))
        return {"depth": torch.ones(1, 7, 9)}


def test_facts_are_the_size_of_the_labels_or_the_one_asked_for():
    assert geometry_facts(DepthLabels(), ["a", "b"], small()) == GeometryFacts(7, 9)
    for size in ("4x6", (4, 6), [4, 6]):
        assert geometry_facts(None, [], small(out_size=size)) == GeometryFacts(4, 6)
    facts = GEOMETRY.facts_type(**json.loads(json.dumps(asdict(GeometryFacts(7, 9)))))
    assert facts == GeometryFacts(7, 9)


@pytest.mark.parametrize("value", ["4", "4x", "x", "4x0", "4x-6", "4x6x8", (4, 6, 8), (4, 1.5), 4, [True, 4]])
def test_out_size_must_be_two_positive_integers(value):
    with pytest.raises(ValueError, match="out_size must be HEIGHTxWIDTH like 56x98"):
        parse_out_size(value)


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"weight must be one of learned, labels .* got 'mean' and 'pair'"):
        geometry_facts(DepthLabels(), ["a"], small(weight="mean"))
    with pytest.raises(ValueError, match="auc one of pair, batch, got 'learned' and 'all'"):
        geometry_facts(DepthLabels(), ["a"], small(auc="all"))
    with pytest.raises(ValueError, match="alpha must be more than 0, got 0"):
        geometry_facts(DepthLabels(), ["a"], small(alpha=0))
    with pytest.raises(ValueError, match="at least 1 training clip"):
        geometry_facts(DepthLabels(), [], small())


def features_with_the_answer(targets):  # -> [B, S, *GRID, C]
    """Per patch log depth and squashed points of its pixels, and the view's pose."""
    points = targets["points"]
    each = torch.cat([targets["depth"][..., None].log(), points.sign() * points.abs().log1p()], -1)
    patch = [SIZE[i] // GRID[i] for i in (0, 1)]
    each = each.unflatten(3, (GRID[1], patch[1])).unflatten(2, (GRID[0], patch[0])).transpose(3, 4).flatten(4)
    return torch.cat([each, targets["pose"][:, :, None, None].expand(-1, -1, *GRID, -1)], -1)


def scores_after_training(features, targets, steps):
    """Metrics on clips that were not trained on, the last 64."""
    torch.manual_seed(0)
    config = small(embed=64, heads=4, depth=0, layer_scale=1.0, weight="labels")
    read, head = nn.Linear(features.shape[-1], 64), GeometryHead(64, config, FACTS)
    backbone = Backbone(64, 0)
    optimizer = torch.optim.AdamW([*read.parameters(), *head.parameters()])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        rows = torch.randint(len(features) - 64, (8,))
        optimizer.zero_grad()
        outputs = head(backbone(read(features[rows])))
        geometry_loss(outputs, {n: x[rows] for n, x in targets.items()}, config, None)["loss"].backward()
        optimizer.step()
        schedule.step()
    metrics = GEOMETRY.metrics(config, FACTS)
    with torch.no_grad():
        metrics.update(head(backbone(read(features[-64:]))), {n: x[-64:] for n, x in targets.items()})
    return metrics.result()


def test_cameras_are_read_from_features_with_them():
    torch.manual_seed(0)
    targets = geometry_targets(scenes(320), small(), FACTS)
    features = features_with_the_answer(targets)
    read = nn.Linear(features.shape[-1], 64)
    head = CameraDecoder(64, readout=True, refinements=2, layers=1, heads=4, layer_scale=1.0)
    optimizer = torch.optim.AdamW([*read.parameters(), *head.parameters()])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=400, pct_start=0.1)
    for _ in range(400):
        rows = torch.randint(256, (16,))
        optimizer.zero_grad()
        poses = head(Tokens([read(features[rows]).flatten(2, 3)], GRID))
        camera_loss(poses, targets["pose"][rows], targets["scaled"][rows]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        poses = head(Tokens([read(features[-64:]).flatten(2, 3)], GRID))[:, :, -1]
    rotation, translation = pair_errors(decode_extrinsic(poses), targets["extrinsic"][-64:])
    assert area_under_curve(rotation.maximum(translation), 30) > 0.85


def test_features_with_the_answer_are_read_and_noise_is_not():
    targets = geometry_targets(scenes(320), small(), FACTS)
    features = features_with_the_answer(targets)
    found = scores_after_training(features, targets, steps=150)
    assert found["AbsRel"] < 0.04
    assert found["delta_1.25"] > 0.99
    assert found["point_error"] < 0.2
    assert found["RTA@30"] > 0.9
    assert found["AUC@30"] > 0.3
    chance = scores_after_training(torch.randn_like(features), targets, steps=40)
    depth = targets["depth"][-64:]
    middle = depth.flatten(1).median(1).values[:, None, None, None]
    assert chance["AbsRel"] > 0.9 * ((middle - depth).abs() / depth).mean()  # what one depth for all pixels gets
    assert chance["point_error"] > 0.4
    assert chance["AUC@30"] < 0.1
