"""The relation task's parts: rows of questions, pooled objects, targets, loss and metrics, each against a slow twin."""

import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from object_tables import table_of_scene
from relation_scenes import boxes_of

from spatialprobe.engine.demo.furnish import SceneObject
from spatialprobe.engine.demo.scenes import Scene, look_at, make_scene
from spatialprobe.engine.lifting.objects import ObjectTable
from spatialprobe.engine.questions.relations import RELATIONS
from spatialprobe.probes.backbone import Tokens
from spatialprobe.probes.heads.pair_reader import PairReader, object_means, patch_shares
from spatialprobe.probes.labels.relations import KINDS, NAMES, relation_rows
from spatialprobe.probes.metrics.relation import Asked, RelationMetrics, relation_scores
from spatialprobe.probes.tasks.relation import RELATION, RelationFacts, numbered, relation_facts

ALL = 4096  # rows, more than any view here has questions
R = len(NAMES)


def asked(rows: torch.Tensor) -> dict[tuple[str, int, int], float]:  # [P, 4] -> (relation, id, other id): answer
    found = {(NAMES[int(r)], int(i), int(j)): float(x) for r, i, j, x in rows.tolist() if r >= 0}
    assert len(found) == int((rows[:, 0] >= 0).sum()), "a question is asked twice"
    return found


def renamed(table: ObjectTable, seed: int) -> tuple[ObjectTable, dict[int, int]]:
    """The same objects under other ids and in another order; and the new id of each."""
    rng = np.random.default_rng(seed)
    order, ids = rng.permutation(len(table.ids)), 100 + rng.permutation(len(table.ids))
    arrays = {
        n: getattr(table, n)[order] for n in ("centre", "extent", "yaw", "complete", "pixels", "whole", "nearest")
    }
    new = replace(table, tags=tuple(table.tags[i] for i in order), ids=ids, box=table.box[order], **arrays)
    return new, {0: 0} | dict(zip(table.ids[order].tolist(), ids.tolist(), strict=True))


# -- rows -------------------------------------------------------------------------------------------------------------


def sides(o: SceneObject) -> list[float]:
    return sorted(o.size[:2])


def between(o: SceneObject, other: SceneObject) -> np.ndarray:
    return np.subtract(o.centre, other.centre)


SINGLE = {"height": lambda o: o.size[2], "width": lambda o: sides(o)[0], "length": lambda o: sides(o)[1]}
PAIR = {
    "above": lambda a, b: a.centre[2] > b.centre[2],
    "taller": lambda a, b: a.size[2] > b.size[2],
    "wider": lambda a, b: sides(a)[0] > sides(b)[0],
    "longer": lambda a, b: sides(a)[1] > sides(b)[1],
    "bigger": lambda a, b: np.prod(a.size) > np.prod(b.size),
    "reaches_higher": lambda a, b: a.centre[2] + a.size[2] / 2 > b.centre[2] + b.size[2] / 2,
    "distance": lambda a, b: np.linalg.norm(between(a, b)),
    "horizontal_distance": lambda a, b: np.linalg.norm(between(a, b)[:2]),
    "vertical_distance": lambda a, b: abs(between(a, b)[2]),
}
SEEN = {  # of centres in camera coordinates: this view's, the first view's
    "left_of": lambda a, b, *first: a[0] < b[0],
    "in_front_of": lambda a, b, *first: a[2] < b[2],
    "left_of_from_first": lambda a, b, first_a, first_b: first_a[0] < first_b[0],
    "nearer_from_first": lambda a, b, first_a, first_b: np.linalg.norm(first_a) < np.linalg.norm(first_b),
}


def true_answer(scene: Scene, frame: int, name: str, i: int, j: int) -> float | None:
    """From boxes and cameras alone; None of a relation that also depends on what is seen."""
    boxes = {o.id: o for o in scene.objects}
    if name in SINGLE:
        return float(SINGLE[name](boxes[i]))
    if name in PAIR:
        return float(PAIR[name](boxes[i], boxes[j]))
    if name in SEEN:
        cameras = [np.linalg.inv(scene.poses[f])[:3] for f in (frame, 0)]
        return float(SEEN[name](*(camera @ (*boxes[x].centre, 1) for camera in cameras for x in (i, j))))
    north, ahead = (scene.poses[f, :2, 2] / np.linalg.norm(scene.poses[f, :2, 2]) for f in (0, frame))
    offset = between(boxes[i], boxes[j])[:2] if j else None
    if name == "north_of":
        return float(offset @ north > 0)
    if name == "east_of":
        return float(offset @ (north[1], -north[0]) > 0)
    return clock_hour(-offset, ahead) if name == "clock" else None


def test_answers_are_those_of_the_scene():
    """Without the relations' own code."""
    counted = Counter()
    for seed in (2, 4):
        scene = make_scene(seed, frames=9, height=48, width=80)
        for frame, rows in zip((0, 4, 8), relation_rows(table_of_scene(scene), [0, 4, 8], ALL), strict=True):
            for (name, i, j), answer in asked(rows).items():
                assert (j == 0) == (name in SINGLE or name == "distance_from_camera")
                if (expected := true_answer(scene, frame, name, i, j)) is not None:
                    assert answer == pytest.approx(expected, abs=1e-5), (scene.id, frame, name, i, j)
                    counted[name] += 1
    assert set(counted) == set(NAMES) - {"distance_from_camera", "nearer"}
    assert sum(counted.values()) > 2000


def clock_hour(offset: np.ndarray, ahead: np.ndarray) -> float:
    """Hours of a clock whose 12 is `ahead`, in a plane seen from above."""
    angle = math.atan2(ahead[1], ahead[0]) - math.atan2(offset[1], offset[0])  # clockwise
    return angle / (2 * math.pi) * 12 % 12


def test_more_questions_than_rows_are_shared_out_evenly():
    table, _ = boxes_of(0)
    (everything,), (some,) = relation_rows(table, [3], ALL), relation_rows(table, [3], 150)
    there, kept = asked(everything), asked(some)
    assert len(there) > 300
    assert len(kept) == 150
    assert kept.items() <= there.items()
    of_kind = Counter(name for name, *_ in kept), Counter(name for name, *_ in there)
    short = [name for name in of_kind[1] if of_kind[0][name] < of_kind[1][name]]  # that have more than were taken
    assert len(short) > 5
    counts = [of_kind[0][name] for name in short]
    assert max(of_kind[0].values()) - min(counts) <= 2
    for name in short:
        if KINDS[NAMES.index(name)] == "yes_or_no":
            yes = sum(answer for (n, *_), answer in kept.items() if n == name)
            assert abs(2 * yes - of_kind[0][name]) <= 1
    assert torch.equal(relation_rows(table, [0, 3, 8], 150)[1], some), "a frame's rows depend on others"
    assert not torch.equal(relation_rows(replace(table, clip="another"), [3], 150)[0], some), "clips draw alike"
    assert torch.equal(some[:, 0] < 0, torch.zeros(150, dtype=torch.bool))
    rest = everything[len(there) :]
    assert torch.equal(rest, torch.tensor([[-1.0, 0, 0, 0]]).expand(len(rest), 4))


def test_from_the_first_view_means_from_its_position():
    """All other cameras look from the opposite side, where left is right and near is far."""
    table, _ = boxes_of(2)
    poses = table.poses.copy()
    poses[1:] = look_at(np.array([0, 9, 1.5]), np.array([0, 4, 1.0]))
    first, found = (asked(rows) for rows in relation_rows(replace(table, poses=poses), [0, 3], ALL))
    far = dict(zip(table.ids.tolist(), np.linalg.norm(table.centre - poses[0, :3, 3], axis=1), strict=True))
    there = {name: {(i, j): x for (n, i, j), x in found.items() if n == name} for name in NAMES}
    both = {pair: x for pair, x in there["left_of_from_first"].items() if ("left_of", *pair) in first}
    assert len(both) >= 6
    assert all(first["left_of", *pair] == x for pair, x in both.items())
    assert any(there["left_of"].get(pair, x) != x for pair, x in both.items())
    assert len(there["nearer_from_first"]) >= 6
    assert all((far[i] < far[j]) == x for (i, j), x in there["nearer_from_first"].items())


@pytest.mark.parametrize("rows", [60, ALL])
def test_other_ids_in_another_order_change_nothing(rows):
    table, _ = boxes_of(1)
    other, new_id = renamed(table, 0)
    for before, after in zip(relation_rows(table, [0, 5], rows), relation_rows(other, [0, 5], rows), strict=True):
        expected = {(name, new_id[i], new_id[j]): answer for (name, i, j), answer in asked(before).items()}
        assert len(expected) >= 60
        assert asked(after) == expected


def test_swapped_objects_have_the_other_answer():
    """Every qualitative relation of two objects is the opposite the other way round; distances are the same."""
    swapped = Counter()
    for number in range(4):
        for rows in relation_rows(boxes_of(number)[0], [0, 8], ALL):
            found = asked(rows)
            for (name, i, j), answer in found.items():
                if j:
                    back, kind = found[name, j, i], KINDS[NAMES.index(name)]
                    opposite = {"yes_or_no": 1 - answer, "length": answer, "hour": (answer + 6) % 12}[kind]
                    assert back == pytest.approx(opposite, abs=1e-5), name
                    swapped[name] += 1
    assert len(swapped) == sum(relation.arity == 2 for relation in RELATIONS)


def test_what_is_not_known_is_not_asked():
    table, _ = boxes_of(4)
    of = lambda table, view=2: {name for name, *_ in asked(relation_rows(table, [view], ALL)[0])}  # noqa: E731
    assert of(table) == set(NAMES)
    assert of(table, 0) == {name for name in NAMES if not name.endswith("_from_first")}
    lengths = {relation.name for relation in RELATIONS if relation.metric}
    assert of(replace(table, metric=False)) == set(NAMES) - lengths
    upright = {relation.name for relation in RELATIONS if relation.upright}
    assert of(replace(table, gravity="camera")) == set(NAMES) - upright
    largest = np.arange(7)[:, None] == table.pixels[:, 2].argmax()
    few = replace(table, pixels=np.where(largest, table.pixels, 0))  # a single object is seen well
    assert of(few) == {relation.name for relation in RELATIONS if relation.arity == 1}
    bottomless = np.arange(7) < 2  # two without depth in view 2, which no difference of infinities is taken of
    with np.errstate(invalid="raise"):
        found = asked(
            relation_rows(replace(table, nearest=np.where(bottomless[:, None], np.inf, table.nearest)), [2], ALL)[0]
        )
    assert not {i for _, *pair in found for i in pair} & set(table.ids[bottomless].tolist())
    none = replace(table, pixels=np.zeros_like(table.pixels))
    assert (relation_rows(none, [0, 1], 16)[..., 0] == -1).all()
    flat = replace(table, extent=table.extent * (1, 1, 0))  # no length of 0 has a logarithm
    answers = relation_rows(flat, [2], ALL)[0]
    assert "height" not in of(flat)
    assert answers.isfinite().all()


def test_an_empty_table_asks_nothing():
    table, _ = boxes_of(3)
    arrays = {n: getattr(table, n)[:0] for n in ("ids", "centre", "extent", "yaw", "complete", "pixels", "whole")}
    empty = replace(table, tags=(), nearest=table.nearest[:0], box=table.box[:0], **arrays)
    assert torch.equal(relation_rows(empty, [0, 8], 5), torch.tensor([-1.0, 0, 0, 0]).expand(2, 5, 4))


# -- head -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4, 6), (9, 17), (31, 20)])
def test_objects_are_means_weighted_by_their_pixels(size):
    grid, objects, rng = (4, 5), 3, torch.Generator().manual_seed(0)
    masks = torch.randint(0, objects + 1, (2, 3, *size), generator=rng)
    masks[0, 1][masks[0, 1] == 2] = 0  # not shown there
    masks[1, 2] = 0
    masks[1, 2, 2, 3] = 1  # a single pixel
    patches = torch.randn(2, 3, 20, 7, generator=rng)
    means = object_means(patches, masks, objects, grid)
    for b, s, m in np.ndindex(2, 3, objects):
        share = torch.zeros(20)
        for n in range(20):
            rows = [y for y in range(size[0]) if int((y + 0.5) * grid[0] / size[0]) == n // 5]
            columns = [x for x in range(size[1]) if int((x + 0.5) * grid[1] / size[1]) == n % 5]
            share[n] = (masks[b, s][rows][:, columns] == m + 1).float().mean()
        expected = share @ patches[b, s] / share.sum() if share.any() else torch.zeros(7)
        assert torch.allclose(means[b, s, m], expected, atol=1e-6)
    shares = patch_shares(masks, objects, grid)
    assert shares[1, 2, 0].count_nonzero() == 1
    assert torch.equal(means[1, 2, 0], patches[1, 2, int(shares[1, 2, 0].argmax())])


def reader(**options) -> PairReader:
    torch.manual_seed(0)
    return PairReader(6, 4, hidden=8, dropout=0.0, **options).eval()


def test_pairs_are_read_as_the_definition_says():
    """One pair after the other, from concatenated vectors; object 0 is none, in a view that does not show it, zeros."""
    centre, scale = torch.tensor([0.0, 1.0, -2.0, 0.5]), torch.tensor([1.0, 0.3, 2.0, 1.0])
    head, rng = reader(centre=centre, scale=scale), torch.Generator().manual_seed(1)
    tokens = Tokens([torch.randn(2, 3, 5 + 20, 6, generator=rng)], (4, 5))  # with special tokens, which are not read
    masks = torch.randint(0, 4, (2, 3, 8, 10), generator=rng)
    masks[0, 0][masks[0, 0] == 3] = 0
    objects = torch.stack([(masks == m).flatten(2).any(2) for m in (1, 2, 3)], -1)
    pairs = torch.randint(0, 4, (2, 3, 7, 2), generator=rng)
    scores = head(tokens, masks, objects, pairs)["scores"]
    means = object_means(tokens.patches, masks, 3, (4, 5))
    for b, s, p in np.ndindex(2, 3, 7):
        parts = []
        for number in pairs[b, s, p].tolist():
            views = [v for v in range(3) if objects[b, v, number - 1]]
            vector = torch.cat([means[b, s, number - 1], means[b, views, number - 1].mean(0)])
            parts.append((vector, number > 0))
        (a, there_a), (z, there_z) = parts
        hidden = head.first(a) * there_a + head.second(z) * there_z
        hidden = hidden + head.product(head.factor(a) * head.factor(z) * (there_a * there_z))
        raw = head.answer(hidden).view(4, 2)
        expected = torch.stack([centre + scale * raw[:, 0], raw[:, 1]], -1)
        assert torch.allclose(scores[b, s, p], expected, atol=1e-5)
    swapped = head(tokens, masks, objects, pairs.flip(-1))["scores"]
    assert not torch.allclose(swapped, scores, atol=1e-3), "who is first makes no difference"


def test_the_head_refuses_masks_coarser_than_patches():
    with pytest.raises(ValueError, match="as fine as the 4x5 patches, got 3x10"):
        patch_shares(torch.zeros(1, 1, 3, 10, dtype=torch.int64), 1, (4, 5))


# -- targets and loss -------------------------------------------------------------------------------------------------


FACTS = RelationFacts(NAMES, tuple(r.level for r in RELATIONS), KINDS, (0.0,) * R, (1.0,) * R)
VIEWS = [0, 3, 8]


def batch_of(tables: list, rows: int = 64) -> dict[str, torch.Tensor]:
    return {
        "relations": torch.stack([relation_rows(table, VIEWS, rows) for table, _ in tables]),
        "instance_masks": torch.stack([torch.from_numpy(masks[VIEWS].astype(np.int32)) for _, masks in tables]),
    }


def answers_to(labels: dict[str, torch.Tensor], seed: int = 0) -> tuple[dict, dict]:
    """What a random head says of random features, the same features for the same pixels; and the targets."""
    targets = RELATION.targets(labels, RELATION.defaults, FACTS)
    torch.manual_seed(seed)
    head = RELATION.head(6, RELATION.defaults, FACTS).eval()
    patches = torch.randn(len(labels["relations"]), len(VIEWS), 70, 6)
    with torch.no_grad():
        outputs = head(Tokens([patches], (7, 10)), **{name: targets[name] for name in RELATION.told})
    return outputs, targets


def numbers(labels: dict[str, torch.Tensor]) -> tuple[float, dict[str, float]]:
    outputs, targets = answers_to(labels)
    metrics = RELATION.metrics(RELATION.defaults, FACTS)
    metrics.update(outputs, targets)
    return float(RELATION.loss(outputs, targets, RELATION.defaults, torch.Generator())["loss"]), metrics.result()


def test_objects_of_a_clip_are_numbered_as_they_are_asked_about():
    pairs = torch.tensor([[[[7, 2], [2, 0]]], [[[0, 0], [5, 9]]]])
    masks = torch.tensor([[[[7, 2, 3, 0, 9]]], [[[7, 9, 5, 5, 2]]]], dtype=torch.int32)
    new_pairs, new_masks, count = numbered(pairs, masks)
    assert new_pairs.tolist() == [[[[2, 1], [1, 0]]], [[[0, 0], [1, 2]]]]
    assert new_masks.tolist() == [[[[2, 1, 0, 0, 0]]], [[[0, 2, 1, 1, 0]]]]
    assert count == 2
    assert numbered(pairs * 0, masks)[2] == 1


def test_an_object_is_in_the_views_that_show_a_pixel_of_it():
    targets = RELATION.targets(batch_of([boxes_of(5), boxes_of(6)]), RELATION.defaults, FACTS)
    numbers = range(1, 1 + int(targets["masks"].max()))
    shown = torch.stack([(targets["masks"] == number).flatten(2).any(2) for number in numbers], -1)
    assert torch.equal(targets["objects"], shown)
    assert not shown.all()
    assert torch.equal(shown.any(1).sum(1), targets["pairs"].flatten(1).amax(1))  # of every object asked about


def test_other_ids_and_rows_that_ask_nothing_change_neither_loss_nor_metrics():
    tables = [boxes_of(number) for number in (5, 6)]
    labels = batch_of(tables)
    loss, metrics = numbers(labels)
    assert metrics["answers"] == int((labels["relations"][..., 0] >= 0).sum()) > 300
    padded = labels | {"relations": F.pad(labels["relations"], (0, 0, 9, 30))}
    padded["relations"][..., :9, 0] = padded["relations"][..., -30:, 0] = -1
    others = []
    for seed, (table, masks) in enumerate(tables):
        table, new_id = renamed(table, seed)
        others.append((table, np.vectorize(new_id.get)(masks)))
    for same in (padded, batch_of(others)):
        again, found = numbers(same)
        assert again == pytest.approx(loss, rel=1e-5)
        assert found == pytest.approx(metrics, nan_ok=True, rel=1e-6)


@pytest.mark.parametrize("beta", [0.1, 0.6])
def test_the_loss_is_the_mean_of_each_answers_own(beta):
    labels = batch_of([boxes_of(7)])
    outputs, targets = answers_to(labels)
    found = RELATION.loss(outputs, targets, RELATION.defaults.with_settings(beta=beta), torch.Generator())["loss"]
    each = []
    for s, p in np.ndindex(len(VIEWS), 64):
        relation, _, _, answer = labels["relations"][0, s, p].tolist()
        if relation < 0:
            continue
        x, y = outputs["scores"][0, s, p, int(relation)].double().tolist()
        if KINDS[int(relation)] == "yes_or_no":
            chance = 1 / (1 + math.exp(-x))
            each.append(-math.log(chance if answer else 1 - chance))
        elif KINDS[int(relation)] == "length":
            off = abs(x - math.log(answer))
            each.append(off**2 / (2 * beta) if off < beta else off - beta / 2)
        else:
            angle = 2 * math.pi * answer / 12
            each.append(((x - math.sin(angle)) ** 2 + (y - math.cos(angle)) ** 2) / 2)
    assert len(each) > 100
    assert float(found) == pytest.approx(np.mean(each), rel=1e-5)


def test_a_batch_that_asks_nothing_has_no_loss_and_no_gradient():
    labels = batch_of([boxes_of(8)])
    labels["relations"][..., 0] = -1
    outputs, targets = answers_to(labels)
    scores = outputs["scores"].requires_grad_()
    loss = RELATION.loss({"scores": scores}, targets, RELATION.defaults, torch.Generator())["loss"]
    loss.backward()
    assert float(loss.detach()) == 0
    assert not scores.grad.any()
    metrics = RELATION.metrics(RELATION.defaults, FACTS)
    metrics.update(outputs, targets)
    found = metrics.result()
    assert (found["answers"], found["relations_scored"], found["relations"]) == (0, 0, R)
    assert math.isnan(found["balanced_accuracy"])
    with pytest.raises(ValueError, match="at least 1 clip"):
        RelationMetrics(FACTS.asked).result()


class Rows:
    """Labels of one clip after the other, whose first views have these rows."""

    root, relation_names = "rooms", NAMES

    def __init__(self, *clips: list[list[float]]):
        self.clips = clips

    def read(self, clip_id, frames, wanted):
        assert (frames, wanted) == ([0], ("relations",))
        return {"relations": torch.tensor([self.clips[int(clip_id)]], dtype=torch.float32)}


def test_facts_are_those_of_the_training_clips():
    left, height = (float(NAMES.index(name)) for name in ("left_of", "height"))
    nothing, tall = [-1.0, 0, 0, 0], [height, 3, 0, 0.5]
    labels = Rows(
        [[left, 1, 2, 1], [left, 2, 1, 0], [left, 1, 3, 1], nothing],
        [[left, 1, 2, 1], [height, 1, 0, 2], tall, nothing],
    )
    facts = relation_facts(labels, ["0", "1"], RELATION.defaults)
    assert facts.means[int(height)] == pytest.approx(0)
    assert facts.spreads[int(height)] == pytest.approx(math.sqrt(2) * math.log(2))
    assert (facts.means[int(left)], facts.spreads[int(left)]) == (0, 1)
    facts = replace(facts, means=tuple(map(float, range(R))))
    head = RELATION.head(6, RELATION.defaults, facts).eval()
    torch.nn.init.ones_(head.answer[-1].bias)
    torch.nn.init.zeros_(head.answer[-1].weight)  # what every pair is told before it is looked at, one spread too much
    tokens, masks = Tokens([torch.zeros(1, 1, 4, 6)], (2, 2)), torch.ones(1, 1, 2, 2, dtype=torch.int64)
    (scores,) = head(tokens, masks, masks[..., 0, :1] > 0, torch.tensor([[[[1, 0]]]]))["scores"].flatten(0, 2)
    assert scores[:, 0].tolist() == pytest.approx([m + s for m, s in zip(facts.means, facts.spreads, strict=True)])
    assert torch.equal(scores[:, 1], torch.ones(R))
    only = relation_facts(labels, ["0"], RELATION.defaults)
    assert (only.means[int(height)], only.spreads[int(height)]) == (0, 1)
    alike = relation_facts(Rows([[left, 1, 2, 1], tall, tall]), ["0"], RELATION.defaults)
    assert alike.spreads[int(height)] == 0.1
    with pytest.raises(
        ValueError, match="nothing to learn: the first views of 1 training clips of rooms show no object"
    ):
        relation_facts(Rows([nothing, nothing]), ["0"], RELATION.defaults)
    with pytest.raises(ValueError, match=f"rooms ask other relations than the {R}"):
        relation_facts(SimpleNamespace(root="rooms", relation_names=NAMES[:3]), ["0"], RELATION.defaults)
    for name, wrong in (("hidden", 0), ("head_dropout", 1.0), ("beta", 0.0)):
        with pytest.raises(ValueError, match="hidden must be at least 1, head_dropout in"):
            relation_facts(labels, ["0"], RELATION.defaults.with_settings(**{name: wrong}))


# -- metrics ----------------------------------------------------------------------------------------------------------


def slow_scores(relations: list[Asked], rows: list[tuple[int, float, float, float]]) -> dict[str, float]:
    """The metrics' definition, one relation and one row after the other."""
    found: dict[str, dict[str, float]] = {}
    for index, asked_ in enumerate(relations):
        mine = [row[1:] for row in rows if row[0] == index]
        if not mine:
            continue
        if asked_.kind == "yes_or_no":
            yes, no = [x >= 0 for x, _, t in mine if t == 1], [x < 0 for x, _, t in mine if t == 0]
            if yes and no:
                found[asked_.name] = {"balanced_accuracy": (sum(yes) / len(yes) + sum(no) / len(no)) / 2}
        elif asked_.kind == "length":
            ratios = sorted(math.exp(x) / t for x, _, t in mine)
            share = lambda low, high, ratios=ratios: sum(low <= r <= high for r in ratios) / len(ratios)  # noqa: E731
            errors = sorted(abs(r - 1) for r in ratios)
            middle = (errors[(len(errors) - 1) // 2] + errors[len(errors) // 2]) / 2
            found[asked_.name] = {
                "within_50_200": share(0.5, 2), "within_67_150": share(1 / 1.5, 1.5), "within_90_110": share(0.9, 1.1),
                "within_25": share(0.75, 1.25), "median_relative_error": middle,
            }  # fmt: skip
        else:
            same = close = 0
            for x, y, t in mine:
                hour = math.degrees(math.atan2(x, y)) / 30 % 12
                same += round(hour) % 12 == round(t) % 12
                close += min((hour - t) % 12, (t - hour) % 12) <= 1
            found[asked_.name] = {"same_hour": same / len(mine), "within_one_hour": close / len(mine)}
    out = {"relations_scored": len(found), "relations": len(relations), "answers": len(rows)}
    for metric in (
        "balanced_accuracy", "within_50_200", "within_67_150", "within_90_110", "within_25", "median_relative_error",
        "same_hour", "within_one_hour",
    ):  # fmt: skip
        values = {r: found[r.name][metric] for r in relations if metric in found.get(r.name, {})}
        out[metric] = sum(values.values()) / len(values) if values else math.nan
        out |= {f"{metric}/{r.name}": x for r, x in values.items()}
        for level in {r.level for r in values}:
            of_level = [x for r, x in values.items() if r.level == level]
            out[f"{metric}/level{level}"] = sum(of_level) / len(of_level)
    return out


def test_metrics_are_their_definition():
    relations = [
        Asked("left", 2, "yes_or_no"), Asked("height", 1, "length"), Asked("clock", 2, "hour"),
        Asked("far", 2, "length"), Asked("above", 2, "yes_or_no"), Asked("only_yes", 3, "yes_or_no"),
        Asked("never", 1, "length"), Asked("there", 3, "yes_or_no"),
    ]  # fmt: skip
    rng, rows = np.random.default_rng(0), []
    for index in rng.permutation(np.repeat([0, 1, 2, 3, 4, 5, 7], 41)):
        x, y = rng.normal(size=2).round(3)
        yes, length, hour = float(rng.random() < 0.3), math.exp(x + 0.4 * rng.normal()), rng.uniform(0, 12)
        truth = {"yes_or_no": yes, "length": length, "hour": hour}[relations[index].kind]
        rows.append((int(index), x, y, 1.0 if index == 5 else float(np.float32(truth))))
    x = torch.tensor(rows, dtype=torch.float64)
    found = relation_scores(relations, x[:, 0].long(), x[:, 1:3], x[:, 3])
    assert found == pytest.approx(slow_scores(relations, rows), rel=1e-9)
    assert found["relations_scored"] == 6
    assert "balanced_accuracy/only_yes" not in found
    assert found["balanced_accuracy/level3"] == found["balanced_accuracy/there"]
    wraps = torch.tensor([[math.sin(math.radians(-10)), math.cos(math.radians(-10))]])  # 11:40, and truth 0:12
    clock = relation_scores([relations[2]], torch.tensor([0]), wraps.float(), torch.tensor([0.2]))
    assert clock["same_hour/clock"] == clock["within_one_hour/clock"] == 1


def test_metrics_of_batches_are_those_of_all_rows_at_once():
    labels = batch_of([boxes_of(number) for number in (9, 10, 11)])
    outputs, targets = answers_to(labels)
    whole, parts = (RELATION.metrics(RELATION.defaults, FACTS) for _ in range(2))
    whole.update(outputs, targets)
    for b in (slice(0, 1), slice(1, 3)):
        parts.update({n: x[b] for n, x in outputs.items()}, {n: x[b] for n, x in targets.items()})
    assert parts.result() == pytest.approx(whole.result(), nan_ok=True, rel=1e-12)
    real = [tuple(row) for row in labels["relations"].view(-1, 4).tolist() if row[0] >= 0]
    scores = outputs["scores"].view(-1, R, 2)[labels["relations"].view(-1, 4)[:, 0] >= 0]
    rows = [(int(r), *scores[k, int(r)].double().tolist(), answer) for k, (r, _, _, answer) in enumerate(real)]
    assert whole.result() == pytest.approx(slow_scores(list(FACTS.asked), rows), nan_ok=True, rel=1e-6)
