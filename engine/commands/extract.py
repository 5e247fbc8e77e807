"""`engine extract`: features of clips into a store, by this process, by one for each device, or by a Ray cluster."""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from spatialprobe.engine.commands.flags import WORDS, add_flags, read_job
from spatialprobe.engine.commands.outcome import print_report

if TYPE_CHECKING:
    from spatialprobe.engine.job import Job


def add_command(command: Callable[..., argparse.ArgumentParser]) -> None:
    sub = command("extract", extract, "features of clips into a store")
    sub.add_argument("clips", nargs="?", help="folder of videos or of image folders, one clip, or a list file")
    add_flags(sub, WORDS)
    sub.add_argument(
        "--compile",
        nargs="?",
        const="blocks",
        metavar="HOW",
        help="compile the blocks, once per shape; graphs: and record CUDA graphs",
    )
    sub.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="work by actors of that Ray cluster, whose machines all see the store; local: one here, for this run",
    )
    sub.add_argument("--merge-steps", action="store_true", default=None, help="store the mean over steps, not each")
    sub.add_argument("--prompt", metavar="TEXT", help="short for --option prompt=TEXT")
    sub.add_argument("--size", metavar="HxW", help="short for --option size=HxW: pixels of the model's input")
    sub.add_argument("--tap", metavar="PART", help="short for --option tap=PART: vision is a VLM's encoder")
    sub.add_argument("--pos-embed", metavar="HOW", help="short for --option pos_embed=HOW: native, none or shuffled")
    sub.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="a setting of the family")
    sub.add_argument("--job", metavar="FILE", help="TOML file with the same words as keys; flags win over it")
    sub.add_argument("--retry-failed", action="store_true", help="only clips that failed before")
    sub.add_argument("--dry-run", action="store_true", help="print the plan; load and write nothing")


def extract(args: argparse.Namespace) -> int:
    from spatialprobe.engine.run import open_run

    job = read_job(args)
    if args.dry_run:
        from spatialprobe.engine.dryrun import plan_lines

        for line in plan_lines(job):
            print(line)
        return 0
    if job.ray:
        from spatialprobe.engine.processes.ray_run import run_ray

        return print_report(*run_ray(job, retry_failed=args.retry_failed), args.words)
    if job.ray_workers:
        raise ValueError("ray-workers goes with ray")
    job = for_this_process(job)
    if job.devices:
        from spatialprobe.engine.processes.workers import run_workers

        return print_report(*run_workers(job, retry_failed=args.retry_failed), args.words)
    run = open_run(job, retry_failed=args.retry_failed)
    try:
        report = run.extract()
    except ValueError as error:  # the arguments were good: this is a bug, and its traceback is wanted
        raise RuntimeError("extraction failed") from error
    return print_report(report, run.store.root, args.words)


def for_this_process(job: "Job") -> "Job":
    """The job with the shard and device that a launcher's variables give it, where the user gave none."""
    from spatialprobe.engine.processes.ranks import words_for

    if job.device and job.devices:
        raise ValueError(f"device and devices exclude each other, got {job.device} and {job.devices}")
    words = words_for(os.environ, job)
    for name, (value, why) in words.items():
        print(f"engine: {name} {value}, from {why}", file=sys.stderr)
    return replace(job, **{name: value for name, (value, _) in words.items()})
