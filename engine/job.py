"""A job: what a user asked for, with every default filled in and every word checked before any work begins."""

import math
import os
import tomllib
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from spatialprobe.engine.adapter import Adapter, plan_clip
from spatialprobe.engine.checkpoint import Checkpoint
from spatialprobe.engine.device import tiling
from spatialprobe.engine.device.attention import kernel_versions, resolve_attention
from spatialprobe.engine.device.compiled import check_compile
from spatialprobe.engine.device.placement import OFFLOAD
from spatialprobe.engine.device.precision import check_precision
from spatialprobe.engine.pipeline.feeding import check_resize
from spatialprobe.engine.pipeline.latents import check_latents
from spatialprobe.engine.presets import ENCODERS, FAMILIES, PRESETS, adapter_class, detect_family, encoder_layers
from spatialprobe.engine.types import COMPUTE_DTYPES, STORE_DTYPES, FeatureSpec, FrameSelection

SHORT_OPTIONS = ("size", "prompt", "tap", "pos_embed")  # options of families that are flags too
ALL = 0  # as window: every frame from `start` on


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


# -- what a word may be: text of the command line, or TOML's own types ----------------------------------------------


def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, got {value!r}")
    return value


def number(name: str, value: Any, least: int = 0) -> int:
    if isinstance(value, bool) or not str(value).isdigit() or int(value) < least:
        raise ValueError(f"{name} must be a whole number from {least}, got {value!r}")
    return int(value)


def share(name: str, value: Any) -> float:
    """A number from 0 on."""
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be a number from 0, got {value!r}")
    return number


def positive(name: str, value: Any) -> int:
    return number(name, value, least=1)


def numbers(name: str, value: Any) -> list[int]:
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    return [number(name, item.strip() if isinstance(item, str) else item) for item in items]


def layer_list(name: str, value: Any) -> list[int]:
    """Block indices; hsK is transformers' hidden_states[K], the output of block K - 1."""
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    layers = []
    for item in (str(item).strip() for item in items):
        if item.startswith("hs"):
            layers.append(number(f"{name} hsK, K", item[2:], least=1) - 1)
        else:
            layers.append(number(name, item))
    return layers


def window(name: str, value: Any) -> int:
    return ALL if value == "all" else positive(f"{name}, if not 'all',", value)


def batch(name: str, value: Any) -> int | str:
    return value if value == "auto" else positive(f"{name}, if not 'auto',", value)


def start(name: str, value: Any) -> int | str:
    return number(name, value) if str(value).isdigit() else text(name, value)


def switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return value


def table(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a table, got {value!r}")
    return value


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


def _read_job_file(path: Path) -> dict[str, Any]:
    try:
        words = tomllib.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"job file {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"job file {path} is not valid TOML: {error}") from None
    return {key.replace("-", "_"): value for key, value in words.items()}


@dataclass
class Resolved:
    spec: FeatureSpec
    adapter: Adapter  # not loaded yet
    depth: int  # blocks to load
    device: torch.device
    batch: int | str
    loaders: int
    may_tile: bool  # vae_tiling was left to us: what the spec says of it may change until there is a store
    about: dict[str, str]  # the model as the user named it: not part of the features' identity
    latent_key: dict | None = None  # of the loaded model, once it was asked for


def resolve(job: Job) -> Resolved:
    """The spec and adapter of a job. Reads the checkpoint's configs, no weights."""
    preset = PRESETS.get(job.model)
    checkpoint = _open(job, preset)
    family = _family(job, preset, checkpoint)
    defaults, cls = FAMILIES[family], adapter_class(family)
    device = device_of(job.device)
    options, compute_dtype = _compute(job, cls, preset, device)
    may_tile = options.get(tiling.OPTION) == tiling.AUTO
    options |= {tiling.OPTION: False} if may_tile else {}
    check_compile(job.compile, device, job.offload)
    check_precision(job.precision, device, compute_dtype, job.offload)
    try:
        adapter = cls(checkpoint, options)
    except KeyError as error:
        raise ValueError(f"a config of {checkpoint.root} lacks the field {error}") from None
    adapter.check_options()
    check_resize(job.resize, adapter)
    if job.latents is not None:
        check_latents(family, adapter)
    attention = resolve_attention(job.attention, device, COMPUTE_DTYPES[compute_dtype])
    spec = FeatureSpec(
        family=family,
        weights=checkpoint.identity,
        layers=_layers(job, preset, family, adapter),
        steps=_steps(job, defaults.default_step, adapter),
        merge_steps=job.merge_steps,
        seed=job.seed if adapter.num_steps else 0,
        frames=FrameSelection(
            window=defaults.window if job.window is None else None if job.window == ALL else job.window,
            start=job.start,
            stride=job.stride,
            query=defaults.query if job.query is None else job.query,
            short=job.short,
        ),
        pool=_pool(job, preset, adapter),
        dtype=job.store_dtype,
        compute_dtype=compute_dtype,
        device=device.type,
        offload=_offload(job, device),
        compile=job.compile,
        attention=attention,
        precision=job.precision,
        options={k: list(v) if isinstance(v, tuple) else v for k, v in options.items()},
        versions={name: version(name) for name in ("spatialprobe", "torch", "pillow", "av", *cls.LIBRARIES)}
        | kernel_versions(attention),
    )
    adapter.steps = spec.steps
    if spec.frames.window is not None:
        plan_clip(spec.frames.window, adapter, spec)  # raises for a window, query or pool the model cannot do
    depth = max(spec.layers) + 1
    if may_tile and tiling.choose(adapter, spec, depth, device, Path(job.out)):
        adapter.options[tiling.OPTION], spec = True, tiling.chosen(spec, True)
    about = {"model": job.model, "repo": checkpoint.repo or str(checkpoint.root), "compute": job.compute}
    # On the CPU a batch is no faster, and a clip's place in it changes the last bits of matrix products.
    batch = 1 if device.type == "cpu" else job.batch
    loaders = job.loaders or (2 if device.type == "cpu" else min(16, os.cpu_count() or 2))
    return Resolved(spec, adapter, depth, device, batch, loaders, may_tile, about)


def _family(job: Job, preset, checkpoint: Checkpoint) -> str:
    if job.family is not None and job.family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {job.family!r}")
    return job.family or (preset.family if preset else detect_family(checkpoint))


def _open(job: Job, preset) -> Checkpoint:
    if preset is not None:
        return Checkpoint.open(preset.repo, job.revision)
    if "/" not in job.model and not Path(job.model).is_dir():
        raise ValueError(f"model {job.model!r} is no preset, local folder or Hub id; presets are {', '.join(PRESETS)}")
    return Checkpoint.open(job.model, job.revision)


def device_of(name: str | None) -> torch.device:
    """The device of that name; without one CUDA if there is any. Raises ValueError for one that is not there."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device {name!r} is not there: this machine has {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device  # set_device wants a number


def _offload(job: Job, device: torch.device) -> str:
    if job.offload not in OFFLOAD:
        raise ValueError(f"offload must be one of {', '.join(OFFLOAD)}, got {job.offload!r}")
    if job.offload == "spread" and (device.type != "cuda" or torch.cuda.device_count() < 2):
        raise ValueError(
            f"offload spread needs CUDA devices to spread over, this machine has {torch.cuda.device_count()}"
        )
    return job.offload


def _compute(job: Job, cls: type[Adapter], preset, device: torch.device) -> tuple[dict, str]:
    """The family's options with the user's over them, and the compute dtype."""
    if job.compute not in ("default", "parity"):
        raise ValueError(f"compute must be 'default' or 'parity', got {job.compute!r}")
    if job.compute_dtype not in (None, *COMPUTE_DTYPES):
        raise ValueError(f"compute_dtype must be one of {', '.join(COMPUTE_DTYPES)}, got {job.compute_dtype!r}")
    if job.store_dtype not in STORE_DTYPES:
        raise ValueError(f"store_dtype must be one of {', '.join(STORE_DTYPES)}, got {job.store_dtype!r}")
    chosen = {}
    for name, value in job.options.items():
        if name not in cls.OPTIONS:
            raise ValueError(f"unknown option {name!r} of {cls.__name__}; its options are {', '.join(cls.OPTIONS)}")
        chosen[name] = _typed(name, value, cls.OPTIONS[name])
    dtype = job.compute_dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if job.compute == "parity":
        for name, value in cls.PARITY.items():
            if chosen.get(name, value) != value:
                raise ValueError(f"compute parity means {name}={value!r}, but {name}={chosen[name]!r} was asked for")
        if job.compute_dtype not in (None, "bfloat16"):
            raise ValueError(f"compute parity means compute_dtype=bfloat16, but {job.compute_dtype} was asked for")
        chosen, dtype = chosen | cls.PARITY, "bfloat16"
    untiled = cls.OPTIONS.get(tiling.OPTION) is False and tiling.OPTION not in chosen
    if untiled and device.type == "cuda" and job.window != ALL:
        chosen[tiling.OPTION] = tiling.AUTO
    return cls.OPTIONS | (preset.options if preset else {}) | chosen, dtype


def _typed(name: str, value: Any, default: Any) -> Any:
    """An option's value as its default's type; text of the command line is parsed."""
    if name == tiling.OPTION and value == tiling.AUTO:
        return value
    try:
        if isinstance(default, tuple):
            numbers = parse_size(name, value) if isinstance(value, str) else tuple(value)
            if len(numbers) != len(default) or not all(isinstance(v, int) for v in numbers):
                raise ValueError
            return numbers
        if isinstance(default, bool):
            return {"true": True, "false": False}[str(value).lower()]
        if isinstance(default, str) and not isinstance(value, str):
            raise ValueError
        if isinstance(default, int) and not isinstance(value, str | int):
            raise ValueError
        return type(default)(value)
    except (ValueError, KeyError, TypeError):
        kind = "HxW" if isinstance(default, tuple) else type(default).__name__
        raise ValueError(f"option {name} must be {kind}, got {value!r}") from None


def parse_size(name: str, text: str) -> tuple[int, int]:
    """ "15x26" -> (15, 26), height first."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise ValueError(f"{name} must be HEIGHTxWIDTH like 15x26, got {text!r}")
    return int(parts[0]), int(parts[1])


def _layers(job: Job, preset, family: str, adapter: Adapter) -> tuple[int, ...]:
    chosen = job.layers
    if chosen is None and family in ENCODERS:
        chosen = encoder_layers(adapter.num_layers)
    elif chosen is None:
        of_study = preset.layers if preset and _usual_tap(adapter) else {}
        if not of_study:
            last = adapter.num_layers - 1
            raise ValueError(
                f"layers must be given where the study used none (blocks 0 .. {last} of this model and tap)"
            )
        chosen = of_study.values()
    layers = sorted(set(chosen))
    if not layers or layers[0] < 0 or layers[-1] >= adapter.num_layers:
        raise ValueError(f"layers must be blocks 0 .. {adapter.num_layers - 1}, got {layers}")
    return tuple(layers)


def _steps(job: Job, default: int | None, adapter: Adapter) -> tuple[int, ...]:
    if not adapter.num_steps:
        if job.steps or job.merge_steps:
            raise ValueError(f"{type(adapter).__name__} has no noise schedule, but steps {job.steps} were asked for")
        return ()
    steps = sorted(set([default] if job.steps is None else job.steps))
    if not steps or steps[0] < 0 or steps[-1] >= adapter.num_steps:
        raise ValueError(f"steps must be indices 0 .. {adapter.num_steps - 1} (noisiest first), got {steps}")
    return tuple(steps)


def _usual_tap(adapter: Adapter) -> bool:
    """Whether the layers are those of the part of the model that presets are about."""
    return adapter.options.get("tap") == adapter.OPTIONS.get("tap")


def _pool(job: Job, preset, adapter: Adapter) -> tuple[int, int] | None:
    if job.pool is None:
        return preset.pool if preset and _usual_tap(adapter) else None
    return None if job.pool == "none" else parse_size("pool", job.pool)


def select_shard(refs: list, shard: str | None, limit: int | None) -> list:
    """Every n-th clip of the first `limit`, from the i-th: shards are disjoint and together complete."""
    refs = refs[:limit]
    if shard is None:
        return refs
    index, _, count = shard.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ValueError(f"shard must be i/n with 0 <= i < n, got {shard!r}")
    return refs[int(index) :: int(count)]
