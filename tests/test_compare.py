"""`engine compare`: every figure against numpy in float64, and whatever cannot be compared is named."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from spatialprobe.engine.cli import main
from spatialprobe.engine.compare import compare_lines, compare_stores
from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.types import STORE_DTYPES, FeatureSpec, FrameSelection, tensor_name
from spatialprobe.kernels.pool_features import finish

SHAPE = (3, 2, 5, 16)  # T, H, W, C
ROWS = [0, 1, 1, 2, 2]


def make_spec(**changes) -> FeatureSpec:
    words = {"family": "wan", "weights": "content:0", "layers": (1, 3), "steps": (749,)}
    return FeatureSpec(**(words | {"frames": FrameSelection(window=5)} | changes))


def make_store(root, clips, *, noise=0.0, shape=SHAPE, rows=ROWS, change=None, **spec) -> FeatureStore:
    """Clips of ids -> seeds; `noise` is added to what the seed draws. `change(name, x)` may alter values."""
    store = FeatureStore.create(root, make_spec(**spec))
    for clip_id, seed in clips.items():
        tensors = {}
        for layer, step in store.spec.tensors():
            generator = torch.Generator().manual_seed(1000 * seed + layer)
            x = 3 * torch.randn(shape, generator=generator) + layer
            x = x + noise * torch.randn(shape, generator=generator)
            name = tensor_name(layer, step)
            x = x if change is None else change(name, x)
            tensors |= finish(x, STORE_DTYPES[store.spec.dtype]).named(name)
        about = {"grid": list(shape[:3]), "rows_kept": list(range(shape[0])), "padded": 0}
        store.write(clip_id, tensors, torch.tensor(rows), about)
    return store


def numbers(store: FeatureStore, clip_id: str, name: str) -> np.ndarray:
    """A clip's values in float64, read by the library's own reader."""
    found = load_file(store.path(clip_id))
    x = found[name].to(torch.float32).numpy().astype(np.float64)
    scale = found.get(f"{name}.scale")
    return x if scale is None else (x.astype(np.float32) * scale.numpy()[..., None]).astype(np.float64)


def by_numpy(a: FeatureStore, b: FeatureStore, clips, name: str) -> dict[str, float]:
    x = np.concatenate([numbers(a, clip, name).reshape(-1, SHAPE[3]) for clip in clips])
    y = np.concatenate([numbers(b, clip, name).reshape(-1, SHAPE[3]) for clip in clips])
    cosines = (x * y).sum(1) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1))
    return {
        "cosine_mean": cosines.mean(),
        "cosine_worst": cosines.min(),
        "worst_clip": clips[int(cosines.argmin()) * len(clips) // len(cosines)],
        "relative_l2": np.linalg.norm(y - x) / np.linalg.norm(x),
        "max_abs": np.abs(y - x).max(),
        "tokens": len(cosines),
        "clips": len(clips),
    }


@pytest.mark.parametrize("dtypes", [("float16", "float16"), ("bfloat16", "int8"), ("float8_e4m3", "int8")])
def test_figures_are_numpys_in_float64(tmp_path, dtypes):
    a = make_store(tmp_path / "a", {"x/1": 1, "x/2": 2, "left": 3}, dtype=dtypes[0])
    b = make_store(tmp_path / "b", {"x/1": 1, "x/2": 2, "right": 3}, noise=0.05, dtype=dtypes[1])
    found = compare_stores(a, b)
    assert (found.compared, found.only_in_a, found.only_in_b, found.left_out) == (2, ["left"], ["right"], {})
    told = json.loads(found.to_json())
    assert [(t["layer"], t["step"]) for t in told["tensors"]] == [(1, 749), (3, 749)]
    for tensor in told["tensors"]:
        expected = by_numpy(a, b, ["x/1", "x/2"], tensor_name(tensor["layer"], tensor["step"]))
        assert 0.005 < expected["relative_l2"] < 0.2
        for key, value in expected.items():
            assert tensor[key] == (value if isinstance(value, str | int) else pytest.approx(value, rel=1e-9)), key
    dtype = {} if dtypes[0] == dtypes[1] else {"dtype": {"a": f'"{dtypes[0]}"', "b": f'"{dtypes[1]}"'}}
    assert told["spec"] == dtype


def test_equal_stores_agree_exactly(tmp_path):
    stores = [make_store(tmp_path / name, {"c": 1}, dtype="int8") for name in "ab"]
    (one, two) = json.loads(compare_stores(*stores).to_json())["tensors"]
    for tensor in (one, two):
        assert (tensor["relative_l2"], tensor["max_abs"], tensor["tokens"]) == (0.0, 0.0, 30)
        assert tensor["cosine_worst"] == pytest.approx(1, abs=1e-15)


def test_tokens_of_zeros(tmp_path):
    """A token that is 0 in both agrees; one that is 0 in one has no direction to agree on."""

    def zero(name, x):
        return x.clone().index_fill_(1, torch.tensor([0]), 0.0)

    a, same = (make_store(tmp_path / name, {"c": 1}, change=zero) for name in ("a", "same"))
    other = make_store(tmp_path / "other", {"c": 1})
    assert compare_stores(a, same).agreements[1, 749].worst == pytest.approx(1, abs=1e-15)
    agreement = compare_stores(a, other).agreements[1, 749]
    assert (agreement.worst, agreement.cosine) == (0.0, pytest.approx(0.5, abs=1e-12))
    nothing = make_store(tmp_path / "zeros", {"c": 1}, change=lambda name, x: 0 * x)
    assert compare_stores(nothing, other).agreements[1, 749].relative == float("inf")
    assert json.loads(compare_stores(nothing, other).to_json())["tensors"][0]["relative_l2"] is None
    assert not compare_stores(nothing, other).within(1e9)


def test_what_cannot_be_compared_is_named(tmp_path):
    a = make_store(tmp_path / "a", {"c": 1, "d": 2}, layers=(1, 2))
    b = make_store(tmp_path / "b", {"c": 1}, shape=(3, 2, 4, 16), layers=(1, 3))
    b.write("d", *_of(make_store(tmp_path / "d", {"d": 2}, layers=(1, 3), rows=[0, 0, 1, 1, 2]), "d"))
    found = compare_stores(a, b)
    assert found.left_out == {
        "layer2/step749 is in one only": [],
        "layer3/step749 is in the other only": [],
        "layer1/step749 is [3, 2, 5, 16] in one, [3, 2, 4, 16] in the other": ["c"],
        "rows see other frames": ["d"],
    }
    assert (found.compared, found.within(1e9)) == (0, False)
    told = "\n".join(compare_lines(found))
    assert "0 clips compared, 0 only in the first, 0 only in the second" in told
    assert "not compared: rows see other frames (1 clips, as d)" in told
    assert "spec layers: [1, 2] in the first, [1, 3] in the second" in told
    with pytest.raises(ValueError, match="no layer and step in common: one holds layer1/step749, layer2/step749, the"):
        compare_stores(a, make_store(tmp_path / "e", {"c": 1}, layers=(1, 2), steps=(3,)))


def _of(store: FeatureStore, clip_id: str):
    tensors = load_file(store.path(clip_id))
    return {n: x for n, x in tensors.items() if n != "rows"}, tensors["rows"], store.provenance(clip_id)


def test_a_damaged_clip_does_not_end_it(tmp_path):
    a, b = (make_store(tmp_path / name, {"c": 1, "d": 2}) for name in "ab")
    b.path("c").write_bytes(b.path("c").read_bytes()[:100])
    found = compare_stores(a, b)
    assert found.compared == 1
    assert list(found.damaged) == ["c"]
    assert not found.within(1.0)  # equal as far as could be seen, which is not all
    assert found.agreements[1, 749].relative == 0


def test_the_command(tmp_path, capsys):
    make_store(tmp_path / "a", {"c": 1, "d": 2})
    b = make_store(tmp_path / "b", {"c": 1, "d": 2}, noise=0.05, seed=1)
    words = ["compare", str(tmp_path / "a"), str(tmp_path / "b")]
    file = tmp_path / "figures.json"
    assert main([*words, "--json", str(file)]) == 0
    out = capsys.readouterr().out
    told = json.loads(file.read_text())
    relative = by_numpy(FeatureStore.open(tmp_path / "a"), b, ["c", "d"], "layer3/step749")["relative_l2"]
    assert told["tensors"][1]["relative_l2"] == pytest.approx(relative, rel=1e-9)
    assert f"{relative:.3e}" in out
    assert "spec seed: 0 in the first, 1 in the second" in out
    assert main([*words, "--max-relative", "0.1"]) == 0
    assert main([*words, "--max-relative", "0.001"]) == 1
    assert "not within a relative L2 of 0.001" in capsys.readouterr().err
    b.path("c").unlink()  # equal as far as both go is not equal
    assert main([*words, "--max-relative", "0.1"]) == 1
    assert "not within a relative L2 of 0.1: 1 clips could not be compared" in capsys.readouterr().err
    assert main(["compare", *words[:0:-1], "--max-relative", "0.1"]) == 1
    assert main(words) == 0
    for more, message in (
        (["--max-relative", "much"], "max-relative must be a number from 0, got 'much'"),
        (["--json", str(tmp_path / "no" / "f.json")], "json must be a file in a folder that is there"),
    ):
        assert main([*words, *more]) == 2
        assert message in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "a"), str(tmp_path)]) == 2
    assert "is not a feature store" in capsys.readouterr().err
