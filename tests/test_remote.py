"""A store elsewhere gives what it gives at home: by ranges, or from a cache that only ever holds whole clips."""

import multiprocessing
import os
import pickle
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
import torch

from spatialprobe.engine.files.durable import StoreFull
from spatialprobe.engine.reading import remote
from spatialprobe.engine.reading.remote import CachedStore, RemoteStore, open_source
from spatialprobe.engine.reading.rows import StoredRows
from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.types import FeatureSpec, FrameSelection, tensor_name
from spatialprobe.kernels.pool_features import finish

SHAPE = (7, 4, 6, 1001)  # a row is 48 KB
ROWS = [-1, 0, 3, 6]
IDS = ["train/a", "train/b #1%2", "val/c"]


def write(store: FeatureStore, clip_id: str, seed: int) -> None:
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for key in store.spec.tensors():
        tensors |= finish(torch.randn(SHAPE, generator=generator), torch.int8).named(tensor_name(*key))
    store.write(clip_id, tensors, torch.tensor(ROWS), {"grid": SHAPE[:3], "rows_kept": [*range(7)], "padded": 0})


@pytest.fixture
def home(tmp_path) -> FeatureStore:
    spec = FeatureSpec("wan", "content:0", (1, 3), (200, 749), frames=FrameSelection(window=4), dtype="int8")
    store = FeatureStore.create(tmp_path / "home", spec)
    for seed, clip_id in enumerate(IDS):
        write(store, clip_id, seed)
    return store


class Server(ThreadingHTTPServer):
    """Serves a folder on this machine; knows what it was asked for."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.asked: list[tuple[str, str, str | None]] = []  # method, path, range
        self.sent = 0  # bytes of files
        self.ranges, self.listing, self.error = True, True, None


class Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        asked = self.headers.get("Range")
        self.server.asked.append((self.command, self.path, asked))
        path = Path(self.translate_path(self.path))
        if self.server.error:
            self.send_error(self.server.error)
        elif path.is_dir() and not self.server.listing:
            self.send_error(403)
        elif path.is_file():
            self._send_file(path.read_bytes(), asked)
        else:
            super().do_GET()

    def do_HEAD(self):
        self.server.asked.append((self.command, self.path, None))
        super().do_HEAD()

    def _send_file(self, content: bytes, asked: str | None) -> None:
        if asked and self.server.ranges:
            first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", asked).groups())
            part = content[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(content)}")
        else:
            part = content
            self.send_response(200)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)
        self.server.sent += len(part)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(home):
    with Server(home.root) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def memory(home):
    """The store, copied to fsspec's memory."""
    fs = fsspec.filesystem("memory")
    for path in home.root.rglob("*"):
        if path.is_file():
            fs.pipe_file(f"/stores/wan/{path.relative_to(home.root).as_posix()}", path.read_bytes())
    yield "memory://stores/wan"
    fs.rm("/stores", recursive=True)


@pytest.fixture(params=["memory", "http"])
def url(request) -> str:
    return request.getfixturevalue("memory") if request.param == "memory" else request.getfixturevalue("server").url


def assert_equal(here: StoredRows, there: StoredRows) -> None:
    assert all(torch.equal(x, getattr(there, part)) for part, x in vars(here).items())


def assert_same_store(source, home) -> None:
    assert (source.spec, source.spec_hash, source.ids()) == (home.spec, home.spec_hash, IDS)
    for clip_id in IDS:
        with source.open_clip(clip_id) as clip:
            assert clip.rows == ROWS
            found = clip.read(home.spec.tensors(), [6, 0, 3, 0])
        for (layer, step), stored in found.items():
            assert_equal(stored, home.read_rows(clip_id, layer, [6, 0, 3, 0], step))


# -- by ranges ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [1 << 9, 1 << 12, 1 << 20])  # less than a header, some of a file, all of it
def test_rows_are_those_at_home(home, url, monkeypatch, head):
    monkeypatch.setattr(remote, "HEAD", head)
    assert_same_store(open_source(url), home)
    assert_same_store(pickle.loads(pickle.dumps(open_source(url + "/"))), home)


def test_only_the_wanted_ranges_are_fetched(home, server, monkeypatch):
    monkeypatch.setattr(remote, "HEAD", 1 << 12)
    monkeypatch.setattr(remote, "GAP", 1 << 10)
    source, size = RemoteStore(server.url), home.path("val/c").stat().st_size
    server.asked.clear()
    server.sent = 0
    with source.open_clip("val/c") as clip:
        stored = clip.read([(3, 200)], [5])[3, 200]
    assert_equal(stored, home.read_rows("val/c", 3, [5], 200))
    assert stored.nbytes <= server.sent < stored.nbytes + (1 << 12) + 2 * remote.GUARD + 4 * remote.GAP < size / 3
    assert {path for _, path, _ in server.asked} == {"/clips/val/c.safetensors"}


def test_threads_share_a_source_and_a_forked_child_connects_anew(home, url):
    source = open_source(url)
    jobs = [(clip_id, row) for row in range(7) for clip_id in IDS]
    read = lambda clip_id, row: _rows(source, clip_id, row)  # noqa: E731
    with ThreadPoolExecutor(4) as pool:
        for (clip_id, row), stored in zip(jobs, pool.map(lambda job: read(*job), jobs), strict=True):
            assert_equal(stored, home.read_rows(clip_id, 1, [row], 749))
    child = multiprocessing.get_context("fork").Process(target=_compare, args=(source, home), daemon=True)
    child.start()
    child.join(30)
    assert child.exitcode == 0, "hangs" if child.is_alive() else "fails"


def _rows(source, clip_id: str, row: int) -> StoredRows:
    with source.open_clip(clip_id) as clip:
        return clip.read([(1, 749)], [row])[1, 749]


def _compare(source, home) -> None:
    assert_equal(_rows(source, "val/c", 2), home.read_rows("val/c", 1, [2], 749))


def test_ids_are_given_where_a_place_cannot_be_listed(home, server):
    server.listing = False
    with pytest.raises(ValueError, match=r"http://.* cannot be listed, so give `ids`: .*403"):
        open_source(server.url).ids()
    assert open_source(server.url, ids=["val/c", "train/a"]).ids() == ["train/a", "val/c"]
    server.listing = True
    for path in home.clips.rglob("*.safetensors"):
        path.unlink()
    with pytest.raises(ValueError, match=r"http://.* has no clips, or does not list them: then give `ids`"):
        open_source(server.url).ids()


# -- what is refused ------------------------------------------------------------------------------------------------


def test_what_is_not_there_is_named(url, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"clip val/d is not in (memory|http)://"):
        open_source(url).open_clip("val/d")
    with pytest.raises(ValueError, match=r"/clips is not a feature store: it has no spec.json"):
        open_source(f"{url}/clips")
    with pytest.raises(ValueError, match="cache, ids and options are for URLs, got the folder"):
        open_source(str(tmp_path), cache=tmp_path / "cache")
    with pytest.raises(ValueError, match="must be a relative path"):
        open_source(url).open_clip("../x")


def test_a_kind_of_url_whose_package_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as where it is not installed
    with pytest.raises(ValueError, match=r"^s3://bucket/store cannot be read: Install s3fs"):
        open_source("s3://bucket/store")
    with pytest.raises(ValueError, match="Protocol not known: s4"):
        open_source("s4://bucket/store")


def test_a_folder_is_opened_as_a_store(home):
    assert_same_store(open_source(str(home.root)), home)


def test_damage_is_named(home, url, server, memory, monkeypatch):
    monkeypatch.setattr(remote, "HEAD", 1 << 12)
    content = home.path("val/c").read_bytes()
    source = open_source(url)

    def put(content: bytes) -> None:
        home.path("val/c").write_bytes(content)
        fsspec.filesystem("memory").pipe_file("/stores/wan/clips/val/c.safetensors", content)

    for damage in (content[:5], content[:100], content[:-1], content + b"x"):
        put(damage)
        with pytest.raises(ValueError, match=r"clip val/c: .*clips/val/c.safetensors is damaged: .*truncated"):
            source.open_clip("val/c")
    put(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    _rows(source, "val/c", 0)
    with pytest.raises(ValueError, match=r"clip val/c: .* is damaged: the checksum does not match"):
        source.open_clip("val/c", check=True)
    put(content)
    source.open_clip("val/c", check=True).close()
    with source.open_clip("val/c") as clip:
        put(content[:-20_000])
        with pytest.raises(ValueError, match=r"clip val/c: .* is damaged: .* bytes came of the .* from byte"):
            clip.read([(1, 200), (3, 749)], [6])
    put(home.path("train/a").read_bytes())
    with pytest.raises(ValueError, match=r"val/c.safetensors is foreign: of clip 'train/a', not 'val/c'"):
        source.open_clip("val/c")


def test_a_clip_that_is_replaced_while_it_is_open_is_no_mixture(home, url, memory, monkeypatch):
    monkeypatch.setattr(remote, "HEAD", 1 << 12)
    source = open_source(url)
    with source.open_clip("val/c") as clip:
        clip.read([(1, 200)], [0])
        write(home, "val/c", seed=9)
        content = home.path("val/c").read_bytes()
        fsspec.filesystem("memory").pipe_file("/stores/wan/clips/val/c.safetensors", content)
        with pytest.raises(OSError, match=r"clip val/c: replaced while it was read: read the clip again"):
            clip.read([(3, 749)], [1])
    assert_equal(_rows(source, "val/c", 1), home.read_rows("val/c", 1, [1], 749))


def test_a_server_without_ranges_or_in_trouble_is_named(server, monkeypatch):
    monkeypatch.setattr(remote, "HEAD", 1 << 12)
    source = RemoteStore(server.url)
    server.ranges = False
    with pytest.raises(OSError, match=r"clip val/c: the server sent .* asked for 4096: it does not serve ranges"):
        source.open_clip("val/c")
    server.ranges, server.error = True, 503
    with pytest.raises(OSError, match=r"clip val/c: ClientResponseError: 503.*http://"):
        source.open_clip("val/c")
    server.shutdown()
    server.server_close()
    with pytest.raises(OSError, match=r"clip val/c: .*Connect.*http://"):
        source.open_clip("val/c")


# -- with a cache ---------------------------------------------------------------------------------------------------


def test_a_clip_is_copied_once_and_the_cache_is_a_store(home, url, server, tmp_path):
    source = open_source(url, cache=tmp_path / "cache")
    assert_same_store(source, home)
    here = FeatureStore.open(tmp_path / "cache")
    assert (here.ids(), here.verify()) == (IDS, [])
    assert all(here.path(name).read_bytes() == home.path(name).read_bytes() for name in IDS)
    server.asked.clear()
    again = pickle.loads(pickle.dumps(open_source(url, cache=tmp_path / "cache", ids=IDS)))
    assert_same_store(again, home)
    assert not any("clips" in path for _, path, _ in server.asked)


def test_only_clips_that_are_whole_get_into_the_cache(home, server, tmp_path):
    content = home.path("val/c").read_bytes()
    source = open_source(server.url, cache=tmp_path / "cache")
    for damage in (content[:-1], content[:-5] + bytes([content[-5] ^ 1]) + content[-4:], b""):
        home.path("val/c").write_bytes(damage)
        with pytest.raises(ValueError, match=r"clip val/c: http.*: damaged there, or on its way"):
            source.open_clip("val/c")
    with pytest.raises(FileNotFoundError, match="clip val/d is not in http"):
        source.open_clip("val/d")
    home.path("val/c").write_bytes(content)
    assert_equal(_rows(source, "val/c", 4), home.read_rows("val/c", 1, [4], 749))
    assert FeatureStore.open(tmp_path / "cache").ids() == ["val/c"]
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_a_cache_is_of_one_store(home, memory, server, tmp_path):
    open_source(memory, cache=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"holds clips copied from memory://stores/wan, not from http://.*; choose"):
        open_source(server.url, cache=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"holds clips copied from None, not from memory"):
        open_source(memory, cache=home.root)
    other = FeatureSpec("wan", "content:1", (1,))
    FeatureStore.create(tmp_path / "other", other)
    with pytest.raises(ValueError, match="holds features of another spec; choose another folder"):
        open_source(memory, cache=tmp_path / "other")


def test_processes_share_a_cache(home, server, tmp_path):
    """Both copy the same clips at the same time."""
    open_source(server.url, cache=tmp_path / "cache")
    fork = multiprocessing.get_context("fork")
    children = [
        fork.Process(target=_read_all, args=(server.url, tmp_path / "cache", home), daemon=True) for _ in range(2)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0, 0]
    assert FeatureStore.open(tmp_path / "cache").verify() == []


def _read_all(url: str, cache: Path, home: FeatureStore) -> None:
    assert_same_store(open_source(url, cache=cache, ids=IDS), home)


def test_a_full_disk_is_said(home, memory, tmp_path, monkeypatch):
    source = CachedStore(RemoteStore(memory), tmp_path / "cache")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    size = home.path("val/c").stat().st_size / 1e6
    with pytest.raises(StoreFull, match=rf"No space left on device: {size:.3f} MB needed"):
        source.open_clip("val/c")
    assert FeatureStore.open(tmp_path / "cache").ids() == []


def test_a_spec_of_an_older_version_keeps_its_hash(home, tmp_path):
    """Its text lacks what later versions add, and the clips' files are of the hash of that text."""
    text = home.root / "spec.json"
    text.write_text(text.read_text().replace(' "options": {},\n', ""))
    older = FeatureStore.open(home.root)
    assert older.spec == home.spec
    assert older.spec_hash != home.spec_hash
    store = FeatureStore.create(home.root, home.spec)
    for seed, clip_id in enumerate(IDS):
        write(store, clip_id, seed)
    fs = fsspec.filesystem("memory")
    for path in home.root.rglob("*"):
        if path.is_file():
            fs.pipe_file(f"/older/{path.relative_to(home.root).as_posix()}", path.read_bytes())
    assert_same_store(open_source("memory://older", cache=tmp_path / "cache"), older)
    fs.rm("/older", recursive=True)
