"""Qwen3-VL (transformers).

A tap on decoder blocks 0 to 2 sees the value before the model adds its DeepStack features.
"""

from spatialprobe.engine.parts.qwen import QwenKin


class Qwen3VL(QwenKin):
    MODEL_TYPE = "qwen3_vl"
    MODEL = "Qwen3VLModel"
