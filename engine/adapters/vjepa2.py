"""V-JEPA 2's video encoder (transformers), trained to predict its own features of hidden parts of a video.

Its published clips are 64 frames; a row sees 2 frames, an odd last one is repeated. Rotary positions over time, rows
and columns, made for square inputs only. The predictor is neither read nor run. The published processor resizes with
torchvision, whose 8-bit results depend on the CPU; here Pillow does it, which differs by a level or so.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spatialprobe.engine.parts.image_encoder import VideoEncoder


class VJEPA2(VideoEncoder):
    CONFIGS = {"vjepa2": "VJEPA2Config"}
    HARMLESS = frozenset({"image_size", "hidden_dropout_prob"})
    PROCESSOR_FILES = ("video_preprocessor_config.json", "preprocessor_config.json")
    PREFIXES = ("", "vjepa2.")

    def check_options(self) -> None:
        super().check_options()
        if self.size[0] != self.size[1]:
            raise ValueError(f"size must be square, the model's positions are, got {self.size}")

    def build(self, config) -> nn.Module:
        from transformers import VJEPA2Model

        config.crop_size = self.size[0]  # from which the model knows how many tokens a row of its grid has
        model = VJEPA2Model(config)
        model.predictor, model.encoder.layernorm = None, nn.Identity()
        return model

    def blocks_of(self, model: nn.Module) -> Sequence[nn.Module]:
        return model.encoder.layer

    def run(self, pixels: Tensor) -> None:
        self.model.encoder(pixels)

    def change_positions(self) -> None:
        # Position 0 on every axis is the rotation by no angle.
        for block in self.blocks:
            block.attention.get_position_ids = self._positions(block.attention.get_position_ids)

    def _positions(self, native):
        return lambda x, masks=None: self.changed(torch.stack(native(x, masks), -1)).unbind(-1)  # time, row, column
