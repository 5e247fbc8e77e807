"""AIMv2's image encoder (transformers), trained to continue images patch by patch and their captions. No class token.

Checkpoints of a fixed size have a table of learned positions, which transformers does not resample; the `native` ones
compute sinusoids for any size, and need `size`. Full models (`aimv2`) and encoders alone (`aimv2_vision_model`) load.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spatialprobe.engine.checkpoint import Checkpoint
from spatialprobe.engine.parts.image_encoder import ImageEncoder


class AIMv2(ImageEncoder):
    CONFIGS = {"aimv2": "Aimv2Config", "aimv2_vision_model": "Aimv2VisionConfig"}
    PREFIXES = ("", "vision_model.")

    def __init__(self, checkpoint: Checkpoint, options: dict[str, Any]):
        super().__init__(checkpoint, options)
        self.resizes = self.config.is_native

    def build(self, config) -> nn.Module:
        from transformers import Aimv2VisionModel

        config.use_head = False
        model = Aimv2VisionModel(config)
        model.rms_norm = nn.Identity()
        return model

    def blocks_of(self, model: nn.Module) -> Sequence[nn.Module]:
        return model.encoder.layers

    def run(self, pixels: Tensor) -> None:
        self.model(pixels)

    def change_positions(self) -> None:
        embeddings = self.model.embeddings
        if self.config.is_native:
            self._tabulate(embeddings)
        table = embeddings.position_embedding.weight
        embeddings.position_embedding = nn.Embedding.from_pretrained(self.changed(table))

    def _tabulate(self, embeddings: nn.Module) -> None:
        """Makes the sinusoids a table: what the embeddings add to patches of zeros."""
        handle = embeddings.rms_norm.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
        table = embeddings(torch.zeros(1, 3, *self.size, device=self.device, dtype=self.dtype))[0]
        handle.remove()
        embeddings.config = copy.deepcopy(embeddings.config)
        embeddings.config.is_native = False
        embeddings.position_embedding = nn.Embedding.from_pretrained(table)
        embeddings.position_ids = torch.arange(len(table), device=self.device)[None]
