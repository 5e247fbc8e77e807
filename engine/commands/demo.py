"""`engine demo`."""

import argparse
from collections.abc import Callable


def add_command(command: Callable[..., argparse.ArgumentParser]) -> None:
    sub = command(
        "demo", demo, "render scenes, ask about them, build tiny models, extract, train probes, and write a page"
    )
    sub.add_argument("--out", default="demo", help="folder to write (default: demo)")


def demo(args: argparse.Namespace) -> int:
    from spatialprobe.engine.demo.run import run_demo

    return run_demo(args.out)
