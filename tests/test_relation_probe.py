"""The relation probe through `train`: features that hold the answer, noise, grids, resume, clips that ask little."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from relation_scenes import FRAMES, GRID, RoomLabels, boxes_of, noise_features, true_features, write_rooms

from spatialprobe.engine.store import FeatureStore
from spatialprobe.probes.labels.relations import KINDS, NAMES
from spatialprobe.probes.loop import evaluate, train
from spatialprobe.probes.pictures import draw_run
from spatialprobe.probes.results import Result, table
from spatialprobe.probes.tasks.relation import RELATION

ROOMS = 80  # of which one in four is for validation
SETTINGS = {
    "views": 3, "gap": 4, "context": FRAMES, "query": "0,1::4",  # frames 0, 1, 5
    "embed": 32, "heads": 2, "depth": 0, "dropout": 0.0, "batch": 8, "epochs": 16, "warmup": 1, "lr": 6e-3,
    "weight_decay": 0.01, "hidden": 64, "head_dropout": 0.0,
}  # fmt: skip
SHORT = SETTINGS | {"depth": 1, "epochs": 2, "hidden": 16, "embed": 16}


def rooms_of(numbers: range, objects: int = 7) -> dict:
    return {room[0].clip: room for room in (boxes_of(number, objects=objects) for number in numbers)}


@pytest.fixture(scope="module")
def labels() -> RoomLabels:
    return RoomLabels(rooms_of(range(ROOMS)))


@pytest.fixture(scope="module")
def few() -> RoomLabels:
    """Of 12 rooms one has a single object, one shows none that is asked about."""
    rooms = rooms_of(range(10)) | rooms_of(range(10, 11), objects=1)
    table, masks = boxes_of(11)
    unseen = replace(table, pixels=np.zeros_like(table.pixels))
    return RoomLabels(rooms | {table.clip: (unseen, np.zeros_like(masks))}, rows=40)


@pytest.fixture(scope="module")
def store(few, tmp_path_factory) -> FeatureStore:
    return write_rooms(tmp_path_factory.mktemp("stores") / "few", few.rooms, true_features)


def numbers(result: Result) -> list[float]:
    return [x for row in [*result.curve, result.metrics] for x in row.values() if not math.isnan(x)]


def test_true_centres_and_sizes_answer_and_noise_does_not(labels, tmp_path):
    """In rooms that no probe was trained on. Chance's bound is that of coins, one per pair of objects."""
    known, unknown = (
        write_rooms(tmp_path / name, labels.rooms, features)
        for name, features in (("known", true_features), ("unknown", noise_features))
    )
    settings = SETTINGS | {"val": labels.ids()[::4]}
    (told,) = train(RELATION, known, labels, **settings)
    (guessed,) = train(RELATION, unknown, labels, **settings | {"epochs": 4})
    assert guessed.best_epoch == np.argmin([row["val_loss"] for row in guessed.curve])
    decided = [name for name, kind in zip(NAMES, KINDS, strict=True) if kind == "yes_or_no"]
    of_each = {name: told.metrics[f"balanced_accuracy/{name}"] for name in decided}
    assert told.metrics["balanced_accuracy"] == pytest.approx(np.mean(list(of_each.values())))
    assert told.metrics["balanced_accuracy"] > 0.95
    assert min(of_each.values()) > 0.9, of_each
    assert told.metrics["within_25"] > 0.8
    assert told.metrics["median_relative_error"] < 0.15
    assert told.metrics["within_one_hour"] > 0.9
    assert told.metrics["relations_scored"] == len(NAMES)
    pairs = {name: set() for name in decided}  # which pair of which room: the other way round and views are no others
    for clip_id in settings["val"]:
        for relation, *ids, _ in labels.read(clip_id, [0, 1, 5], ("relations",))["relations"].flatten(0, 1).tolist():
            if relation >= 0 and NAMES[int(relation)] in pairs:
                pairs[NAMES[int(relation)]].add((clip_id, *sorted(ids)))
    # A share of n coins has standard deviation 1 / (2 sqrt(n)). Relations of the same pairs are not independent, so
    # their mean is bounded as one of them is.
    deviation = {name: 0.5 / math.sqrt(len(there)) for name, there in pairs.items()}
    assert max(deviation.values()) < 0.06
    assert abs(guessed.metrics["balanced_accuracy"] - 0.5) < 3 * np.mean(list(deviation.values()))
    for name in decided:
        assert abs(guessed.metrics[f"balanced_accuracy/{name}"] - 0.5) < 4 * deviation[name], name
    assert guessed.metrics["within_25"] < 0.5
    assert guessed.metrics["same_hour"] < 0.25  # of 12


def test_noise_in_every_patch_tells_how_large_objects_look(tmp_path):
    """A mean over many patches varies less than one over few: what looks larger is nearer, but on neither side."""
    labels = RoomLabels(rooms_of(range(320)), rows=64)
    store = write_rooms(tmp_path / "noise", labels.rooms, partial(noise_features, per_object=False))
    (guessed,) = train(RELATION, store, labels, **SETTINGS | {"val": labels.ids()[::4], "epochs": 4})
    for name in ("nearer", "in_front_of"):
        assert guessed.metrics[f"balanced_accuracy/{name}"] > 0.6, name
    for name in ("left_of", "east_of", "above"):
        assert guessed.metrics[f"balanced_accuracy/{name}"] == pytest.approx(0.5, abs=0.1), name


def test_each_relation_probe_of_a_grid_ends_as_it_would_alone(few, store):
    grid = {"head_dropout": [0.0, 0.3], "hidden": [16, 24], "depth": [0, 1]}
    settings = {name: value for name, value in SHORT.items() if name not in grid} | {"val": few.ids()[::4]}
    together = train(RELATION, store, few, grid=grid, **settings)
    assert len({tuple(numbers(result)) for result in together}) == 8, "settings make no difference"
    for result in together[1::3]:
        chosen = {name: result.config["options"][name] for name in ("head_dropout", "hidden")}
        (alone,) = train(RELATION, store, few, **settings | chosen | {"depth": result.config["depth"]})
        assert alone.config == result.config
        assert numbers(alone) == pytest.approx(numbers(result), rel=2e-4, abs=1e-4)


def test_a_probe_in_a_file_says_the_same_and_a_killed_run_goes_on(few, store, tmp_path):
    settings = SHORT | {"val": few.ids()[::4]}
    (whole,) = train(RELATION, store, few, out=tmp_path / "whole", **settings)
    again = evaluate(tmp_path / "whole" / "probe-000.safetensors", store, few)
    assert again == pytest.approx(whole.metrics, nan_ok=True, rel=1e-5)

    def kill(state):
        if (state.epoch, state.batch) == (1, 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(RELATION, store, few, out=tmp_path / "killed", progress=kill, **settings)
    (resumed,) = train(RELATION, store, few, out=tmp_path / "killed", **settings)
    assert numbers(resumed) == numbers(whole)
    few.relation_names = tuple(reversed(NAMES))
    try:
        with pytest.raises(ValueError, match=r"trained on 21 classes .*, labels in rooms have 21 classes"):
            evaluate(tmp_path / "whole" / "probe-000.safetensors", store, few)
    finally:
        del few.relation_names


def test_clips_that_ask_little_are_trained_on_and_scored(few, store):
    """The one with a single object and the one without any are validated on alone."""
    (result,) = train(RELATION, store, few, **SHORT | {"val": few.ids()[-2:]})
    single = few.read(few.ids()[-2], [0, 1, 5], ("relations",))["relations"].flatten(0, 1)
    kinds = {NAMES[int(relation)] for relation in single[single[:, 0] >= 0, 0].tolist()}
    assert kinds == {"distance_from_camera", "height", "width", "length"}
    assert result.metrics["answers"] == (single[:, 0] >= 0).sum()
    assert result.metrics["relations_scored"] == 4
    assert math.isnan(result.metrics["balanced_accuracy"])
    assert {name for name in result.metrics if name.startswith("within_25/")} == {
        "within_25/level1", *(f"within_25/{name}" for name in kinds)
    }  # fmt: skip
    (other,) = train(RELATION, store, few, **SHORT | {"val": few.ids()[:4]})  # trained on both
    assert other.metrics["relations_scored"] > 15


def test_pictures_and_the_table_of_a_run(few, store, tmp_path):
    results = train(RELATION, store, few, out=tmp_path, grid={"seed": [1, 2]}, **SHORT | {"val": few.ids()[::4]})
    drawn = draw_run(tmp_path, results, [store], few)
    assert [path.name for path in drawn] == ["curve.png", "relations.png"]
    assert all(path.stat().st_size > 10_000 for path in drawn)
    header = table(results).splitlines()[0].split()
    assert header[:3] == ["seed", "loss", "balanced_accuracy"]
    assert not [name for name in header if "/" in name]


def test_what_does_not_fit_is_refused(few, store):
    without = RoomLabels(few.rooms)
    without.names = ("instance_masks",)
    with pytest.raises(ValueError, match="labels wanted must be some of instance_masks, got relations"):
        train(RELATION, store, without, **SHORT)
    table, masks = boxes_of(0)
    coarse = RoomLabels({clip_id: (table, masks[:, ::3, ::3]) for clip_id, (table, masks) in few.rooms.items()}, rows=9)
    with pytest.raises(ValueError, match=f"as fine as the {GRID[0]}x{GRID[1]} patches, got 7x10"):
        train(RELATION, store, coarse, **SHORT)
    blank = replace(table, pixels=np.zeros_like(table.pixels))
    nothing = RoomLabels({clip_id: (blank, masks) for clip_id in few.rooms})
    with pytest.raises(ValueError, match="nothing to learn: the first views of 11 training clips of rooms show no"):
        train(RELATION, store, nothing, **SHORT)
    with pytest.raises(ValueError, match="no probe setting is called wings"):
        train(RELATION, store, few, **SHORT, wings=2)
