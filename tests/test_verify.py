"""Verifying finds every kind of damage, names it in one line each, and never stumbles over it."""

import json
import random
import shutil
from collections import Counter

import pytest
import torch
from safetensors.torch import save_file

from spatialprobe.engine.files import verify
from spatialprobe.engine.files.clipfile import write_file
from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.types import STORE_DTYPES, FeatureSpec, FrameSelection
from spatialprobe.kernels.pool_features import finish


def small_clip(dtype="float16", seed=0):
    done = finish(torch.randn(2, 2, 3, 8, generator=torch.Generator().manual_seed(seed)), STORE_DTYPES[dtype])
    tensors = {"layer1": done.data, "layer1.mean": done.mean, "layer1.rstd": done.rstd}
    if done.scale is not None:
        tensors["layer1.scale"] = done.scale
    return tensors, torch.tensor([0, 1, 1]), {"grid": [2, 2, 3], "rows_kept": [0, 1], "padded": 0}


def small_store(path, dtype="float16", clips=("a", "b/c")) -> FeatureStore:
    spec = FeatureSpec("qwen3_vl", "content:0", (1,), frames=FrameSelection(window=3), dtype=dtype)
    store = FeatureStore.create(path, spec)
    for seed, clip in enumerate(clips):
        store.write(clip, *small_clip(dtype, seed))
    return store


@pytest.mark.parametrize("dtype", STORE_DTYPES)
def test_every_flipped_bit_is_found(tmp_path, dtype):
    store = small_store(tmp_path / "s", dtype)
    assert store.verify() == []
    path, rng = store.path("b/c"), random.Random(0)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [*range(8), *rng.sample(range(8, header), 120), *rng.sample(range(header, len(whole)), 60)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        problems = store.verify(threads=1)
        assert len(problems) == 1, (place, problems)
        assert problems[0].startswith("clips/b/c.safetensors: ")
        assert "\n" not in problems[0]
    path.write_bytes(whole)
    assert store.verify() == []


def test_every_truncation_and_extension_is_found(tmp_path):
    store = small_store(tmp_path / "s")
    path = store.path("a")
    whole = path.read_bytes()
    for size in (0, 1, 7, 8, 9, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        (problem,) = store.verify()
        assert problem.startswith("clips/a.safetensors: "), problem
        assert "truncated" in problem
    for more in (b"\0", whole):
        path.write_bytes(whole + more)
        (problem,) = store.verify()
        assert f"of {len(whole + more)}" in problem


HEADERS = [
    b"[" * 9999,
    b"{}",
    b"null",
    b'{"__metadata__": {"spatialprobe": "7"}}',
    b'{"__metadata__": {"spatialprobe": "{}"}}',
    b'{"__metadata__": {"spatialprobe": "{\\"checksum\\": \\"\\ud800\\"}"}}',
    b'{"__metadata__": 3, "a": {"dtype": "F16"}}',
    b"\xff\xfe\x00",
]


@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
def test_a_nonsense_header_is_one_line(tmp_path, header):
    store = small_store(tmp_path / "s", clips=())
    store.path("x").write_bytes(len(header).to_bytes(8, "little") + header)
    assert store.verify() == ["clips/x.safetensors: the header is damaged, or another program's"]
    assert store.info().damaged == 1


ENTRIES = [  # of a file with 4 bytes of data
    {"dtype": "F16", "shape": [2], "data_offsets": [4, 8]},
    {"dtype": "F16", "shape": [3], "data_offsets": [0, 6]},
    {"dtype": "F16", "shape": [2], "data_offsets": [0, 6]},
    {"dtype": "F16", "shape": [3], "data_offsets": [0, 4]},
    {"dtype": "F16", "shape": [-1, -2], "data_offsets": [0, 4]},
    {"dtype": "F16", "shape": [2.0], "data_offsets": [0, 4]},
    {"dtype": "F77", "shape": [2], "data_offsets": [0, 4]},
    {"dtype": ["F16"], "shape": 2, "data_offsets": None},
    7,
]


@pytest.mark.parametrize("entry", ENTRIES, ids=range(len(ENTRIES)))
def test_an_impossible_tensor_is_one_line(tmp_path, entry):
    store = small_store(tmp_path / "s", clips=())
    provenance = json.dumps({"checksum": "0" * 64})
    header = json.dumps({"__metadata__": {"spatialprobe": provenance}, "layer1": entry}).encode()
    store.path("x").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    gap_or_overrun = "damaged or truncated: the tensors end at byte"
    wanted = gap_or_overrun if entry in ENTRIES[:2] else "the header is damaged, or another program's"
    (problem,) = store.verify()
    assert problem.startswith(f"clips/x.safetensors: {wanted}")


def test_files_of_others_are_foreign(tmp_path):
    store = small_store(tmp_path / "s")
    shutil.copy(store.path("a"), store.path("z"))
    save_file({"feat": torch.zeros(2)}, store.path("y"))
    other = FeatureStore.create(tmp_path / "t", FeatureSpec("qwen3_vl", "content:1", (1,)))
    other.write("x", *small_clip())
    shutil.copy(other.path("x"), store.path("x"))
    (store.clips / "b" / "readme.txt").touch()
    (store.clips / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    assert store.verify() == [
        "clips/b/readme.txt: not a clip file",
        "clips/gone.safetensors: cannot be read: No such file or directory",
        f"clips/x.safetensors: foreign: it was written for spec '{other.spec_hash}', not '{store.spec_hash}'",
        "clips/y.safetensors: the header is damaged, or another program's",
        "clips/z.safetensors: foreign: it was written for clip 'a', not 'z'",
    ]


@pytest.mark.parametrize("dtype", STORE_DTYPES)
@pytest.mark.parametrize("bad", ["nan", "-inf"])
@pytest.mark.parametrize("part", ["layer1", "layer1.rstd"])
def test_values_that_are_not_finite_are_found_in_any_chunk(tmp_path, monkeypatch, dtype, bad, part):
    monkeypatch.setattr(verify, "CHUNK", 32)
    store = small_store(tmp_path / "s", dtype, clips=())
    tensors, rows, provenance = small_clip(dtype)
    x = tensors[part]
    if x.dtype == torch.int8 or (x.dtype == torch.float8_e4m3fn and bad == "-inf"):
        pytest.skip(f"{x.dtype} has no {bad}")
    largest = torch.finfo(x.dtype).max
    for place in (0, x.numel() // 2, x.numel() - 1):
        for value, expected in ((bad, [f"clips/x.safetensors: {part} is not finite"]), (-largest, [])):
            flat = x.flatten().float()
            flat[place] = float(value)
            changed = tensors | {"rows": rows, part: flat.view(x.shape).to(x.dtype)}
            store.path("x").unlink(missing_ok=True)
            write_file(store.path("x"), changed, provenance | {"clip": "x", "spec": store.spec_hash})
            assert store.verify() == expected


def test_sound_files_that_do_not_fit_the_spec_are_found(tmp_path):
    store = small_store(tmp_path / "s", clips=())
    tensors, rows, provenance = small_clip()
    cases = {
        "bfloat16": tensors | {"rows": rows, "layer1": tensors["layer1"].bfloat16()},
        "missing": tensors,
        "rows": tensors | {"rows": rows + 1},
        "shape": tensors | {"rows": rows, "layer1.mean": tensors["layer1.mean"][:, :1]},
    }
    for clip, changed in cases.items():
        write_file(store.path(clip), changed, provenance | {"clip": clip, "spec": store.spec_hash})
    assert store.verify() == [
        "clips/bfloat16.safetensors: layer1 is torch.bfloat16, not torch.float16",
        "clips/missing.safetensors: lacks rows, which does not fit the spec",
        "clips/rows.safetensors: rows must be -1 .. 1, got [1, 2, 2]",
        "clips/shape.safetensors: layer1.mean must be [2, 2, 3], got [2, 1, 3]",
    ]


@pytest.mark.parametrize("threads", [1, 3])
def test_problems_come_in_order_and_progress_counts_every_file(tmp_path, threads):
    clips = [f"{i:02d}" for i in range(20)]
    store = small_store(tmp_path / "s", clips=clips)
    for clip in clips[::3]:
        store.path(clip).write_bytes(b"")
    (tmp_path / "s" / "failed.jsonl").write_text('{"id": "x", "stage": "decode", "reason": "r"}\n{"id": "y", "st')
    calls = Counter()
    problems = store.verify(threads=threads, progress=lambda n: calls.update(n=n))
    assert calls["n"] == 20
    empty = [f"clips/{clip}.safetensors: truncated: 0 bytes cannot hold a header" for clip in clips[::3]]
    assert problems == [*empty, "failed.jsonl: line 2 is torn; its clip counts as never tried"]
    assert store.ids() == clips  # nothing was deleted
