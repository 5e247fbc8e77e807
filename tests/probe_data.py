"""Small stores and ScanNet-like labels whose features hold the answer, or noise: what probes are tested on."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.types import STORE_DTYPES, FeatureSpec, FrameSelection, tensor_name
from spatialprobe.kernels.pool_features import finish
from spatialprobe.probes.labels import ScanNetLabels
from spatialprobe.probes.loading.sampling import generator

FRAMES, K, GRID, CHANNELS = 9, 6, (4, 5), 24
SAMPLING = {"views": 2, "gap": 4, "context": FRAMES, "query": "0,1::4"}  # 0, 1, 5 of 9 frames


def write_labels(root: Path, clips: int) -> ScanNetLabels:
    """Clips of which three in four are for training. Each class is there in half of them; a grid of objects."""
    root.mkdir(parents=True)
    (root / f"class_names_{K}.json").write_text(json.dumps({"names": [f"class {k}" for k in range(K)]}))
    listed = {"train": [], "val": []}
    for number in range(clips):
        split = "val" if number % 4 == 3 else "train"
        listed[split].append([split, f"clip{number:03d}"])
        folder = root / split / f"clip{number:03d}"
        folder.mkdir(parents=True)
        rng = generator("labels", number)
        counts = np.broadcast_to(rng.integers(0, 2, K) * 1000, (FRAMES, K))
        np.save(folder / f"tag_pixel_counts_{K}.npy", counts.astype(np.int32))
        cells = rng.integers(0, 4, (FRAMES, *GRID))  # 0 is no object
        np.save(folder / "instance_masks.npy", cells.repeat(2, 1).repeat(2, 2).astype(np.uint16))
        save_file({"gt_num_frames": torch.tensor(FRAMES, dtype=torch.int32)}, folder / "metadata.sft")
    for split, pairs in listed.items():
        (root / f"{split}.json").write_text(json.dumps(pairs))
    return ScanNetLabels(root, classes=K)


def write_store(root: Path, labels: ScanNetLabels, *, answers: bool = True, seed: int = 0, **fields) -> FeatureStore:
    """Features [T, 4, 5, 24] for rows 0, 1+4k of every clip: noise, and with `answers` the classes' presence in the
    first channels and the object at each token as a one-hot in the next ones."""
    about = {"family": "wan", "weights": f"content:{seed}", "layers": (3,), "pool": GRID}
    spec = FeatureSpec(**about | {"frames": FrameSelection(window=FRAMES)} | fields)
    store = FeatureStore.create(root, spec)
    rows = [(f + 3) // 4 for f in range(FRAMES)]
    first = [rows.index(row) for row in range(max(rows) + 1)]
    for clip_id in labels.ids():
        read = labels.read(clip_id, first, ("tag_pixel_counts", "instance_masks"))
        tensors = {}
        for key in spec.tensors():
            noise = generator("features", seed, clip_id, key).standard_normal((len(first), *GRID, CHANNELS))
            x = torch.from_numpy(noise.astype(np.float32))
            if answers:
                x *= 0.3
                x[..., :K] += 2.0 * (read["tag_pixel_counts"] > 0)[:, None, None]
                objects = read["instance_masks"][:, ::2, ::2].long()
                x[..., K : K + 4] += 2.0 * torch.nn.functional.one_hot(objects, 4)
            tensors |= finish(x, STORE_DTYPES[spec.dtype]).named(tensor_name(*key))
        provenance = {"grid": [len(first), *GRID], "rows_kept": list(range(len(first))), "padded": 0}
        store.write(clip_id, tensors, torch.tensor(rows), provenance)
    return FeatureStore.open(root)
