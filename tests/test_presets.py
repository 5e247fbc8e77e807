"""The table of presets agrees with what the adapters compute from the published configs."""

import json

import pytest

from spatialprobe.engine.checkpoint import Checkpoint
from spatialprobe.engine.presets import FAMILIES, PRESETS, adapter_class
from spatialprobe.engine.types import parse_query

PUBLISHED = {  # the fields of the published configs that geometry depends on
    "wan2.1-t2v-1.3b": {"num_layers": 30, "num_attention_heads": 12},
    "wan2.1-t2v-14b": {"num_layers": 40, "num_attention_heads": 40},
    "qwen3-vl-2b": {"num_hidden_layers": 28, "hidden_size": 2048},
    "qwen3-vl-4b": {"num_hidden_layers": 36, "hidden_size": 2560},
    "qwen3-vl-8b": {"num_hidden_layers": 36, "hidden_size": 4096},
}


def checkpoint(root, family: str, fields: dict) -> Checkpoint:
    if family == "wan":
        files = {
            "transformer/config.json": fields
            | {"attention_head_dim": 128, "patch_size": [1, 2, 2], "in_channels": 16, "out_channels": 16},
            "model_index.json": {},
            "vae/config.json": {"temperal_downsample": [False, True, True], "z_dim": 16},
        }
    else:
        size = {"shortest_edge": 65536, "longest_edge": 16777216}
        files = {
            "config.json": {"text_config": fields, "vision_config": {"patch_size": 16, "spatial_merge_size": 2}},
            "preprocessor_config.json": {"size": size},
            "video_preprocessor_config.json": {
                "size": {"shortest_edge": 4096, "longest_edge": 25165824},
                "temporal_patch_size": 2,
            },
        }
    for name, content in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(json.dumps(content))
    return Checkpoint.open(str(root))


@pytest.mark.parametrize("name", PRESETS)
def test_preset_matches_its_adapter(name, tmp_path):
    preset, family = PRESETS[name], FAMILIES[PRESETS[name].family]
    cls = adapter_class(preset.family)
    adapter = cls(checkpoint(tmp_path, preset.family, PUBLISHED[name]), dict(cls.OPTIONS))
    adapter.check_options()
    query = parse_query(family.query, family.window)
    plan = adapter.plan(family.window, query)
    assert (adapter.num_layers, adapter.channels, plan.grid) == (preset.blocks, preset.channels, preset.grid)
    assert max(preset.layers.values()) < preset.blocks
    assert plan.wanted_rows(query) == tuple(range(preset.grid[0]))
