"""The instance task: pixels between tokens, sampling, loss, clustering beside the forward pass, and what is learnt."""

import threading

import grouping_reference as reference
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA

from spatialprobe.probes.backbone import Backbone, Tokens
from spatialprobe.probes.grouping import group
from spatialprobe.probes.heads.pixel_embedding import PixelEmbedding, at_pixels
from spatialprobe.probes.metrics.instance import Grouping, InstanceMetrics, resize_nearest, score_scene
from spatialprobe.probes.probe import Probe
from spatialprobe.probes.tasks.instance import INSTANCE, instance_loss, predict, sample_pixels


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def config(**settings):
    return INSTANCE.defaults.with_settings(**{"embed": 16, "heads": 2, "depth": 0, "dropout": 0.0, **settings})


# -- head -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mlp", "linear"])
@pytest.mark.parametrize("special", [0, 5])
def test_the_head_reads_each_patch_alone_and_gives_unit_vectors(kind, special):
    torch.manual_seed(0)
    head = PixelEmbedding(12, 7, kind)
    last = torch.randn(2, 3, special + 20, 12)
    found = head(Tokens([torch.full_like(last, torch.nan), last], (4, 5)))["embeddings"]
    for view, y, x in [(0, 0, 0), (2, 3, 4), (1, 2, 1)]:
        token = last[1, view, special + 5 * y + x].double()
        for layer in [head.layers] if kind == "linear" else head.layers:
            linear = isinstance(layer, torch.nn.Linear)
            token = layer.weight.double() @ token + layer.bias.double() if linear else F.gelu(token)
        torch.testing.assert_close(found[1, view, y, x].double(), token / token.norm(), rtol=0, atol=1e-6)
    assert [tuple(p.shape) for p in head.parameters() if p.ndim == 2] == (
        [(7, 12)] if kind == "linear" else [(64, 12), (64, 64), (7, 64)]
    )


def test_lengths_are_1_in_float32_under_autocast():
    head = PixelEmbedding(12)
    with torch.autocast("cpu", torch.bfloat16):
        found = head(Tokens([100 * torch.randn(1, 2, 6, 12)], (2, 3)))["embeddings"]
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(1, 2, 2, 3), rtol=0, atol=1e-6)


# -- pixels between tokens --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "size"),
    [((3, 5), (7, 13)), ((1, 1), (2, 3)), ((4, 4), (4, 4)), ((6, 5), (3, 11)), ((15, 26), (54, 72)), ((2, 9), (1, 1))],
)
def test_single_pixels_equal_the_whole_upsampled_map(grid, size):
    torch.manual_seed(0)
    embeddings = F.normalize(torch.randn(2, 3, *grid, 4, dtype=torch.float64), dim=-1).requires_grad_()
    pixels = torch.randperm(2 * 3 * size[0] * size[1])[:500].view(2, -1)
    whole = F.interpolate(embeddings.flatten(0, 1).movedim(-1, 1), size, mode="bilinear", align_corners=False)
    expected = F.normalize(whole.movedim(1, -1).flatten(0, 2)[pixels], dim=-1)
    found = at_pixels(embeddings, pixels, size)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(expected)
    gradients = [torch.autograd.grad(x, embeddings, upstream)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_single_pixels_at_the_published_size_in_float32():
    torch.manual_seed(0)
    embeddings = F.normalize(torch.randn(1, 2, 15, 26, 8), dim=-1)
    pixels = torch.randint(2 * 540 * 720, (1, 3000))
    whole = F.interpolate(embeddings[0].movedim(-1, 1), (540, 720), mode="bilinear", align_corners=False)
    expected = F.normalize(whole.movedim(1, -1).flatten(0, 2)[pixels], dim=-1)
    torch.testing.assert_close(at_pixels(embeddings, pixels, (540, 720)), expected, rtol=0, atol=1e-5)


# -- sampling ---------------------------------------------------------------------------------------------------------


def test_pixels_are_drawn_from_instances_without_replacement_where_there_are_enough():
    instances = torch.zeros(4, 2, 30, 40, dtype=torch.int32)
    instances[0] = 7  # every pixel
    instances[1, 1, 10, :20] = 2  # 20 of 2400: none of the first tries may hit
    instances[2, 0, 0, :5] = 1  # 5: fewer than wanted
    drawn = sample_pixels(instances, 16, generator())  # clip 3 shows nothing
    assert drawn.shape == (3, 16)
    assert [len(set(row.tolist())) for row in drawn[:2]] == [16, 16]
    assert set(drawn[2].tolist()) <= set(range(2 * 2400, 2 * 2400 + 5))
    assert (instances.flatten()[drawn] == torch.tensor([[7], [2], [1]])).all()
    exactly = sample_pixels(instances[1:2], 20, generator())
    assert exactly.sort().values.tolist() == [list(range(1200 + 400, 1200 + 420))]


@pytest.mark.parametrize(("shown", "pixels"), [(240, 30), (24, 6), (20, 60), (240, 200)])
def test_every_pixel_is_drawn_equally_often(shown, pixels):
    instances = torch.zeros(1, 2, 10, 12, dtype=torch.int32)
    places = torch.randperm(240, generator=generator(1))[:shown]
    instances.view(-1)[places] = 1
    rounds, source = 2000, generator(2)
    counts = sum(torch.bincount(sample_pixels(instances, pixels, source)[0], minlength=240) for _ in range(rounds))
    assert counts.sum() == rounds * pixels
    expected = rounds * pixels / shown
    share = pixels / shown
    deviation = (expected * (1 - share if pixels <= shown else 1)) ** 0.5
    assert ((counts[places] - expected).abs() < 5 * deviation).all()
    assert counts[places].double().std() > 0.7 * deviation, "more even than chance: not drawn independently"


def test_what_is_drawn_for_a_clip_depends_on_the_generator_alone():
    instances = torch.randint(0, 3, (3, 2, 20, 20), generator=generator())
    instances[1] = 0
    instances[1, 0, 0, :3] = 1  # takes the second look, which must not shift the clip after it
    first, again, other = (sample_pixels(instances, 50, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    instances[1] = 0
    assert torch.equal(sample_pixels(instances, 50, generator(1)), first[[0, 2]])
    same = sample_pixels(torch.ones(2, 2, 20, 20, dtype=torch.int32), 50, generator(1))
    assert not torch.equal(same[0], same[1] - 800), "clips of equal masks get draws of their own"
    source = generator(1)
    assert not torch.equal(sample_pixels(instances, 50, source), sample_pixels(instances, 50, source))


# -- loss -------------------------------------------------------------------------------------------------------------


def slow_loss(embeddings, instances, pixels, margin):
    """Pairs one by one, in float64, on the whole upsampled map."""
    whole = F.interpolate(embeddings.double().flatten(0, 1).movedim(-1, 1), instances.shape[2:], mode="bilinear")
    whole, ids = whole.movedim(1, -1).reshape(-1, embeddings.shape[-1]).numpy(), instances.flatten().tolist()
    pull, push = [], []
    for clip in pixels.tolist():
        for i, a in enumerate(clip):
            for j, b in enumerate(clip):
                if i == j:
                    continue
                u, v = (whole[p] / np.sqrt((whole[p] ** 2).sum()) for p in (a, b))
                distance = np.sqrt(((u - v) ** 2).sum())
                if ids[a] == ids[b]:
                    pull.append(distance)
                else:
                    push.append(max(0.0, margin - distance))
    return sum(float(np.mean(x)) for x in (pull, push) if x)


@pytest.mark.parametrize("case", ["random", "few pixels", "one instance", "each its own", "one view", "a clip empty"])
def test_the_loss_equals_its_definition(case):
    torch.manual_seed(0)
    instances = torch.randint(0, 4, (2, 1 if case == "one view" else 2, 9, 8), dtype=torch.int32)
    if case == "few pixels":
        instances[:, :, 1:] = 0
    elif case == "one instance":
        instances.clamp_(max=1)
    elif case == "each its own":
        instances = torch.arange(1, instances.numel() + 1, dtype=torch.int32).view_as(instances)
    elif case == "a clip empty":
        instances[1] = 0
    embeddings = F.normalize(torch.randn(2, instances.shape[1], 4, 5, 6), dim=-1)
    settings = config(pixels=24, margin=1.3)
    found = instance_loss({"embeddings": embeddings}, {"instances": instances}, settings, generator(3))["loss"]
    expected = slow_loss(embeddings, instances, sample_pixels(instances, 24, generator(3)), 1.3)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_a_batch_without_instances_has_no_loss_and_no_gradient():
    embeddings = torch.randn(2, 2, 3, 3, 8, requires_grad=True)
    empty = {"instances": torch.zeros(2, 2, 9, 9, dtype=torch.int32)}
    loss = instance_loss({"embeddings": embeddings}, empty, config(), generator())["loss"]
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(embeddings.grad, torch.zeros_like(embeddings))


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_gradients_reach_every_parameter(depth, kind):
    settings = config(depth=depth, head=kind, pixels=40, layer_scale=1.0)
    probe = Probe(INSTANCE, settings, 6, None)
    outputs = probe.read(torch.randn(2, 2, 3, 4, 16))
    labels = {"instance_masks": torch.randint(0, 4, (2, 2, 12, 16), dtype=torch.int32)}
    targets = INSTANCE.targets(labels, settings, None)
    INSTANCE.loss(outputs, targets, settings, generator())["loss"].backward()
    # The last pair's camera and register tokens are not read, but reach the patches by attention.
    missing = [
        n for n, p in probe.named_parameters() if not n.startswith("input") and (p.grad is None or not p.grad.any())
    ]
    assert not missing


# -- metrics ----------------------------------------------------------------------------------------------------------

SMALL = Grouping(components=3, min_cluster_size=8, min_samples=3)


def scene(seed: int, views: int = 3, grid=(8, 10), size=(20, 30), instances: int = 4, noise: float = 0.3):
    """Token embeddings [S, h, w, 6] that follow a map of vertical bands, and the bands as masks."""
    rng = np.random.default_rng(seed)
    prototypes = rng.normal(size=(instances + 1, 6))
    bands = lambda width, v: (np.arange(width) * 10 + v * width) * (instances + 1) // (width * (10 + views))  # noqa: E731
    tokens = np.stack([np.tile(prototypes[bands(grid[1], v)], (grid[0], 1, 1)) for v in range(views)])
    tokens = tokens + noise * rng.normal(size=tokens.shape)
    masks = np.stack([np.tile(bands(size[1], v), (size[0], 1)) for v in range(views)])
    return torch.from_numpy(tokens).float(), torch.from_numpy(masks).int()


def slow_score(embeddings, truth, grouping=SMALL):
    flat = embeddings.double().numpy().reshape(-1, embeddings.shape[-1])
    scores = PCA(grouping.components, svd_solver="full").fit_transform(flat)
    labels = group(scores, min_cluster_size=grouping.min_cluster_size, min_samples=grouping.min_samples)
    labels = labels.reshape(embeddings.shape[:-1])
    up = np.empty(truth.shape, np.int64)
    for y in range(truth.shape[1]):
        for x in range(truth.shape[2]):
            up[:, y, x] = labels[:, y * labels.shape[1] // truth.shape[1], x * labels.shape[2] // truth.shape[2]]
    return (*reference.temporal_overlap(up, truth.numpy())[:2], labels.max() + 1, (labels < 0).mean())


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_metrics_equal_the_mean_of_slow_scores(threads):
    scenes = [scene(seed, noise=0.2 + 0.1 * seed) for seed in range(7)]
    expected = np.mean([slow_score(*s) for s in scenes], axis=0)
    metrics = InstanceMetrics(SMALL, threads=threads, backlog=2)
    for part in (scenes[:3], scenes[3:4], scenes[4:]):
        tokens, masks = (torch.stack(x) for x in zip(*part, strict=True))
        metrics.update({"embeddings": tokens.requires_grad_()}, {"instances": masks})
    found = metrics.result()
    assert [found[n] for n in ("T-mIoU", "T-SR", "clusters", "noise")] == pytest.approx(expected, rel=1e-9)
    assert (found["scenes_scored"], found["scenes"]) == (7, 7)
    assert metrics.result() == found
    assert 0.05 < found["T-SR"] < found["T-mIoU"] < 0.95, "the scenes are too easy or too hard to tell"
    assert [s.miou for s in metrics.scores] == pytest.approx([slow_score(*s)[0] for s in scenes], rel=1e-9)


@pytest.mark.parametrize("size", [(8, 10), (5, 7), (4, 31), (16, 6), (1, 1)])
def test_masks_of_any_size_and_aspect(size):
    embeddings, truth = scene(1, size=size)
    found = score_scene(embeddings, truth, SMALL)
    expected = slow_score(embeddings, truth)
    if not truth.any():
        assert found is None
        return
    assert (found.miou, found.success_rate) == pytest.approx(expected[:2], rel=1e-9)


def test_labels_are_resized_to_the_nearest_cell():
    labels = np.random.default_rng(0).integers(-1, 9, (2, 15, 26))
    for height in (1, 7, 15, 54, 61):
        for width in (1, 20, 26, 72, 97):
            expected = F.interpolate(torch.from_numpy(labels)[:, None].double(), (height, width), mode="nearest")
            np.testing.assert_array_equal(resize_nearest(labels, (height, width)), expected[:, 0].long().numpy())
    np.testing.assert_array_equal(resize_nearest(np.array([[[1, 2]]]), (1, 5)), [[[1, 1, 1, 2, 2]]])


def test_scenes_without_instances_are_left_out_and_counted():
    tokens, masks = scene(0)
    metrics = InstanceMetrics(SMALL)
    metrics.update({"embeddings": torch.stack([tokens] * 3)}, {"instances": torch.stack([masks, 0 * masks, masks])})
    found = metrics.result()
    assert found["T-mIoU"] == pytest.approx(slow_score(tokens, masks)[0])
    assert (found["scenes_scored"], found["scenes"]) == (2, 3)
    empty = InstanceMetrics(SMALL)
    empty.update({"embeddings": tokens[None]}, {"instances": 0 * masks[None]})
    found = empty.result()
    assert np.isnan([found["T-mIoU"], found["T-SR"], found["clusters"], found["noise"]]).all()
    assert (found["scenes_scored"], found["scenes"]) == (0, 1)
    with pytest.raises(ValueError, match="at least 1 scene, got none"):
        InstanceMetrics(SMALL).result()


def test_one_view_and_all_noise():
    tokens, masks = scene(0, views=1, size=(8, 10), noise=0.05)
    found = score_scene(tokens, masks, SMALL)
    assert (found.miou, found.success_rate) == pytest.approx(slow_score(tokens, masks)[:2])
    assert found.miou == 1
    nothing = score_scene(tokens, masks, Grouping(components=3, min_cluster_size=81))
    assert (nothing.miou, nothing.success_rate, nothing.clusters, nothing.noise) == (0, 0, 0, 1)


class Held(Grouping):
    """Labels that wait to be let go, and a count of how many scenes have begun."""

    gate, begun = threading.Event(), threading.Semaphore(0)

    def labels(self, embeddings):
        self.begun.release()
        assert self.gate.wait(10)
        return np.zeros(embeddings.shape[:-1], np.int64)


def test_clustering_goes_on_beside_the_caller_and_few_scenes_wait():
    tokens, masks = scene(0)
    held = Held()
    metrics = InstanceMetrics(held, threads=2, backlog=3)
    batch = {"embeddings": tokens[None]}, {"instances": masks[None]}
    for _ in range(3):
        metrics.update(*batch)  # returns although no scene can end
    assert all(held.begun.acquire(timeout=10) for _ in range(2)), "two threads work"
    assert not held.begun.acquire(timeout=0.05), "the third scene waits for a thread"
    fourth = threading.Thread(target=metrics.update, args=batch)
    fourth.start()
    fourth.join(0.2)
    assert fourth.is_alive(), "a fourth scene waits for the oldest"
    held.gate.set()
    fourth.join(10)
    assert metrics.result()["scenes"] == 4


def test_an_error_in_a_scene_is_not_lost():
    tokens, masks = scene(0)
    metrics = InstanceMetrics(SMALL)
    metrics.update({"embeddings": tokens[None] * torch.nan}, {"instances": masks[None]})
    with pytest.raises(ValueError, match="row 0"):
        metrics.result()


def test_predictions_are_the_groups_at_the_size_of_the_masks():
    scenes = [scene(seed) for seed in (0, 1)]
    settings = config(components=3, min_cluster_size=8, min_samples=3)
    found = predict({"embeddings": torch.stack([tokens for tokens, _ in scenes])}, (20, 30), settings)
    for labels, (tokens, truth) in zip(found, scenes, strict=True):
        expected = slow_score(tokens, truth)
        assert reference.temporal_overlap(labels, truth.numpy())[:2] == pytest.approx(expected[:2])
        assert (labels < 0).any()


# -- what is learnt ---------------------------------------------------------------------------------------------------


def rooms(clips: int, seed: int, answers: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [B, 3, 10, 12, 12] and masks [B, 3, 40, 48] of six fields whose borders move from view to view.

    With `answers` a token's features are its instance as a noisy one-hot, else noise alone.
    """
    rng = np.random.default_rng(seed)
    tokens = np.zeros((clips, 3, 10, 12), np.int32)
    for clip, view in np.ndindex(clips, 3):
        row, left, right = rng.integers((4, 3, 7), (7, 6, 10))
        for y, x in np.ndindex(10, 12):
            tokens[clip, view, y, x] = 1 + 3 * (y >= row) + (x >= left) + (x >= right)
    features = rng.normal(size=(*tokens.shape, 12)) * 0.15
    if answers:
        features[..., :7] += tokens[..., None] == np.arange(7)
    return torch.from_numpy(features).float(), torch.from_numpy(tokens.repeat(4, 2).repeat(4, 3))


def learn(settings, answers: bool, steps: int) -> dict[str, float]:
    """T-mIoU and T-SR on clips that were not trained on."""
    torch.manual_seed(0)
    project, backbone = (
        torch.nn.Linear(12, settings.embed),
        Backbone(settings.embed, settings.depth, heads=settings.heads),
    )
    head = INSTANCE.head(backbone.width, settings, None)
    parameters = [p for module in (project, backbone, head) for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr)
    features, masks = rooms(12, seed=0, answers=answers)
    for step in range(steps):
        chosen = torch.arange(4) + 4 * (step % 3)
        targets = INSTANCE.targets({"instance_masks": masks[chosen]}, settings, None)
        outputs = head(backbone(project(features[chosen])))
        loss = INSTANCE.loss(outputs, targets, settings, generator(step))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    metrics = INSTANCE.metrics(settings, None)
    features, masks = rooms(4, seed=1, answers=answers)
    with torch.no_grad():
        metrics.update(head(backbone(project(features))), INSTANCE.targets({"instance_masks": masks}, settings, None))
    return metrics.result()


@pytest.mark.parametrize(("depth", "kind", "steps"), [(0, "mlp", 40), (0, "linear", 60), (1, "mlp", 40)])
def test_features_that_hold_the_answer_are_grouped(depth, kind, steps):
    settings = config(embed=32, heads=4, depth=depth, head=kind, pixels=128, lr=1e-2)
    found = learn(settings, answers=True, steps=steps)
    assert found["T-mIoU"] > 0.97
    assert found["T-SR"] == 1


def test_noise_gives_chance():
    found = learn(config(embed=32, heads=4, pixels=128, lr=1e-2), answers=False, steps=40)
    assert found["T-mIoU"] < 0.2
    assert found["T-SR"] == 0


# -- bad settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"head": "deep"}, "head must be one of mlp, linear, got 'deep'"),
        ({"dims": 4}, "dims must be an integer of at least 8, got 4"),
        ({"components": 0}, "components must be an integer of at least 1, got 0"),
        ({"min_cluster_size": 1}, "min_cluster_size must be an integer of at least 2, got 1"),
        ({"min_samples": 2.5}, "min_samples must be an integer, got 2.5"),
        ({"pixels": 1}, "pixels must be an integer of at least 2, got 1"),
        ({"pixels": "all"}, "pixels must be an integer, got 'all'"),
        ({"margin": 0}, "margin must be a positive number, got 0"),
        ({"margin": float("nan")}, "margin must be a positive number, got nan"),
    ],
)
def test_bad_options_are_refused_before_training(settings, match):
    with pytest.raises(ValueError, match=match):
        Probe(INSTANCE, config(**settings), 6, None)


def test_bad_threads_are_refused():
    with pytest.raises(ValueError, match="threads and backlog must be at least 1, got 0 and 3"):
        InstanceMetrics(SMALL, threads=0, backlog=3)
