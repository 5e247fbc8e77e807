"""Margins, ambiguity, cameras and mirrors, and what a table lacks."""

import re
from dataclasses import replace

import numpy as np
import pytest
from question_truth import rotation
from synthetic_tables import AHEAD, mirrored, random_table, records, rolled, table_of_boxes

from spatialprobe.engine.questions.ask import ask
from spatialprobe.engine.questions.finding import Material
from spatialprobe.engine.questions.settings import Settings
from spatialprobe.engine.questions.steps import gaps
from spatialprobe.engine.questions.types import BY_TYPE, TYPES
from spatialprobe.engine.questions.views import look
from spatialprobe.engine.types import ClipError

CUBE = (0.4, 0.4, 0.4)


def found(table, kind: str) -> dict[tuple, tuple]:
    """All candidates of a type: (row, *things) -> (value, outcome)."""
    views, last = np.arange(len(table.frames)), len(table.frames) - 1
    material = Material(look(table, views, last - views), table.sample_points, table.poses[:, :3, :3])
    of = BY_TYPE[kind].find(material)
    keys = zip(of.row.tolist(), *of.things.T.tolist(), strict=True)
    return dict(zip(keys, zip(of.value.tolist(), of.outcome.tolist(), strict=True), strict=True))


# -- margins: type, the objects asked about, table of a value, a value within the margin, one beyond


def two(second, size=CUBE):
    return table_of_boxes([(-0.5, 4, 0.2), second], [CUBE, size])


def three(third, *, base=2.0, size=CUBE):
    return table_of_boxes([(-base / 2, 4, 0.2), (base / 2, 4, 0.2), third], [CUBE, CUBE, size])


def points(*places):
    table, k = two((1, 4, 0.2)), len(places)
    pixels, ids = table.sample_pixels[:, :1].repeat(k, 1), table.sample_ids[:, :1].repeat(k, 1)
    at = np.broadcast_to(np.array(places, float), (len(table.frames), k, 3))
    return replace(table, sample_pixels=pixels, sample_points=at, sample_ids=ids)


def at_angle(degrees: float, reach: float = 2.0) -> tuple[float, float, float]:
    """Seen from the first of `three`, so far to the left of the second."""
    return -1 + reach * np.cos(np.radians(degrees)), 4 + reach * np.sin(np.radians(degrees)), 0.2


def turned(degrees: float):
    """A second view that looks so far to the right of the first."""
    second = AHEAD.copy()
    second[:2, :3] = rotation(-np.radians(degrees))[:2, :2] @ AHEAD[:2, :3]
    return table_of_boxes([(0, 4, 0.2)], [CUBE], poses=np.stack([AHEAD, second]))


def within(metres: float):
    """Three boxes around the first, of which one is so far from it."""
    return table_of_boxes([(0, 5, 0.2), (1, 5, 0.2), (-1, 5, 0.2), (0, 5 + metres, 0.2)], [CUBE] * 4)


MARGINS = [
    ("left_right", (0, 1), lambda x: two((-0.5 + x, 4, 0.2)), 0.35, 0.45),  # .2 m half extent + 5% of 4.2 m
    ("above_below", (0, 1), lambda x: two((-0.5, 4, 0.2 + x)), 0.35, 0.45),
    ("front_behind", (0, 1), lambda x: two((-0.5, 4 + x, 0.2)), 0.35, 0.5),
    ("nearer", (0, 1), lambda x: two((-0.5 * x, 4 * x, 1.5 - 1.3 * x)), 1.09, 1.11),
    ("taller", (1, 0), lambda x: two((1, 4, 0.5), (0.4, 0.4, 0.4 * x)), 1.14, 1.16),
    ("wider", (1, 0), lambda x: two((1, 4, 0.5), (0.7, 0.4 * x, 0.4)), 1.14, 1.16),
    ("longer", (1, 0), lambda x: two((1, 4, 0.5), (0.4 * x, 0.4, 0.4)), 1.14, 1.16),
    ("bigger", (1, 0), lambda x: two((1, 4, 0.5), (0.4 * x, 0.4, 0.4)), 1.49, 1.51),
    ("height_ratio", (1, 0), lambda x: two((1, 4, 0.5), (0.4, 0.4, 0.4 * x)), 1.14, 1.16),
    ("taller_than_long", (1,), lambda x: two((1, 4, 0.5), (0.4, 0.4, 0.4 * x)), 1.14, 1.16),
    ("reaches_higher", (1, 0), lambda x: two((1, 4, 0.2 + x)), 0.19, 0.23),
    ("vertical_distance", (0, 1), lambda x: two((1, 4, 0.2 + x)), 0.039, 0.041),
    ("clock", (0, 1), lambda x: two((-0.5 + np.sin(x * np.pi / 6), 4 + np.cos(x * np.pi / 6), 0.2)), 1.42, 1.39),
    ("clock", (0, 1), lambda x: two((-0.5 + x, 4, 0.2)), 0.19, 0.21),  # half of .4 m
    ("position", (0,), lambda x: table_of_boxes([(1, x, 0.2)], [CUBE]), -0.1, 0.1),  # behind, ahead
    ("points_apart", (0, 1), lambda x: points((0, 4, 1.5), (x, 4, 1.5)), 0.19, 0.21),  # 5% of 4 m
    ("bearing", (0,), lambda x: table_of_boxes([(4 * np.tan(np.radians(x)), 4, 0.2)], [CUBE]), 4.9, 5.1),
    ("image_third", (0,), lambda x: table_of_boxes([(4 * (160 * x - 80) / 104, 4, 0.2)], [CUBE]), 0.36, 0.37),
    ("in_order", (0, 1, 2), lambda x: table_of_boxes(
        [(0, 4, 1.5), (0, 4 * x, 1.5), (0, 8, 1.5)], [CUBE] * 3), 1.09, 1.11),
    ("nearest_to", (1, 2, 3, 0), lambda x: table_of_boxes(
        [(0, 4, 0), (0, 5, 0), (x, 4, 0), (0, 9, 0)], [CUBE] * 4), 1.09, 1.11),
    ("count_nearer", (0, 1, 2, 3), lambda x: table_of_boxes(
        [(0, 3, 1.5), (0, 6, 1.5), (0, 7, 1.5), (0, 3 * x, 1.5)], [CUBE] * 4), 1.09, 1.11),
    ("count_within", (1, 2, 3, 0), within, 3.29, 3.31),  # a radius of 3 m
    ("count_within", (1, 2, 3, 0), within, 2.74, 2.72),
    *(("camera_turned", (), turned, *degrees) for degrees in ((9, 11), (-9, -11), (171, 169), (-171, -169))),
    ("between", (2, 0, 1), lambda x: three((0.1, 4 + x, 0.2)), 0.32, 0.28),  # 15% of 2 m sideways
    ("between", (2, 0, 1), lambda x: three((0.1, 4 + x, 0.2)), 0.78, 0.82),  # 40%
    ("between", (2, 0, 1), lambda x: three((1 + x, 4, 0.2)), 0.19, 0.21),  # 10% of 2 m beyond an end
    ("equilateral", (0, 1, 2), lambda x: three((0, 4 + x, 0.2)), 2.15, 2.05),  # sides of 2 and up to 2.3 m
    ("equilateral", (0, 1, 2), lambda x: three((0, 4 + x, 0.2)), 2.6, 2.63),  # 2.8 m
    ("fits_between", (2, 0, 1), lambda x: three((0, 8, 0.2), base=0.4 + x), 0.45, 0.47),  # a gap of x for .4 m
    ("fits_between", (2, 0, 1), lambda x: three((0, 8, 0.2), base=0.4 + x), 0.36, 0.34),
    ("fits_between", (2, 0, 1), lambda x: three((0, 8, 0.2), base=0.4 + x), -0.01, 0.01),  # no gap where two overlap
    ("facing_side", (0, 1, 2), lambda x: three(at_angle(x)), 19, 21),
    ("facing_turn", (0, 1, 2), lambda x: three(at_angle(x)), 19, 21),
    ("facing_clock", (0, 1, 2), lambda x: three(at_angle(x)), 42, 41),
    ("facing_clock", (0, 1, 2), lambda x: three(at_angle(x)), 11, 19),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "things", "table", "within", "beyond"), MARGINS)
def test_what_is_near_a_boundary_is_not_asked(kind, things, table, within, beyond):
    assert (0, *things) not in found(table(within), kind)
    assert (0, *things) in found(table(beyond), kind)


def test_lengths_below_ten_centimetres_are_not_asked_about():
    """Of a thing alone, and beside two chairs that nothing tells apart, which have no names."""
    for height, types in ((0.099, {"length", "width"}), (0.101, {"length", "width", "height"})):
        for chairs in ([], [(-1, 4, 0.2), (-0.95, 4.05, 0.2)]):
            tags = ("bed", *["chair"] * len(chairs))
            table = table_of_boxes([(0, 4, 0.5), *chairs], [(0.4, 0.3, height), *[CUBE] * len(chairs)], tags)
            asked = records(table, per_clip=200)
            assert {q["type"] for q in asked} & {"length", "width", "height"} == types


def test_gaps_are_between_the_nearest_points_of_boxes():
    """Of boxes turned anyhow, against a grid of points on each: a gap has a corner of one at one of its ends."""
    table, yaw = random_table(0, objects=24), np.random.default_rng(1).uniform(-np.pi, np.pi, 24)
    table.centre[1], table.extent[:2], yaw[:2] = table.centre[0], (2, 0.2, 1), (0.3, 1.8)  # a cross
    table = replace(table, yaw=yaw)
    found, side = gaps(look(table, np.array([0])))[0], np.linspace(-0.5, 0.5, 41)
    grid = np.stack(np.meshgrid(side, side), -1).reshape(1, -1, 2) * table.extent[:, None, :2]  # [N, P, 2] in each box
    turn = np.stack([rotation(yaw)[:2, :2] for yaw in table.yaw])
    places = grid @ turn.swapaxes(1, 2) + table.centre[:, None, :2]
    seen = (places[:, None] - table.centre[:, None, :2]) @ turn  # [i, j, P, 2] those of i in the frame of j
    away = np.maximum(np.abs(seen) - table.extent[:, None, :2] / 2, 0)
    one_way = np.linalg.norm(away, axis=3).min(2)
    np.testing.assert_allclose(found, np.minimum(one_way, one_way.T), atol=1e-9)
    assert (found == 0).sum() > 24 + 20  # each with itself, and those that overlap


# -- ambiguity


def chairs(second, *, size=CUBE):
    sizes = [CUBE, size, (1.5, 0.5, 1)]
    return table_of_boxes([(-1, 4, 0.2), second, (0.2, 6, 0.5)], sizes, ("chair", "chair", "bed"))


def names(qs: list[dict]) -> set[str]:
    return {thing["name"] for q in qs for thing in q.get("objects", ())}


def test_two_chairs_are_told_apart_or_left_out():
    apart = records(chairs((1.5, 4, 0.2)), per_clip=200)
    assert names(apart) == {"the leftmost chair", "the rightmost chair", "the bed"}
    assert {o["id"] for q in apart for o in q.get("objects", ()) if o["name"] == "the leftmost chair"} == {1}
    sided = {q["type"] for q in apart if BY_TYPE[q["type"]].leak == "side" and len(q["objects"]) > 1}
    assert not sided  # "is the leftmost chair to the left": and nothing else tells them apart
    assert names(records(chairs((-0.95, 4.05, 0.2)), per_clip=200)) == {"the bed"}
    taller = names(records(chairs((-0.95, 4.05, 0.2), size=(0.4, 0.4, 0.8)), per_clip=200))
    assert taller == {"the taller chair", "the shorter chair", "the bed"}
    behind = names(records(chairs((-1.5, 6, 0.2)), per_clip=200))
    assert {"the chair nearest to the camera", "the chair farthest from the camera"} <= behind
    hidden = chairs((1.5, 4, 0.2))
    hidden = replace(hidden, pixels=hidden.pixels * ((1,), (0,), (1,)))
    assert names(records(hidden, per_clip=200)) == {"the chair", "the bed"}


def test_three_of_a_kind_have_a_middle_one_without_a_name():
    table = table_of_boxes([(-2, 5, 0.2), (0, 5, 0.2), (2, 5, 0.2)], [CUBE] * 3, ("chair",) * 3)
    asked = records(table, per_clip=60)
    assert names(asked) == {"the leftmost chair", "the rightmost chair"}
    assert {o["id"] for q in asked for o in q.get("objects", ())} == {1, 3}


def test_a_barely_seen_rival_still_makes_a_name_ambiguous():
    table = chairs((-0.95, 4.05, 0.2))
    table = replace(table, pixels=table.pixels * 0 + ((500,), (1,), (500,)))
    assert names(records(table, per_clip=200)) == {"the bed"}


def test_objects_cut_or_occluded_are_out_and_unknown_ends_are_not_measured():
    table = random_table(3, views=3)
    whole = table.whole.copy()
    whole[2] = 0.4
    asked = records(replace(table, whole=whole), per_clip=300)
    assert len(asked) > 200
    assert 3 not in {o["id"] for q in asked for o in q.get("objects", ())}
    complete = table.complete.copy()
    complete[4] = False
    unknown, objects = replace(table, complete=complete), [kind.name for kind in TYPES if not kind.points]
    about = {kind for kind in objects if any(4 in things for _, *things in found(unknown, kind))}
    sizeless = {"nearer", "distance_from_camera", "image_third", "count_nearer", "in_order"}
    assert about == sizeless
    large = table.pixels.copy()
    large[1] = 30  # of 15,360: .195%
    assert 2 not in {o["id"] for q in records(replace(table, pixels=large)) for o in q.get("objects", ())}


def test_walls_and_floors_are_no_objects():
    table = table_of_boxes([(-1, 4, 0.2), (1, 4, 0.2), (0, 6, 1)], [CUBE] * 3, ("wall", "lamp", "floor"))
    assert names(records(table)) == {"the lamp"}


# -- cameras and mirrors


def test_a_rolled_camera_changes_no_answer_but_withholds_some():
    fewer = 0
    for number in range(20):
        table = random_table(number)
        level = found(table, "left_right")
        for degrees in (20, -20):
            turned = rolled(table, degrees)
            there = found(turned, "left_right")
            assert all(there[key][1] == level[key][1] for key in there.keys() & level.keys())
            fewer += len(level) - len(there)
            here = look(turned, np.arange(len(turned.frames))).here
            for (row, i, j), (_, outcome) in there.items():  # as the room has it, and as the rolled image has it
                for sideways in (here.along[row, 2], here.slope[row]):
                    assert (sideways[i] < sideways[j]) == (outcome == 0)
            for kind in ("above_below", "front_behind", "north_south", "clock", "bearing", "facing_side", "distance"):
                same, before = found(turned, kind), found(table, kind)
                assert same.keys() <= before.keys()
                assert all(np.allclose(same[key], before[key]) for key in same)
    assert fewer > 100


def test_what_is_in_front_is_so_along_the_floor_and_along_the_view():
    """A camera that looks down by 40 degrees: what is higher up is nearer along its view, though farther on."""
    c, s = np.cos(np.radians(40)), np.sin(np.radians(40))
    down = np.array([[1, 0, 0, 0], [0, c, s, 0], [0, -s, c, 0], [0, 0, 0, 1.0]])
    for height, kept in ((0.2, True), (1.8, False)):
        table = two((-0.5, 4.8, height))
        table = replace(table, poses=table.poses @ down)
        assert table.poses[0, 2, 2] == pytest.approx(-s)
        assert ((0, 0, 1) in found(table, "front_behind")) == kept


WORD_FLIPS = {"left_right", "left_right_there", "east_west", "camera_turned", "facing_side", "image_third"}
NUMBER_FLIPS = {"bearing", "clock", "facing_clock", "position", "point_position"}


@pytest.mark.parametrize("kind", [kind.name for kind in TYPES])
def test_a_mirror_flips_the_lateral_answers_and_no_other(kind):
    some = 0
    for number in range(12):
        table = random_table(number)
        before, after = found(table, kind), found(mirrored(table), kind)
        assert before.keys() == after.keys()
        some += len(before)
        last = 2 if kind == "image_third" else 1
        for key, (value, outcome) in before.items():
            other, flipped = after[key]
            assert flipped == (last - outcome if kind in WORD_FLIPS else outcome)
            if kind in ("clock", "facing_clock"):
                assert (value + other) % 12 == pytest.approx(0, abs=1e-9) or (value + other) % 12 == pytest.approx(12)
            elif kind in ("position", "point_position"):
                assert np.allclose([-value[0], *value[1:]], other)
            elif kind == "image_third":
                assert value + other == pytest.approx(1)
            elif kind in NUMBER_FLIPS | WORD_FLIPS:
                assert value == pytest.approx(-other) or kind == "left_right_there"
            else:
                assert np.allclose(value, other)
    assert some


# -- what a table lacks


@pytest.mark.parametrize(
    ("lacks", "needs"), [({"metric": False}, "metric"), ({"gravity": "camera"}, "upright"), ({"floor": None}, "floor")]
)
def test_what_a_table_lacks_is_not_asked_for(lacks, needs):
    asked = records(random_table(5, **lacks), per_clip=400)
    types = {q["type"] for q in asked}
    assert types == {kind.name for kind in TYPES if needs not in kind.needs.split()} & types
    assert len(types) >= 12
    if needs == "metric":
        said = " ".join(q["question"] + q["answer"] for q in asked)
        assert not re.search(r"\d c?m", said)
        assert {q["unit"] for q in asked} <= {"", "degrees", "h"}


def test_one_view_has_no_second_image():
    asked = records(random_table(5, views=1), per_clip=200)
    assert {len(q["frames"]) for q in asked} == {1}
    assert "image" not in {word for q in asked for word in re.findall(r"second (\w+)", q["question"])}


def test_a_clip_without_objects_is_named():
    table = random_table(5)
    with pytest.raises(ClipError, match="none of its 8 objects is seen well in any of 6 views"):
        ask(replace(table, whole=table.whole * 0.4), Settings())
    empty = {name: getattr(table, name)[:0] for name in ("ids", "centre", "extent", "yaw", "complete")}
    empty |= {name: getattr(table, name)[:0] for name in ("pixels", "whole", "nearest", "box")}
    with pytest.raises(ClipError, match="there are no objects"):
        ask(replace(table, tags=(), **empty), Settings())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("objects", [1, 2, 5, 24, 25, 60])
def test_odd_tables_are_asked_about_without_a_word_of_nonsense(objects):
    """Flat boxes, boxes at one place, cameras that look down, objects without depth, hardly a pixel to ask about."""
    for number in range(4):
        table = random_table(number, objects=objects, views=(1, 2, 9, 30)[number], alike=number % 2 == 0)
        rng, points = np.random.default_rng(number), slice(None, number)
        hidden, flat = rng.random(table.pixels.shape) < 0.2, rng.random(table.extent.shape) < 0.2
        down = table.poses.copy()
        down[::2, :3, :3] = np.diag((1, -1, -1))
        odd = replace(
            table,
            whole=rng.uniform(0.3, 1, table.whole.shape),
            complete=rng.random(table.complete.shape) < 0.8,
            pixels=np.where(hidden, 0, table.pixels),
            nearest=np.where(hidden | (rng.random(hidden.shape) < 0.1), np.inf, table.nearest),
            box=np.where(hidden[..., None], np.nan, table.box),
            extent=np.where(flat, 0, table.extent),
            centre=table.centre if number else np.repeat(table.centre[:1], objects, 0),
            poses=down if number == 1 else table.poses,
            sample_pixels=table.sample_pixels[:, points],
            sample_points=table.sample_points[:, points],
            sample_ids=table.sample_ids[:, points],
        )
        seen = (odd.pixels > 0) & (odd.whole >= 2 / 3) & np.isfinite(odd.nearest)
        if not seen.any():
            continue
        asked = records(odd, per_clip=60)
        assert asked or not number
        known = dict(zip(odd.ids.tolist(), seen, strict=True))
        for q in asked:
            view = odd.frames.tolist().index(q["frames"][0])
            assert all(known[thing["id"]][view] for thing in q.get("objects", ()))
            assert not re.search(r"\bnan|\binf\b|None\b(?! of)|\be[+-]\d", q["question"] + q["answer"])
