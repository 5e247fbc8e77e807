"""Training-free probes: neighbours against slow definitions, geometry against the renderer's own rays, and both bounds:
features that hold the answer reach the ceiling, noise reaches the chance that is reported."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from spatialprobe.engine.demo.render import cast_room, hit_box, render, surfaces_of
from spatialprobe.engine.demo.scene_files import write_demo
from spatialprobe.engine.demo.scenes import make_scene
from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.types import FeatureSpec, FrameSelection
from spatialprobe.kernels.pool_features import finish
from spatialprobe.probes.labels import DemoLabels, presence_rates
from spatialprobe.probes.loading.sampling import FrameSampling, generator
from spatialprobe.probes.metrics.tagging import tagging_scores
from spatialprobe.probes.training_free import (
    MatchingRecall,
    Seen,
    cell_centres,
    correspondences,
    describe,
    nearest,
    neighbour_tagging,
    view_correspondence,
    vote,
)

GRID, SIZE = (12, 20), (48, 80)  # cells of 4 x 4 pixels
RADII = (3.0, 6.0, 12.0)  # the first is half a cell's diagonal
FRAMES = 49


# -- neighbours -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("queries", "rows", "channels", "k"), [(1, 1, 1, 1), (5, 7, 3, 7), (30, 41, 17, 4)])
def test_nearest_are_those_of_largest_cosine(queries, rows, channels, k):
    rng = torch.Generator().manual_seed(rows)
    x, base = torch.randn(queries, channels, generator=rng), torch.randn(rows, channels, generator=rng) * 5
    cosine = F.cosine_similarity(x.double()[:, None], base.double(), dim=-1)
    similarity, index = nearest(x, base, k)
    expected = cosine.sort(1, descending=True)
    torch.testing.assert_close(similarity.double(), expected.values[:, :k], rtol=0, atol=1e-6)
    assert index.tolist() == expected.indices[:, :k].tolist()


def test_neighbours_that_cannot_be_found_are_named():
    x = torch.randn(3, 4)
    for k in (0, 4):
        with pytest.raises(ValueError, match=rf"k must be 1 .. 3, the rows to choose from, got {k}"):
            nearest(x, x, k)
    x[1, 2] = math.inf
    with pytest.raises(ValueError, match="features must be finite"):
        nearest(torch.randn(3, 4), x, 1)


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_a_clip_is_described_by_all_its_tokens(pool):
    features = torch.randn(3, 2, 4, 5, 6)
    for clip, got in zip(features.double().numpy(), describe(features, pool), strict=True):
        np.testing.assert_allclose(got, getattr(clip.reshape(-1, 6), pool)(0), atol=1e-6)


def test_unknown_descriptions_and_temperatures_are_named():
    with pytest.raises(ValueError, match="pool must be one of mean, max, got 'min'"):
        describe(torch.zeros(1, 1, 1, 1, 1), "min")
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        vote(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.bool), 0)


def test_votes_are_weighted_by_similarity():
    rng = torch.Generator().manual_seed(0)
    similarity, rows = torch.rand(6, 4, generator=rng), torch.randint(0, 9, (6, 4), generator=rng)
    present = torch.rand(9, 3, generator=rng) < 0.5
    got = vote(similarity, rows, present, 0.3)
    for q in range(6):
        weights = [math.exp(s / 0.3) for s in similarity[q].tolist()]
        for c in range(3):
            share = sum(w for w, row in zip(weights, rows[q].tolist(), strict=True) if present[row, c]) / sum(weights)
            assert got[q, c].item() == pytest.approx(share, rel=1e-5)


def test_neighbours_that_share_classes_score_one_and_strangers_score_chance():
    rng = torch.Generator().manual_seed(0)
    kinds = torch.rand(12, 8, generator=rng) < 0.4  # rooms of 12 kinds
    kind = torch.randint(0, 12, (800,), generator=rng)
    present, rates = kinds[kind], [0.4] * 8
    marked = F.one_hot(kind, 12)[:, None, None, None] + 0.3 * torch.randn(800, 2, 2, 3, 12, generator=rng)
    noise = torch.randn(800, 2, 2, 3, 12, generator=rng)
    results = []
    for features in (marked, noise):
        x = describe(features)
        scores = vote(*nearest(x[400:], x[:400], 10), present[:400])
        results.append(tagging_scores(scores, present[400:], rates, cut=0.5))
    assert results[0]["mAP"] > 0.999
    assert results[0]["OF1"] > 0.999
    assert abs(results[1]["mAP"] - results[1]["mAP_chance"]) < 0.05


# -- geometry -------------------------------------------------------------------------------------------------------


def test_cells_divide_the_image_evenly():
    assert cell_centres((1, 2), (4, 8)).tolist() == [[1.5, 1.5], [5.5, 1.5]]
    assert cell_centres((2, 3), (2, 3)).tolist() == [[u, v] for v in (0, 1) for u in (0, 1, 2)]
    u, v = cell_centres((3, 2), (5, 9))[3]  # second row, second column
    assert (u, v) == (pytest.approx(1.5 * 9 / 2 - 0.5), pytest.approx(2))


def plane(distance=2.0, size=(6, 8), focal=5.0):
    """A wall before two equal cameras that look at it squarely."""
    intrinsic = torch.tensor([[focal, 0, 3.5], [0, focal, 2.5], [0, 0, 1]]).expand(2, 3, 3).clone()
    extrinsic = torch.eye(4)[:3].expand(2, 3, 4).clone()
    return {"depth": torch.full((2, *size), distance), "extrinsic": extrinsic, "intrinsic": intrinsic}


def test_a_shifted_camera_sees_a_wall_shifted():
    views = plane()
    same = correspondences(**views, grid=(6, 8))
    assert same.cells.tolist() == list(range(48))
    torch.testing.assert_close(same.pixels, cell_centres((6, 8), (6, 8)), rtol=0, atol=1e-9)
    views["extrinsic"][1, 0, 3] = 0.8  # the camera .8 to the left: all moves right by 5 * .8 / 2 = 2 pixels
    moved = correspondences(**views, grid=(6, 8))
    kept = [row * 8 + column for row in range(6) for column in range(6)]
    assert moved.cells.tolist() == kept
    expected = cell_centres((6, 8), (6, 8))[kept] + torch.tensor([2.0, 0.0])
    torch.testing.assert_close(moved.pixels, expected, rtol=0, atol=1e-6)
    views["intrinsic"][1, 0, 0] = 2.5  # a wider lens: half as far from its centre at u = 3.5
    wider = correspondences(**views, grid=(6, 8))
    assert wider.cells.tolist() == list(range(48))
    expected = (cell_centres((6, 8), (6, 8)) - torch.tensor([3.5, 0])) * torch.tensor([0.5, 1]) + torch.tensor([4.5, 0])
    torch.testing.assert_close(wider.pixels, expected, rtol=0, atol=1e-6)


def test_points_hidden_behind_or_without_depth_are_left_out():
    views = plane()
    views["depth"][1, :, :4] = 1.0  # something stands before the left half
    assert {cell % 8 for cell in correspondences(**views, grid=(6, 8)).cells.tolist()} == {4, 5, 6, 7}
    views["depth"][1, :, :4] = 2.09  # within 5%
    assert len(correspondences(**views, grid=(6, 8)).cells) == 48
    assert len(correspondences(**views, grid=(6, 8), tolerance=0.04).cells) == 24
    for nothing in (0.0, -1.0, math.nan, math.inf):
        for view in (0, 1):
            views = plane()
            views["depth"][view, 2, 3] = nothing
            assert 2 * 8 + 3 not in correspondences(**views, grid=(6, 8)).cells
            assert len(correspondences(**views, grid=(6, 8)).cells) == 47
    for nothing in (0.0, -1.0):  # would be points where the first camera is, or behind it, in view of one further back
        views = plane()
        views["extrinsic"][1, 2, 3] = 3
        views["depth"][0], views["depth"][1] = nothing, 3 + nothing
        assert not len(correspondences(**views, grid=(6, 8)).cells)
    views = plane()
    views["extrinsic"][1, :, :3] = torch.diag(torch.tensor([-1.0, 1.0, -1.0]))  # looks the other way
    assert not len(correspondences(**views, grid=(6, 8)).cells)
    with pytest.raises(ValueError, match="tolerance must be a share of the depth between 0 and 1, got 0"):
        correspondences(**views, grid=(6, 8), tolerance=0)


@pytest.fixture(scope="module")
def scenes():
    """Rooms with their first, middle and last view."""
    made = []
    for seed in range(3):
        scene = make_scene(seed, frames=FRAMES, height=SIZE[0], width=SIZE[1])
        views = [0, FRAMES // 2, FRAMES - 1]
        depth = torch.stack([torch.from_numpy(render(scene, f, samples=1).depth) for f in views])
        extrinsic = torch.from_numpy(np.linalg.inv(scene.poses[views])[:, :3]).float()
        intrinsic = torch.from_numpy(scene.intrinsic).float().expand(3, 3, 3)
        made.append((scene, views, {"depth": depth, "extrinsic": extrinsic, "intrinsic": intrinsic}))
    return made


def pairs_of(labels):
    for first, second in ((0, 1), (0, 2), (1, 2)):
        yield first, second, {name: x[[first, second]] for name, x in labels.items()}


def traced(scene, first, second):
    """The points of one frame's cells: their pixels in another frame [N, 2], and whether rays from there reach them."""
    u, v = cell_centres(GRID, SIZE).round().int().numpy().T
    rays = np.linalg.inv(scene.intrinsic) @ (u, v, np.ones(len(u))) * render(scene, first, samples=1).depth[v, u]
    points, eye = scene.poses[first, :3, :3] @ rays + scene.poses[first, :3, 3:], scene.poses[second, :3, 3]
    x, y, z = scene.intrinsic @ scene.poses[second, :3, :3].T @ (points - eye[:, None])
    along = (points - eye[:, None])[:, None]  # [3, 1, N]
    boxes = surfaces_of(scene)
    met = [cast_room(scene, along, eye)[0]] + [hit_box(boxes, i, along, eye) for i in range(6, len(boxes.glow))]
    return np.stack([x / z, y / z], 1), np.min(met, 0)[0] > 1 - 1e-4  # the point itself is met at 1


def test_correspondences_are_the_renderers_own(scenes):
    """All but a few of the points that are in view and hidden: depth is compared at a whole pixel, with a tolerance."""
    agreed, counts = 0, np.zeros(3, int)
    for scene, views, labels in scenes:
        for first, second, pair in pairs_of(labels):
            seen = correspondences(**pair, grid=GRID)
            pixels, reached = traced(scene, views[first], views[second])
            inside = ((pixels >= -0.5) & (pixels < np.array(SIZE[::-1]) - 0.5)).all(1)
            ours = np.isin(np.arange(len(pixels)), seen.cells)
            np.testing.assert_allclose(seen.pixels, pixels[ours], atol=1e-3)
            assert not (ours & ~inside).any()
            agreed += (ours == (inside & reached)).sum()
            counts += (len(ours), (~inside).sum(), (inside & ~reached).sum())
    cells, outside, hidden = counts
    assert outside > 0.1 * cells
    assert hidden > 0.03 * cells
    assert cells - agreed < 0.4 * hidden


# -- matching -------------------------------------------------------------------------------------------------------


def test_recall_counts_points_within_the_radius():
    """Three points of a 1 x 4 grid of 4-pixel cells, whose centres are at u = 1.5, 5.5, 9.5, 13.5 and v = 1.5."""
    second = torch.eye(4)[None]
    first = torch.eye(4)[[1, 0, 2, 3]][None]  # tokens 0 and 1 are swapped
    seen = Seen(torch.tensor([0, 2, 3]), torch.tensor([[5.5, 1.5], [7.5, 1.5], [1.5, 1.5]]).double())
    recall = MatchingRecall([1.0, 2.0, 12.0])
    recall.update(first, second, seen, (4, 16))
    got = recall.result()
    # distances of the matches: 0, 2, 12; of the nearest cells: 0, 2, 0
    assert [got[f"recall@{r}"] for r in (1, 2, 12)] == pytest.approx([1 / 3, 2 / 3, 1])
    assert [got[f"ceiling@{r}"] for r in (1, 2, 12)] == pytest.approx([2 / 3, 1, 1])
    assert [got[f"chance@{r}"] for r in (1, 2, 12)] == pytest.approx([2 / 12, 4 / 12, 1])
    assert (got["points"], got["pairs"]) == (3, 1)
    recall.update(first, second, Seen(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 2).double()), (4, 16))
    assert recall.result() == {**got, "pairs": 2}


def test_matching_nothing_and_wrong_radii_are_named():
    recall = MatchingRecall([1.0])
    with pytest.raises(ValueError, match="none of 0 pairs of views sees a point in common"):
        recall.result()
    for radii in ([], [4.0, 0.0]):
        with pytest.raises(ValueError, match="radii must be one or more positive numbers"):
            MatchingRecall(radii)


def score(scenes, features_of):
    recall = MatchingRecall(RADII)
    for scene, _, labels in scenes:
        for _, _, pair in pairs_of(labels):
            seen = correspondences(**pair, grid=GRID)
            recall.update(*features_of(scene, pair, seen), seen, SIZE)
    return recall.result()


def written_cells(scene, pair, seen):
    """The answer itself: each cell's number, and in the first view that of the cell where it is seen."""
    second = torch.eye(GRID[0] * GRID[1])
    place = torch.cdist(seen.pixels, cell_centres(GRID, SIZE)).argmin(1)
    first = torch.zeros_like(second)
    first[seen.cells] = second[place]
    return first.view(*GRID, -1), second.view(*GRID, -1)


def written_places(scene, pair, seen):
    """Where each cell's centre is in the world, as waves of 512 random directions: cosine falls with distance."""
    rng, u, v = np.random.default_rng(0), *cell_centres(GRID, SIZE).round().int().unbind(1)
    waves, features = rng.normal(scale=4, size=(512, 3)), []
    for view in range(2):
        rays = np.stack([u, v, np.ones(len(u))], 1) @ np.linalg.inv(pair["intrinsic"][view].numpy()).T
        local = rays * pair["depth"][view, v, u].numpy()[:, None]
        pose = np.linalg.inv(np.vstack([pair["extrinsic"][view].numpy(), [0, 0, 0, 1]]))
        phase = (local @ pose[:3, :3].T + pose[:3, 3]) @ waves.T
        features.append(torch.from_numpy(np.concatenate([np.cos(phase), np.sin(phase)], 1)).float().view(*GRID, -1))
    return features


def test_features_that_hold_the_answer_reach_the_ceiling(scenes):
    got = score(scenes, written_cells)
    assert got["points"] > 500
    assert got["pairs"] == 9
    for r in (3, 6, 12):
        assert got[f"recall@{r}"] == got[f"ceiling@{r}"] == 1


def test_features_that_hold_positions_come_close(scenes):
    got = score(scenes, written_places)
    assert got["recall@3"] > 0.9
    assert got["recall@6"] > 0.98
    assert got["recall@12"] > 0.99


def test_noise_reaches_the_reported_chance(scenes):
    rng = torch.Generator().manual_seed(0)
    got = score(scenes, lambda *_: torch.randn(2, *GRID, 8, generator=rng).unbind(0))
    for r in (3, 6, 12):
        chance = got[f"chance@{r}"]
        assert 0 < chance < 0.2
        # twice what independent points would give: points of a pair can share a match
        assert abs(got[f"recall@{r}"] - chance) < 3 * 2 * math.sqrt(chance * (1 - chance) / got["points"])


# -- from stores ----------------------------------------------------------------------------------------------------

SAMPLING = {"views": 3, "sampling": FrameSampling(context=9, gap=2, query="0:9:2"), "batch": 2}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Labels of 8 small rooms, and a store whose tokens at layer 1 hold the classes their pixels show."""
    root = tmp_path_factory.mktemp("demo")
    scenes = [make_scene(seed, frames=9, height=24, width=40) for seed in range(8)]
    spec = FeatureSpec("wan", "content:0", layers=(1, 2), frames=FrameSelection(window=9), dtype="float16")
    store, labels = FeatureStore.create(root / "store", spec), DemoLabels(root)
    rng = torch.Generator().manual_seed(0)
    for scene in scenes:
        write_demo(root, scene, kind="images")
        tag = torch.stack([torch.from_numpy(render(scene, f, samples=1).tag) for f in range(9)]).long()
        shown = F.one_hot(tag.clamp(max=20), 21)[..., :20].float().unfold(1, 4, 4).unfold(2, 4, 4).mean((-1, -2))
        tensors = {}
        for layer, data in ((1, shown), (2, torch.randn(shown.shape, generator=rng))):
            done = finish(data, torch.float16)
            tensors |= {f"layer{layer}": done.data, f"layer{layer}.mean": done.mean, f"layer{layer}.rstd": done.rstd}
        provenance = {"grid": list(shown.shape[:3]), "rows_kept": list(range(9)), "padded": 0}
        store.write(scene.id, tensors, torch.arange(9), provenance)
    return FeatureStore.open(root / "store"), labels


def views_of(clip_id):
    return SAMPLING["sampling"].sample(3, 9, generator("frames", clip_id))


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_tagging_by_neighbours_from_a_store(demo, pool):
    store, labels = demo
    train, test = labels.ids()[:5], labels.ids()[5:]
    described, present = {}, {}
    counts = {i: labels.read(i, views_of(i), ["tag_pixel_counts"])["tag_pixel_counts"].sum(0) for i in labels.ids()}
    threshold = int(torch.cat([counts[i][counts[i] > 0] for i in test]).median())  # some class has just as many
    chosen = {"k": 3, "pool": pool, "threshold": threshold, "keys": [(0, 1, None)]}
    got = neighbour_tagging(store, labels, train, test, **chosen, **SAMPLING)
    for clip_id in labels.ids():
        frames = views_of(clip_id)
        tokens = store.read_frames(clip_id, 1, frames).float().flatten(0, 2)
        described[clip_id] = tokens.mean(0) if pool == "mean" else tokens.amax(0)
        present[clip_id] = counts[clip_id] >= threshold
    scores = []
    for clip_id in test:
        near = {other: F.cosine_similarity(described[clip_id], described[other], dim=0).item() for other in train}
        best = sorted(train, key=lambda other: -near[other])[:3]
        weights = torch.tensor([math.exp(near[other] / 0.07) for other in best])
        scores.append((weights[:, None] * torch.stack([present[other] for other in best])).sum(0) / weights.sum())
    truth = torch.stack([present[clip_id] for clip_id in test])
    rates = presence_rates(labels, train).tolist()
    assert got == pytest.approx(tagging_scores(torch.stack(scores), truth, rates, cut=0.5), abs=1e-5)
    assert got["mAP"] > got["mAP_chance"]


def test_correspondence_from_a_store(demo):
    store, labels = demo
    ids, radii = labels.ids()[:3], (2.0, 4.0)
    got = view_correspondence(store, labels, ids, radii=radii, keys=[(0, 1, None)], **SAMPLING)
    recall = MatchingRecall(radii)
    for clip_id in ids:
        frames = views_of(clip_id)
        read = labels.read(clip_id, frames, ["depth", "extrinsic", "intrinsic"])
        tokens = store.read_frames(clip_id, 1, frames).float()
        for first, second, pair in pairs_of(read):
            recall.update(tokens[first], tokens[second], correspondences(**pair, grid=(6, 10)), (24, 40))
    assert got == recall.result()
    assert got["pairs"] == 9
    noise = view_correspondence(store, labels, ids, radii=radii, keys=[(0, 2, None)], **SAMPLING)
    assert noise["points"] == got["points"]
    assert noise["recall@4"] < 3 * noise["chance@4"] < got["recall@4"]


@pytest.mark.parametrize("fusion", ["concat", "norm"])
def test_features_of_several_stores_are_fused(demo, fusion):
    store, labels = demo
    clip_id, keys = labels.ids()[0], [(0, 1, None), (1, 2, None)]
    got = view_correspondence([store, store], labels, [clip_id], radii=[4], keys=keys, fusion=fusion, **SAMPLING)
    frames, recall = views_of(clip_id), MatchingRecall([4])
    read = labels.read(clip_id, frames, ["depth", "extrinsic", "intrinsic"])
    parts = [store.read_frames(clip_id, layer, frames).float() for layer in (1, 2)]
    if fusion == "norm":
        parts = [F.layer_norm(x, x.shape[-1:], eps=1e-6) for x in parts]
    tokens = torch.cat(parts, -1).half()
    for first, second, pair in pairs_of(read):
        recall.update(tokens[first], tokens[second], correspondences(**pair, grid=(6, 10)), (24, 40))
    assert got == recall.result()


def test_a_store_of_several_layers_wants_one_named(demo):
    store, labels = demo
    with pytest.raises(ValueError, match=r"keys must be one per source, got .* of 1 sources"):
        neighbour_tagging(store, labels, labels.ids()[:4], labels.ids()[4:], k=1, **SAMPLING)
