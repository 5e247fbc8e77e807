"""Rows are read as they were written, and only they; what is damaged, foreign or not there is named."""

import ctypes
import mmap
import multiprocessing
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from spatialprobe.engine.reading import host_memory, ranges
from spatialprobe.engine.reading.ranges import LocalFile
from spatialprobe.engine.reading.rows import StoredRows
from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.types import STORE_DTYPES, FeatureSpec, FrameSelection, tensor_name
from spatialprobe.kernels.pool_features import finish

SHAPE = (7, 5, 13, 331)  # a row is 43 KB of float16, on no boundary of any kind
LARGE = (9, 8, 16, 1024)  # a row is 262 KB of float16
FRAMES = [-1, 0, 0, 3, 6]


def spec_of(**changes) -> FeatureSpec:
    values = {"family": "wan", "weights": "content:0", "layers": (1, 3), "steps": (200, 749)}
    return FeatureSpec(**(values | {"frames": FrameSelection(window=len(FRAMES))} | changes))


def write(store: FeatureStore, clip_id: str, shape=SHAPE, seed=0) -> Path:
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for key in store.spec.tensors():
        done = finish(torch.randn(shape, generator=generator) * 3 + 1, STORE_DTYPES[store.spec.dtype])
        tensors |= done.named(tensor_name(*key))
    store.write(
        clip_id, tensors, torch.tensor(FRAMES), {"grid": shape[:3], "rows_kept": [*range(shape[0])], "padded": 0}
    )
    return store.path(clip_id)


def bits(x):
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def assert_rows(stored: StoredRows, there: dict[str, torch.Tensor], key, rows) -> None:
    """They are those of `there`, a whole file."""
    for part, x in vars(stored).items():
        wanted = there.get(tensor_name(*key) if part == "data" else f"{tensor_name(*key)}.{part}")
        if wanted is None:
            assert x is None, part
        else:
            assert (x.dtype, len(x)) == (wanted.dtype, len(rows)), part
            assert torch.equal(bits(x), bits(wanted)[list(rows)]), part


def whole(path: Path) -> dict[str, torch.Tensor]:
    """What the library's own reader reads; copies, because what it gives are mappings of the file."""
    return {name: x.clone() for name, x in load_file(path).items()}


def evict(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def cached(path: Path) -> int:
    """Bytes of a file that the page cache has."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        view = np.frombuffer(mapped, np.uint8)
        address = ctypes.c_void_p(view.ctypes.data)
        assert ctypes.CDLL(None).mincore(address, ctypes.c_size_t(len(mapped)), pages) == 0
        del view
        return sum(page & 1 for page in pages) * mmap.PAGESIZE


def fetched() -> int:
    """Bytes that this process has asked the kernel for so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def disk(tmp_path):
    """A folder on a file system with direct reads."""
    probe = tmp_path / "probe"
    probe.write_bytes(b"x")
    try:
        os.close(os.open(probe, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip(f"{tmp_path} is on a file system without direct reads")
    return tmp_path


# -- what is read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", STORE_DTYPES)
@pytest.mark.parametrize("way", ["page cache", "direct", "head"])
def test_rows_are_those_that_were_written(disk, monkeypatch, dtype, way):
    """Alone and of several layers and steps, in any order, twice, cut into many reads and merged into one."""
    monkeypatch.setattr(ranges, "LEAST_DIRECT", 0 if way == "direct" else 1 << 40)
    monkeypatch.setattr(ranges, "HEAD", 1 << 30 if way == "head" else 1 << 9)
    path = write(FeatureStore.create(disk / "s", spec_of(dtype=dtype)), "train/a")
    store, there = FeatureStore.open(disk / "s"), whole(path)
    keys = store.spec.tensors()
    for longest in (1 << 21, 40_000):
        monkeypatch.setattr(ranges, "SPAN", longest)
        for wanted, rows in (([keys[2]], [6]), (keys, [6, 2, 3]), (keys[2:0:-1], [5, 1, 5, 5, 0]), (keys, range(7))):
            evict(path)
            with store.open_clip("train/a") as clip:
                assert clip.rows == FRAMES
                assert clip.shape(wanted[0]) == SHAPE
                found = clip.read(wanted, rows)
            assert list(found) == wanted
            for key, stored in found.items():
                assert_rows(stored, there, key, rows)
    assert_rows(store.read_rows("train/a", 3, [6, 0], 200), there, (3, 200), [6, 0])
    assert store.read_rows("train/a", 3, [], 200).data.shape == (0, *SHAPE[1:])


def test_a_cold_read_goes_around_the_page_cache_and_a_warm_one_does_not(disk, monkeypatch):
    path = write(FeatureStore.create(disk / "s", spec_of(layers=(1,), steps=())), "x", LARGE)
    store, there, used = FeatureStore.open(disk / "s"), whole(path), []
    for name in ("_read_direct", "_read_cached"):
        one = getattr(LocalFile, name)
        spy = lambda self, span, name=name, one=one: (used.append(name), one(self, span))  # noqa: E731
        monkeypatch.setattr(LocalFile, name, spy)

    def read(store) -> set[str]:
        used.clear()
        assert_rows(store.read_rows("x", 1, [8, 0, 4]), there, (1, None), [8, 0, 4])
        return set(used)

    evict(path)
    assert read(store) == read(store) == {"_read_direct"}
    assert cached(path) <= ranges.HEAD + 2 * mmap.PAGESIZE
    path.read_bytes()
    assert read(store) == {"_read_cached"}
    evict(path)
    assert read(FeatureStore.open(disk / "s", direct=False)) == {"_read_cached"}
    assert 3 * 262_144 <= cached(path) <= 4 * 262_144 + ranges.HEAD
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(os, "geteuid", lambda: -1)
    path.read_bytes()
    assert read(FeatureStore.open(disk / "s")) == {"_read_direct"}  # what is cached is not told to strangers


def test_without_direct_reads_the_page_cache_is_used(tmp_path, monkeypatch):
    path = write(FeatureStore.create(tmp_path / "s", spec_of()), "x", LARGE)
    there, real = whole(path), ranges.fcntl.fcntl

    def refuse(fd, command, flags=0):
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(fd, command, flags)

    monkeypatch.setattr(ranges.fcntl, "fcntl", refuse)
    evict(path)
    assert_rows(FeatureStore.open(tmp_path / "s").read_rows("x", 1, [2, 7], 749), there, (1, 749), [2, 7])


@pytest.mark.parametrize("direct", [True, False])
def test_only_these_bytes_are_fetched(disk, direct):
    path = write(FeatureStore.create(disk / "s", spec_of(layers=(1, 2, 3))), "x", LARGE)
    store = FeatureStore.open(disk / "s", direct=direct)
    evict(path)
    before = fetched()
    stored = store.read_rows("x", 2, [1, 2, 7], 200)
    assert 3 * 262_144 < stored.nbytes <= fetched() - before < stored.nbytes + ranges.HEAD + 4 * ranges.GAP
    before = fetched()
    store.read_rows("x", 2, [4] * 5, 200)
    assert fetched() - before < 1.1 * 262_144 + ranges.HEAD + 4 * ranges.GAP


def test_reads_are_cut_and_merged_as_said():
    place = lambda offset, length: (offset, np.zeros(length, np.uint8))  # noqa: E731
    pieces = [place(1000, 90), place(0, 10), place(10, 10), place(25, 5), place(31, 1), place(500, 0)]
    found = ranges.spans(pieces, gap=5, longest=40)
    assert [[(at, len(into)) for at, into in span] for span in found] == [
        [(0, 10), (10, 10), (25, 5), (31, 1)],
        [(1000, 30)],
        [(1030, 30)],
        [(1060, 30)],
    ]
    assert [ranges.extent(span) for span in found] == [(0, 32), (1000, 1030), (1030, 1060), (1060, 1090)]
    apart = ranges.spans(pieces, gap=4, longest=40)
    assert [len(span) for span in apart[:2]] == [2, 2]
    many = ranges.spans([place(i, 1) for i in range(1200)], gap=0, longest=5000)
    assert [len(span) for span in many] == [500, 500, 200]


def test_whole_tensors_are_mapped_not_read(tmp_path):
    path = write(FeatureStore.create(tmp_path / "s", spec_of()), "x", LARGE)
    store, there = FeatureStore.open(tmp_path / "s"), whole(path)["layer3/step749"]
    for read in (lambda: store.read_raw("x", 3, 749)["data"], lambda: store.read("x", 3, 749).data):
        before = fetched()
        data = read()
        assert fetched() - before < 10_000
        assert str(path) in Path("/proc/self/maps").read_text()
        assert torch.equal(data[5, 7], there[5, 7])
        del data
        assert str(path) not in Path("/proc/self/maps").read_text()


# -- into whose memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_rows_are_read_into_what_is_given(tmp_path, dtype):
    """Parts of one buffer for several clips, which is written over and over."""
    store = FeatureStore.create(tmp_path / "s", spec_of(dtype=dtype))
    paths = {name: write(store, name, LARGE, seed) for seed, name in enumerate("abc")}
    batch = StoredRows.empty((4, *LARGE[1:]), STORE_DTYPES[dtype], scaled=dtype == "int8")
    for names in ("ab", "ca"):
        for place, name in enumerate(names):
            part = batch.part(2 * place, 2 * place + 2)
            assert store.read_rows(name, 3, [8, 1], 200, out=part) is part
        for place, name in enumerate(names):
            assert_rows(batch.part(2 * place, 2 * place + 2), whole(paths[name]), (3, 200), [8, 1])
    tokens = 4 * 8 * 16
    assert batch.nbytes == tokens * (1024 * batch.data.itemsize + 4 * (3 if dtype == "int8" else 2))


def test_memory_that_does_not_fit_is_refused(tmp_path):
    store = FeatureStore.create(tmp_path / "s", spec_of())
    write(store, "x")
    good = lambda: StoredRows.empty((2, *SHAPE[1:]), torch.float16)  # noqa: E731
    strided, scaled = good(), StoredRows.empty((2, *SHAPE[1:]), torch.float16, scaled=True)
    strided.data = torch.empty(2, 13, 5, 331, dtype=torch.float16).transpose(1, 2)
    wrong = {
        r"data must be contiguous torch.float16 \[2, 5, 13, 331\] on the CPU, got torch.float16 \[3, 5": (
            StoredRows.empty((3, *SHAPE[1:]), torch.float16)
        ),
        r"data must be .*, got torch.bfloat16": StoredRows.empty((2, *SHAPE[1:]), torch.bfloat16),
        r"data must be .*, got torch.float16 \[2, 5, 13, 331\] on cpu not contiguous": strided,
        r"rstd must be contiguous torch.float32 \[2, 5, 13\] on the CPU, got": (
            StoredRows(good().data, good().mean, torch.empty(2, 5, 14))
        ),
        r"mean must be .* on meta": StoredRows(good().data, torch.empty(2, 5, 13, device="meta"), good().rstd),
        "out must have no scale for float16": scaled,
    }
    for reason, out in wrong.items():
        with pytest.raises(ValueError, match=reason):
            store.read_rows("x", 1, [0, 1], 200, out=out)
    quantised = FeatureStore.create(tmp_path / "q", spec_of(dtype="int8"))
    write(quantised, "x")
    with pytest.raises(ValueError, match="out must have a scale for int8"):
        quantised.read_rows("x", 1, [0, 1], 200, out=StoredRows.empty((2, *SHAPE[1:]), torch.int8))


def test_memory_is_used_again_once_nothing_uses_it(monkeypatch):
    monkeypatch.setattr(host_memory, "_idle", type(host_memory._idle)())
    shape = (3, host_memory.LEAST)
    x = host_memory.host_empty(shape, torch.int8).fill_(1)
    address, view = x.data_ptr(), x.view(torch.float16)[1]
    del x
    other = host_memory.host_empty(shape, torch.int8).fill_(2)
    assert other.data_ptr() != address
    assert (view.view(torch.int8) == 1).all()
    del view
    bigger = host_memory.host_empty((4, host_memory.LEAST), torch.int8)
    again = host_memory.host_empty((host_memory.LEAST // 2, 3), torch.float16)
    assert bigger.data_ptr() != address == again.data_ptr()
    assert again.dtype == torch.float16
    del other, bigger, again
    assert sum(map(len, host_memory._idle)) == 10 * host_memory.LEAST
    monkeypatch.setattr(host_memory, "IDLE", 7 * host_memory.LEAST)
    small = host_memory.host_empty((host_memory.LEAST,), torch.int8)
    assert small.data_ptr() % mmap.PAGESIZE == 0
    assert 0 < sum(map(len, host_memory._idle)) <= 7 * host_memory.LEAST


# -- what is refused ------------------------------------------------------------------------------------------------


def test_rows_and_layers_that_are_not_there_are_named(tmp_path):
    store = FeatureStore.create(tmp_path / "s", spec_of())
    write(store, "train/a")
    where = r"clip train/a: .*train/a\.safetensors has rows 0 \.\. 6, got"
    with pytest.raises(ValueError, match=rf"{where} \[-1\]; -1 stands for frames that no row sees"):
        store.read_rows("train/a", 1, [0, FRAMES[0]], 749)
    with pytest.raises(ValueError, match=rf"{where} \[7, -2\]$"):
        store.read_rows("train/a", 1, [7, 6, -2], 749)
    with pytest.raises(ValueError, match=r"layer2/step749 is not in .*; it holds layer1/step200"):
        store.read_rows("train/a", 2, [0], 749)
    with pytest.raises(FileNotFoundError, match=r"clip b is not in .*/s$"):
        store.read_rows("b", 1, [0], 749)
    with store.open_clip("train/a") as clip:
        with pytest.raises(ValueError, match=r"clip train/a: .*a\.safetensors has layer1/step200, .*, not layer1$"):
            clip.shape((1, None))


@pytest.mark.parametrize("direct", [True, False])
def test_damage_is_named_and_a_changed_byte_on_request(tmp_path, direct):
    path = write(FeatureStore.create(tmp_path / "s", spec_of()), "x", LARGE)
    store, content = FeatureStore.open(tmp_path / "s", direct=direct), path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    unseen, seen = content.index(b'"rows"'), len(content) - 5
    for damage in (b"", content[:5], content[: header - 1], content[:-1], content[: len(content) // 2], content + b"x"):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=r"clip x: .*x\.safetensors is damaged: .*truncated"):
            store.read_rows("x", 1, [0], 200)
    path.write_bytes(content[:unseen] + b'"rowz"' + content[unseen + 6 :])
    with pytest.raises(ValueError, match=r"x\.safetensors is damaged: lacks rows and has rowz"):
        store.read_rows("x", 1, [0], 200)
    path.write_bytes(content[:seen] + bytes([content[seen] ^ 1]) + content[seen + 1 :])
    there = whole(path)
    assert_rows(store.read_rows("x", 1, [0], 200), there, (1, 200), [0])
    with pytest.raises(ValueError, match=r"clip x: .*x\.safetensors is damaged: the checksum does not match"):
        store.read_rows("x", 1, [0], 200, check=True)
    path.write_bytes(content)
    evict(path)
    assert_rows(store.read_rows("x", 1, [0], 200, check=True), there, (1, 200), [0])


def test_a_row_vector_out_of_range_is_damage(tmp_path):
    path = write(FeatureStore.create(tmp_path / "s", spec_of()), "x")
    store, content = FeatureStore.open(tmp_path / "s"), path.read_bytes()
    at = content.index(np.array(FRAMES).tobytes())
    path.write_bytes(content[:at] + np.array([0, 1, 2, 3, 7]).tobytes() + content[at + 40 :])
    with pytest.raises(ValueError, match=r"damaged: rows must be -1 \.\. 6, got \[0, 1, 2, 3, 7\]"):
        store.open_clip("x")


@pytest.mark.parametrize("left", [0, 9_000_000])
@pytest.mark.parametrize("direct", [True, False])
def test_a_file_that_gets_shorter_while_it_is_read_is_named(tmp_path, direct, left):
    path = write(FeatureStore.create(tmp_path / "s", spec_of()), "x", LARGE)
    with FeatureStore.open(tmp_path / "s", direct=direct).open_clip("x") as clip:
        evict(path)
        os.truncate(path, left)
        with pytest.raises(ValueError, match=r"clip x: .*x\.safetensors is damaged: truncated while it was read"):
            clip.read([(3, 749)], [0, 8])


def test_features_of_another_spec_or_clip_are_foreign(tmp_path):
    here, there = (FeatureStore.create(tmp_path / name, spec_of(seed=i)) for i, name in enumerate("ab"))
    write(here, "x")
    write(there, "y")
    here.path("y").write_bytes(there.path("y").read_bytes())
    here.path("z").write_bytes(here.path("x").read_bytes())
    with pytest.raises(ValueError, match=rf"clip y: .*y.safetensors is foreign: of spec '{there.spec_hash}', not"):
        here.read_rows("y", 1, [0], 200)
    with pytest.raises(ValueError, match=r"clip z: .*z.safetensors is foreign: of clip 'x', not 'z'"):
        here.read_rows("z", 1, [0], 200)


def test_files_are_closed_also_after_an_error(tmp_path):
    path = write(FeatureStore.create(tmp_path / "s", spec_of()), "x", LARGE)
    store, before = FeatureStore.open(tmp_path / "s"), open_files()
    for _ in range(3):
        store.read_rows("x", 1, [0, 3], 200)
        with pytest.raises(ValueError, match="has rows"):
            store.read_rows("x", 1, [-1], 200)
    path.write_bytes(b"half")
    for _ in range(3):
        with pytest.raises(ValueError, match="is damaged"):
            store.read_rows("x", 1, [0], 200)
    assert open_files() == before


# -- several at once ------------------------------------------------------------------------------------------------


def test_an_open_clip_stays_what_it_was(tmp_path):
    store = FeatureStore.create(tmp_path / "s", spec_of())
    there = whole(write(store, "x", LARGE, seed=1))
    with store.open_clip("x") as clip:
        path = write(store, "x", LARGE, seed=2)
        assert_rows(clip.read([(3, 200)], [0, 8])[3, 200], there, (3, 200), [0, 8])
    assert_rows(store.read_rows("x", 3, [0, 8], 200), whole(path), (3, 200), [0, 8])


def test_threads_read_at_the_same_time(tmp_path):
    store = FeatureStore.create(tmp_path / "s", spec_of(layers=(1,), steps=()))
    there = {name: whole(write(store, name, LARGE, seed)) for seed, name in enumerate("abcd")}
    for name in there:
        evict(store.path(name))
    jobs = [(name, [row, (row + 3) % 9]) for row in range(9) for name in there]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda job: store.read_rows(job[0], 1, job[1]), jobs))
    for (name, rows), stored in zip(jobs, found, strict=True):
        assert_rows(stored, there[name], (1, None), rows)


FORK = multiprocessing.get_context("fork")


def _read_and_compare(pickled: bytes, path: Path) -> None:
    assert_rows(pickle.loads(pickled).read_rows("x", 1, [8, 2, 5]), whole(path), (1, None), [8, 2, 5])


def test_another_process_reads_what_it_is_given(tmp_path):
    """A forked one has none of its parent's threads."""
    path = write(FeatureStore.create(tmp_path / "s", spec_of(layers=(1,), steps=())), "x", LARGE)
    pickled = pickle.dumps(FeatureStore.open(tmp_path / "s"))
    _read_and_compare(pickled, path)  # starts this process's threads
    child = FORK.Process(target=_read_and_compare, args=(pickled, path), daemon=True)
    child.start()
    child.join(30)
    assert child.exitcode == 0, "hangs" if child.is_alive() else "fails"


def test_a_forked_process_reads_through_memory_of_its_own():
    ranges._scratch(10)[:] = 1
    child = FORK.Process(target=lambda: ranges._scratch(10).fill(2))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    assert ranges._scratch(10).tolist() == [1] * 10


CLIPS, VERSIONS = 3, 6


def test_readers_of_a_store_that_is_being_written_see_whole_clips_only(tmp_path):
    """Clips come and are replaced; every version is one number all over."""
    spec = spec_of(layers=(1, 3), steps=())
    FeatureStore.create(tmp_path / "s", spec)
    stores, versions = [FeatureStore.open(tmp_path / "s", direct=direct) for direct in (True, False)], {}
    writer = FORK.Process(target=_write_numbers, args=(tmp_path / "s", spec), daemon=True)
    writer.start()
    with ThreadPoolExecutor(4) as pool:
        while writer.is_alive():
            jobs = [(store, clip_id) for store in stores for clip_id in store.ids()]
            for (store, clip_id), value in zip(jobs, pool.map(lambda job: _read_number(*job), jobs), strict=True):
                versions.setdefault((store.direct, clip_id), []).append(value)
    assert writer.exitcode == 0
    assert sorted(versions) == [(direct, f"clip{i}") for direct in (False, True) for i in range(CLIPS)]
    assert any(len(set(seen)) > 1 for seen in versions.values())  # replaced while they were read
    assert all(a <= b for seen in versions.values() for a, b in pairwise(seen))
    assert stores[0].verify() == []


def _read_number(store: FeatureStore, clip_id: str) -> float:
    """The one number that is everywhere in a clip, read in two goes."""
    with store.open_clip(clip_id) as clip:
        found = [clip.read([(1, None)], [0, 4, 8]), clip.read([(3, None), (1, None)], [7, 1])]
    tensors = [x for part in found for rows in part.values() for x in (rows.data, rows.mean, rows.rstd)]
    numbers = {float(n) for x in tensors for n in x.aminmax()}
    assert len(numbers) == 1, (clip_id, numbers)
    return numbers.pop()


def _write_numbers(root: Path, spec: FeatureSpec) -> None:
    store = FeatureStore.create(root, spec)
    for version in range(VERSIONS):
        data, token = torch.full(LARGE, float(version)).half(), torch.full(LARGE[:3], float(version))
        tensors = {}
        for layer in spec.layers:
            tensors |= {f"layer{layer}": data, f"layer{layer}.mean": token, f"layer{layer}.rstd": token}
        provenance = {"grid": LARGE[:3], "rows_kept": [*range(LARGE[0])], "padded": 0}
        for i in range(CLIPS):
            store.write(f"clip{i}", tensors, torch.tensor(FRAMES), provenance)


@pytest.mark.parametrize("rows", [[0], np.array([0]), torch.tensor([0]), torch.tensor([2, 0, 2]), np.array([1, 1])])
def test_rows_may_be_a_list_an_array_or_a_tensor(tmp_path, rows):
    path = write(FeatureStore.create(tmp_path / "s", spec_of()), "x")
    store, there = FeatureStore.open(tmp_path / "s"), whole(path)
    assert_rows(store.read_rows("x", 3, rows, 749), there, (3, 749), [int(row) for row in rows])
    with store.open_clip("x") as clip:  # a key twice is one key
        assert_rows(clip.read([(3, 749), (3, 749)], rows)[3, 749], there, (3, 749), [int(row) for row in rows])
