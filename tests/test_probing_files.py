"""A store, the published layout and a store again: the same values, the right frames, a reason for every refusal."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from spatialprobe.engine.reading.probing_files import export_probing, import_probing
from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.types import STORE_DTYPES, FeatureSpec, FrameSelection, tensor_name
from spatialprobe.kernels.pool_features import finish

STUDY = FrameSelection(window=81, query="0,1:76:4")
QUERY = (0, *range(1, 76, 4))


def make_store(path, spec, rows, *, length, kept=None, scale=1.0, clips=("train/a", "val/b")) -> FeatureStore:
    store = FeatureStore.create(path, spec)
    kept = list(range(length)) if kept is None else kept
    for seed, clip in enumerate(clips):
        generator, tensors = torch.Generator().manual_seed(seed), {}
        for key in spec.tensors():
            x = torch.randn(len(kept), 2, 3, 8, generator=generator) * scale
            done = finish(x, STORE_DTYPES[spec.dtype])
            parts = {"": done.data, ".mean": done.mean, ".rstd": done.rstd, ".scale": done.scale}
            tensors |= {tensor_name(*key) + part: value for part, value in parts.items() if value is not None}
        store.write(clip, tensors, torch.tensor(rows), {"grid": [length, 4, 6], "rows_kept": kept, "padded": 0})
    return store


def wan_store(path, **changes) -> FeatureStore:
    spec = FeatureSpec("wan", "content:0", (18, 20), (500, 749), frames=STUDY, **changes)
    return make_store(path, spec, [(f + 3) // 4 for f in range(81)], length=21)


def vlm_store(path) -> FeatureStore:
    spec = FeatureSpec("qwen3_vl", "content:0", (21,), frames=STUDY)
    return make_store(path, spec, [QUERY.index(f) if f in QUERY else -1 for f in range(81)], length=20)


def interleaved(frame: int) -> tuple[int, int]:
    """(half, row) by the definition: frame 0 begins both halves, the others alternate, 4 frames to a row."""
    halves = [[0], [0]]
    for f in range(1, 97):
        halves[(f - 1) % 2].append(f)
    half = 0 if frame == 0 else (frame - 1) % 2
    place = halves[half].index(frame)
    return half, 0 if place == 0 else (place - 1) // 4 + 1


# -- there and back -------------------------------------------------------------------------------------------------


def test_wan_there_and_back(tmp_path):
    store = wan_store(tmp_path / "store")
    done = []
    result = export_probing(store, tmp_path / "out", "wan-14b", progress=done.append)
    assert (result.written, result.present, result.failed, done) == (2, 0, {}, [1, 1])
    files = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file())
    names = [f"feature_t{step}_layer{layer}.sft" for step in (500, 749) for layer in (18, 20)]
    assert files == [f"wan-14b/{clip}/{name}" for clip in ("train/a", "val/b") for name in names]
    feat = load_file(tmp_path / "out/wan-14b/val/b/feature_t749_layer18.sft")
    assert set(feat) == {"feat"}
    assert torch.equal(feat["feat"], store.read("val/b", 18, 749).data)

    back, result = import_probing(
        tmp_path / "out/wan-14b", tmp_path / "back", family="wan", layers=(18, 20), steps=(500, 749), frames=STUDY
    )
    assert (result.written, result.failed) == (2, {})
    assert back.spec.weights == "imported:wan-14b"
    assert back.verify() == []
    for clip in store.ids():
        for key in store.spec.tensors():
            there, here = store.read_raw(clip, *key), back.read_raw(clip, *key)
            assert torch.equal(here["data"], there["data"])
            assert torch.equal(here["rows"], there["rows"])
            x = there["data"].double()
            torch.testing.assert_close(here["mean"].double(), x.mean(-1), rtol=1e-6, atol=1e-6)
            rstd = (x.var(-1, correction=0) + 1e-6).rsqrt()
            torch.testing.assert_close(here["rstd"].double(), rstd, rtol=1e-5, atol=0)


def test_vlm_layers_are_hidden_states_there_and_query_frames_are_rows(tmp_path):
    store = vlm_store(tmp_path / "store")
    export_probing(store, tmp_path / "out", "qwen")
    path = tmp_path / "out/qwen/train/a/feature_layer22.sft"
    assert torch.equal(load_file(path)["feat"], store.read("train/a", 21).data)
    back, _ = import_probing(tmp_path / "out/qwen", tmp_path / "back", family="qwen3_vl", layers=(21,), frames=STUDY)
    frames = [0, 73, 5]
    assert torch.equal(back.read_frames("train/a", 21, frames), load_file(path)["feat"][[0, 19, 2]])
    with pytest.raises(KeyError, match=r"no feature row sees frames \[2\]"):
        back.read_frames("train/a", 21, [2])


@pytest.mark.parametrize("length", [13, 14])
def test_interleaved_halves_become_rows_and_halves_again(tmp_path, length):
    feat = torch.randn(2, length, 2, 3, 4).half()
    folder = tmp_path / "in/cog/train/a"
    folder.mkdir(parents=True)
    save_file({"feat": feat}, folder / "feature_t2v_5b_t749_layer18.sft")
    frames = FrameSelection(window=97)
    store, result = import_probing(
        tmp_path / "in/cog", tmp_path / "s", family="cogvideox", layers=(18,), steps=(749,), frames=frames
    )
    assert result.failed == {}
    for frame in range(97):
        half, row = interleaved(frame)
        assert torch.equal(store.read_frames("train/a", 18, [frame], 749)[0], feat[half, row]), frame
    export_probing(store, tmp_path / "out", "cog")
    assert torch.equal(load_file(tmp_path / "out/cog/train/a/feature_t2v_5b_t749_layer18.sft")["feat"], feat)
    export_probing(store, tmp_path / "out", "aether", split="x", tag="")
    assert (tmp_path / "out/aether/x/train/a/feature_t749_layer18.sft").exists()


def test_rows_of_ones_own(tmp_path):
    store = wan_store(tmp_path / "store")
    export_probing(store, tmp_path / "out", "wan")
    arguments = {"family": "wan", "layers": (18,), "steps": (749,), "frames": FrameSelection(window=4)}
    back, _ = import_probing(tmp_path / "out/wan", tmp_path / "back", rows=[20, -1, 3, 3], **arguments)
    assert torch.equal(back.read_frames("val/b", 18, [2, 0], 749), store.read("val/b", 18, 749).data[[3, 20]])
    with pytest.raises(ValueError, match="a row for each of its frames, got 4"):
        import_probing(tmp_path / "out/wan", tmp_path / "x", rows=[0, 1], **arguments)
    _, result = import_probing(tmp_path / "out/wan", tmp_path / "y", rows=[0, 1, 2, 21], **arguments)
    assert set(result.failed.values()) == {"21 rows cannot see 4 frames: 22 are needed"}


# -- export ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3", "int8"])
def test_other_dtypes_become_float16_or_fail_when_they_overflow(tmp_path, dtype):
    store = wan_store(tmp_path / "store", dtype=dtype)
    large = make_store(store.root, store.spec, [0] * 81, length=21, scale=3e4, clips=("train/large",))
    result = export_probing(large, tmp_path / "out", "wan")
    assert result.written == 2
    assert list(result.failed) == ["train/large"]
    assert result.failed["train/large"].startswith("layer18/step500 overflows float16: largest magnitude ")
    feat = load_file(tmp_path / "out/wan/val/b/feature_t749_layer20.sft")["feat"]
    expected = store.read("val/b", 20, 749, dtype=torch.float32).data
    assert feat.dtype == torch.float16
    torch.testing.assert_close(feat.float(), expected, rtol=2**-11, atol=1e-7)
    assert not (tmp_path / "out/wan/train/large/feature_t500_layer18.sft").exists()


def test_missing_rows_are_refused_or_made_visible(tmp_path):
    spec = FeatureSpec("wan", "content:0", (18,), (749,), frames=STUDY)
    rows, kept = [(f + 3) // 4 - 1 for f in range(81)], list(range(1, 21))
    store = make_store(tmp_path / "s", spec, rows, length=21, kept=kept)
    with pytest.raises(ValueError, match=r"clip train/a holds 20 of the model's 21 rows .* query ':'"):
        export_probing(store, tmp_path / "out", "wan")
    assert not (tmp_path / "out").exists()
    export_probing(store, tmp_path / "out", "wan", fill_missing=True)
    feat = load_file(tmp_path / "out/wan/train/a/feature_t749_layer18.sft")["feat"]
    assert torch.equal(feat[1:], store.read("train/a", 18, 749).data)
    assert feat.shape[0] == 21
    assert feat[0].isnan().all()


def test_export_goes_on_where_it_stopped_and_mixes_nothing(tmp_path):
    store = wan_store(tmp_path / "store")
    export_probing(store, tmp_path / "out", "wan")
    gone = tmp_path / "out/wan/val/b/feature_t749_layer20.sft"
    whole = gone.read_bytes()
    gone.unlink()
    result = export_probing(store, tmp_path / "out", "wan")
    assert (result.written, result.present, result.failed) == (1, 1, {})
    assert gone.read_bytes() == whole
    other = make_store(tmp_path / "other", store.spec, [0] * 81, length=21, scale=2.0)
    for foreign in (other, store):
        gone.write_bytes(b"" if foreign is store else whole)
        result = export_probing(foreign, tmp_path / "out", "wan")
        assert list(result.failed) == (["val/b"] if foreign is store else ["train/a", "val/b"])
        assert "is there already and was not made from this clip" in result.failed["val/b"]
    assert gone.read_bytes() == b""
    assert not list((tmp_path / "out").glob(".tmp"))


def test_what_the_layout_cannot_say_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no name for features merged over steps"):
        export_probing(wan_store(tmp_path / "a", merge_steps=True), tmp_path / "out", "wan")
    unknown = FeatureStore.create(tmp_path / "b", FeatureSpec("dino", "content:0", (1,)))
    with pytest.raises(ValueError, match="no published layout is known for family 'dino'; known: wan_i2v, wan"):
        export_probing(unknown, tmp_path / "out", "dino")
    odd = make_store(tmp_path / "c", FeatureSpec("cogvideox", "content:0", (1,), (7,)), [0], length=13)
    assert "13 rows must be 2 equal halves" in export_probing(odd, tmp_path / "out", "cog").failed["val/b"]


def test_a_damaged_clip_fails_and_the_rest_is_exported(tmp_path):
    store = wan_store(tmp_path / "store")
    store.path("train/a").write_bytes(store.path("train/a").read_bytes()[:-1])
    result = export_probing(store, tmp_path / "out", "wan")
    assert result.written == 1
    assert "a.safetensors is damaged" in result.failed["train/a"]


# -- import ---------------------------------------------------------------------------------------------------------


def test_broken_files_are_failures_and_the_rest_is_imported(tmp_path):
    store = wan_store(tmp_path / "store")
    good = store.read("train/a", 18, 749).data
    root = tmp_path / "wan"
    cases = {
        "truncated": (b"", "feature_t749_layer18.sft: "),
        "not-finite": ({"feat": torch.full_like(good, torch.inf)}, "layer18/step749.mean is not finite"),
        "no-feat": ({"other": good}, "feature_t749_layer18.sft: "),
        "float32": ({"feat": good.float()}, "feat is torch.float32, and the store would hold float16"),
        "bfloat16": ({"feat": good.bfloat16()}, "feat is torch.bfloat16, and the store would hold float16"),
        "flat": ({"feat": good.flatten(1, 2)}, r"feat must be ['T', 'H', 'W', 'C'], got [21, 6, 8]"),
        "halves": ({"feat": good[None]}, r"feat must be ['T', 'H', 'W', 'C'], got [1, 21, 2, 3, 8]"),
        "short": ({"feat": good[:20].clone()}, "20 rows cannot see 81 frames: 21 are needed"),
        "good": ({"feat": good}, None),
    }
    for name, (content, _) in cases.items():
        path = root / "train" / name / "feature_t749_layer18.sft"
        path.parent.mkdir(parents=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            save_file(content, path)
    (root / "train/other").mkdir()
    save_file({"feat": good}, root / "train/other/feature_t500_layer18.sft")
    (root / "train/tags").mkdir()
    for tag in ("", "i2v_"):
        save_file({"feat": good}, root / f"train/tags/feature_{tag}t749_layer18.sft")
    (root / ".tmp/x").mkdir(parents=True)
    save_file({"feat": good}, root / ".tmp/x/feature_t749_layer18.sft")

    arguments = {"family": "wan", "layers": (18,), "steps": (749,), "frames": STUDY}
    done = []
    back, result = import_probing(root, tmp_path / "back", progress=done.append, **arguments)
    expected = {f"train/{name}": reason for name, (_, reason) in cases.items() if reason}
    expected["train/other"] = "one feature_t749_layer18.sft expected, found 0; there are feature_t500_layer18.sft"
    expected["train/tags"] = "found 2; there are feature_i2v_t749_layer18.sft, feature_t749_layer18.sft"
    assert set(result.failed) == set(expected)
    for clip, reason in expected.items():
        assert reason in result.failed[clip]
    assert {clip: record["reason"] for clip, record in back.failures().items()} == result.failed
    assert back.ids() == ["train/good"]
    assert torch.equal(back.read("train/good", 18, 749).data, good)
    assert len(done) == len(expected) + 1

    save_file({"feat": good}, root / "train/truncated/feature_t749_layer18.sft")
    _, result = import_probing(root, tmp_path / "back", **arguments)
    assert (result.written, result.present) == (1, 1)
    assert "train/truncated" not in back.failures()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_bit_pattern_survives_an_import(tmp_path, dtype):
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(STORE_DTYPES[dtype])
    finite = patterns[patterns.float().abs() < 1e18]  # leaves float32 sums of squares finite
    feat = finite[: len(finite) // 64 * 64].view(1, 1, -1, 64)
    (tmp_path / "m/train/a").mkdir(parents=True)
    save_file({"feat": feat}, tmp_path / "m/train/a/feature_layer1.sft")
    store, result = import_probing(
        tmp_path / "m", tmp_path / "s", family="internvl", layers=(0,), frames=FrameSelection(window=1), dtype=dtype
    )
    assert result.failed == {}
    assert torch.equal(store.read("train/a", 0).data.view(torch.int16), feat.view(torch.int16))


def test_arguments_that_fit_nothing_are_refused_before_anything_is_made(tmp_path):
    (tmp_path / "wan").mkdir()
    arguments = {"family": "wan", "layers": (18,), "steps": (749,)}
    with pytest.raises(ValueError, match=r"must hold <split>/<scene>/feature_\*.sft, found none"):
        import_probing(tmp_path / "wan", tmp_path / "s", frames=STUDY, **arguments)
    save_file({"feat": torch.zeros(1)}, tmp_path / "wan/feature_t749_layer18.sft")
    with pytest.raises(ValueError, match="found the files"):
        import_probing(tmp_path / "wan", tmp_path / "s", frames=STUDY, **arguments)
    with pytest.raises(ValueError, match="needs the window's length"):
        import_probing(tmp_path / "wan", tmp_path / "s", frames=FrameSelection(), **arguments)
    with pytest.raises(ValueError, match="no published layout is known for family 'dino'"):
        import_probing(tmp_path / "wan", tmp_path / "s", frames=STUDY, **(arguments | {"family": "dino"}))
    assert not (tmp_path / "s").exists()
