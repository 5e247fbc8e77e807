"""CLIP's image encoder (transformers), trained to match images with captions. One class token, learned positions.

Full models (`clip`, of which the text half is not read) and encoders alone (`clip_vision_model`) both load.
"""

from spatialprobe.engine.parts.caption_encoder import CaptionEncoder


class CLIP(CaptionEncoder):
    CONFIGS = {"clip": "CLIPConfig", "clip_vision_model": "CLIPVisionConfig"}
    HARMLESS = frozenset({"text_config_dict", "vision_config_dict"})  # older spellings, which transformers merges
    LIBRARY = "CLIPVisionModel"
    special = 1
