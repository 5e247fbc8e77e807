"""Config fields that the installed libraries do not know are named, and published ones are not."""

import json

import pytest
from diffusers import WanTransformer3DModel
from transformers import Qwen3VLConfig

from spatialprobe.engine.checkpoint import Checkpoint
from spatialprobe.engine.configs import check_fields
from spatialprobe.engine.presets import adapter_class, detect_family


def test_what_the_libraries_write_themselves_is_known():
    check_fields(dict(WanTransformer3DModel(num_layers=1, num_attention_heads=1).config), WanTransformer3DModel, "a")
    config = Qwen3VLConfig().to_dict()
    check_fields(config, Qwen3VLConfig, "a")
    check_fields(config["text_config"], Qwen3VLConfig.sub_configs["text_config"], "a")


@pytest.mark.parametrize("cls", [WanTransformer3DModel, Qwen3VLConfig])
def test_an_unknown_field_is_named(cls):
    with pytest.raises(ValueError, match=rf"x/config\.json .* {cls.__name__} .* does not know: gate, warp"):
        check_fields({"warp": 1, "gate": 2, "_note": 3, "architectures": []}, cls, "x/config.json")
    check_fields({"warp": 1, "gate": 2}, cls, "a", harmless=("warp", "gate"))


TEXT, STACK = {"num_hidden_layers": 2, "hidden_size": 8}, {"num_hidden_layers": 2}
NO_VISION = "must have a table vision_config, got None"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        *(({"model_type": f"qwen3_{name}", "text_config": TEXT}, NO_VISION) for name in ("vl", "vl_moe", "5")),
        ({"model_type": "qwen3_vl", "vision_config": {}}, "must have a table text_config, got None"),
        ({"model_type": "qwen2_5_vl", "num_hidden_layers": 2}, NO_VISION),
        ({"model_type": "glm4v", "text_config": TEXT}, NO_VISION),
        ({"model_type": "gemma3", "text_config": TEXT, "vision_config": None}, NO_VISION),
        ({"model_type": "internvl", "text_config": TEXT}, NO_VISION),
        ({"model_type": "internvl", "text_config": STACK}, "config.json, text_config lacks hidden_size"),
        ({"model_type": "internvl_chat", "text_config": TEXT}, "must have a table llm_config, got None"),
        ({"model_type": "llavaonevision1_5", "image_token_id": 1, "text_config": TEXT}, NO_VISION),
        ({"model_type": "llavaonevision1_5", "text_config": TEXT}, "lacks image_token_id"),
        (
            {"model_type": "llavaonevision1_5", "image_token_id": 1, "text_config": TEXT, "vision_config": STACK},
            "vision_config lacks depth, hidden_size, intermediate_size, num_heads, patch_size",
        ),
    ],
)
def test_a_config_without_a_table_or_size_is_named(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint.open(str(tmp_path))
    cls = adapter_class(detect_family(checkpoint))
    with pytest.raises(ValueError, match=message):
        cls(checkpoint, cls.OPTIONS)
