"""`engine lift`: clips with depth, cameras and masks into point maps and tables of objects."""

import argparse
from collections.abc import Callable

from spatialprobe.engine.commands.flags import WORDS, add_flags
from spatialprobe.engine.commands.outcome import print_report

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
    "shard": WORDS["shard"],
    "limit": WORDS["limit"],
}


def add_command(command: Callable[..., argparse.ArgumentParser]) -> None:
    sub = command("lift", lift, "depth, cameras and masks of clips into point maps and tables of objects in 3D")
    sub.add_argument("data", help="labels with instance masks: demo scenes, or ScanNet-processed")
    add_flags(sub, LIFT_WORDS, required="out")
    sub.add_argument("--retry-failed", action="store_true", help="only clips that failed before")


def lift(args: argparse.Namespace) -> int:
    from spatialprobe.engine.lifting.run import LiftJob, run_lift
    from spatialprobe.engine.words import parse_size, positive
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
