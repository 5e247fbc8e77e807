"""The table of presets agrees with what the adapters compute from the published configs, kept in `published/`."""

import json
from pathlib import Path

import pytest
import torch

from spatialprobe.engine.checkpoint import Checkpoint
from spatialprobe.engine.presets import FAMILIES, PRESETS, adapter_class
from spatialprobe.engine.types import parse_query

PUBLISHED = Path(__file__).parent / "published"  # per preset {file: the fields that geometry and weights depend on}


def test_every_preset_has_its_published_configs():
    assert sorted(path.stem for path in PUBLISHED.iterdir()) == sorted(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_matches_its_adapter(name, tmp_path):
    preset, family = PRESETS[name], FAMILIES[PRESETS[name].family]
    for file, content in json.loads((PUBLISHED / f"{name}.json").read_text()).items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(json.dumps(content))
    cls = adapter_class(preset.family)
    adapter = cls(Checkpoint.open(str(tmp_path)), cls.OPTIONS | preset.options)
    adapter.check_options()
    adapter.steps = () if family.default_step is None else (family.default_step,)
    query = parse_query(family.query, family.window)
    plan = adapter.plan(family.window, query)
    assert (adapter.num_layers, adapter.channels, plan.grid) == (preset.blocks, preset.channels, preset.grid)
    assert max(preset.layers.values(), default=0) < preset.blocks
    assert plan.wanted_rows(query) == tuple(range(preset.grid[0]))
    one, two = (adapter.weight_bytes(depth, torch.bfloat16) / 1e9 for depth in (1, 2))
    before, block = preset.weights
    assert (before, block) == pytest.approx((2 * one - two, two - one), rel=0.02, abs=0.006)
