"""A job: the words that a user asked with, those of a file and of the command line, each of its kind."""

import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from spatialprobe.engine.words import batch, layer_list, number, numbers, positive, start, switch, table, text, window

SHORT_OPTIONS = ("size", "prompt", "tap", "pos_embed")  # options of families that are flags too
WORDS = {  # everything else is text
    "layers": layer_list,
    "steps": numbers,
    "merge_steps": switch,
    "window": window,
    "start": start,
    "stride": positive,
    "seed": number,
    "options": table,
    "batch": batch,
    "loaders": positive,
    "ray_workers": positive,
    "writers": positive,
    "limit": positive,
}


@dataclass
class Job:
    """The words of `engine extract`, on the command line and in a TOML job file. None: a default or no limit."""

    clips: str
    model: str  # preset name, Hub id, or local folder
    out: str  # the store
    revision: str | None = None  # of a Hub id
    family: str | None = None  # of a checkpoint whose own configs do not say
    layout: str = "auto"
    targets: str | None = None  # DL3DV: folder of the processed targets, which hold start_idx
    layers: list[int] | None = None  # default: the blocks the study used for this preset; `encoder_layers` of encoders
    steps: list[int] | None = None
    merge_steps: bool = False
    window: int | None = None
    start: str | int = "start"
    stride: int = 1
    query: str | None = None
    short: str = "pad"
    pool: str | None = None  # "15x26", or "none" for the model's own token grid
    store_dtype: str = "float16"
    compute: str = "default"  # or "parity"
    compute_dtype: str | None = None
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)  # the family's own: size, prompt, ...
    batch: int | str = "auto"  # clips per batch on a GPU; auto halves when memory runs out
    loaders: int | None = None  # threads that decode and resize; default: 2 on the CPU, for a GPU all cores up to 16
    writers: int = 4
    resize: str = "auto"  # or where: "host", "device"; the bits are the same
    latents: str | None = None  # folder of latents that jobs share
    device: str | None = None
    devices: str | None = None  # instead: "all", or one worker process on each of "cuda:0,cuda:1"
    ray: str | None = None  # instead: the address of a Ray cluster, or "local" for one on this machine
    ray_workers: int | None = None  # default: one per GPU, on the CPU one per machine
    offload: str = "none"  # or where blocks lie that do not fit on the device: "host", "spread"
    compile: str = "none"  # or "blocks", "graphs"
    attention: str = "auto"  # or a kernel by name
    precision: str = "full"  # or "fp8"
    shard: str | None = None  # "i/n", i from 0
    limit: int | None = None

    @classmethod
    def from_words(cls, words: dict[str, Any], job_file: str | None = None) -> "Job":
        """Words of the command line over those of a job file. Raises ValueError for unknown, missing or odd ones."""
        merged = _read_job_file(Path(job_file)) if job_file else {}
        short = {name: merged.pop(name) for name in SHORT_OPTIONS if name in merged}  # as the flags have them
        options = table("options", merged.get("options", {})) | short | words.get("options", {})
        merged = merged | words | {"options": options}
        known = {f.name for f in fields(cls)}
        if unknown := sorted(merged.keys() - known):
            raise ValueError(f"unknown word {unknown[0]!r} in the job; known: {', '.join(sorted(known))}")
        for name in ("clips", "model", "out"):
            if name not in merged:
                raise ValueError(f"{name} is missing: what to read, which model, and where to write must be given")
        return cls(**{name: WORDS.get(name, text)(name, value) for name, value in merged.items()})


def _read_job_file(path: Path) -> dict[str, Any]:
    try:
        words = tomllib.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"job file {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"job file {path} is not valid TOML: {error}") from None
    return {key.replace("-", "_"): value for key, value in words.items()}


def select_shard(refs: list, shard: str | None, limit: int | None) -> list:
    """Every n-th clip of the first `limit`, from the i-th: shards are disjoint and together complete."""
    refs = refs[:limit]
    if shard is None:
        return refs
    index, _, count = shard.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ValueError(f"shard must be i/n with 0 <= i < n, got {shard!r}")
    return refs[int(index) :: int(count)]
