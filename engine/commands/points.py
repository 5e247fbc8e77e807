"""`engine points`: point maps of labelled clips as a store."""

import argparse
import sys
from collections.abc import Callable

from spatialprobe.engine.commands.flags import WORDS
from spatialprobe.engine.commands.outcome import print_report


def add_command(command: Callable[..., argparse.ArgumentParser]) -> None:
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
    sub.add_argument("--store-dtype", metavar="DTYPE", default="float16", help=WORDS["store_dtype"][1])
    sub.add_argument("--loaders", metavar="N", default="2", help="threads that read labels and average them")
    sub.add_argument("--shard", metavar="I/N", help=WORDS["shard"][1])
    sub.add_argument("--retry-failed", action="store_true", help="only clips that failed before")


def points(args: argparse.Namespace) -> int:
    from spatialprobe.engine.pointmaps.options import PointOptions
    from spatialprobe.engine.pointmaps.run import run_points
    from spatialprobe.engine.store import FeatureStore
    from spatialprobe.engine.words import number, positive
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
