"""Config fields that the installed libraries do not know are named, and published ones are not."""

import pytest
from diffusers import WanTransformer3DModel
from transformers import Qwen3VLConfig

from spatialprobe.engine.configs import check_fields


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
