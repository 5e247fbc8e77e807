"""Every model and family we know, in two tables. Another size of a known family is one more line.

`layer` i is the output of block i (transformers calls the same tensor hidden_states[i + 1]). `step` is an index into
the schedule of 1000 steps, noisiest first: Wan's step 749 is timestep 502. Importing this is quick: no torch.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spatialprobe.engine.adapter import Adapter
    from spatialprobe.engine.checkpoint import Checkpoint


@dataclass(frozen=True)
class Family:
    adapter: str  # "module:Class", imported when a model of the family is used
    marks: tuple[str, ...]  # `_class_name` in model_index.json or `model_type` in config.json
    window: int  # frames, as in the published study
    query: str  # frames of the window whose features are wanted
    default_step: int | None = None


STUDY_QUERY = "0,1:76:4"  # 0, 1, 5, ..., 73

FAMILIES = {
    "wan": Family("spatialprobe.engine.adapters.wan:Wan", ("WanPipeline",), 81, ":", 749),
    "qwen3_vl": Family("spatialprobe.engine.adapters.qwen3_vl:Qwen3VL", ("qwen3_vl",), 81, STUDY_QUERY),
}


@dataclass(frozen=True)
class Preset:
    family: str
    repo: str  # Hugging Face id
    blocks: int
    channels: int
    layers: dict[str, int]  # probe task -> block the published study used
    grid: tuple[int, int, int]  # (T, H, W) tokens at the family's default window and size
    pool: tuple[int, int] | None = None  # token grid the study's probes see; None is the model's own


def _wan(repo: str, blocks: int, channels: int) -> Preset:
    layers = {"tagging": 18, "instance": 18, "geometry": 20}
    return Preset("wan", repo, blocks, channels, layers, (21, 30, 52), (15, 26))


def _qwen3_vl(repo: str, blocks: int, channels: int) -> Preset:
    layers = dict.fromkeys(("tagging", "instance", "geometry"), 21)  # the study's hidden_states[22]
    return Preset("qwen3_vl", repo, blocks, channels, layers, (20, 17, 30))


PRESETS = {
    "wan2.1-t2v-1.3b": _wan("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 30, 1536),
    "wan2.1-t2v-14b": _wan("Wan-AI/Wan2.1-T2V-14B-Diffusers", 40, 5120),
    "qwen3-vl-2b": _qwen3_vl("Qwen/Qwen3-VL-2B-Instruct", 28, 2048),
    "qwen3-vl-4b": _qwen3_vl("Qwen/Qwen3-VL-4B-Instruct", 36, 2560),
    "qwen3-vl-8b": _qwen3_vl("Qwen/Qwen3-VL-8B-Instruct", 36, 4096),
}


def adapter_class(family: str) -> "type[Adapter]":
    module, name = FAMILIES[family].adapter.split(":")
    return getattr(import_module(module), name)


def detect_family(checkpoint: "Checkpoint") -> str:
    """The family of a checkpoint, by what its own configs call it. Raises ValueError for one we do not know."""
    marks = []
    for file, key in (("model_index.json", "_class_name"), ("config.json", "model_type")):
        if checkpoint.has(file):
            marks.append(checkpoint.json(file).get(key))
    for name, family in FAMILIES.items():
        if any(mark in family.marks for mark in marks):
            return name
    known = ", ".join(mark for family in FAMILIES.values() for mark in family.marks)
    raise ValueError(
        f"{checkpoint.root} says it is {marks[0] if marks else 'nothing'} "
        f"(model_index.json or config.json); known are {known}"
    )
