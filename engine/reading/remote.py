"""Stores elsewhere, by any path that fsspec knows: s3://, gs://, https://, memory://. Read only.

Without a cache, only the header and the wanted rows of a clip are fetched, every time. With a cache folder, a clip is
fetched whole once: the rows that training wants of it differ from epoch to epoch.
"""

import errno
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import fsspec
import numpy as np

from spatialprobe.engine.files.clipfile import SUFFIX, BadFile, is_whole
from spatialprobe.engine.files.durable import publish, room_for
from spatialprobe.engine.reading.ranges import HEAD, Piece, extent, spans
from spatialprobe.engine.reading.rows import FeatureSource
from spatialprobe.engine.reading.stored_clip import StoredClip
from spatialprobe.engine.store import FeatureStore, parse_spec
from spatialprobe.engine.types import check_clip_id

SPAN = 1 << 23  # bytes of one request; several are under way at once
GAP = 1 << 16  # bytes between two pieces that are fetched with them: a request of its own would take longer
GUARD = 1 << 9  # bytes of a file that hold its checksum, and so tell it from one that took its name


def open_source(
    path: str | Path,
    *,
    cache: str | Path | None = None,  # folder of this machine that keeps clips; one for each store
    ids: Sequence[str] | None = None,  # the clips there are, where the place cannot be listed (http)
    options: dict[str, Any] | None = None,  # of fsspec's file system: credentials, endpoint ...
) -> FeatureSource:
    """Opens a store for reading: a folder, or a URL. Raises ValueError if it is none.

    A clip in the cache is not asked for again, so a store whose clips were replaced wants a new cache. The cache is a
    store itself: `engine verify` checks it.
    """
    path = os.fspath(path)
    if "://" not in path:
        if cache is not None or ids is not None or options is not None:
            raise ValueError(f"cache, ids and options are for URLs, got the folder {path}")
        return FeatureStore.open(path)
    remote = RemoteStore(path, ids=ids, options=options)
    return remote if cache is None else CachedStore(remote, cache)


class RemoteStore:
    """A `FeatureSource` that fetches ranges of the files below a URL."""

    def __init__(self, url: str, *, ids: Sequence[str] | None = None, options: dict[str, Any] | None = None):
        self.url, self._ids, self._options = url.rstrip("/"), None if ids is None else sorted(ids), options or {}
        self._connected: tuple[int, Any, str] | None = None  # process, file system, path in it
        try:
            self.spec_text = self.fetch(lambda fs, root: fs.cat_file(f"{root}/spec.json")).decode()
        except FileNotFoundError:
            raise ValueError(f"{self.url} is not a feature store: it has no spec.json") from None
        except ImportError as error:  # of the package for this kind of URL
            raise ValueError(f"{self.url} cannot be read: {error}") from None
        self.spec, self.spec_hash = parse_spec(self.spec_text, f"{self.url}/spec.json")

    def fetch(self, ask: Callable[[Any, str], Any]) -> Any:
        """`ask` of the file system and the store's path in it. Raises OSError whatever the transport raises."""
        if self._connected is None or self._connected[0] != os.getpid():  # a forked child needs a connection of its own
            self._connected = os.getpid(), *fsspec.core.url_to_fs(self.url, use_listings_cache=False, **self._options)
        with _as_os_error(self.url):
            return ask(*self._connected[1:])

    def ids(self) -> list[str]:
        """Ids of the clips that are there, sorted: those given, or else listed. Raises ValueError if none are found."""
        if self._ids is not None:
            return list(self._ids)
        try:
            root, found = self.fetch(lambda fs, root: (f"{root}/clips/", fs.find(f"{root}/clips")))
        except OSError as error:
            raise ValueError(f"{self.url} cannot be listed, so give `ids`: {error}") from None
        names = [path.removeprefix(root).removesuffix(SUFFIX) for path in found if path.endswith(SUFFIX)]
        ids = sorted(unquote(name) if _quotes(root) else name for name in names)
        if not ids:
            raise ValueError(f"{self.url} has no clips, or does not list them: then give `ids`")
        return [clip_id for clip_id in ids if not clip_id.rpartition("/")[2].startswith(".")]

    def clip_path(self, root: str, clip_id: str) -> str:
        """A clip's path in the file system."""
        return f"{root}/clips/{quote(check_clip_id(clip_id)) if _quotes(root) else check_clip_id(clip_id)}{SUFFIX}"

    def fetch_of(self, clip_id: str, ask: Callable[[Any, str], Any]) -> Any:
        """`ask` of the file system and a clip's path in it."""
        try:
            return self.fetch(lambda fs, root: ask(fs, self.clip_path(root, clip_id)))
        except FileNotFoundError:
            raise FileNotFoundError(f"clip {clip_id} is not in {self.url}") from None

    def open_clip(self, clip_id: str, *, check: bool = False) -> StoredClip:
        """See `FeatureSource.open_clip`. A clip that is replaced while it is open raises OSError."""
        try:
            file = RemoteFile(self, clip_id)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise OSError(error.errno, f"clip {clip_id}: {error.strerror or error}", self.url) from error
        return StoredClip(file, clip_id, self.spec, self.spec_hash, check=check)


class RemoteFile:
    """A `ByteFile` of a clip in a RemoteStore."""

    def __init__(self, store: RemoteStore, clip_id: str):
        self.name = store.clip_path(store.url, clip_id)
        self._store, self._clip_id = store, clip_id
        self.start = self._fetch(lambda fs, path: fs.cat_file(path, 0, HEAD))
        if len(self.start) > HEAD:
            message = f"the server sent {len(self.start)} bytes when asked for {HEAD}: it does not serve ranges"
            raise OSError(errno.EOPNOTSUPP, message)
        self.size = len(self.start)
        if self.size == HEAD:
            self.size = self._fetch(lambda fs, path: fs.info(path)["size"])
        if self.size is None:
            raise OSError(errno.EOPNOTSUPP, "the server does not tell the size of the file")

    def _fetch(self, ask: Callable[[Any, str], Any]) -> Any:
        return self._store.fetch_of(self._clip_id, ask)

    def read(self, pieces: Sequence[Piece]) -> None:
        todo = spans(pieces, gap=GAP, longest=SPAN)
        starts, ends = (list(edges) for edges in zip(*map(extent, todo), strict=True))
        count = len(todo)
        parts = self._fetch(lambda fs, path: fs.cat_ranges([path] * count, starts, ends, on_error="raise"))
        for span, begin, end, part in zip(todo, starts, ends, parts, strict=True):
            if len(part) != end - begin:
                raise BadFile(f"{len(part)} bytes came of the {end - begin} from byte {begin}")
            for offset, into in span:
                into[:] = np.frombuffer(part, np.uint8, len(into), offset - begin)
        if self._fetch(lambda fs, path: fs.cat_file(path, 0, GUARD)) != self.start[:GUARD]:
            raise OSError(errno.ESTALE, "replaced while it was read: read the clip again")

    def close(self) -> None:
        pass


class CachedStore:
    """A `FeatureSource` that copies clips of a RemoteStore into a store of this machine before it reads them.

    Any number of processes may share the folder: a clip is there when it is whole, and its checksum was right.
    """

    def __init__(self, remote: RemoteStore, folder: str | Path):
        self.remote, self.folder = remote, Path(folder)
        self.spec, self.spec_hash = remote.spec, remote.spec_hash
        about = {"copied from": remote.url}
        self._local = FeatureStore.create(self.folder, remote.spec, about, spec_text=remote.spec_text)
        origin = self._local.about.get("copied from")
        if origin != remote.url or self._local.spec_hash != remote.spec_hash:
            raise ValueError(f"{folder} holds clips copied from {origin}, not from {remote.url}; choose another folder")

    @property
    def root(self) -> str:
        return self.remote.url

    def __reduce__(self) -> tuple:
        return CachedStore, (self.remote, self.folder)

    def ids(self) -> list[str]:
        """Ids of the clips of the remote store, sorted, in the cache or not."""
        return self.remote.ids()

    def open_clip(self, clip_id: str, *, check: bool = False) -> StoredClip:
        """See `FeatureSource.open_clip`. Raises StoreFull if the clip has to be copied and there is no room."""
        if clip_id not in self._local:
            self._copy(clip_id)
        return self._local.open_clip(clip_id, check=check)

    def _copy(self, clip_id: str) -> None:
        size = self.remote.fetch_of(clip_id, lambda fs, path: fs.info(path)["size"])
        temp = self._local.run.file()
        with room_for(self._local.path(clip_id), size or 0):
            try:
                self.remote.fetch_of(clip_id, lambda fs, path: fs.get_file(path, str(temp)))
                if not is_whole(temp):
                    raise ValueError(f"clip {clip_id}: {self.remote.url}: damaged there, or on its way")
                with temp.open("rb") as file:
                    os.fsync(file.fileno())
                publish(temp, self._local.path(clip_id))
            finally:
                temp.unlink(missing_ok=True)


def _quotes(root: str) -> bool:
    """Whether names are quoted in paths of this kind."""
    return root.startswith(("http://", "https://"))


@contextmanager
def _as_os_error(url: str) -> Iterator[None]:
    aiohttp = sys.modules.get("aiohttp")  # fsspec's transport for http, whose errors are of a kind of their own
    errors = (aiohttp.ClientError,) if aiohttp else ()
    try:
        yield
    except errors as error:
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}", url) from error
