"""What a model family must say about itself; the rest is shared. `engine/adapters/open_sora.py` is a whole one."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spatialprobe.engine.checkpoint import Checkpoint
from spatialprobe.engine.types import Clip, FeatureSpec, Plan, parse_query

Inputs = dict[str, Tensor]  # what `prepare` makes of one clip, and, stacked on a first dimension B, what `encode` takes


class Adapter(ABC):
    """A model family. Constructing one reads configs only; `load` reads weights."""

    LIBRARIES: ClassVar[tuple[str, ...]]  # distributions whose release may change values: fields of the spec
    AUTO_BATCH: ClassVar[int] = 1  # clips that fill a GPU, where batch "auto" starts
    OPTIONS: ClassVar[dict[str, Any]]  # the family's own settings with their defaults; all are fields of the spec
    PARITY: ClassVar[dict[str, Any]]  # options under which the published study made its features
    PREPARES_ON_DEVICE: ClassVar[bool] = False  # `prepare` is `images.resize` and torch alone: frames may lie anywhere

    num_layers: int  # blocks of the whole model
    num_steps: int  # length of the noise schedule, 0 for models without noise
    channels: int  # C
    steps: tuple[int, ...] = ()  # the job's, set before `load`: parts that none of them runs need not be loaded

    # after `load`
    device: torch.device
    dtype: torch.dtype
    blocks: Sequence[nn.Module]  # the blocks that layers count, in the order they run

    def __init__(self, checkpoint: Checkpoint, options: dict[str, Any]):
        self.checkpoint, self.options = checkpoint, options

    @abstractmethod
    def plan(self, frames: int, query: tuple[int, ...]) -> Plan:
        """Geometry for a window of `frames` frames, of which `query` are wanted. Raises ValueError if impossible."""

    @abstractmethod
    def load(self, depth: int, device: torch.device, dtype: torch.dtype, cache: Path) -> None:
        """Loads the first `depth` blocks and what runs before them. `cache` is a folder for computed constants.

        On the meta device nothing is read, and a pass must work, on shapes alone: so is memory planned.
        """

    @abstractmethod
    def prepare(self, clip: Clip, plan: Plan) -> Inputs:
        """Resizes and normalises, where the frames are. May be called from several threads at once.

        Equal plans give equal shapes.
        """

    @abstractmethod
    def encode(self, inputs: Inputs, plan: Plan) -> Any:
        """What does not depend on the noise step, once per batch: the VAE. What it returns goes to `forward`."""

    @abstractmethod
    def forward(self, state: Any, step: int | None, noise: Tensor | None) -> None:
        """Runs the loaded blocks on what `encode` returned. What they put out is read by taps on the blocks."""

    @abstractmethod
    def grid(self, tokens: Tensor, state: Any, plan: Plan) -> Tensor:
        """A block's output [B, N, C] as [B, T, H, W, C], with tokens that see no pixels left out."""

    @abstractmethod
    def skeleton(self, depth: int) -> list[nn.Module]:
        """The modules `load` would fill, on the meta device: for counting what they weigh."""

    def noise_shape(self, plan: Plan) -> tuple[int, ...] | None:
        """Shape of one clip's noise, None for models without noise."""
        return None

    def describe_step(self, step: int) -> dict[str, float | str]:
        """Timestep and sigma of a step and the like, for provenance. Needs `load` first."""
        return {}

    def describe_clip_step(self, step: int, plan: Plan) -> dict[str, float]:
        """The same for a clip of this plan: some families shift their schedule by the number of tokens."""
        return self.describe_step(step)

    @abstractmethod
    def check_options(self) -> None:
        """Raises ValueError for option values the model cannot take."""

    def text_encoder_bytes(self, cache: Path, dtype: torch.dtype) -> int:
        """Bytes of the text encoder's weights, if `load` has to run it: 0 once `cache` has the prompt."""
        return 0

    def weight_bytes(self, depth: int, dtype: torch.dtype) -> int:
        """Bytes of the weights that `load(depth)` holds, a few percent low where parts stay float32."""
        return sum(p.numel() * dtype.itemsize for module in self.skeleton(depth) for p in module.parameters())


def plan_clip(frames: int, adapter: Adapter, spec: FeatureSpec) -> tuple[Plan, tuple[int, ...]]:
    """The plan for a window of `frames` frames and the feature rows to keep. Raises ValueError if it cannot be met."""
    query = parse_query(spec.frames.query, frames)
    plan = adapter.plan(frames, query)
    if spec.pool is not None and (spec.pool[0] > plan.grid[1] or spec.pool[1] > plan.grid[2]):
        raise ValueError(f"pool must be at most the model's {plan.grid[1]}x{plan.grid[2]} tokens, got {spec.pool}")
    return plan, plan.wanted_rows(query)
