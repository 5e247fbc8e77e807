"""Probes in files: a training run that can go on where it was killed, and trained probes to be used again."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from spatialprobe.engine.files.clipfile import is_whole, read_header, write_file
from spatialprobe.engine.files.durable import RunFolder, publish, room_for
from spatialprobe.probes.probe import Probe
from spatialprobe.probes.task import ProbeConfig, ProbeTask
from spatialprobe.probes.training import Trainee

STATE = ("curve", "best_score", "best_epoch", "stopped", "loss_sum", "clips")  # of a Trainee, beside its tensors

FACTS = "facts."  # before the name of a tensor that is one of the task's facts


def save_run(path: Path, trainees: Sequence[Trainee], about: dict[str, Any], progress: dict[str, Any]) -> None:
    """Replaces the checkpoint at `path`, whole or not at all. `about` says which run it is, `progress` where it is."""
    tensors, states = {}, []
    for i, trainee in enumerate(trainees):
        tensors |= {f"{i}/probe/{n}": x for n, x in trainee.probe.state_dict().items()}
        tensors |= {f"{i}/best/{n}": x for n, x in trainee.best.items()}
        for number, moments in trainee.optimizer.state_dict()["state"].items():
            tensors |= {f"{i}/adam/{number}/{n}": torch.as_tensor(x) for n, x in moments.items()}
        states.append({name: getattr(trainee, name) for name in STATE})
    save(path, tensors, {"about": about, "progress": progress, "probes": states})


def load_run(path: Path, trainees: Sequence[Trainee], about: dict[str, Any]) -> dict[str, Any]:
    """Brings fresh `trainees` to where the run at `path` was, and returns its `progress`.

    Raises ValueError for a damaged file, and for a checkpoint of another run, naming what differs.
    """
    tensors, header = load(path)
    if changed := _differences(header["about"], json.loads(json.dumps(about))):
        raise ValueError(f"{path} is of another run; choose another folder\n  " + "\n  ".join(changed))
    for i, (trainee, state) in enumerate(zip(trainees, header["probes"], strict=True)):
        for name in STATE:
            setattr(trainee, name, state[name])
        part = lambda kind, i=i: {  # noqa: E731
            n.split("/", 2)[2]: x for n, x in tensors.items() if n.startswith(f"{i}/{kind}/")
        }
        trainee.probe.load_state_dict(part("probe"))
        trainee.best = part("best")
        moments: dict[int, dict[str, Tensor]] = {}
        for name, x in part("adam").items():
            number, kind = name.split("/")
            moments.setdefault(int(number), {})[kind] = x
        trainee.optimizer.load_state_dict({**trainee.optimizer.state_dict(), "state": moments})
    return header["progress"]


def _differences(there: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """A line for each entry that differs; of the probes' settings those of the first probe that differs."""
    if there["task"] != asked["task"]:
        return [f"task: {there['task']} there, {asked['task']} asked"]  # of which all the rest follows
    lines = []
    for name in (name for name in asked if there.get(name) != asked[name]):
        old, new = there.get(name), asked[name]
        if name == "probes" and len(old) != len(new):
            old, new = len(old), len(new)
        elif name == "probes":
            number = next(i for i, pair in enumerate(zip(old, new, strict=True)) if pair[0] != pair[1])
            flat = [{k: v for k, v in x[number].items() if k != "options"} | x[number]["options"] for x in (old, new)]
            differing = [k for k in flat[1] if flat[0].get(k) != flat[1][k]]
            old, new = (", ".join(f"{k}={x.get(k)}" for k in differing) for x in flat)
        lines.append(f"{name}: {_short(old)} there, {_short(new)} asked")
    return lines


def _short(value: Any) -> str:
    return text if len(text := str(value)) <= 100 else text[:100] + " ..."


def save_probe(path: Path, trainee: Trainee, about: dict[str, Any]) -> None:
    """The probe's best weights, with all that `load_probe` needs to build it again."""
    probe = trainee.probe
    facts = None if probe.facts is None else asdict(probe.facts)
    tensors = {f"{FACTS}{name}": x for name, x in (facts or {}).items() if isinstance(x, Tensor)}
    described = {
        "task": probe.task.name,
        "config": asdict(probe.config),
        "facts": facts and {name: x for name, x in facts.items() if not isinstance(x, Tensor)},
        "channels": probe.input.weight.shape[1],
        "keys": [list(key) for key in trainee.keys],
    }
    save(path, (trainee.best or dict(probe.state_dict())) | tensors, described | {"about": about})


def load_probe(path: Path, tasks: dict[str, ProbeTask]) -> tuple[Probe, dict[str, Any]]:
    """A trained probe, and its file's header. Raises ValueError for a damaged file or an unknown task."""
    tensors, header = load(path)
    if header.get("task") not in tasks:
        raise ValueError(f"{path} is of task {header.get('task')!r}; known: {', '.join(tasks)}")
    task = tasks[header["task"]]
    as_tuples = {n: tuple(x) if isinstance(x, list) else x for n, x in (header["facts"] or {}).items()}
    of_facts = {n.removeprefix(FACTS): tensors.pop(n) for n in list(tensors) if n.startswith(FACTS)}
    facts = None if header["facts"] is None else task.facts_type(**as_tuples, **of_facts)
    probe = Probe(task, ProbeConfig(**header["config"]), header["channels"], facts)
    probe.load_state_dict(tensors)
    return probe, header


def save(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    run = RunFolder(path.parent / ".tmp")
    temp = run.file()
    on_cpu = {name: x.detach().cpu() for name, x in tensors.items()}
    with room_for(path, sum(x.nbytes for x in on_cpu.values())):
        try:
            write_file(temp, on_cpu, {"header": json.dumps(header)})  # as text, which may say NaN
            publish(temp, path)
        finally:
            temp.unlink(missing_ok=True)
            run.close()


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if not is_whole(path):
        raise ValueError(f"{path} is damaged")
    with path.open("rb") as file:
        header = read_header(file).provenance.get("header")
    if header is None:
        raise ValueError(f"{path} holds no probes")
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(header)
