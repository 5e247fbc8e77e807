"""SigLIP's image encoder, and SigLIP 2's of a fixed input size, which is the same model (transformers).

Trained to tell matching captions from others; SigLIP 2 also to write captions and to predict its own masked features.
No class token, learned positions. Patches that the input's right and lower rims do not fill (384 pixels hold 27
patches of 14) are not seen. Full models (`siglip`) and encoders alone (`siglip_vision_model`) both load.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from spatialprobe.engine.parts.image_encoder import ImageEncoder


class SigLIP(ImageEncoder):
    CONFIGS = {"siglip": "SiglipConfig", "siglip_vision_model": "SiglipVisionConfig"}
    PREFIXES = ("vision_model.", "")
    RENAMES = {"vision_model.": ""}  # some releases of transformers have it in the encoder's own names too

    def build(self, config) -> nn.Module:
        from transformers import SiglipVisionModel

        config.vision_use_head = False
        model = SiglipVisionModel(config)
        _encoder(model).post_layernorm = nn.Identity()
        return model

    def blocks_of(self, model: nn.Module) -> Sequence[nn.Module]:
        return _encoder(model).encoder.layers

    def run(self, pixels: Tensor) -> None:
        self.model(pixels, interpolate_pos_encoding=True)  # which leaves the table alone where it fits

    def change_positions(self) -> None:
        self.change_table(_encoder(self.model).embeddings, special=0)


def _encoder(model: nn.Module) -> nn.Module:
    return getattr(model, "vision_model", model)
