"""`engine study`: words in; stores, probes and one table out."""

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spatialprobe.engine.commands.flags import WORDS, add_flags
from spatialprobe.engine.commands.probe import TASK_NAMES, Bar, pairs_of, value_of

if TYPE_CHECKING:
    from spatialprobe.probes.labels import Labels
    from spatialprobe.probes.study.job import StudyJob

JOB_WORDS = (  # of `engine extract`, that every encoder is given
    "layout targets layers window start stride query short pool store_dtype compute compute_dtype "
    "batch loaders writers resize device devices offload attention precision limit"
).split()


def add_command(command: Callable[..., argparse.ArgumentParser]) -> None:
    sub = command("study", study, "encoders with and without their positions, by probes on every axis, as a grid")
    sub.add_argument("clips", help="as for extract")
    sub.add_argument("--labels", required=True, metavar="DATA", help="of the same clips, as for probe")
    sub.add_argument(
        "--encoders", required=True, metavar="A,B", help="presets, Hub ids or local folders; name=folder names one"
    )
    sub.add_argument("--out", required=True, metavar="DIR", help="stores, runs, study.json; run again to resume")
    sub.add_argument("--tasks", metavar="A,B", help=f"of {', '.join(TASK_NAMES)} (default: those the labels have)")
    sub.add_argument(
        "--pos-embed", default="native,none,shuffled", metavar="A,B", help="of the encoders (default: all three)"
    )
    sub.add_argument("--position", default="none,1d,2d", metavar="A,B", help="of the probes (default: all three)")
    sub.add_argument("--seeds", metavar="1,2", help="of the probes; the table has their means (default: one seed)")
    sub.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE",
        help="a setting of all probes that have it, or TASK.NAME=VALUE",
    )  # fmt: skip
    sub.add_argument("--classes", metavar="K", type=int, help="ScanNet: the list class_names_K.json (default: 20)")
    sub.add_argument("--val", metavar="SHARE", type=float, help="of the clips (default: the dataset's split, or .1)")
    sub.add_argument("--threads", metavar="N", default=4, help="that read features (default: 4)")
    sub.add_argument("--keep", metavar="GB", default=4.0, help="of clips kept in memory, as for probe")
    add_flags(sub, {word: WORDS[word] for word in JOB_WORDS})
    sub.add_argument("--size", metavar="HxW", help="pixels of every model's input (default: its own)")
    sub.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of every encoder's family")
    sub.add_argument("--skip-failed", action="store_true", help="train without clips that cannot be extracted")
    sub.add_argument("--dry-run", action="store_true", help="print the plan; load and write nothing")


def study(args: argparse.Namespace) -> int:
    from spatialprobe.probes.study.run import run_study
    from spatialprobe.probes.study.table import findings_table

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("a study is one process: --devices shares extraction among GPUs, and each probe takes one")
    asked = read_study(args)
    if args.dry_run:
        return print_plan(asked)
    found = run_study(asked, tell=lambda line: print(line, file=sys.stderr), progress=Bar)
    if found.results:
        print(findings_table(found))
    print(f"{asked.out}: study.json, {len(found.results)} training runs of {len(asked.parts) * len(asked.axes)}")
    lost = found.failed | found.diverged
    for name, why in lost.items():
        print(f"{name} failed: {why}", file=sys.stderr)
    return 1 if lost else 0


def read_study(args: argparse.Namespace) -> "StudyJob":
    """Raises ValueError for words that no encoder could be run with."""
    from spatialprobe.engine.words import numbers, positive, share
    from spatialprobe.probes.labels import open_labels
    from spatialprobe.probes.study.job import StudyJob

    labels = open_labels(args.labels, **({} if args.classes is None else {"classes": args.classes}))
    tasks = args.tasks.split(",") if args.tasks else tasks_of(labels)
    options = pairs_of(args.option) | ({"size": args.size} if args.size else {})
    given = {name: getattr(args, name) for name in ("clips", *JOB_WORDS)}
    return StudyJob(
        out=Path(args.out),
        encoders=named_encoders(args.encoders),
        pos_embed=tuple(args.pos_embed.split(",")),
        words={name: value for name, value in given.items() if value is not None} | {"options": options},
        labels=labels,
        axes=settings_of(tasks, pairs_of(args.set)),
        position=tuple(args.position.split(",")),
        seeds=tuple(numbers("seeds", args.seeds)) if args.seeds else (),
        val=args.val,
        skip_failed=args.skip_failed,
        training={"device": args.device, "threads": positive("threads", args.threads)}
        | {"keep_bytes": int(share("keep", args.keep) * 1e9)},
    )


def named_encoders(text: str) -> dict[str, str]:
    """{name: model} of "preset,org/model,name=folder": without a name the last part of a path is one."""
    found: dict[str, str] = {}
    for word in text.split(","):
        name, equals, model = word.partition("=")
        model = model if equals else name
        name = name if equals else Path(name).name
        if not name or not model:
            raise ValueError(f"encoders must be models or name=model, got {word!r}")
        if name in found:
            raise ValueError(f"two encoders are called {name}: {found[name]} and {model}; say name=model")
        found[name] = model
    return found


def tasks_of(labels: "Labels") -> list[str]:
    """The tasks that the labels can answer."""
    from spatialprobe.probes.tasks import TASKS

    return [name for name in TASK_NAMES if set(TASKS[name].labels) <= set(labels.names)]


def settings_of(tasks: list[str], pairs: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """{task: settings}: NAME goes to all tasks that have it, TASK.NAME to one. Raises ValueError if none has it."""
    from dataclasses import fields

    from spatialprobe.probes.tasks import TASKS

    if unknown := [task for task in tasks if task not in TASKS]:
        raise ValueError(f"tasks must be some of {', '.join(TASKS)}, got {', '.join(unknown)}")
    defaults = {task: TASKS[task].defaults for task in tasks}
    known = {task: ({f.name for f in fields(x)} | set(x.options)) - {"options"} for task, x in defaults.items()}
    settings: dict[str, dict[str, Any]] = {task: {} for task in tasks}
    for word, value in pairs.items():
        task, dot, name = word.rpartition(".")
        if dot and task not in known:
            raise ValueError(f"{word} is a setting of {task}, which is none of the tasks {', '.join(tasks)}")
        meant = [each for each in ([task] if dot else tasks) if name in known[each]]
        if not meant:
            choices = sorted(set().union(*(known[each] for each in ([task] if dot else tasks))))
            raise ValueError(
                f"no setting of {task or ', '.join(tasks)} is called {name}; there are {', '.join(choices)}"
            )
        for each in meant:
            settings[each][name] = value_of(value)
    return settings


def print_plan(asked: "StudyJob") -> int:
    """What would be extracted and trained. Returns 1 if some encoder could not be."""
    from spatialprobe.engine.dryrun import plan_lines
    from spatialprobe.probes.study.run import attempt, check_views

    failed = 0
    for part in asked.parts:
        job = asked.job(part)
        lines, why = attempt(lambda job=job: [check_views(asked, job), *plan_lines(job)][1:])
        failed += bool(why)
        print(f"{part.name}, in {job.out}")
        for line in [f"cannot be run: {why}"] if why else lines:
            print(f"  {line}")
    for task in asked.axes:
        configs = asked.configs(task)
        grid = " x ".join(f"{name} {','.join(map(str, values))}" for name, values in asked.grid().items())
        print(f"{task}: {len(configs)} probes of each layer, {grid}, in one pass over the features of each encoder")
    return 1 if failed else 0
