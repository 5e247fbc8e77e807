"""The noise schedule of flow-matching models that sample with UniPC: timestep and sigma of each of 1000 steps."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from spatialprobe.engine.configs import check_fields

NUM_STEPS = 1000  # steps index the scheduler's schedule when it is asked for this many


class FlowSchedule(nn.Module):
    """Step 0 is the noisiest. A module, so that its two tables move to the device with the rest of a model."""

    def __init__(
        self,
        config: Mapping[str, Any],  # of the scheduler
        where: str,  # its file, for messages
        flow_shift: float,  # 0: the config's own
    ):
        from diffusers import UniPCMultistepScheduler

        super().__init__()
        check_fields(config, UniPCMultistepScheduler, where)
        own = {} if flow_shift == 0 else {"flow_shift": flow_shift}
        self.scheduler = UniPCMultistepScheduler.from_config(config, **own)
        self.scheduler.set_timesteps(NUM_STEPS)
        self.register_buffer("timesteps", self.scheduler.timesteps)  # int64 [1000], 999 .. 0; some occur twice
        self.register_buffer("sigmas", self.scheduler.sigmas)  # float32 [1001], 1 .. 0

    def timestep(self, step: int) -> int:
        return int(self.scheduler.timesteps[step])  # these stay on the host: no wait for the device

    def _sigma_index(self, step: int) -> int:
        # Integer timesteps repeat in a schedule of 1000; add_noise takes the sigma of the second of a pair.
        return self.scheduler.index_for_timestep(self.scheduler.timesteps[step])

    def describe(self, step: int) -> dict[str, int | float]:
        sigma = self.scheduler.sigmas[self._sigma_index(step)]
        return {"timestep": self.timestep(step), "sigma": round(float(sigma), 6)}

    def add_noise(self, latents: Tensor, noise: Tensor, step: int) -> Tensor:
        """The scheduler's, without its search for the timestep on the device, which would stall the queue."""
        sigma = self.sigmas[self._sigma_index(step)].to(latents.dtype)
        return (1 - sigma) * latents + sigma * noise.to(latents.dtype)

    def is_high_noise(self, step: int, boundary: float) -> bool:
        """Whether the step's timestep is at or above this share of the training timesteps."""
        return self.timestep(step) >= boundary * self.scheduler.config.num_train_timesteps
