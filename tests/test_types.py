"""The nouns check themselves where they are made."""

import pytest
import torch

from spatialprobe.engine.types import (
    Clip,
    ClipRef,
    Features,
    FeatureSpec,
    FrameSelection,
    Plan,
    check_clip_id,
    parse_query,
)


@pytest.mark.parametrize(
    ("query", "window", "frames"),
    [
        (":", 4, (0, 1, 2, 3)),
        ("0,1:76:4", 81, (0, *range(1, 76, 4))),
        ("0,1:76:4", 9, (0, 1, 5)),  # slices end at the window
        ("7, 3,3", 9, (3, 7)),
        ("::3", 7, (0, 3, 6)),
        ("5:", 7, (5, 6)),
    ],
)
def test_query(query, window, frames):
    assert parse_query(query, window) == frames


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("9", "query frame 9 is outside the window of 9 frames"),
        ("", "query must be frame numbers and slices"),
        ("-1", "outside the window"),
        ("1:2:3:4", "query must be"),
        ("::0", "query must be"),
        ("-3:", "query must be"),
        ("20:", "selects none"),
        ("one", "query must be"),
    ],
)
def test_bad_query(query, message):
    with pytest.raises(ValueError, match=message):
        parse_query(query, 9)


@pytest.mark.parametrize("clip_id", ["a", "train/scene0000_00", "a b", "日本/ü", "x" * 200])
def test_good_ids(clip_id):
    assert check_clip_id(clip_id) == clip_id


@pytest.mark.parametrize(
    "clip_id",
    [
        "",
        "/etc/x",
        "a/../b",
        "..",
        "a//b",
        "a/",
        ".hidden",
        "a/.b",
        "a\\b",
        "a\nb",
        "x" * 201,
        "a.safetensors/b",
        "a.sft/b",
        "a\udce9",
    ],
)
def test_bad_ids(clip_id):
    with pytest.raises(ValueError, match="clip id must"):
        ClipRef(clip_id, "/data/x")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 0}, "window must be at least 1"),
        ({"stride": 0}, "stride must be at least 1"),
        ({"start": -1}, "start must be a frame number"),
        ({"start": "end"}, "start must be 'start', 'center', 'start_idx'"),
        ({"short": "drop"}, "short must be one of pad, error, skip"),
        ({"window": 5, "query": "5"}, "outside the window of 5"),
    ],
)
def test_bad_frame_selections(fields, message):
    with pytest.raises(ValueError, match=message):
        FrameSelection(**fields)


def spec(**fields) -> FeatureSpec:
    return FeatureSpec(**{"family": "wan", "weights": "content:0", "layers": (1, 3), "steps": (5, 9)} | fields)


def test_a_spec_survives_json_and_equal_specs_give_equal_text():
    a = spec(pool=(2, 3), options={"size": [4, 6], "prompt": "é"}, frames=FrameSelection(window=9, query="0,3"))
    assert FeatureSpec.from_json(a.to_json()) == a
    assert FeatureSpec.from_json(a.to_json()).to_json() == a.to_json()
    assert spec(options={"a": 1, "b": 2}).to_json() == spec(options={"b": 2, "a": 1}).to_json()
    assert spec(seed=1).to_json() != spec(seed=2).to_json()
    with pytest.raises(ValueError, match="does not know: colour"):
        FeatureSpec.from_json(a.to_json().replace('"seed"', '"colour"'))


def test_tensors_of_a_spec():
    assert spec().tensors() == [(1, 5), (1, 9), (3, 5), (3, 9)]
    assert spec(merge_steps=True).tensors() == [(1, None), (3, None)]
    assert spec(steps=()).tensors() == [(1, None), (3, None)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": ()}, "at least one block"),
        ({"layers": (3, 1)}, "layers must be ascending"),
        ({"layers": (1, 1)}, "layers must be ascending"),
        ({"steps": (-1,)}, "steps must be ascending"),
        ({"steps": (), "merge_steps": True}, "merge_steps needs steps"),
        ({"dtype": "float64"}, "dtype must be one of"),
        ({"compute_dtype": "int8"}, "compute_dtype must be one of"),
        ({"pool": (0, 3)}, "pool must be two positive"),
    ],
)
def test_bad_specs(fields, message):
    with pytest.raises(ValueError, match=message):
        spec(**fields)


def test_features_say_which_frames_no_row_sees():
    features = Features(torch.arange(2.0).view(2, 1, 1, 1), torch.tensor([0, -1, 1]))
    assert features.at(torch.tensor([2, 0])).flatten().tolist() == [1.0, 0.0]
    for frame in (1, 3, -1):
        with pytest.raises(KeyError, match=rf"\[{frame}\]"):
            features.at(torch.tensor([0, frame]))
    with pytest.raises(ValueError, match=r"values -1 \.\. 1"):
        Features(torch.zeros(2, 1, 1, 1), torch.tensor([2]))
    with pytest.raises(ValueError, match=r"\[T, H, W, C\]"):
        Features(torch.zeros(2, 1, 1), torch.tensor([0]))


def test_a_clip_is_uint8_rgb_with_an_index():
    with pytest.raises(ValueError, match=r"uint8 \[F, 3, H, W\], got torch.float32"):
        Clip("a", torch.zeros(2, 3, 4, 4), torch.arange(2))
    with pytest.raises(ValueError, match=r"index must be \[2\]"):
        Clip("a", torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.arange(3))


def test_a_plan_knows_the_rows_of_wanted_frames():
    plan = Plan(5, (0, 1, 2, 3, 4), (8, 8), (2, 1, 1), (0, 1, 1, 1, -1))
    assert plan.wanted_rows((2, 3)) == (1,)
    assert plan.wanted_rows((0, 3)) == (0, 1)
    whole = Plan(3, (0, 1, 2), (8, 8), (3, 1, 1), (0, 2, 2))  # row 1 stands for no frame
    assert whole.wanted_rows((0, 1, 2)) == (0, 1, 2)
    assert whole.wanted_rows((0, 1)) == (0, 2)
    with pytest.raises(ValueError, match=r"no feature row sees frames \[4\]; rows see \[0, 1, 2, 3\]"):
        plan.wanted_rows((0, 4))
