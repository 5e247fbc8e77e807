"""`engine probe`: words in, trained probes, their numbers and their pictures out."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spatialprobe.probes.loop import TrainProgress

TASK_NAMES = ("tagging", "instance", "geometry", "relation")


def add_command(command: Callable[..., argparse.ArgumentParser]) -> None:
    sub = command("probe", probe, "train probes on stores and measure them")
    sub.add_argument("--task", required=True, choices=TASK_NAMES)
    sub.add_argument(
        "--features", required=True, action="append", metavar="STORE", help="a store; several are joined on channels"
    )
    sub.add_argument(
        "--labels", required=True, metavar="DATA", help="ScanNet-processed, DL3DV-processed, demo or lifted clips"
    )
    sub.add_argument("--classes", metavar="K", type=int, help="ScanNet: the list class_names_K.json (default: 20)")
    sub.add_argument("--out", required=True, metavar="DIR", help="results, probes, pictures; run again to resume")
    sub.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE",
        help="a setting of the probe, as lr=1e-3; a wrong name lists them all",
    )  # fmt: skip
    sub.add_argument("--grid", action="append", default=[], metavar="NAME=A,B", help="train a probe for each value")
    sub.add_argument("--val", metavar="SHARE", type=float, help="of the clips (default: the dataset's split, or .1)")
    sub.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: cuda if there)")
    sub.add_argument("--threads", metavar="N", type=int, default=4, help="that read (default: 4)")
    sub.add_argument(
        "--keep", metavar="GB", type=float, default=4.0,
        help="of training clips kept in memory, and as much of the others (default: 4)",
    )  # fmt: skip
    sub.add_argument("--compile", action="store_true", help="torch.compile the probes")
    sub.add_argument(
        "--skip-unreadable", action="store_true", help="leave out clips that cannot be read, and list them"
    )


def probe(args: argparse.Namespace) -> int:
    import torch

    from spatialprobe.engine.reading.remote import open_source
    from spatialprobe.probes.labels import open_labels
    from spatialprobe.probes.loop import train
    from spatialprobe.probes.pictures import draw_run
    from spatialprobe.probes.results import table
    from spatialprobe.probes.tasks import TASKS
    from spatialprobe.probes.training import Diverged

    device = args.device
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # under torchrun or accelerate launch
        from accelerate import PartialState

        device = PartialState().device
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    labels = open_labels(args.labels, **({} if args.classes is None else {"classes": args.classes}))
    sources = [open_source(path) for path in args.features]
    settings = {name: value_of(value) for name, value in pairs_of(args.set).items()}
    TASKS[args.task].defaults.with_settings(**settings)  # else a name such as `out` would be an argument of `train`
    shown = Bar() if first else lambda state: None
    try:
        results = train(
            TASKS[args.task],
            sources,
            labels,
            grid={name: [value_of(v) for v in values.split(",")] for name, values in pairs_of(args.grid).items()},
            val=args.val,
            out=args.out,
            device=device,
            threads=args.threads,
            keep_bytes=int(args.keep * 1e9),
            compiled=args.compile,
            on_error="skip" if args.skip_unreadable else "raise",
            progress=shown,
            **settings,
        )
    except Diverged as error:
        print(f"engine: stopped: {error}", file=sys.stderr)
        return 1
    finally:
        if first:
            shown.close()
    skipped = results[0].skipped
    if first:
        print(table(results))
        drawn = draw_run(Path(args.out), results, sources, labels)
        print(f"{args.out}: results.json, {', '.join(path.name for path in drawn)}")
        for clip_id, why in skipped.items():
            print(f"skipped {clip_id}: {why}", file=sys.stderr)
    return 1 if skipped or any(result.stopped.startswith("the loss") for result in results) else 0


def pairs_of(words: Sequence[str]) -> dict[str, str]:
    """{name: value} of NAME=VALUE words. Raises ValueError for other words, and for a name given twice."""
    pairs = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise ValueError(f"wanted NAME=VALUE, got {word!r}")
        if name in pairs:
            raise ValueError(f"{name} is given twice: {pairs[name]} and {value}")
        pairs[name] = value
    return pairs


def value_of(text: str) -> Any:
    """A number, true, false or null as in JSON, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


class Bar:
    """A bar over all batches with the epoch and the best probe's loss; a line per epoch where there is no terminal."""

    def __init__(self):
        self._bar = None

    def __call__(self, state: "TrainProgress") -> None:
        from spatialprobe.engine.pipeline.progress import bar

        done, total = state.epoch * state.batches + state.batch, state.epochs * state.batches
        if self._bar is None:
            self._bar = bar(total, "batch")
            self._bar.update(done - 1)
        self._bar.set_postfix(epoch=f"{state.epoch + 1}/{state.epochs}", loss=f"{min(state.losses):.4g}", refresh=False)
        self._bar.update()
        if state.batch == state.batches and not sys.stderr.isatty():
            print(f"epoch {state.epoch + 1}/{state.epochs}: training loss {min(state.losses):.4g}", file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
