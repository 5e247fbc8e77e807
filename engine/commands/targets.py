"""`engine targets`: labels for probes by geometry models."""

import argparse
from collections.abc import Callable

from spatialprobe.engine.commands.flags import WORDS, add_flags, read_job
from spatialprobe.engine.commands.outcome import print_report

TAKEN = "model out revision layout window start stride query short compute_dtype device writers shard limit".split()
OWN = {  # word -> (placeholder, help), where it is not as for extract
    "model": ("NAME", "depth-anything-v2, depth-pro, zoedepth, a Hub id, or local folder"),
    "out": ("STORE", "folder of the labels; run the same command again to resume"),
    "window": ("N", "frames per clip (default: 81), or all"),
}


def add_command(command: Callable[..., argparse.ArgumentParser]) -> None:
    sub = command("targets", targets, "depth and what else a geometry model says of clips, as labels for probes")
    sub.add_argument("clips", nargs="?", help="as for extract")
    add_flags(sub, {word: OWN.get(word, WORDS[word]) for word in TAKEN})
    sub.add_argument("--size", metavar="HxW", help="of the maps (default: the longer side 518 pixels)")
    sub.add_argument("--cameras", metavar="LABELS", help="labels of these clips with poses and intrinsics")
    sub.add_argument("--intrinsic-size", metavar="HxW", help="pixels that ScanNet's intrinsic.txt is of: 968x1296")
    sub.add_argument("--retry-failed", action="store_true", help="only clips that failed before")


def targets(args: argparse.Namespace) -> int:
    from spatialprobe.engine.targets.run import run_targets

    args.targets, cameras = args.cameras, None
    job = read_job(args)
    if args.cameras:
        from spatialprobe.engine.words import parse_size
        from spatialprobe.probes.labels import open_labels

        of = {"intrinsic_size": parse_size("intrinsic-size", args.intrinsic_size)} if args.intrinsic_size else {}
        cameras = open_labels(args.cameras, "scannet" if of else "auto", **of)
    elif args.intrinsic_size:
        raise ValueError("intrinsic-size is for --cameras")
    report, out = run_targets(job, cameras, retry_failed=args.retry_failed)
    return print_report(report, out, args.words)
