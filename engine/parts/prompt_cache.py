"""The embedding of a prompt on disk: computed once for a store, so that no later run loads a text encoder."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from spatialprobe.engine.checkpoint import Checkpoint
from spatialprobe.engine.files.clipfile import is_whole, write_file
from spatialprobe.engine.files.durable import RunFolder, make_folder, publish


def prompt_file(cache: Path, checkpoint: Checkpoint, *what: object) -> Path:
    """Where `cached` keeps a prompt's embedding. `what`: the prompt, its padded length, the dtype and the like."""
    key = "|".join([checkpoint.identity, *map(str, what)])
    return cache / f"prompt-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"


def cached(path: Path, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors that take long to compute, from the file `path` if it is there and whole. Safe from kills."""
    scratch = path.parent / "tmp"
    if not is_whole(path) or scratch.exists():  # a killed process may have left its scratch folder behind
        make_folder(path.parent)
        run = RunFolder(scratch)
        try:
            if not is_whole(path):
                temp = run.file()
                write_file(temp, compute(), {})
                publish(temp, path)
        finally:
            run.close()
    return load_file(path)
