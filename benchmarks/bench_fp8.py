"""What `--precision fp8` does to features: published widths, random weights, one small clip, and no GPU.

The same blocks run in bfloat16 and then with fp8 linear layers, whose products and sums are defined to the bit but for
the order of sums. Trained weights have outliers that random ones lack, so this is what rounding alone does: how much of
it a probe would see is to be measured with `engine compare` on stores of a real model.
"""

import gc
from pathlib import Path

import pytest
import torch
from bench_device import Engine
from device_subject import Sizes, Subject
from families import CPU, features, make_clip

from spatialprobe.engine.compare import Agreement
from spatialprobe.engine.device.blocks import set_up_blocks

SIZES = {  # true widths and depths, few tokens
    "wan2.1-t2v-1.3b": Sizes((96, 160), (96, 160), 9, ":", 20),
    "qwen3-vl-8b": Sizes((96, 160), (96, 160), 2, ":", 21),
}
BOUND = 0.25  # relative L2: 4% for both roundings of a product, added up at random over two parts of 22 blocks


def layers_of(deepest: int) -> list[int]:
    return [0, deepest // 2, deepest]


@pytest.mark.parametrize("name", SIZES)
def test_fp8_moves_features_by_percents(name: str, tmp_path: Path, show, record):
    sizes = SIZES[name]
    subject = Subject(name, sizes, tmp_path, CPU, dtype=torch.bfloat16)
    engine = Engine(subject)
    adapter, clip = engine.adapter, make_clip(sizes.window, sizes.source)
    step = 749 if subject.has_steps else None
    adapter.steps = () if step is None else (step,)
    layers = layers_of(sizes.layer)
    full = features(adapter, clip, layers, step=step)
    share = set_up_blocks(adapter.blocks, precision="fp8")["fp8_linears"]
    fp8 = features(adapter, clip, layers, step=step)
    found = {}
    for layer in layers:
        agreement = Agreement()
        agreement.add(full[layer], fp8[layer], "clip")
        found[layer] = {
            "relative_l2": round(agreement.relative, 5),
            "cosine_mean": round(agreement.cosine, 6),
            "cosine_worst": round(agreement.worst, 6),
        }
    lines = [f"layer {layer:2d}: " + ", ".join(f"{k} {v}" for k, v in x.items()) for layer, x in found.items()]
    show("\n".join([f"{name}, fp8 against bfloat16, {share[0]} of {share[1]} linear layers in fp8", *lines]))
    tokens = list(full[layers[0]].shape[1:4])
    record(f"fp8-{name}", {"model": name, "grid": tokens, "fp8_linears": share, "layers": found})
    assert all(0 < x["relative_l2"] < BOUND for x in found.values())
    del engine, adapter, subject
    gc.collect()
