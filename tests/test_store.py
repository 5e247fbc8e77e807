"""What goes into a store comes out, equal clips make equal bytes, and what does not fit is refused at the door."""

import hashlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.types import STORE_DTYPES, FeatureSpec, FrameSelection, tensor_name
from spatialprobe.kernels.pool_features import finish

ROWS = [-1, 0, 0, 0, 0, 2, 2, 2, 1]  # of 9 frames
QUERY = FrameSelection(window=9)


def small_spec(**changes) -> FeatureSpec:
    values = {"family": "wan", "weights": "content:0", "layers": (1, 3), "steps": (200, 749), "frames": QUERY}
    return FeatureSpec(**(values | changes))


def small_clip(spec, seed=0, shape=(3, 4, 5, 16)):
    """What FeatureStore.write takes for a clip."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for key in spec.tensors():
        done = finish(torch.randn(shape, generator=generator) * 3 + 1, STORE_DTYPES[spec.dtype])
        parts = {"": done.data, ".mean": done.mean, ".rstd": done.rstd, ".scale": done.scale}
        tensors |= {tensor_name(*key) + part: value for part, value in parts.items() if value is not None}
    return tensors, torch.tensor(ROWS), {"grid": list(shape[:3]), "rows_kept": [0, 1, 2], "padded": 0, "seed": seed}


def bits(x):
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


# -- round trip -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", STORE_DTYPES)
@pytest.mark.parametrize("steps", [(), (200, 749)])
def test_what_is_written_is_read(tmp_path, dtype, steps):
    store = FeatureStore.create(tmp_path / "s", small_spec(dtype=dtype, steps=steps))
    tensors, rows, provenance = small_clip(store.spec, seed=3)
    size = store.write("train/scene", tensors, rows, provenance)
    assert size == store.path("train/scene").stat().st_size == store.nbytes

    other = load_file(store.path("train/scene"))  # the library's own reader
    assert set(other) == {*tensors, "rows"}
    assert all(torch.equal(bits(other[name]), bits(x)) for name, x in tensors.items())
    reader = FeatureStore.open(tmp_path / "s")
    for layer, step in reader.spec.tensors():
        name = tensor_name(layer, step)
        expected = tensors[name]
        if dtype in ("float8_e4m3", "int8"):
            expected = torch.einsum("thwc,thw->thwc", expected.float(), tensors[f"{name}.scale"])
        features = reader.read("train/scene", layer, step)
        assert features.data.dtype == expected.dtype
        assert torch.equal(features.data, expected)
        assert features.rows.tolist() == ROWS
        assert torch.equal(reader.read("train/scene", layer, step, dtype=torch.float64).data, expected.double())
        raw = reader.read_raw("train/scene", layer, step)
        for part, x in raw.items():
            stored = rows if part == "rows" else tensors[name if part == "data" else f"{name}.{part}"]
            assert torch.equal(bits(x), bits(stored))
        frames = [8, 1, 5, 1]
        picked = reader.read_frames("train/scene", layer, frames, step)
        assert torch.equal(picked, expected[[1, 0, 2, 0]])
        assert picked.dtype == expected.dtype
        for unseen in (0, 9, -1):
            with pytest.raises(KeyError, match=rf"train/scene: no feature row sees frames \[{unseen}\]"):
                reader.read_frames("train/scene", layer, [1, unseen], step)
    assert reader.provenance("train/scene").items() >= provenance.items()


def test_equal_clips_make_equal_bytes(tmp_path):
    spec = small_spec()
    tensors, rows, provenance = small_clip(spec)
    strided = {n: x.movedim(-1, 0).contiguous().movedim(0, -1) for n, x in reversed(tensors.items())}
    assert not strided["layer1/step200"].is_contiguous()
    shuffled = dict(reversed(provenance.items())) | {"steps": [{"b": 0.1, "a": 1}]}
    a, b = (FeatureStore.create(tmp_path / name, spec) for name in "ab")
    a.write("x", tensors, rows, provenance | {"steps": [{"a": 1, "b": 0.1}]})
    b.write("x", strided, rows, shuffled)
    assert a.path("x").read_bytes() == b.path("x").read_bytes()
    b.write("x", strided, rows, shuffled | {"seed": 1})
    assert a.path("x").read_bytes() != b.path("x").read_bytes()
    assert b.provenance("x")["seed"] == 1  # replaced


def test_the_checksum_covers_header_and_data(tmp_path):
    store = FeatureStore.create(tmp_path / "s", small_spec())
    store.write("x", *small_clip(store.spec))
    whole = store.path("x").read_bytes()
    with safe_open(store.path("x"), "pt") as file:
        metadata = file.metadata()
    assert set(metadata) == {"spatialprobe"}
    provenance = json.loads(metadata["spatialprobe"])
    checksum = provenance["checksum"]
    assert checksum == hashlib.sha256(whole.replace(checksum.encode(), b"0" * 64)).hexdigest()
    assert (provenance["clip"], provenance["spec"]) == ("x", store.spec_hash)


def test_changing_what_was_read_changes_no_file(tmp_path):
    store = FeatureStore.create(tmp_path / "s", small_spec())
    store.write("x", *small_clip(store.spec))
    before = store.path("x").read_bytes()
    store.read("x", 1, 200).data.zero_()
    assert store.path("x").read_bytes() == before
    assert store.read("x", 1, 200).data.any()


# -- refusals -------------------------------------------------------------------------------------------------------


def altered(name, change):
    def alter(tensors, rows, provenance):
        tensors[name] = change(tensors[name])
        return tensors, rows, provenance

    return alter


NAME = "layer3/step749"
WRONG = {
    "lacks layer3/step749.mean, which": lambda t, r, p: ({n: x for n, x in t.items() if n != f"{NAME}.mean"}, r, p),
    "has layer9, which": lambda t, r, p: (t | {"layer9": t[NAME]}, r, p),
    "layer3/step749 is torch.bfloat16, not torch.float16": altered(NAME, lambda x: x.bfloat16()),
    r"layer3/step749.rstd must be \[3, 4, 5\], got \[3, 5, 4\]": altered(f"{NAME}.rstd", lambda x: x.transpose(1, 2)),
    r"layer3/step749 must be \[T, 4, 5, C\] with one T .* got \[3, 20, 16\]": altered(NAME, lambda x: x.flatten(1, 2)),
    r"layer3/step749 must be .* got \[2, 4, 5, 16\]": altered(NAME, lambda x: x[:2]),
    r"rows must be \[9\], got \[8\]": lambda t, r, p: (t, r[:8], p),
    "rows is torch.int32, not torch.int64": lambda t, r, p: (t, r.int(), p),
    r"rows must be -1 .. 2, got \[-1, 0, .*, 3\]": lambda t, r, p: (t, torch.tensor([*ROWS[:8], 3]), p),
    "rows must be -1 .. 2, got": lambda t, r, p: (t, torch.tensor([*ROWS[:8], -2]), p),
    "layer3/step749.mean is not finite": altered(f"{NAME}.mean", lambda x: x.index_fill(0, torch.tensor(1), torch.nan)),
    "provenance lacks padded": lambda t, r, p: (t, r, {"grid": p["grid"], "rows_kept": p["rows_kept"]}),
    "rows_kept must name the model's row of each of 3 rows": lambda t, r, p: (t, r, p | {"rows_kept": [0, 1]}),
}


@pytest.mark.parametrize("reason", WRONG)
def test_a_clip_that_does_not_fit_is_refused(tmp_path, reason):
    store = FeatureStore.create(tmp_path / "s", small_spec(pool=(4, 5)))
    with pytest.raises(ValueError, match=f"^clip a/b: .*{reason}"):
        store.write("a/b", *WRONG[reason](*small_clip(store.spec)))
    assert store.ids() == []
    assert not list((tmp_path / "s").rglob("*.part"))


def test_a_pooled_store_takes_pooled_clips_only(tmp_path):
    store = FeatureStore.create(tmp_path / "s", small_spec(pool=(2, 5)))
    with pytest.raises(ValueError, match=r"layer1/step200 must be \[T, 2, 5, C\]"):
        store.write("x", *small_clip(store.spec))


def test_another_spec_is_refused_field_by_field(tmp_path):
    there = small_spec(options={"prompt": "", "size": (480, 832)}, versions={"torch": "2.13"})
    FeatureStore.create(tmp_path / "s", there, {"model": "first"})
    before = {p: p.read_bytes() for p in (tmp_path / "s").rglob("*") if p.is_file()}
    asked = small_spec(
        seed=1, frames=FrameSelection(window=49), options={"prompt": "a room", "size": [480, 832], "tiling": True}
    )
    with pytest.raises(ValueError, match="features of another spec") as caught:
        FeatureStore.create(tmp_path / "s", asked)
    assert str(caught.value).splitlines()[1:] == [
        "  frames.window: 9 there, 49 asked",
        '  options.prompt: "" there, "a room" asked',
        "  options.tiling: nothing there, true asked",
        "  seed: 0 there, 1 asked",
        '  versions.torch: "2.13" there, nothing asked',
    ]
    assert {p: p.read_bytes() for p in (tmp_path / "s").rglob("*") if p.is_file()} == before
    again = FeatureStore.create(tmp_path / "s", there, {"model": "second"})  # a tuple is JSON's list
    assert again.about == {"model": "first"}


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"not empty and not a store: it holds thesis.tex"):
        FeatureStore.create(tmp_path, small_spec())
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match="is a file; a store is a folder"):
        FeatureStore.create(tmp_path / "thesis.tex", small_spec())
    for path in (tmp_path, tmp_path / "missing", tmp_path / "thesis.tex"):
        with pytest.raises(ValueError, match=r"is not a feature store: it has no spec\.json"):
            FeatureStore.open(path)
    (tmp_path / "spec.json").write_text('{"family": ')
    with pytest.raises(ValueError, match=r"spec.json is not a feature spec"):
        FeatureStore.open(tmp_path)


def test_reading_what_is_not_there_says_so(tmp_path):
    store = FeatureStore.create(tmp_path / "s", small_spec())
    store.write("x", *small_clip(store.spec))
    store.record_failure("y", "decode", "no frames")
    with pytest.raises(
        ValueError, match=r"layer2/step749 is not in .*; it holds layer1/step200, layer1/step749, layer3"
    ):
        store.read("x", 2, 749)
    with pytest.raises(ValueError, match="layer1 is not in"):
        store.read_frames("x", 1, [1])
    with pytest.raises(FileNotFoundError, match=r"clip y is not in .*; it failed at decode: no frames$"):
        store.read("y", 1, 200)
    with pytest.raises(ValueError, match="must be a relative path"):
        store.read("../x", 1, 200)
    with pytest.raises(ValueError, match="opened for reading"):
        FeatureStore.open(tmp_path / "s").write("z", *small_clip(store.spec))
    whole = store.path("x").read_bytes()
    for damage in (b"", whole[:5], whole[:300], whole[:-1], b"\xff" * 999):
        store.path("x").write_bytes(damage)
        for read in (
            store.provenance,
            lambda clip: store.read(clip, 1, 200),
            lambda clip: store.read_frames(clip, 1, [1], 200),
        ):
            with pytest.raises(ValueError, match=r"clip x: .*x.safetensors is damaged"):
                read("x")


# -- listing and failures -------------------------------------------------------------------------------------------


def test_listing(tmp_path):
    store = FeatureStore.create(tmp_path / "s", small_spec())
    assert (store.ids(), len(store), store.nbytes) == ([], 0, 0)
    sizes = [store.write(name, *small_clip(store.spec)) for name in ("b", "a/2", "a/1", "a/1/x")]
    tensors, rows, provenance = small_clip(store.spec, shape=(3, 2, 2, 16))
    sizes.append(store.write("c", tensors, rows, provenance | {"padded": 2}))
    store.path("d").write_bytes(b"half")
    (store.clips / "a" / "notes.txt").touch()
    (store.clips / "a" / "._1.safetensors").touch()
    store.record_failure("e", "decode", "broken")
    assert store.ids() == ["a/1", "a/1/x", "a/2", "b", "c", "d"]
    assert len(store) == 6
    assert "a/1" in store
    assert "a" not in store
    (store.clips / "linked").symlink_to(store.clips / "a")
    assert store.ids()[-3:] == ["linked/1", "linked/1/x", "linked/2"]
    assert sum(p.startswith("clips/linked/") for p in store.verify()) == 5  # foreign names, and no clip files
    (store.clips / "linked").unlink()
    info = store.info()
    assert (info.clips, info.bytes, info.padded, info.failed, info.damaged) == (6, sum(sizes) + 4, 1, 1, 1)
    assert info.shapes == {tensor_name(*key): {(3, 4, 5, 16): 4, (3, 2, 2, 16): 1} for key in store.spec.tensors()}


def test_failures_are_the_last_word_on_clips_without_a_file(tmp_path, caplog):
    store = FeatureStore.create(tmp_path / "s", small_spec())
    assert store.failures() == {}
    for clip, reason in (("b", "first"), ("a/x", 'with "quotes"\nand a line'), ("b", "second"), ("done", "once")):
        store.record_failure(clip, "decode", reason)
    store.write("done", *small_clip(store.spec))
    expected = {
        "a/x": {"id": "a/x", "stage": "decode", "reason": 'with "quotes"\nand a line'},
        "b": {"id": "b", "stage": "decode", "reason": "second"},
    }
    assert store.failures() == expected
    with (tmp_path / "s" / "failed.jsonl").open("a") as file:  # as kill -9 leaves it
        file.write('{"id": "c", "sta')
    assert store.failures() == expected
    assert "skipped torn lines [5]" in caplog.text
    store.record_failure("d", "write", "after the torn line")
    assert store.failures() == expected | {"d": {"id": "d", "stage": "write", "reason": "after the torn line"}}
    with pytest.raises(ValueError, match="must be a relative path"):
        store.record_failure("../d", "decode", "")
