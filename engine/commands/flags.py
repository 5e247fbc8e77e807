"""Flags of several commands: the words of a job, what they mean, and the job that they ask for."""

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spatialprobe.engine.job import Job

WORDS = {  # word of a Job -> (placeholder, help); clips, switches and the family's options are written out by commands
    "model": ("NAME", "preset (see `engine models`), Hub id, or local folder"),
    "out": ("STORE", "folder of the feature store; run the same command again to resume"),
    "revision": ("REV", "branch, tag or commit of a Hub id"),
    "family": ("NAME", "of a checkpoint whose own configs do not say which it is"),
    "layout": ("KIND", "videos, images, list, scannet or dl3dv; default: recognise it"),
    "targets": ("DIR", "dl3dv: folder of the processed targets, for start_idx"),
    "layers": (
        "I,J",
        "blocks, from 0; hsK is hidden_states[K], block K-1 (default: the study's; encoders: 3/4 up, last)",
    ),
    "steps": ("I,J", "noise steps: indices into the schedule of 1000, noisiest first"),
    "window": ("N", "frames per clip, or all"),
    "start": ("WHERE", "first frame of the window: start, center, start_idx, or a number"),
    "stride": ("N", "take every N-th frame"),
    "query": ("FRAMES", "frames of the window whose features are wanted, like 0,1:76:4"),
    "short": ("WHAT", "a clip shorter than its window: pad (repeat the last frame), error, skip"),
    "pool": ("HxW", "average-pool the token grid, or none"),
    "store_dtype": ("DTYPE", "float16, bfloat16, float8_e4m3 or int8"),
    "compute": ("HOW", "default, or parity: as the published study computed"),
    "compute_dtype": ("DTYPE", "float32, bfloat16 or float16"),
    "seed": ("N", "of the noise"),
    "batch": ("N", "clips per batch on a GPU, or auto: halve when memory runs out; the CPU takes one at a time"),
    "loaders": ("N", "threads that decode and resize"),
    "writers": ("N", "threads that write"),
    "resize": ("WHERE", "frames are resized on the host or the device, with the same bits (default: auto)"),
    "latents": ("DIR", "keep what the VAE makes of clips there: other layers, steps or models of that VAE reuse it"),
    "device": ("NAME", "cpu, cuda, cuda:1"),
    "devices": ("NAMES", "all, or a list like cuda:0,cuda:1: a worker process on each, which share the clips"),
    "ray_workers": ("N", "with --ray: how many actors (default: one per GPU, on the CPU one per machine)"),
    "offload": (
        "WHERE",
        "blocks that do not fit: host (memory; each comes to the device while it runs) or spread (GPUs)",
    ),
    "attention": ("NAME", "auto (torch's choice), or one exact kernel: math, flash, efficient, cudnn, flash3, flash4"),
    "precision": ("NAME", "full, or fp8: the blocks' linear layers on a GPU that has it; changes values"),
    "shard": ("I/N", "every N-th clip from the I-th, from 0"),
    "limit": ("N", "only the first N clips of the listing"),
}


def add_flags(
    sub: argparse.ArgumentParser,
    words: Mapping[str, tuple[str, str]],  # word -> (placeholder, help)
    required: str = "",  # the one of them that must be given
) -> None:
    for word, (placeholder, about) in words.items():
        sub.add_argument(f"--{word.replace('_', '-')}", metavar=placeholder, help=about, required=word == required)


def read_job(args: argparse.Namespace) -> "Job":
    """Raises ValueError for words that are no job's."""
    from dataclasses import fields

    from spatialprobe.engine.job import SHORT_OPTIONS, Job

    given = {f.name: getattr(args, f.name, None) for f in fields(Job) if f.name != "options"}
    words = {name: value for name, value in given.items() if value is not None}
    options = {name: getattr(args, name) for name in SHORT_OPTIONS if getattr(args, name, None) is not None}
    for item in getattr(args, "option", []):
        name, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"option must be KEY=VALUE, got {item!r}")
        options[name] = value
    return Job.from_words(words | {"options": options}, getattr(args, "job", None))
