"""`engine report`: files of results in, one page out."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path


def add_command(command: Callable[..., argparse.ArgumentParser]) -> None:
    sub = command("report", report, "one page of what probes found: tables, maps, charts, and all that made them")
    sub.add_argument("runs", nargs="+", metavar="RUN", help="a results.json, or a folder above some")
    sub.add_argument("--out", required=True, metavar="PAGE", help="HTML file to write, whole or not at all")
    sub.add_argument("--title", metavar="TEXT", default="What frozen features know about space")


def report(args: argparse.Namespace) -> int:
    from spatialprobe.engine.files.durable import write_whole
    from spatialprobe.probes.report.collect import collect
    from spatialprobe.probes.report.page import render
    from spatialprobe.probes.report.scores import make_scores

    out = Path(args.out)
    if out.is_dir():
        raise ValueError(f"out must be an HTML file, got the folder {out}")
    collection = collect(args.runs)
    not_read = [f"{path}: {why}" for path, why in collection.unread.items()]
    if not collection.runs:
        raise ValueError("none of the files could be read: " + "; ".join(not_read))
    write_whole(out, render(make_scores(collection), args.title))
    probes = sum(len(run.results) for run in collection.runs)
    print(f"{out}: {probes} probes of {len(collection.runs)} runs, {out.stat().st_size / 1e6:.2f} MB")
    for line in not_read:
        print(f"not read: {line}", file=sys.stderr)
    return 1 if not_read else 0
