"""SigLIP's image encoder, and SigLIP 2's of a fixed input size, which is the same model (transformers).

Trained to tell matching captions from others; SigLIP 2 also to write captions and to predict its own masked features.
No class token, learned positions. Patches that the input's right and lower rims do not fill (384 pixels hold 27
patches of 14) are not seen. Full models (`siglip`) and encoders alone (`siglip_vision_model`) both load.
"""

from torch import nn

from spatialprobe.engine.parts.caption_encoder import CaptionEncoder


class SigLIP(CaptionEncoder):
    CONFIGS = {"siglip": "SiglipConfig", "siglip_vision_model": "SiglipVisionConfig"}
    LIBRARY = "SiglipVisionModel"

    def build(self, config) -> nn.Module:
        config.vision_use_head = False
        return super().build(config)
