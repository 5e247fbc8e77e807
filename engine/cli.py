"""The `engine` command: words in, exit code out. 0 all done, 1 some clips failed or damaged, 2 bad arguments."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import fields

from spatialprobe.engine.job import Job

EXTRACT_WORDS = {  # word of a Job -> (placeholder, help); the positional ones and switches are written out below
    "model": ("NAME", "preset (see `engine models`), Hub id, or local folder"),
    "out": ("STORE", "folder of the feature store; run the same command again to resume"),
    "revision": ("REV", "branch, tag or commit of a Hub id"),
    "layout": ("KIND", "videos, images, list, scannet or dl3dv; default: recognise it"),
    "targets": ("DIR", "dl3dv: folder of the processed targets, for start_idx"),
    "layers": ("I,J", "blocks, from 0; hsK is hidden_states[K], block K-1 (default: the study's)"),
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
    "device": ("NAME", "cpu, cuda, cuda:1"),
    "shard": ("I/N", "every N-th clip from the I-th, from 0"),
    "limit": ("N", "only the first N clips of the listing"),
}


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        return args.run(args)
    except ValueError as error:
        print(f"engine: error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, OSError) as error:
        print(f"engine: stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("engine: interrupted", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="engine", description=__doc__, allow_abbrev=False)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], about: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    sub = command("extract", extract, "features of clips into a store")
    sub.add_argument("clips", nargs="?", help="folder of videos or of image folders, one clip, or a list file")
    for word, (placeholder, about) in EXTRACT_WORDS.items():
        sub.add_argument(f"--{word.replace('_', '-')}", metavar=placeholder, help=about)
    sub.add_argument("--merge-steps", action="store_true", default=None, help="store the mean over steps, not each")
    sub.add_argument("--prompt", metavar="TEXT", help="short for --option prompt=TEXT")
    sub.add_argument("--size", metavar="HxW", help="short for --option size=HxW: pixels of the model's input")
    sub.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="a setting of the family")
    sub.add_argument("--job", metavar="FILE", help="TOML file with the same words as keys; flags win over it")
    sub.add_argument("--retry-failed", action="store_true", help="only clips that failed before")
    sub.add_argument("--dry-run", action="store_true", help="print the plan; load and write nothing")

    command("models", models, "presets and what they cost")
    sub = command("info", info, "what a store holds")
    sub.add_argument("store")
    sub = command("verify", verify, "re-read a whole store and report every damaged file")
    sub.add_argument("store")
    sub = command("demo", demo, "render scenes, build tiny models, extract, and write a page about it")
    sub.add_argument("--out", default="demo", help="folder to write (default: demo)")
    return top


# -- extract --------------------------------------------------------------------------------------------------------


def extract(args: argparse.Namespace) -> int:
    from spatialprobe.engine.progress import summary
    from spatialprobe.engine.run import run_job

    job = read_job(args)
    if args.dry_run:
        from spatialprobe.engine.dryrun import plan_lines

        for line in plan_lines(job):
            print(line)
        return 0
    report, store = run_job(job, retry_failed=args.retry_failed)
    print(summary(report, store.root))
    if report.interrupted:
        print("interrupted: run the same command again to go on", file=sys.stderr)
        return 130
    if report.failed:
        print(f"{report.failed} clips failed:", file=sys.stderr)
        for clip_id, reason in report.failures.items():
            print(f"  {clip_id}  {reason}", file=sys.stderr)
        words = [w for w in sys.argv[1:] if w != "--retry-failed"]
        print(f"to retry them: {shlex.join(['engine', *words, '--retry-failed'])}", file=sys.stderr)
        return 1
    return 0


def read_job(args: argparse.Namespace) -> Job:
    given = {f.name: getattr(args, f.name, None) for f in fields(Job) if f.name != "options"}
    words = {name: value for name, value in given.items() if value is not None}
    options = {name: getattr(args, name) for name in ("prompt", "size") if getattr(args, name) is not None}
    for item in args.option:
        name, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"option must be KEY=VALUE, got {item!r}")
        options[name] = value
    return Job.from_words(words | {"options": options}, args.job)


# -- the other commands ---------------------------------------------------------------------------------------------


def models(args: argparse.Namespace) -> int:
    from spatialprobe.engine.presets import FAMILIES, PRESETS

    print(f"{'preset':<18}{'blocks':>7}{'channels':>9}  {'tokens':<10}{'pool':<7}{'step':>5}  layers the study used")
    for name, p in PRESETS.items():
        layers = ", ".join(f"{task} {layer}" for task, layer in p.layers.items())
        step = FAMILIES[p.family].default_step
        pool = "x".join(map(str, p.pool)) if p.pool else "-"
        tokens = "x".join(map(str, p.grid))
        step = "-" if step is None else step
        print(f"{name:<18}{p.blocks:>7}{p.channels:>9}  {tokens:<10}{pool:<7}{step:>5}  {layers}")
    return 0


def info(args: argparse.Namespace) -> int:
    from spatialprobe.engine.progress import store_lines
    from spatialprobe.engine.store import FeatureStore

    for line in store_lines(FeatureStore.open(args.store)):
        print(line)
    return 0


def verify(args: argparse.Namespace) -> int:
    from spatialprobe.engine.progress import bar
    from spatialprobe.engine.store import FeatureStore

    store = FeatureStore.open(args.store)
    with bar(total=len(store), unit="clip") as progress:
        problems = list(store.verify(progress=progress.update))
    for problem in problems:
        print(problem)
    print(f"{len(store)} clips read, {len(problems)} problems")
    return 1 if problems else 0


def demo(args: argparse.Namespace) -> int:
    from spatialprobe.engine.demo.run import run_demo

    return run_demo(args.out)


if __name__ == "__main__":
    sys.exit(main())
