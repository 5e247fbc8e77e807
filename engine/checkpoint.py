"""A model's folder of files, local or on the Hugging Face Hub, and reading just the tensors that are wanted.

Knows the Hugging Face layout (configs, safetensors shards, index files), no model family. Remote code is never run.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from spatialprobe.engine.types import first_line

SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]  # configs, tokenizers: all that a plan needs
STEMS = ("model", "diffusion_pytorch_model")  # of weight files: transformers', diffusers'
Stored = str | tuple[str, slice]  # a stored tensor's name, or that and the rows of it that are meant
MAX_HEADER_BYTES = 100_000_000  # of a safetensors file, as in its library; more is another kind of file
SAMPLE_BYTES = 512  # read at the start, middle and end of every tensor for the content hash


@dataclass
class Checkpoint:
    """Files of one revision of one model. Weights on the Hub are downloaded file by file, when first asked for."""

    root: Path
    repo: str | None = None  # Hub id; None for a local folder
    revision: str | None = None  # commit of `repo`
    bytes_read: int = field(default=0, compare=False)  # of tensors, by `load_weights`

    @classmethod
    def open(cls, model: str, revision: str | None = None) -> "Checkpoint":
        """A local folder, or a Hub id with an optional revision. Raises ValueError when neither can be had."""
        path = Path(model).expanduser()
        if path.is_dir():
            if revision is not None:
                raise ValueError(f"revision {revision!r} is for models from the Hub, but {model!r} is a local folder")
            return cls(path.resolve())
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith("."):
            raise ValueError(f"model {model!r} is no local folder, and no Hub id of the form owner/name")
        from huggingface_hub import snapshot_download

        root = Path(_from_hub(model, lambda: snapshot_download(model, revision=revision, allow_patterns=SMALL_FILES)))
        return cls(root, repo=model, revision=root.name)

    @property
    def identity(self) -> str:
        """What `FeatureSpec.weights` holds."""
        return f"hub:{self.repo}@{self.revision}" if self.repo else f"content:{content_hash(self.root)}"

    def has(self, name: str) -> bool:
        return (self.root / name).is_file()

    def file(self, name: str) -> Path:
        """Local path of one file. Raises ValueError if the checkpoint lacks it."""
        path = self.root / name
        if not path.is_file() and self.repo:
            from huggingface_hub import hf_hub_download

            _from_hub(f"{self.repo}/{name}", lambda: hf_hub_download(self.repo, name, revision=self.revision))
        if not path.is_file():
            raise ValueError(f"checkpoint {self.root} has no file {name}")
        return path

    def folder(self, name: str = "") -> Path:
        """Local path of one sub-folder (a text encoder, say) with its configs and safetensors; "": of everything."""
        if self.repo:
            from huggingface_hub import snapshot_download

            patterns = [f"{name}/{files}".lstrip("/") for files in (*SMALL_FILES, "*.safetensors")]
            fetch = lambda: snapshot_download(self.repo, revision=self.revision, allow_patterns=patterns)  # noqa: E731
            _from_hub(f"{self.repo}/{name}", fetch)
        if not (self.root / name).is_dir():
            raise ValueError(f"checkpoint {self.root} has no folder {name}")
        return self.root / name

    def json(self, name: str) -> dict:
        try:
            return json.loads(self.file(name).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.root / name} is not valid JSON: {error}") from None

    def shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """{tensor name: shape} of one safetensors file, read from its header: on the Hub, without a download.

        For models whose sizes no config says. Raises ValueError for a file that is not there or is no safetensors.
        """
        if self.repo and not self.has(name):
            from huggingface_hub import HfApi

            fetch = lambda: HfApi().parse_safetensors_file_metadata(self.repo, name, revision=self.revision)  # noqa: E731
            remote = _from_hub(f"{self.repo}/{name}", fetch)
            return {tensor: tuple(info.shape) for tensor, info in remote.tensors.items()}
        with self.file(name).open("rb") as file:
            _, _, header = _read_header(file)
        return {tensor: tuple(entry["shape"]) for tensor, entry in header.items()}

    def tensor_files(self, folder: str = "") -> dict[str, str]:
        """{tensor name: file that holds it} for the safetensors of `folder`, which may also be one such file.

        A folder's are not downloaded for it: a plan of memory asks too.
        """
        if folder.endswith(".safetensors"):
            with _open_shard(self.file(folder)) as shard:
                return dict.fromkeys(shard.keys(), folder)
        prefix = f"{folder}/" if folder else ""
        for stem in STEMS:
            if self.has(index := f"{prefix}{stem}.safetensors.index.json"):
                return {name: prefix + shard for name, shard in self.json(index)["weight_map"].items()}
        reasons = []
        for single in (f"{prefix}{stem}.safetensors" for stem in STEMS):
            try:
                return dict.fromkeys(self.shapes(single), single)
            except ValueError as error:
                reasons.append(str(error))
        raise ValueError(f"no safetensors weights (pickled ones are not read): {'; '.join(reasons)}")


def _from_hub(what: str, fetch: Callable[[], Any]) -> Any:
    import huggingface_hub.errors as hub

    try:
        return fetch()
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled):
        raise ValueError(f"{what} is not in the local Hub cache, and the Hub cannot be reached") from None
    except hub.SafetensorsParsingError as error:
        raise ValueError(f"{what} is not a safetensors file: {first_line(error)}") from None
    except (hub.HTTPError, hub.EntryNotFoundError, OSError) as error:  # no such repository, gated, no connection
        raise ValueError(f"{what} cannot be fetched: {first_line(error)}") from None


def _open_shard(path: Path):
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None


@contextmanager
def one_line(path: Path) -> Iterator[None]:
    """Turns what a library says of broken files or of code it would have to run into a ValueError of one line."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} cannot be loaded: {type(error).__name__}: {first_line(error)}") from error


def content_hash(root: Path) -> str:
    """Hash of a checkpoint's configs, tokenizers and weights, in seconds whatever the size.

    Of each tensor it reads the name, dtype, shape and 3 samples of 512 bytes; a change of weights that touches none
    of the samples goes unnoticed.
    """
    digest = hashlib.sha256()
    folders = [root]  # and, of a diffusers pipeline, those of its components: a store kept beside them does not count
    if (root / "model_index.json").is_file():
        folders += [root / name for name in json.loads((root / "model_index.json").read_text())]
    elif not (root / "config.json").is_file():  # single components of a pipeline, in folders of their own
        folders += [path.parent for depth in ("*", "*/*") for path in root.glob(f"{depth}/config.json")]
    files = [path for folder in folders if folder.is_dir() for path in folder.iterdir()]
    for path in sorted(p for p in files if p.suffix in (".json", ".txt", ".model", ".jinja", ".safetensors")):
        digest.update(f"{path.relative_to(root)}\0".encode())
        if path.suffix == ".safetensors":
            for sample in _samples(path):
                digest.update(sample)
        else:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def _samples(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        size, raw, header = _read_header(file)
        yield raw
        for name in sorted(header):
            begin, end = header[name]["data_offsets"]
            for at in (begin, (begin + end) // 2, max(begin, end - SAMPLE_BYTES)):
                file.seek(8 + size + at)
                yield file.read(min(SAMPLE_BYTES, end - at))


def _read_header(file: BinaryIO) -> tuple[int, bytes, dict[str, dict]]:
    """A safetensors file's header: its length, its bytes, and {tensor name: its entry}. Reads no tensor."""
    size = int.from_bytes(file.read(8), "little")
    raw = file.read(size) if size <= MAX_HEADER_BYTES else b""
    try:
        header = json.loads(raw)
    except ValueError:
        raise ValueError(f"{file.name} is not a safetensors file") from None
    header.pop("__metadata__", None)
    return size, raw, header


@torch.no_grad()
def load_weights(
    module: nn.Module,
    checkpoint: Checkpoint,
    folder: str = "",
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype,
    keep_fp32: tuple[str, ...] = (),
    rename: Callable[[str], Stored] = lambda name: name,
) -> None:
    """Fills a module built on the meta device from a checkpoint, reading only the tensors the module has.

    On the meta device nothing is read: the parameters get their dtypes. `folder` may be one safetensors file. `rename`
    turns a parameter's name into the checkpoint's, and says which rows of that tensor it is where several parameters
    are stored as one. Parameters whose dotted name has a part in `keep_fp32` stay float32. Raises ValueError for
    tensors the checkpoint lacks or that have another shape.
    """
    if torch.device(device).type == "meta":
        return _as_if_loaded(module, dtype, keep_fp32)
    files = checkpoint.tensor_files(folder)
    renamed = {name: rename(name) for name in module.state_dict()}
    wanted = {name: to if isinstance(to, tuple) else (to, None) for name, to in renamed.items()}
    missing = [stored for stored, _ in wanted.values() if stored not in files]
    if missing:
        raise ValueError(
            f"{checkpoint.root / folder} lacks {len(missing)} of the {len(wanted)} tensors of "
            f"{type(module).__name__}, first {missing[0]}: is it a checkpoint of another family?"
        )
    with ExitStack() as stack:
        needed = {files[stored] for stored, _ in wanted.values()}
        shards = {file: stack.enter_context(_open_shard(checkpoint.file(file))) for file in needed}
        for name, (stored, rows) in wanted.items():
            shard = shards[files[stored]]
            if stored not in shard.keys():
                raise ValueError(f"{checkpoint.root / files[stored]} lacks {stored}, which its index promises")
            value = shard.get_tensor(stored) if rows is None else shard.get_slice(stored)[rows]
            owner, leaf = _owner(module, name)
            target = getattr(owner, leaf)
            if value.shape != target.shape:
                raise ValueError(f"{stored} must have shape {tuple(target.shape)}, got {tuple(value.shape)}")
            checkpoint.bytes_read += value.nbytes
            keep = not value.is_floating_point() or any(part in keep_fp32 for part in name.split("."))
            # clone: CPU kernels round differently on weights that are not 64-byte aligned, as mapped files are not
            value = value.to(device=device, dtype=value.dtype if keep else dtype, copy=True)
            if isinstance(target, nn.Parameter):
                setattr(owner, leaf, nn.Parameter(value, requires_grad=False))
            else:
                owner.register_buffer(leaf, value)
    for buffer_owner in module.modules():  # buffers that are computed, not stored (rotary tables)
        for leaf, buffer in list(buffer_owner.named_buffers(recurse=False)):
            buffer_owner._buffers[leaf] = buffer.to(device)
    module.eval()


def _as_if_loaded(module: nn.Module, dtype: torch.dtype, keep_fp32: tuple[str, ...]) -> None:
    """Parameters of the dtypes that loading gives them; computed buffers stay real."""
    for name, value in list(module.named_parameters()):
        owner, leaf = _owner(module, name)
        keep = not value.is_floating_point() or any(part in keep_fp32 for part in name.split("."))
        setattr(owner, leaf, nn.Parameter(value if keep else value.to(dtype), requires_grad=False))
    module.eval()


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def empty_module(build: Callable[[], nn.Module]) -> nn.Module:
    """`build()` with parameters on the meta device: no memory, no random initialisation; computed buffers are real."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return build()
