"""CLIP's image encoder (transformers), trained to match images with captions. One class token, learned positions.

Full models (`clip`, of which the text half is not read) and encoders alone (`clip_vision_model`) both load.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from spatialprobe.engine.parts.image_encoder import ImageEncoder


class CLIP(ImageEncoder):
    CONFIGS = {"clip": "CLIPConfig", "clip_vision_model": "CLIPVisionConfig"}
    HARMLESS = frozenset({"text_config_dict", "vision_config_dict"})  # older spellings, which transformers merges
    PREFIXES = ("vision_model.", "")
    RENAMES = {"vision_model.": ""}  # some releases of transformers have it in the encoder's own names too
    special = 1

    def build(self, config) -> nn.Module:
        from transformers import CLIPVisionModel

        model = CLIPVisionModel(config)
        _encoder(model).post_layernorm = nn.Identity()
        return model

    def blocks_of(self, model: nn.Module) -> Sequence[nn.Module]:
        return _encoder(model).encoder.layers

    def run(self, pixels: Tensor) -> None:
        self.model(pixels, interpolate_pos_encoding=True)  # which leaves the table alone where it fits

    def change_positions(self) -> None:
        self.change_table(_encoder(self.model).embeddings, special=1)


def _encoder(model: nn.Module) -> nn.Module:
    return getattr(model, "vision_model", model)
