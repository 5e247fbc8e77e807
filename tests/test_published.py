"""A dump of the research code read in place gives what an import of it would store, row by row."""

import pickle

import pytest
import torch
from safetensors.torch import save_file

from spatialprobe.engine.reading import ranges
from spatialprobe.engine.reading.probing_files import export_probing, import_probing
from spatialprobe.engine.reading.published import PublishedDump
from spatialprobe.engine.reading.rows import StoredRows
from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.types import FeatureSpec, FrameSelection, tensor_name
from spatialprobe.kernels.pool_features import finish

QUERY = (0, *range(1, 76, 4))
STUDY = FrameSelection(window=81, query="0,1:76:4")
SHORT = FrameSelection(window=9)
FAMILIES = {  # family: shape of feat, its file, and the arguments of an import
    "wan": ((21, 4, 6, 64), "feature_t{step}_layer{layer}.sft", {"layers": (18, 20), "steps": (500, 749)}),
    "cogvideox": ((2, 13, 4, 6, 64), "feature_t2v_5b_t{step}_layer{layer}.sft", {"layers": (18, 20), "steps": (749,)}),
    "qwen3_vl": ((20, 4, 6, 64), "feature_layer{hidden}.sft", {"layers": (17, 21)}),
}


def dump(root, family, clips=("train/a", "val/b"), dtype=torch.float16) -> dict:
    """Writes the files of a family; the arguments that describe them."""
    shape, name, arguments = FAMILIES[family]
    generator = torch.Generator().manual_seed(0)
    for clip in clips:
        (root / clip).mkdir(parents=True, exist_ok=True)
        for layer in arguments["layers"]:
            for step in arguments.get("steps", (0,)):
                feat = (torch.randn(shape, generator=generator) * 3 + 1).to(dtype)
                save_file({"feat": feat}, root / clip / name.format(layer=layer, step=step, hidden=layer + 1))
    return {"family": family, "frames": STUDY, **arguments}


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_those_of_an_import(tmp_path, monkeypatch, family, direct):
    monkeypatch.setattr(ranges, "LEAST_DIRECT", 0)
    monkeypatch.setattr(ranges, "HEAD", 1 << 9)
    arguments = dump(tmp_path / "in" / family, family)
    source = PublishedDump(tmp_path / "in" / family, direct=direct, **arguments)
    store, _ = import_probing(tmp_path / "in" / family, tmp_path / "s", **arguments)
    assert (source.spec, source.spec_hash) == (store.spec, store.spec_hash)
    assert source.ids() == store.ids() == ["train/a", "val/b"]
    source = pickle.loads(pickle.dumps(source))
    for clip_id in source.ids():
        with source.open_clip(clip_id) as clip, store.open_clip(clip_id) as other:
            assert clip.rows == other.rows
            rows = [clip.rows[f] for f in (73, 0, 1, 9, 0, 5)]
            keys = source.spec.tensors()[::-1]
            assert [clip.shape(key) for key in keys] == [other.shape(key) for key in keys]
            here, there = clip.read(keys, rows), other.read(keys, rows)
            assert list(here) == keys
            for key in keys:
                assert here[key].scale is None
                assert torch.equal(here[key].data, there[key].data)
                x = there[key].data.double()
                torch.testing.assert_close(here[key].mean.double(), x.mean(-1), rtol=1e-6, atol=1e-6)
                rstd = (x.var(-1, correction=0) + 1e-6).rsqrt()
                torch.testing.assert_close(here[key].rstd.double(), rstd, rtol=1e-5, atol=0)


def test_rows_of_ones_own_and_memory_of_ones_own(tmp_path):
    arguments = dump(tmp_path / "wan", "wan") | {"frames": SHORT}
    rows = [20, -1, 3, 3, -1, 0, 7, 7, 7]
    source = pickle.loads(pickle.dumps(PublishedDump(tmp_path / "wan", rows=rows, name="other", **arguments)))
    store, _ = import_probing(tmp_path / "wan", tmp_path / "s", rows=rows, name="other", **arguments)
    assert source.spec == store.spec
    out = StoredRows.empty((2, 4, 6, 64), torch.float16)
    with source.open_clip("val/b") as clip:
        assert clip.rows == rows
        assert clip.read([(20, 749)], [20, 3], out={(20, 749): out})[20, 749] is out
        with pytest.raises(ValueError, match=r"clip val/b: .*t749_layer20.sft has rows 0 .. 20, got \[-1\]; -1 stands"):
            clip.read([(20, 749)], [rows[1]])
        with pytest.raises(ValueError, match=r"clip val/b: .*val/b has layer18/step500, .*, not layer3$"):
            clip.read([(3, None)], [0])
    wanted = store.read_raw("val/b", 20, 749)
    assert torch.equal(out.data, wanted["data"][[20, 3]])
    torch.testing.assert_close(out.mean, wanted["mean"][[20, 3]], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.rstd, wanted["rstd"][[20, 3]], rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="a row for each of its frames, got 9"):
        PublishedDump(tmp_path / "wan", rows=[0], **arguments)
    with pytest.raises(FileNotFoundError, match=r"clip train/z is not in .*wan"):
        source.open_clip("train/z")


def test_what_is_broken_or_unfit_is_named(tmp_path):
    arguments = dump(tmp_path / "wan", "wan", ["train/a"])
    source, folder = PublishedDump(tmp_path / "wan", **arguments), tmp_path / "wan/train/a"
    path = folder / "feature_t500_layer18.sft"
    content, good = path.read_bytes(), torch.ones(21, 4, 6, 64, dtype=torch.float16)
    for damage in (b"", content[:100], content[:-1], content + b"x"):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=r"clip train/a: .*feature_t500_layer18.sft: .*truncated"):
            source.open_clip("train/a")
    cases = {
        "it has no tensor feat, but other$": {"other": good},
        "feat is torch.float32, and the store would hold float16": {"feat": good.float()},
        r"feat must be \['T', 'H', 'W', 'C'\], got \[1, 21, 4, 6, 64\]": {"feat": good[None]},
        "20 rows cannot see 81 frames: 21 are needed": {"feat": good[:20].clone()},
    }
    for reason, tensors in cases.items():
        save_file(tensors, path)
        with pytest.raises(ValueError, match=f"clip train/a: .*wan/train/a.*: {reason}"):
            source.open_clip("train/a")
    good[4, 1, 2, 3] = torch.inf
    save_file({"feat": good}, path)
    with source.open_clip("train/a") as clip:
        assert (clip.read([(18, 500)], [3])[18, 500].data == 1).all()
        with pytest.raises(ValueError, match=r"clip train/a: .*feature_t500_layer18.sft is not finite in row 4"):
            clip.read([(18, 500)], [3, 4])
        save_file({"feat": good[:20].clone()}, folder / "feature_t749_layer20.sft")
        with pytest.raises(ValueError, match=r"t749_layer20.sft: feat has 20 rows, other layers or steps have 21"):
            clip.read([(20, 749)], [0])
        (folder / "feature_t749_layer18.sft").unlink()
        with pytest.raises(ValueError, match=r"clip train/a: .*: one feature_t749_layer18.sft expected, found 0"):
            clip.shape((18, 749))
    with pytest.raises(ValueError, match="no published layout is known for family 'dino'"):
        PublishedDump(tmp_path / "wan", **(arguments | {"family": "dino"}))


def test_checksums_are_checked_where_there_are_any(tmp_path):
    plain = PublishedDump(tmp_path / "wan", **dump(tmp_path / "wan", "wan", ["train/a"]))
    with pytest.raises(ValueError, match=r"clip train/a: .*_layer18.sft: it carries no checksum to check"):
        plain.open_clip("train/a", check=True)
    store = FeatureStore.create(tmp_path / "s", FeatureSpec("wan", "content:0", (18,), (749,), frames=STUDY))
    done = finish(torch.randn(21, 4, 6, 64), torch.float16)
    provenance = {"grid": [21, 4, 6], "rows_kept": [*range(21)], "padded": 0}
    rows = torch.tensor([(f + 3) // 4 for f in range(81)])
    store.write("train/a", done.named(tensor_name(18, 749)), rows, provenance)
    export_probing(store, tmp_path / "out", "wan")
    source = PublishedDump(tmp_path / "out/wan", family="wan", layers=[18], steps=[749], frames=STUDY)
    with source.open_clip("train/a", check=True) as clip:
        assert torch.equal(clip.read([(18, 749)], [2])[18, 749].data[0], done.data[2])
    path = tmp_path / "out/wan/train/a/feature_t749_layer18.sft"
    content = path.read_bytes()
    path.write_bytes(content[:-3] + bytes([content[-3] ^ 4]) + content[-2:])
    source.open_clip("train/a").close()
    with pytest.raises(ValueError, match=r"clip train/a: .*layer18.sft: the checksum does not match"):
        source.open_clip("train/a", check=True)
