"""What a job comes to, before any weight is read: every default filled in, and everything checked that can be."""

import os
from dataclasses import dataclass
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
from spatialprobe.engine.files.durable import must_be_no_file
from spatialprobe.engine.job import Job
from spatialprobe.engine.pipeline.feeding import check_resize
from spatialprobe.engine.pipeline.latents import check_latents
from spatialprobe.engine.presets import ENCODERS, FAMILIES, PRESETS, adapter_class, detect_family, encoder_layers
from spatialprobe.engine.types import COMPUTE_DTYPES, STORE_DTYPES, FeatureSpec, FrameSelection
from spatialprobe.engine.words import ALL, parse_size


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
        must_be_no_file(Path(job.latents), "latents are a folder")
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
