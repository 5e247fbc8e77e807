"""A folder of features: `spec.json` says what they are, `clips/<clip id>.safetensors` holds them, one file per clip.

A clip is done when its file has its final name; there is no index to disagree with the files. Any number of processes
may write to one store. Which clips should be there is not known here.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spatialprobe.engine.files.clipfile import SUFFIX, BadFile, Entry, clip_files, read_header, write_file
from spatialprobe.engine.files.durable import (
    RunFolder,
    make_folder,
    must_be_no_file,
    publish,
    publish_first,
    room_for,
    write_text,
)
from spatialprobe.engine.files.failures import append_failure, read_failures
from spatialprobe.engine.files.schema import differences, mismatches, quantised, row_mismatches
from spatialprobe.engine.files.verify import StoreInfo, reread, summarize
from spatialprobe.engine.reading.ranges import LocalFile
from spatialprobe.engine.reading.rows import Key, StoredRows
from spatialprobe.engine.reading.stored_clip import StoredClip
from spatialprobe.engine.types import Features, FeatureSpec, check_clip_id, rows_of, tensor_name
from spatialprobe.kernels.pool_features import dequantize

log = logging.getLogger(__name__)


class FeatureStore:
    """Features of one FeatureSpec. `create` to write, `open` to read."""

    def __init__(self, root: Path, spec_text: str, *, direct: bool = True):
        self.root, self.clips, self.direct = root, root / "clips", direct
        self.run: RunFolder | None = None  # of this process's temporary files, if it may write
        self.spec, self.spec_hash = parse_spec(spec_text, root / "spec.json")

    @classmethod
    def create(
        cls,
        root: str | Path,
        spec: FeatureSpec,
        about: dict[str, Any] | None = None,
        *,
        spec_text: str | None = None,  # of the store whose files are copied into this one; it may be an older version's
    ) -> "FeatureStore":
        """Makes a store, or opens one of an equal spec. Removes what killed runs left in its `tmp`.

        `about` is for people (the model's name as typed); the first run's stays. Raises ValueError for a store of
        another spec, naming each field that differs, and for a folder that holds something else.
        """
        root = Path(root)
        cls.check_place(root, spec)
        make_folder(root)
        run = RunFolder(root / "tmp")
        _first_wins(run, root / "spec.json", spec_text or spec.to_json())
        store = cls.open(root)
        store._must_be_of(spec)  # another process may have been first
        _first_wins(run, root / "about.json", json.dumps(about or {}, sort_keys=True, indent=1))
        make_folder(store.clips)
        store.run = run
        return store

    @classmethod
    def check_place(cls, root: Path, spec: FeatureSpec) -> None:
        """Raises what `create` would, and writes nothing."""
        must_be_no_file(root, "a store is a folder")
        foreign = _foreign(root) if root.is_dir() else []
        if (root / "spec.json").exists():
            cls.open(root)._must_be_of(spec)
        elif foreign:
            raise ValueError(f"{root} is not empty and not a store: it holds {', '.join(foreign[:5])}")

    @classmethod
    def open(cls, root: str | Path, *, direct: bool = True) -> "FeatureStore":
        """Opens a store for reading (and for recording failures). Raises ValueError if `root` is not a store.

        `direct` reads rows that the page cache has not got around it, at half the CPU time. Without, they are cached:
        better where several processes read a store that fits in memory.
        """
        path = Path(root) / "spec.json"
        try:
            return cls(Path(root), path.read_text(), direct=direct)
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"{root} is not a feature store: it has no spec.json") from None

    def _must_be_of(self, spec: FeatureSpec) -> None:
        changed = differences(self.spec, spec)
        if changed:
            lines = "\n".join(f"  {line}" for line in changed)
            raise ValueError(f"{self.root} holds features of another spec; choose another folder\n{lines}")

    @property
    def about(self) -> dict[str, Any]:
        path = self.root / "about.json"
        return json.loads(path.read_text()) if path.exists() else {}

    # -- clips ------------------------------------------------------------------------------------------------------

    def path(self, clip_id: str) -> Path:
        return self.clips / f"{check_clip_id(clip_id)}{SUFFIX}"

    def __contains__(self, clip_id: str) -> bool:
        return self.path(clip_id).is_file()

    def __len__(self) -> int:
        return sum(1 for _ in clip_files(self.clips))

    def ids(self) -> list[str]:
        """Ids of the clips that are done, sorted. Lists the folder: 20,000 clips take 30 ms."""
        return sorted(name.removesuffix(SUFFIX) for name, _ in clip_files(self.clips))

    @property
    def nbytes(self) -> int:
        return sum(entry.stat().st_size for _, entry in clip_files(self.clips))

    def info(self) -> StoreInfo:
        """What the files' headers say. About 0.1 ms a clip, three times that from a cold disk."""
        return summarize(self)

    def verify(self, *, threads: int = 2, progress: Callable[[int], object] = lambda files: None) -> list[str]:
        """Reads everything again: problems, one line each, beginning with the file's name below the store.

        Every file must be one that this store wrote under this name, unchanged since, of the spec's tensors, with
        finite values and rows in range. What killed runs left behind is a problem too. `progress(1)` after each file.
        """
        return reread(self, threads, progress)

    # -- writing ----------------------------------------------------------------------------------------------------

    def write(self, clip_id: str, tensors: dict[str, Tensor], rows: Tensor, provenance: dict[str, Any]) -> int:
        """Stores a clip and returns its file's size in bytes; a file that is there is replaced by the whole new one.

        `tensors`: for each of `spec.tensors()` its `name` [T, H, W, C] in the store's dtype, `name.mean` and
        `name.rstd` float32 [T, H, W], and `name.scale` float32 [T, H, W] where the dtype is quantised; on the CPU.
        `rows`: int64 [F]. `provenance`: JSON values, with the keys of PROVENANCE. Equal arguments give equal bytes.
        Raises ValueError for what does not fit the spec or is not finite, StoreFull if the disk is full.
        """
        if self.run is None:
            raise ValueError(f"{self.root} was opened for reading; FeatureStore.create opens it for writing")
        final, tensors = self.path(clip_id), tensors | {"rows": rows}
        problems = mismatches(self.spec, {n: Entry(x.dtype, tuple(x.shape), 0, 0) for n, x in tensors.items()})
        if not problems:
            problems = [f"{n} is not on the CPU" for n, x in tensors.items() if x.device.type != "cpu"]
        if not problems:
            problems = row_mismatches(rows, provenance, len(tensors[tensor_name(*self.spec.tensors()[0])]))
            # a feature that is not finite shows in its token's mean
            problems += [f"{n} is not finite" for n, x in tensors.items() if "." in n and not x.isfinite().all()]
        if problems:
            raise ValueError(f"clip {clip_id}: {'; '.join(problems)}")
        temp = self.run.file()
        with room_for(final, sum(x.nbytes for x in tensors.values())):
            try:
                size = write_file(temp, tensors, provenance | {"clip": clip_id, "spec": self.spec_hash})
                publish(temp, final)
            except BaseException:
                temp.unlink(missing_ok=True)
                raise
        return size

    def write_record(self, name: str, text: str) -> None:
        """Writes a small file beside the clips, whole or not at all; one of that name is replaced."""
        with room_for(self.root / name, len(text)):
            temp = self.run.file()
            write_text(temp, text)
            publish(temp, self.root / name)

    def record_failure(self, clip_id: str, stage: str, reason: str) -> None:
        """Adds a line to `failed.jsonl`. Safe from several threads and processes."""
        append_failure(self.root / "failed.jsonl", clip_id, stage, reason)

    # -- reading ----------------------------------------------------------------------------------------------------

    def open_clip(self, clip_id: str, *, check: bool = False) -> StoredClip:
        """`with store.open_clip(id) as clip: clip.read(keys, rows)`: see `FeatureSource.open_clip`.

        The clip stays what it is while it is open, also if an extractor replaces it meanwhile.
        """
        with self._explained(clip_id) as path:
            file = LocalFile(path, direct=self.direct)
        return StoredClip(file, clip_id, self.spec, self.spec_hash, check=check)

    def read_rows(
        self,
        clip_id: str,
        layer: int,
        rows: Sequence[int],  # [R]
        step: int | None = None,
        *,
        out: StoredRows | None = None,  # of R rows; without, new memory
        check: bool = False,  # compare the whole file with its checksum first
    ) -> StoredRows:
        """Rows of a clip's features as stored, with their token statistics. Fetches only these bytes, in parallel.

        Raises what `OpenClip.read` and `open_clip` raise.
        """
        key = self._key(layer, step)
        with self.open_clip(clip_id, check=check) as clip:
            return clip.read([key], rows, out=None if out is None else {key: out})[key]

    def read_frames(
        self,
        clip_id: str,
        layer: int,
        frames: Sequence[int],  # [S] frames of the window
        step: int | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> Tensor:  # [S, H, W, C]
        """Like `read(...).at(frames)`, but only those rows are read. Raises KeyError for a frame that no row sees."""
        key = self._key(layer, step)
        with self.open_clip(clip_id) as clip:
            try:
                rows = rows_of(clip.rows, frames)
            except KeyError as error:
                raise KeyError(f"clip {clip_id}: {error.args[0]}") from None
            stored = clip.read([key], rows)[key]
        out = stored.data if stored.scale is None else dequantize(stored.data, stored.scale)
        return out if dtype is None else out.to(dtype)

    def read(self, clip_id: str, layer: int, step: int | None = None, *, dtype: torch.dtype | None = None) -> Features:
        """A clip's features, in the stored dtype (float32 if that is quantised) or in `dtype`.

        As they are stored they are mapped: see `read_raw`. Raises ValueError for a layer or step that is not in the
        spec and for a damaged file, FileNotFoundError for a clip that is not there.
        """
        raw = self.read_raw(clip_id, layer, step)
        data = dequantize(raw["data"], raw["scale"]) if "scale" in raw else raw["data"]
        return Features(data if dtype is None else data.to(dtype), raw["rows"])

    def read_raw(self, clip_id: str, layer: int, step: int | None = None) -> dict[str, Tensor]:
        """As stored: "data" [T, H, W, C], "mean", "rstd" and, where quantised, "scale" [T, H, W], "rows" [F].

        For looking around: the tensors are the file itself, mapped into memory, and what is not looked at is not read.
        Changing them changes no file.
        """
        name = tensor_name(*self._key(layer, step))
        parts = ("mean", "rstd", "scale") if quantised(self.spec) else ("mean", "rstd")
        with self._explained(clip_id) as path, safe_open(path, "pt") as file:
            raw = {"data": file.get_tensor(name), "rows": file.get_tensor("rows")}
            return raw | {part: file.get_tensor(f"{name}.{part}") for part in parts}

    def provenance(self, clip_id: str) -> dict[str, Any]:
        """How a clip's features came about."""
        with self._explained(clip_id) as path, path.open("rb") as file:
            return read_header(file).provenance

    def failures(self) -> dict[str, dict[str, str]]:
        """Clips without a file whose last attempt failed: id -> {"id", "stage", "reason"}, sorted by id."""
        records, torn = read_failures(self.root / "failed.jsonl")
        if torn:
            log.warning("%s: skipped torn lines %s", self.root / "failed.jsonl", torn)
        return {name: records[name] for name in sorted(records) if name not in self}

    def _key(self, layer: int, step: int | None) -> Key:
        if (layer, step) not in self.spec.tensors():
            there = ", ".join(tensor_name(*key) for key in self.spec.tensors())
            raise ValueError(f"{tensor_name(layer, step)} is not in {self.root}; it holds {there}")
        return layer, step

    @contextmanager
    def _explained(self, clip_id: str) -> Iterator[Path]:
        """The path of a clip's file, with errors of reading it that name the clip."""
        path = self.path(clip_id)
        try:
            yield path
        except FileNotFoundError:
            record = self.failures().get(clip_id)
            why = f"; it failed at {record['stage']}: {record['reason']}" if record else ""
            raise FileNotFoundError(f"clip {clip_id} is not in {self.root}{why}") from None
        except (SafetensorError, BadFile) as error:
            raise ValueError(f"clip {clip_id}: {path} is damaged: {error}") from None


def parse_spec(text: str, path: Path | str) -> tuple[FeatureSpec, str]:
    """A spec and its hash, of the text itself: so the hash stays when a later version adds a field. Raises ValueError.

    `path` is where the text is from, for the message.
    """
    try:
        return FeatureSpec.from_json(text), sha256(text.encode()).hexdigest()[:16]
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{path} is not a feature spec: {error}") from None


def _foreign(root: Path) -> list[str]:
    """Names in a folder that a store about to be made there would not have put there."""
    names = {p.name for p in root.iterdir()} - {"cache"}  # filled while the model is loaded, before the store is made
    runs = root / "tmp"
    if runs.is_dir() and all(p.name == "lock" or p.name.startswith("run-") for p in runs.iterdir()):
        names.discard("tmp")  # another process is making the store, or was killed while making it
    return sorted(names)


def _first_wins(run: RunFolder, path: Path, text: str) -> None:
    if not path.exists():
        with room_for(path, len(text)):
            temp = run.file()
            write_text(temp, text)
            publish_first(temp, path)
