"""What all vision-language models have in common: batches, and jobs that store either tap.

That features are those of the library's whole models is tested family by family.
"""

import pytest
import torch
from families import CPU, assert_batch_agrees, make_adapter
from tiny_models import MODELS

from spatialprobe.engine.job import Job
from spatialprobe.engine.presets import VISION_LANGUAGE, adapter_class
from spatialprobe.engine.run import run_job

GRIDS = dict.fromkeys(VISION_LANGUAGE, (2, 3)) | {  # of the tiny decoders' images
    "glm4v": (3, 4),  # its processor enlarges images to a least number of pixels
    "internvl": (3, 3),
    "gemma3": (3, 3),
}


@pytest.fixture(scope="module", params=VISION_LANGUAGE)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def path(family, tmp_path_factory):
    return MODELS[family].build(tmp_path_factory.mktemp(family) / "tiny")


@pytest.mark.parametrize("tap", ["decoder", "vision"])
def test_a_batch_agrees_with_single_clips(family, path, tmp_path, tap):
    adapter = make_adapter(adapter_class(family), path, tap=tap, **MODELS[family].options)
    adapter.load(3, CPU, torch.float32, tmp_path)
    assert_batch_agrees(adapter, (0, 1, 2), query=(0, 1, 5))


@pytest.mark.parametrize("tap", ["decoder", "vision"])
def test_a_job_stores_either_tap(family, path, clips_path, tmp_path, tap):
    options = {name: "x".join(map(str, size)) for name, size in MODELS[family].options.items()} | {"tap": tap}
    words = {"clips": str(clips_path), "model": str(path), "out": str(tmp_path / "store"), "options": options}
    report, store = run_job(Job.from_words(words | {"window": 9, "query": "0,4,8", "layers": [0, 1], "limit": 2}))
    assert (report.written, report.failed) == (2, 0)
    assert (store.spec.family, store.spec.options["tap"]) == (family, tap)
    height, width = GRIDS[family]
    shape = {"decoder": (3, height, width, 64), "vision": (3, 2 * height, 2 * width, 32)}[tap]
    features = store.read("clip1", 1)
    assert features.data.shape == shape
    assert features.rows.tolist() == [0, -1, -1, -1, 1, -1, -1, -1, 2]
    assert list(store.verify()) == []
