"""What a launcher's variables say of this process's part: torchrun and accelerate, SLURM's arrays, srun.

A variable counts only where its launcher has really started several processes: a batch script that asks for four tasks
and calls `engine` without srun has SLURM_NTASKS=4, and is one process.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from spatialprobe.engine.job import Job


@dataclass
class Part:
    index: int
    count: int
    names: list[str]  # of the variables that said so, for the log
    local: int | None = None  # among this machine's processes of the launcher


def part_of(env: Mapping[str, str]) -> Part | None:
    """This process's part; None where no launcher has started several. Raises ValueError for variables that clash."""
    parts = [part for part in (_array(env), _torchrun(env) or _srun(env)) if part is not None]
    if not parts:
        return None
    whole = Part(0, 1, [])
    for part in parts:  # a task of an array may itself start several processes
        whole = Part(whole.index * part.count + part.index, whole.count * part.count, whole.names + part.names)
    return whole


def _torchrun(env: Mapping[str, str]) -> Part | None:
    if "RANK" not in env or "WORLD_SIZE" not in env:
        return None
    return _part(env, "RANK", "WORLD_SIZE", "LOCAL_RANK")


def _srun(env: Mapping[str, str]) -> Part | None:
    if not env.keys() & {"SLURM_STEP_ID", "SLURM_STEPID"} or "SLURM_PROCID" not in env:
        return None
    count = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    return _part(env, "SLURM_PROCID", count, "SLURM_LOCALID")


def _part(env: Mapping[str, str], index: str, count: str, local: str) -> Part | None:
    i, n = _number(env, index), _number(env, count)
    if i >= n:
        raise ValueError(f"{index}={i} must be below {count}={n}; --shard i/n says it instead")
    return Part(i, n, [index, count], _number(env, local) if local in env else None) if n > 1 else None


def _array(env: Mapping[str, str]) -> Part | None:
    if "SLURM_ARRAY_TASK_ID" not in env:
        return None
    names = [f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "COUNT", "MIN", "MAX", "STEP")]
    task, count, least = (_number(env, name) for name in names[:3])
    step = max(1, _number(env, names[4])) if names[4] in env else 1
    most = _number(env, names[3]) if names[3] in env else least + (count - 1) * step
    regular = most - least == (count - 1) * step and (task - least) % step == 0
    if not regular or not least <= task <= most:
        raise ValueError(
            f"the SLURM array has {count} tasks from {least} to {most}, with gaps: which part is task {task}'s must be "
            "said by --shard i/n"
        )
    return Part((task - least) // step, count, names[:3]) if count > 1 else None


def _number(env: Mapping[str, str], name: str) -> int:
    text = env.get(name)
    if text is None or not text.isdigit():
        raise ValueError(f"{name} must be a whole number, got {text!r}; --shard i/n says it instead")
    return int(text)


def words_for(env: Mapping[str, str], job: Job) -> dict[str, tuple[str, str]]:
    """Words of a job that a launcher's variables give: name -> (value, the variables). The user's own words win."""
    words = {}
    if job.devices and _torchrun(env):
        raise ValueError("devices starts processes, and so has the launcher that set RANK: leave one of them out")
    if not job.shard and (part := part_of(env)):
        words["shard"] = (f"{part.index}/{part.count}", ", ".join(part.names))
    if not job.device and not job.devices and torch.cuda.is_available():
        launched = _torchrun(env) or _srun(env)
        if launched and launched.local is not None:
            words["device"] = (f"cuda:{launched.local % torch.cuda.device_count()}", f"local rank {launched.local}")
    return words
