"""Which probe is drawn, what the layer x step map holds, and how predicted depth is scaled, before it is drawn."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from spatialprobe.probes import pictures
from spatialprobe.probes.results import Result


def result(task: str, metrics: dict[str, float], *, layer: int = 1, step: int | None = None, number: int = 0) -> Result:
    config = {"layer": layer, "step": step, "seed": number, "options": {}}
    return Result(task, config, metrics, 0, [], "", [], [[0, layer, step]], "labels", 1, 1, 0.0)


@pytest.mark.parametrize("task", ["instance", "geometry"])
def test_the_probe_of_the_least_loss_is_drawn(task, tmp_path, monkeypatch):
    results = [result(task, {}), *(result(task, {"loss": x}, number=i) for i, x in enumerate((0.5, 0.2, 0.9)))]
    chosen = []
    monkeypatch.setattr(pictures, "_first_clip", lambda file, *_: chosen.append(file.name) or [file])
    monkeypatch.setitem(pictures.DRAWN, task, lambda folder, file: [folder / "drawn.png"])
    assert pictures.draw_run(tmp_path, results, [], None) == [tmp_path / "drawn.png"]
    assert chosen == ["probe-002.safetensors"]


@pytest.mark.parametrize(
    ("task", "metric", "expected"),
    [("tagging", "AP_head", [[0.4, np.nan], [0.1, 0.3]]), ("instance", "T-mIoU", [[0.4, np.nan], [0.1, 0.3]])],
)
def test_the_map_holds_the_best_of_each_layer_and_step(task, metric, expected, tmp_path, monkeypatch):
    points = [(3, 900, 0.3), (1, 749, 0.2), (3, 749, 0.1), (1, 749, 0.4), (3, 900, 0.25)]
    results = [
        result(task, {metric: x, "loss": x}, layer=layer, step=step, number=i)
        for i, (layer, step, x) in enumerate(points)
    ]
    maps = []
    monkeypatch.setattr(pictures, "layer_step_figure", lambda *args, **more: maps.append((args, more)))
    monkeypatch.setattr(pictures, "DRAWN", {})
    assert pictures.draw_run(tmp_path, results, [], None) == [tmp_path / "layers.png"]
    ((values, layers, steps, _), more) = maps[0]
    np.testing.assert_array_equal(values, expected)
    assert (layers, steps, more) == ([1, 3], [749, 900], {"metric": metric})


def test_predicted_depth_is_drawn_at_the_median_of_the_true_one_where_that_is_known(tmp_path, monkeypatch):
    truth = torch.rand(1, 2, 3, 4, generator=torch.Generator().manual_seed(0)) + 0.5
    valid = torch.ones(1, 2, 3, 4, dtype=torch.bool)
    valid[0, 0, 0] = False
    predicted = 3 * truth
    predicted[0, 0, 0] = 100.0
    points = torch.randn(1, 2, 3, 4, 3, generator=torch.Generator().manual_seed(1))
    points[0, 1, 2, 3, 0] = torch.inf
    task = SimpleNamespace(targets=lambda labels, config, facts: {"valid": valid, "depth": truth})
    batch = SimpleNamespace(labels={}, frames=torch.tensor([[0, 5]]), ids=["a"])
    drawn = []
    monkeypatch.setattr(pictures, "depth_figure", lambda *args, **more: drawn.append(args))
    made = pictures._draw_geometry(
        Path(tmp_path),
        SimpleNamespace(task=task, config=None, facts=None),
        batch,
        {"depth": predicted, "points": points},
    )
    assert [path.name for path in made] == ["depth.png", "points.ply"]
    np.testing.assert_allclose(drawn[0][2][valid[0]], truth[valid], rtol=1e-6)
    assert b"element vertex 23\n" in (tmp_path / "points.ply").read_bytes()
