"""DINOv2, with and without register tokens (transformers), trained on images alone to agree with a teacher.

A class token, registers if any, then the patches; learned positions, which the model resamples to the input's grid
(the published table is for 518 pixels, the processor makes 224).
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from spatialprobe.engine.checkpoint import Checkpoint
from spatialprobe.engine.parts.image_encoder import ImageEncoder


class DINOv2(ImageEncoder):
    CONFIGS = {"dinov2": "Dinov2Config", "dinov2_with_registers": "Dinov2WithRegistersConfig"}
    # What transformers always does for models with registers: it resamples their table with antialiasing.
    HARMLESS = frozenset({"interpolate_antialias", "interpolate_offset"})
    PREFIXES = ("", "dinov2.", "dinov2_with_registers.")
    RENAMES = {
        "attention.q_proj": "attention.attention.query",
        "attention.k_proj": "attention.attention.key",
        "attention.v_proj": "attention.attention.value",
        "attention.o_proj": "attention.output.dense",
    }

    def __init__(self, checkpoint: Checkpoint, options: dict[str, Any]):
        super().__init__(checkpoint, options)
        self.special = 1 + getattr(self.config, "num_register_tokens", 0)
        if self.config.use_swiglu_ffn:
            raise ValueError(f"{checkpoint.root} has gated blocks (DINOv2 giant), which this adapter does not read")

    def build(self, config) -> nn.Module:
        import transformers

        model = getattr(transformers, type(config).__name__.replace("Config", "Model"))(config)
        model.layernorm = nn.Identity()
        return model

    def blocks_of(self, model: nn.Module) -> Sequence[nn.Module]:
        return model.encoder.layer

    def run(self, pixels: Tensor) -> None:
        self.model(pixels)

    def change_positions(self) -> None:
        self.change_table(self.model.embeddings, special=1)  # registers have no positions
