"""A folder of what encoders made of clips: on a hit neither decode nor encoder runs, and features are the same bits.

`<folder>/<key>/key.json` says what latents depend on beside the clip, `<clip id>.<source>.safetensors` there holds one
clip's. Several jobs and processes may share a folder: equal keys mean interchangeable latents.
"""

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from spatialprobe.engine.adapter import Adapter, Inputs, plan_clip
from spatialprobe.engine.clips.sources import image_files
from spatialprobe.engine.device.attention import IMPLEMENTATIONS
from spatialprobe.engine.files.clipfile import SUFFIX, BadFile, is_whole, read_header, write_file
from spatialprobe.engine.files.durable import RunFolder, make_folder, publish, publish_first, room_for, write_text
from spatialprobe.engine.types import ClipRef, FeatureSpec, Plan

Latents = dict[str, Tensor]  # by name, [B, ...]


class FromLatents(Adapter):
    """A family whose `encode` makes tensors that depend on no noise, and the rest of its state of these alone."""

    LATENT_OPTIONS: ClassVar[tuple[str, ...]] = ("size", "vae_tiling", "vae_channels_last")

    def latents(self, inputs: Inputs, plan: Plan) -> Latents:
        """What the encoders make of a batch; a clip's do not depend on its neighbours."""
        raise NotImplementedError

    def state(self, latents: Latents, plan: Plan) -> Any:
        """What `encode` returns, of the latents."""
        raise NotImplementedError

    def latent_facts(self) -> dict[str, Any]:
        """What else latents depend on, as JSON values: for example which of them the blocks are given."""
        return {}

    def encode(self, inputs: Inputs, plan: Plan) -> Any:
        return self.state(self.latents(inputs, plan), plan)

    def encoders(self) -> dict[str, tuple[nn.Module, Mapping[str, Any]]]:
        """The loaded modules that `latents` runs, with their configs."""
        return {"vae": (self.vae, self.vae_config)}


def check_latents(family: str, adapter: Adapter | type[Adapter]) -> None:
    """Raises ValueError for a family that keeps no latents."""
    cls = adapter if isinstance(adapter, type) else type(adapter)
    if not issubclass(cls, FromLatents):
        raise ValueError(
            f"latents cannot be kept for family {family}: what it encodes depends on more than its encoder and the clip"
        )


@dataclass
class KeptLatents:
    """One clip's latents from disk, and the facts that decoding it would have given."""

    tensors: Latents  # [...], without B
    about: dict[str, Any]  # index, padded, source_size, window


class LatentFolder:
    """The latents of one key. Safe from several threads and processes."""

    def __init__(self, root: str | Path, key: dict[str, Any]):
        text = json.dumps(key, sort_keys=True, indent=1)
        self.hash = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.folder = Path(root) / self.hash
        self.hits = self.made = 0  # clips read and written, by this process
        self._counting = threading.Lock()
        make_folder(self.folder)
        self._run = RunFolder(Path(root) / "tmp")
        if not (self.folder / "key.json").exists():
            temp = self._run.file()
            with room_for(self.folder / "key.json", len(text)):
                write_text(temp, text)
                publish_first(temp, self.folder / "key.json")

    def path(self, ref: ClipRef, source: str) -> Path:
        return self.folder / f"{ref.id}.{source}{SUFFIX}"

    def read(self, ref: ClipRef, source: str) -> KeptLatents | None:
        """None if they are not there, or damaged: they are then made again."""
        path = self.path(ref, source)
        if not is_whole(path):
            return None
        try:
            with path.open("rb") as file:
                about = read_header(file).provenance
            tensors = load_file(path)
        except (FileNotFoundError, BadFile):  # removed or replaced since
            return None
        with self._counting:
            self.hits += 1
        return KeptLatents(tensors, about)

    def write(self, ref: ClipRef, source: str, tensors: Latents, about: dict[str, Any]) -> None:
        """Of two processes at once the last wins; both have the same bits. Raises StoreFull if the disk is full."""
        path, temp = self.path(ref, source), self._run.file()
        with room_for(path, sum(x.nbytes for x in tensors.values())):
            try:
                write_file(temp, tensors, about)
                publish(temp, path)
            finally:
                temp.unlink(missing_ok=True)
        with self._counting:
            self.made += 1

    def close(self) -> None:
        self._run.close()


def latent_key(adapter: FromLatents, spec: FeatureSpec) -> dict[str, Any]:
    """All that a clip's latents depend on beside the clip. Blocks, layers, steps, prompt and seed are not in it."""
    frames = spec.frames
    plan = None if frames.window is None else plan_clip(frames.window, adapter, spec)[0]
    # Frames that are shown: of a window of any length only the query can say.
    shown = {"query": frames.query} if plan is None else {"shown": list(plan.shown), "passes": plan.passes}
    shown |= {"window": frames.window, "start": frames.start, "stride": frames.stride, "short": frames.short}
    return {
        "family": spec.family,
        "encoders": {
            name: {"config": _plain(config), "weights": weights_hash(module)}
            for name, (module, config) in adapter.encoders().items()
        },
        "options": {name: _plain(adapter.options[name]) for name in adapter.LATENT_OPTIONS if name in adapter.options},
        "frames": shown,  # `short` too: on a hit nobody looks how long the source is
        "facts": adapter.latent_facts(),
        "compute_dtype": spec.compute_dtype,
        "flash": spec.attention if spec.attention in IMPLEMENTATIONS else "",  # these are the encoders' too
        "device": spec.device,
        "versions": dict(spec.versions),
    }


def _plain(value: Any) -> Any:
    """As JSON has it; of a config without notes like the library's version."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items() if not k.startswith("_")}
    return list(value) if isinstance(value, tuple) else value


def weights_hash(module: nn.Module) -> str:
    """Of every parameter and buffer as loaded: equal for equal weights, whatever files they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}\0".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def source_identity(ref: ClipRef) -> str:
    """Hash of path, size and time of change of every file of a clip, and of its own first frame.

    Raises OSError or ValueError for files that are not there.
    """
    path = Path(ref.source)
    files: Sequence[str | Path] = ref.frames or (image_files(ref.source) if path.is_dir() else [path])
    digest = hashlib.sha256(f"{ref.start_idx}\0".encode())
    for file in files:
        found = Path(file).stat()
        digest.update(f"{Path(file).absolute()}|{found.st_size}|{found.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:16]
