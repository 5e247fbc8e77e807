"""What CLIP's and SigLIP's image encoders share: both were trained with captions, and transformers has them alike.

Learned positions, and in some releases of transformers a shell around the encoder.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from spatialprobe.engine.parts.image_encoder import ImageEncoder


class CaptionEncoder(ImageEncoder):
    LIBRARY: str  # transformers' class of the encoder alone
    PREFIXES = ("vision_model.", "")
    RENAMES = {"vision_model.": ""}  # some releases of transformers have it in the encoder's own names too

    def build(self, config) -> nn.Module:
        import transformers

        model = getattr(transformers, self.LIBRARY)(config)
        _encoder(model).post_layernorm = nn.Identity()
        return model

    def blocks_of(self, model: nn.Module) -> Sequence[nn.Module]:
        return _encoder(model).encoder.layers

    def run(self, pixels: Tensor) -> None:
        self.model(pixels, interpolate_pos_encoding=True)  # which leaves the table alone where it fits

    def change_positions(self) -> None:
        self.change_table(_encoder(self.model).embeddings, special=self.special)


def _encoder(model: nn.Module) -> nn.Module:
    return getattr(model, "vision_model", model)
