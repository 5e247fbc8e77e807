"""Qwen2.5-VL (transformers). Most blocks of its vision tower attend within windows of 112 pixels."""

from spatialprobe.engine.configs import table_of
from spatialprobe.engine.parts.qwen import ANY, QwenKin

# In published config.json files the decoder's fields lie at the top level, among these.
TOP = (
    "architectures image_token_id model_type video_token_id vision_config vision_end_token_id vision_start_token_id "
    "vision_token_id"
).split()


class Qwen25VL(QwenKin):
    MODEL_TYPE = "qwen2_5_vl"
    MODEL = "Qwen2_5_VLModel"
    TURN = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
    )
    IGNORED = {
        "config.json": {"vision_token_id": ANY},
        "vision_config": {"in_chans": 3, "spatial_patch_size": ANY},
    }

    def config_parts(self, raw: dict) -> dict[str, dict]:
        if "text_config" in raw:
            return super().config_parts(raw)
        text = {name: value for name, value in raw.items() if name not in TOP}
        top = {name: raw[name] for name in TOP if name in raw}
        vision = table_of(raw, "vision_config", f"{self.checkpoint.root}/config.json")
        return {"config.json": top, "text_config": text, "vision_config": vision}

    def window(self) -> int:
        return self.config.vision_config.window_size // self.cell

    def stored_name(self, name: str) -> str:
        return name if name.startswith("visual.") else f"model.{name.removeprefix('language_model.')}"
