"""A dump of the published research code as a source of features, read in place: see `probing_files` for its layout."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from spatialprobe.engine.files.clipfile import METADATA_KEY, BadFile, Entry
from spatialprobe.engine.reading.probing_files import (
    Published,
    describe_dump,
    dumped_file,
    dumped_ids,
    dumped_length,
    dumped_rows,
)
from spatialprobe.engine.reading.ranges import LocalFile
from spatialprobe.engine.reading.row_bytes import (
    check_bytes,
    damage_named,
    must_have_rows,
    must_hold,
    place_for,
    read_any_header,
    read_clip_header,
    read_pieces,
    repeat_rows,
    row_pieces,
)
from spatialprobe.engine.reading.rows import Key, StoredRows, row_numbers
from spatialprobe.engine.types import FeatureSpec, FrameSelection, check_clip_id
from spatialprobe.kernels.pool_features import LAYER_NORM_EPS


class PublishedDump:
    """A `FeatureSource` of `<root>/<split>/<scene>/feature_*.sft`; clips are "<split>/<scene>".

    Its spec, and the rows that see frames, are those that `import_probing` would give a store of the same arguments.
    The two halves of an interleaved model are one after the other, 2T rows. Token statistics are not in these files:
    they are computed of the rows that are read. Raises ValueError for arguments that fit no row rule.
    """

    def __init__(
        self,
        root: str | Path,  # <root>/<model> of the published layout
        *,
        family: str,
        layers: Sequence[int],  # block indices: hidden_states[22] is layer 21
        steps: Sequence[int] = (),
        frames: FrameSelection,  # as the clips were cut when the files were made; needs a window
        rows: Sequence[int] | None = None,  # [F] row of each frame, -1 if none, instead of the family's rule
        name: str | None = None,  # whose features these are; the folder's name if None
        dtype: str = "float16",
        direct: bool = True,  # as of FeatureStore.open
    ):
        self.root, self.direct = Path(root), direct
        self.spec, self.rule = describe_dump(self.root, family, layers, steps, frames, rows, name, dtype)
        self.spec_hash = sha256(self.spec.to_json().encode()).hexdigest()[:16]  # as a FeatureStore's

    def ids(self) -> list[str]:
        """Clips with any feature file, sorted. Raises ValueError if there are none."""
        return dumped_ids(self.root)

    def open_clip(self, clip_id: str, *, check: bool = False) -> "PublishedClip":
        """See `FeatureSource.open_clip`. `check` needs a checksum, which only files of `engine export` have."""
        folder = self.root / check_clip_id(clip_id)
        if not folder.is_dir():
            raise FileNotFoundError(f"clip {clip_id} is not in {self.root}")
        return PublishedClip(folder, clip_id, self.spec, self.rule, direct=self.direct, check=check)


class PublishedClip:
    """An `OpenClip` of a folder of feature files: the first layer's and step's is opened first, others when wanted."""

    def __init__(self, folder: Path, clip_id: str, spec: FeatureSpec, rule: Published, *, direct: bool, check: bool):
        self.clip_id, self.name = clip_id, str(folder)
        self._folder, self._spec, self._rule, self._direct, self._check = folder, spec, rule, direct, check
        self._files: dict[Key, tuple[LocalFile, Entry]] = {}
        self._length: int | None = None  # T of every file's parts, once one is open
        try:
            self._file(spec.tensors()[0])
            with self._naming(self.name):
                self.rows = dumped_rows(spec, rule, self._length)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for file, _ in self._files.values():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def shape(self, key: Key) -> tuple[int, int, int, int]:
        """(T, H, W, C) of a layer and step. Raises ValueError for one that is not there."""
        return self._file(key)[1].shape

    def read(
        self, keys: Sequence[Key], rows: Sequence[int], *, out: dict[Key, StoredRows] | None = None
    ) -> dict[Key, StoredRows]:
        """As `OpenClip.read` says. Rows with values that are not finite raise ValueError, too."""
        found, rows = {}, row_numbers(rows)
        for key in dict.fromkeys(keys):
            file, entry = self._file(key)
            must_have_rows(rows, entry.shape[0], f"clip {self.clip_id}: {file.name}")
            stored = found[key] = place_for(rows, entry.shape, self._spec, None if out is None else out[key])
            with damage_named(self.clip_id, file.name):
                read_pieces(file, row_pieces(entry, rows, stored.data))
            repeat_rows(rows, stored.data)
            for i, row in enumerate(rows):  # one by one: float32 copies stay small
                stored.mean[i], stored.rstd[i] = _token_stats(stored.data[i])
                if not stored.mean[i].isfinite().all():  # a value that is not shows in its token's mean
                    raise ValueError(f"clip {self.clip_id}: {file.name} is not finite in row {row}")
        return found

    def _file(self, key: Key) -> tuple[LocalFile, Entry]:
        """A layer's and step's open file, and where its feature lies, [T, H, W, C] with halves one after the other."""
        if key not in self._files:
            must_hold(self._spec, key, f"clip {self.clip_id}: {self.name}")
            with self._naming(self.name):
                path = dumped_file(self._folder, *key)
            file = LocalFile(path, direct=self._direct)
            try:
                with self._naming(file.name):
                    self._files[key] = file, self._feature(file, path.name)
            except BaseException:
                file.close()
                raise
        return self._files[key]

    def _feature(self, file: LocalFile, name: str) -> Entry:
        entries, metadata, _ = read_any_header(file)
        if "feat" not in entries:
            raise BadFile(f"it has no tensor feat, but {', '.join(entries)}")
        feat = entries["feat"]
        length = dumped_length(self._spec, self._rule, {name: (feat.dtype, feat.shape)})
        if length != (self._length or length):
            raise BadFile(f"feat has {length} rows, other layers or steps have {self._length}")
        if self._check:
            if METADATA_KEY not in metadata:
                raise BadFile("it carries no checksum to check: the research code writes none")
            check_bytes(file, read_clip_header(file))
        self._length = length
        return Entry(feat.dtype, (length * self._rule.parts, *feat.shape[-3:]), feat.start, feat.stop)

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ValueError(f"clip {self.clip_id}: {name}: {error}") from None


def _token_stats(x: Tensor) -> tuple[Tensor, Tensor]:  # [..., C] -> float32 [...], float32 [...]
    """What `pool_features.token_stats` computes, in two passes: a tenth of the time of `var_mean` on a CPU."""
    x = x.to(torch.float32, copy=True)
    mean = x.mean(-1)
    deviation = torch.linalg.vector_norm(x.sub_(mean[..., None]), dim=-1)
    return mean, (deviation.square_() / x.shape[-1] + LAYER_NORM_EPS).rsqrt()
