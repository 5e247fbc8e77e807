"""One step of a diffusers pipeline, run through its own call: what a video generator's features must equal."""

import functools
from typing import Any

from torch import Tensor


def only_step(pipeline: Any, step: int) -> None:
    """Makes the pipeline's call run just this step of its 1000, on the latents that it is given.

    Its scheduler still sets up the whole schedule; then the other entries are left out.
    """
    scheduler = pipeline.scheduler
    whole = scheduler.set_timesteps

    @functools.wraps(whole)  # pipelines look at its signature
    def set_timesteps(*args, **kwargs):
        whole(*args, **kwargs)
        assert len(scheduler.timesteps) == 1000
        scheduler.timesteps, scheduler.sigmas = scheduler.timesteps[step : step + 1], scheduler.sigmas[step : step + 2]

    scheduler.set_timesteps = set_timesteps


def sampled_until(step: int, scheduler: Any, noise: Tensor, velocity: Tensor) -> Tensor:
    """The latents that a perfect model has come to at a step: the scheduler's own steps along the true velocity."""
    latents = noise
    for timestep in scheduler.timesteps[:step]:
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents
