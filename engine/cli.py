"""The `engine` command: words in, exit code out. 0 all done, 1 clips failed or damaged, the disk or memory is
full, or the GPU lost, 2 bad arguments, 130 interrupted."""

import argparse
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from spatialprobe.engine.job import Job
    from spatialprobe.engine.report import Report

# Before torch is imported: threads that spin while they wait stall the loader threads, threefold on a busy CPU.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

EXTRACT_WORDS = {  # word of a Job -> (placeholder, help); the positional ones and switches are written out below
    "model": ("NAME", "preset (see `engine models`), Hub id, or local folder"),
    "out": ("STORE", "folder of the feature store; run the same command again to resume"),
    "revision": ("REV", "branch, tag or commit of a Hub id"),
    "family": ("NAME", "of a checkpoint whose own configs do not say which it is"),
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

LIFT_WORDS = {  # word -> (placeholder, help)
    "out": ("LIFTED", "folder of the lifted clips; run the same command again to resume"),
    "depth": ("TARGETS", "labels of the same clips that have depth: of `engine targets`, or DL3DV-processed"),
    "points": ("DTYPE", "of the stored point maps: float16, float32, or none (default: float16)"),
    "query": ("FRAMES", "frames of the window to lift, like 0,1:76:4 (default: all)"),
    "up": ("X,Y,Z", "up in the poses' world, or floor: look for it (default: as the labels say, else floor)"),
    "scale": ("WHICH", "metric: lengths are metres, or free (default: as the labels say)"),
    "names": ("FILE", "JSON {clip: {id: name}} of the objects, instead of the labels' own names"),
    "classes": ("K", "of ScanNet's lists of classes (default: 20)"),
    "intrinsic_size": ("HxW", "pixels that ScanNet's intrinsic.txt is of: 968x1296"),
    "loaders": ("N", "threads that read and lift (default: 2)"),
    "writers": ("N", "threads that write (default: 2)"),
    "shard": EXTRACT_WORDS["shard"],
    "limit": EXTRACT_WORDS["limit"],
}

ASK_WORDS = {
    "out": ("DIR", "folder of the questions; run the same command again to resume"),
    "per_clip": ("N", "questions of each clip (default: 100)"),
    "seed": ("N", "of everything that is drawn (default: 0)"),
    "types": ("A,B", "types of questions (default: all)"),
    "levels": ("I,J", "0 pixels, 1 one object, 2 two objects, 3 several steps (default: all)"),
    "shares": ("X,Y", "shares of these levels (default: of all four 0.15,0.25,0.35,0.25)"),
    "forms": ("F,G", "open, choice, truth, each alone or with its share (default: open=0.4,choice=0.3,truth=0.3)"),
    "images": ("PATTERN", "of image paths in chats (default: {clip}/frame_{frame:05d}.png)"),
    "shard": ("I/N", "every N-th part of the output from the I-th, from 0"),
    "limit": ("N", "only the first N clips of the listing"),
}

TARGET_WORDS = (
    "model out revision layout window start stride query short compute_dtype device writers shard limit".split()
)
TARGET_HELP = {  # where it is not as for extract
    "model": "depth-anything-v2, depth-pro, zoedepth, a Hub id, or local folder",
    "out": "folder of the labels; run the same command again to resume",
    "window": "frames per clip (default: 81), or all",
}


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(words)
    args.words = words
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
    except RuntimeError as error:
        if type(error).__name__ == "Refused":
            print(f"engine: error: {error}", file=sys.stderr)
            return 2
        if type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error):
            traceback.print_exc()  # it may be a bug of ours
            print("engine: stopped: lost its GPU; run the same command again to go on", file=sys.stderr)
            return 1
        if type(error).__name__ != "OutOfMemoryError":  # torch's, without importing torch to say so
            raise
        print(f"engine: stopped: the model does not fit: {str(error).splitlines()[0]}", file=sys.stderr)
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

    sub = command("targets", targets, "depth and what else a geometry model says of clips, as labels for probes")
    sub.add_argument("clips", nargs="?", help="as for extract")
    for word in TARGET_WORDS:
        placeholder, about = EXTRACT_WORDS[word]
        sub.add_argument(f"--{word.replace('_', '-')}", metavar=placeholder, help=TARGET_HELP.get(word, about))
    sub.add_argument("--size", metavar="HxW", help="of the maps (default: the longer side 518 pixels)")
    sub.add_argument("--cameras", metavar="LABELS", help="labels of these clips with poses and intrinsics")
    sub.add_argument("--intrinsic-size", metavar="HxW", help="pixels that ScanNet's intrinsic.txt is of: 968x1296")
    sub.add_argument("--retry-failed", action="store_true", help="only clips that failed before")

    sub = command("points", points, "point maps of labelled clips as a store, to join with the features of another")
    sub.add_argument(
        "labels", help="demo scenes, DL3DV-processed, lifted clips, or what `engine targets --cameras` made"
    )
    sub.add_argument("--like", required=True, metavar="STORE", help="whose clips, rows and token grid the points get")
    sub.add_argument("--out", required=True, metavar="STORE", help="run the same command again to resume")
    sub.add_argument("--bands", metavar="K", default="6", help="sinusoids of 6.28, 3.14, ... units (default: 6)")
    sub.add_argument(
        "--frame", metavar="OF", default="world", help="world, first (frame's camera) or camera (each its own)"
    )
    sub.add_argument(
        "--unit", metavar="NAME", help="metres, or clip: its mean distance (default: metres where they are)"
    )
    sub.add_argument("--store-dtype", metavar="DTYPE", default="float16", help=EXTRACT_WORDS["store_dtype"][1])
    sub.add_argument("--loaders", metavar="N", default="2", help="threads that read labels and average them")
    sub.add_argument("--shard", metavar="I/N", help=EXTRACT_WORDS["shard"][1])
    sub.add_argument("--retry-failed", action="store_true", help="only clips that failed before")

    sub = command("lift", lift, "depth, cameras and masks of clips into point maps and tables of objects in 3D")
    sub.add_argument("data", help="labels with instance masks: demo scenes, or ScanNet-processed")
    for word, (placeholder, about) in LIFT_WORDS.items():
        sub.add_argument(f"--{word.replace('_', '-')}", metavar=placeholder, help=about, required=word == "out")
    sub.add_argument("--retry-failed", action="store_true", help="only clips that failed before")

    sub = command("ask", ask, "questions and answers about the objects of lifted clips, as JSON lines")
    sub.add_argument("lifted", help="folder that `engine lift` made")
    for word, (placeholder, about) in ASK_WORDS.items():
        sub.add_argument(f"--{word.replace('_', '-')}", metavar=placeholder, help=about, required=word == "out")
    sub.add_argument("--chat", action="store_true", help="write them as chats with images too, for fine-tuning tools")
    sub.add_argument("--retry-failed", action="store_true", help="again the parts in which a clip failed")

    command("models", models, "presets, their token grids and the layers the study used")
    sub = command("info", info, "what a store holds")
    sub.add_argument("store")
    sub = command("verify", verify, "re-read a whole store and report every damaged file")
    sub.add_argument("store")
    sub = command("compare", compare, "how far the features of a store are from another's, the reference, by layer")
    sub.add_argument("reference", help="store")
    sub.add_argument("store", help="another of the same clips and model")
    sub.add_argument("--json", metavar="FILE", help="write the figures there too")
    sub.add_argument("--max-relative", metavar="X", help="exit code 1 of a relative L2 above it or a clip not in both")
    sub = command("export", export, "write a store as the files of the published research code")
    sub.add_argument("store")
    sub.add_argument("dump", help="folder to write <model>/<split>/<clip>/feature_*.sft into")
    sub.add_argument("--layout", choices=["probing"], required=True, help="the layout to write")
    sub.add_argument("--name", help="of the model's folder (default: the model as it was named to extract)")
    sub.add_argument("--split", default="", help="folder between model and clip, for ids that lack their split")
    sub.add_argument("--fill-missing", action="store_true", help="NaN for rows the store left out, instead of an error")

    sub = command("import", import_dump, "make a store of a dump of the published research code")
    sub.add_argument("dump", help="<model> folder of the published layout")
    sub.add_argument("store")
    sub.add_argument("--family", required=True, help="wan, qwen3_vl, cogvideox, ... : says which row sees a frame")
    sub.add_argument("--layers", metavar="I,J", required=True, help="blocks; hsK for files named feature_layerK")
    sub.add_argument("--steps", metavar="I,J", default="")
    sub.add_argument("--window", metavar="N", default="81", help="frames the clips were cut to (default: 81)")
    sub.add_argument("--query", metavar="FRAMES", help="frames shown to the model (default: the family's)")

    from spatialprobe.probes.cli import add_probe_command  # the one place where the engine knows of probes
    from spatialprobe.probes.report.cli import add_report_command
    from spatialprobe.probes.study.cli import add_study_command

    add_probe_command(command)
    add_study_command(command, EXTRACT_WORDS)
    add_report_command(command)
    sub = command(
        "demo", demo, "render scenes, ask about them, build tiny models, extract, train probes, and write a page"
    )
    sub.add_argument("--out", default="demo", help="folder to write (default: demo)")
    return top


# -- extract --------------------------------------------------------------------------------------------------------


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
    from dataclasses import replace

    from spatialprobe.engine.processes.ranks import words_for

    if job.device and job.devices:
        raise ValueError(f"device and devices exclude each other, got {job.device} and {job.devices}")
    words = words_for(os.environ, job)
    for name, (value, why) in words.items():
        print(f"engine: {name} {value}, from {why}", file=sys.stderr)
    return replace(job, **{name: value for name, (value, _) in words.items()})


def targets(args: argparse.Namespace) -> int:
    from spatialprobe.engine.targets.run import run_targets

    args.targets, cameras = args.cameras, None
    job = read_job(args)
    if args.cameras:
        from spatialprobe.engine.job import parse_size
        from spatialprobe.probes.labels import open_labels

        of = {"intrinsic_size": parse_size("intrinsic-size", args.intrinsic_size)} if args.intrinsic_size else {}
        cameras = open_labels(args.cameras, "scannet" if of else "auto", **of)
    elif args.intrinsic_size:
        raise ValueError("intrinsic-size is for --cameras")
    report, out = run_targets(job, cameras, retry_failed=args.retry_failed)
    return print_report(report, out, args.words)


def points(args: argparse.Namespace) -> int:
    from spatialprobe.engine.job import number, positive
    from spatialprobe.engine.pointmaps.options import PointOptions
    from spatialprobe.engine.pointmaps.run import run_points
    from spatialprobe.engine.store import FeatureStore
    from spatialprobe.probes.labels import open_labels

    labels, like = open_labels(args.labels), FeatureStore.open(args.like)
    unit = args.unit or ("metres" if labels.metric else "clip")
    report, store = run_points(
        labels,
        like,
        args.out,
        PointOptions(number("bands", args.bands), args.frame, unit),
        dtype=args.store_dtype,
        loaders=positive("loaders", args.loaders),
        shard=args.shard,
        retry_failed=args.retry_failed,
    )
    if without := len(set(like.ids()) - set(labels.ids())):
        print(f"{without} clips of {like.root} have no labels in {labels.root}: they get no points", file=sys.stderr)
    return print_report(report, store.root, args.words)


def lift(args: argparse.Namespace) -> int:
    from spatialprobe.engine.job import parse_size, positive
    from spatialprobe.engine.lifting.run import LiftJob, run_lift
    from spatialprobe.probes.labels import open_labels

    of = {} if args.classes is None else {"classes": positive("classes", args.classes)}
    of |= {} if args.intrinsic_size is None else {"intrinsic_size": parse_size("intrinsic-size", args.intrinsic_size)}
    if args.scale not in (None, "metric", "free"):
        raise ValueError(f"scale must be metric or free, got {args.scale!r}")
    data = open_labels(args.data, "scannet" if of else "auto", **of)
    depth = None if args.depth is None else open_labels(args.depth)
    given = {name: getattr(args, name) for name in ("points", "query", "names", "shard", "loaders", "writers", "limit")}
    given = {name: value for name, value in given.items() if value is not None}
    given |= {name: positive(name, given[name]) for name in ("loaders", "writers", "limit") if name in given}
    up = args.up if args.up in (None, "floor") else parse_up(args.up)
    metric = None if args.scale is None else args.scale == "metric"
    job = LiftJob(args.out, up=up, metric=metric, intrinsic_size=of.get("intrinsic_size"), **given)
    report, out = run_lift(data, depth, job, retry_failed=args.retry_failed)
    return print_report(report, out, args.words)


def parse_up(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise ValueError(f"up must be three numbers like 0,0,1, or floor, got {text!r}") from None


def ask(args: argparse.Namespace) -> int:
    from spatialprobe.engine.job import positive
    from spatialprobe.engine.questions.run import AskJob, run_ask
    from spatialprobe.engine.questions.settings import Settings

    if args.images and not args.chat:
        raise ValueError("images goes with chat")
    settings = Settings.from_words({word: text for word in ASK_WORDS if (text := getattr(args, word)) is not None})
    limit = None if args.limit is None else positive("limit", args.limit)
    images = (args.images or "{clip}/frame_{frame:05d}.png") if args.chat else None
    job = AskJob(args.lifted, args.out, settings, images, args.shard, limit)
    report, out, summary = run_ask(job, retry_failed=args.retry_failed)
    code = print_report(report, out, args.words)
    for name in ("levels", "wanted", "forms", "truths", "types"):
        print(f"{name}: {', '.join(f'{key} {count}' for key, count in summary[name].items())}")
    return code


def print_report(report: "Report", root: "Path", words: list[str]) -> int:
    """What became of the clips, and the exit code."""
    from spatialprobe.engine.progress import summary

    print(summary(report, root))
    if report.stopped:
        print(f"engine: stopped: {report.stopped}; run the same command again to go on", file=sys.stderr)
    if report.interrupted:
        print("interrupted: run the same command again to go on", file=sys.stderr)
        return 130
    if report.failed:
        print(f"{report.failed} clips failed:", file=sys.stderr)
        for clip_id, reason in report.failures.items():
            print(f"  {clip_id}  {reason}", file=sys.stderr)
        again = [word for word in words if word != "--retry-failed"]
        print(f"to retry them: {shlex.join([sys.argv[0], *again, '--retry-failed'])}", file=sys.stderr)
    return 1 if report.failed or report.stopped else 0


def read_job(args: argparse.Namespace) -> "Job":
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


# -- the other commands ---------------------------------------------------------------------------------------------


def models(args: argparse.Namespace) -> int:
    from spatialprobe.engine.presets import FAMILIES, LEFT_OUT, PRESETS, TEACHERS

    print(
        f"{'preset':<24}{'blocks':>7}{'channels':>9}  {'tokens':<10}{'pool':<7}{'step':>5}{'memory':>9}{'clip':>9}"
        "  layers the study used"
    )
    for name, p in PRESETS.items():
        layers = ", ".join(f"{task} {layer}" for task, layer in p.layers.items()) or "-"
        step, pool = FAMILIES[p.family].default_step, "x".join(map(str, p.pool)) if p.pool else "-"
        memory = p.memory_gb(max(p.layers.values(), default=p.blocks - 1))
        print(
            f"{name:<24}{p.blocks:>7}{p.channels:>9}  {'x'.join(map(str, p.grid)):<10}{pool:<7}"
            f"{'-' if step is None else step:>5}{memory:>6.1f} GB{p.clip_bytes / 1e6:>6.0f} MB  {layers}"
        )
    print(
        "memory: weights in bfloat16 up to the study's last layer, or of all blocks; clip: float16, one layer and step"
    )
    print(f"for engine targets: {', '.join(TEACHERS)}")
    for name, why in LEFT_OUT.items():
        print(f"left out: {name}, {why}")
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
    if problems:
        print("to mend them: delete these files and run the same extract again")
    return 1 if problems else 0


def compare(args: argparse.Namespace) -> int:
    from pathlib import Path

    from spatialprobe.engine.compare import compare_lines, compare_stores
    from spatialprobe.engine.job import share
    from spatialprobe.engine.progress import bar
    from spatialprobe.engine.store import FeatureStore

    limit = None if args.max_relative is None else share("max-relative", args.max_relative)
    file = None if args.json is None else Path(args.json)
    if file is not None and not file.absolute().parent.is_dir():
        raise ValueError(f"json must be a file in a folder that is there, got {file}")
    a, b = FeatureStore.open(args.reference), FeatureStore.open(args.store)
    with bar(total=None, unit="clip") as progress:
        found = compare_stores(a, b, progress=progress.update)
    for line in compare_lines(found):
        print(line)
    if file is not None:
        file.write_text(found.to_json() + "\n")
    if limit is None or found.within(limit):
        return 0
    unseen = f": {found.unseen} clips could not be compared" if found.unseen else ""
    print(f"engine: not within a relative L2 of {limit:g}{unseen}", file=sys.stderr)
    return 1


def export(args: argparse.Namespace) -> int:
    from pathlib import Path

    from spatialprobe.engine.progress import bar
    from spatialprobe.engine.reading.probing_files import export_probing
    from spatialprobe.engine.store import FeatureStore

    store = FeatureStore.open(args.store)
    name = args.name or Path(store.about.get("model", args.store)).name
    with bar(total=len(store), unit="clip") as progress:
        done = export_probing(
            store, args.dump, name, args.split, fill_missing=args.fill_missing, progress=progress.update
        )
    return print_transfer(done)


def import_dump(args: argparse.Namespace) -> int:
    from spatialprobe.engine.job import layer_list, numbers, positive
    from spatialprobe.engine.presets import FAMILIES, STUDY_QUERY
    from spatialprobe.engine.progress import bar
    from spatialprobe.engine.reading.probing_files import import_probing
    from spatialprobe.engine.types import FrameSelection

    steps = numbers("steps", args.steps) if args.steps else []
    known = FAMILIES.get(args.family)
    query = args.query or (known.query if known else ":" if steps else STUDY_QUERY)
    with bar(total=None, unit="clip") as progress:
        _, done = import_probing(
            args.dump,
            args.store,
            family=args.family,
            layers=tuple(sorted(set(layer_list("layers", args.layers)))),
            steps=tuple(sorted(set(steps))),
            frames=FrameSelection(window=positive("window", args.window), query=query),
            progress=progress.update,
        )
    return print_transfer(done)


def print_transfer(done) -> int:
    print(f"{done.written} clips written, {done.present} there before, {len(done.failed)} failed")
    for clip_id, reason in sorted(done.failed.items()):
        print(f"  {clip_id}  {reason}", file=sys.stderr)
    return 1 if done.failed else 0


def demo(args: argparse.Namespace) -> int:
    from spatialprobe.engine.demo.run import run_demo

    return run_demo(args.out)


if __name__ == "__main__":
    sys.exit(main())
