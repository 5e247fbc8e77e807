"""The scheduler of pipelines that sample by flow matching with Euler steps, as their checkpoints configure it."""

from collections.abc import Collection
from typing import Any

from spatialprobe.engine.checkpoint import Checkpoint
from spatialprobe.engine.configs import check_fields


def euler_scheduler(checkpoint: Checkpoint, *, harmless: Collection[str] = ()) -> Any:
    """The checkpoint's FlowMatchEulerDiscreteScheduler, its steps not yet set.

    Raises ValueError for another scheduler, or one with fields that the library does not know; `harmless` are fields
    that a pipeline writes there for itself.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    name = "scheduler/scheduler_config.json"
    config = checkpoint.json(name)
    wanted = FlowMatchEulerDiscreteScheduler.__name__
    if config.get("_class_name") != wanted:
        raise ValueError(f"{checkpoint.root / name} must be a {wanted}, got {config.get('_class_name')}")
    check_fields(config, FlowMatchEulerDiscreteScheduler, name, harmless=harmless)
    return FlowMatchEulerDiscreteScheduler.from_config(config)
