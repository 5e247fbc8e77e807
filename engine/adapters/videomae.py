"""VideoMAE's encoder (transformers), trained to fill in hidden parts of a video. No class token.

It sees exactly as many frames as its fixed table of sinusoids is for, 16 in all published models, at one size; a row
sees 2. `--stride 5` spreads its 16 frames over the 76 that other models see. The decoder is neither read nor run.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from spatialprobe.engine.parts.image_encoder import VideoEncoder
from spatialprobe.engine.types import Plan


class VideoMAE(VideoEncoder):
    CONFIGS = {"videomae": "VideoMAEConfig"}
    PREFIXES = ("videomae.", "")
    HARMLESS = frozenset({"qkv_bias", "qv_bias"})  # two releases' names of one field
    RENAMES = {"attention.query.bias": "attention.q_bias", "attention.value.bias": "attention.v_bias"}
    resizes = False

    def plan(self, frames: int, query: tuple[int, ...]) -> Plan:
        if frames != self.config.num_frames:
            raise ValueError(f"window must be the {self.config.num_frames} frames of this VideoMAE, got {frames}")
        return super().plan(frames, query)

    def build(self, config) -> nn.Module:
        from transformers import VideoMAEModel

        config.use_mean_pooling = True  # without a norm after the blocks
        model = VideoMAEModel(config)
        for block in model.encoder.layer:
            # Published models have none, transformers 5.0 to 5.17 at least do. It shifts all scores of a query alike.
            block.attention.attention.key.bias = None
        return model

    def load(self, depth: int, device: torch.device, dtype: torch.dtype, cache: Path) -> None:
        super().load(depth, device, dtype, cache)
        table = self.model.embeddings.position_embeddings  # no parameter: it would be copied over for every batch
        self.model.embeddings.position_embeddings = table.to(device)

    def blocks_of(self, model: nn.Module) -> Sequence[nn.Module]:
        return model.encoder.layer

    def run(self, pixels: Tensor) -> None:
        self.model(pixels)

    def change_positions(self) -> None:
        embeddings = self.model.embeddings
        embeddings.position_embeddings = self.changed(embeddings.position_embeddings)
