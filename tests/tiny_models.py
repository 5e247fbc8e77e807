"""A tiny checkpoint of every family, and the words that make a small job of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from families import CPU, make_adapter

from spatialprobe.engine.adapter import Adapter
from spatialprobe.engine.checkpoint import Checkpoint
from spatialprobe.engine.presets import adapter_class, detect_family

DEMO = "spatialprobe.engine.demo.tiny"  # of two families, and what benchmarks use; the others are in tests/tiny
OF_DEMO = ("wan", "cogvideox", "qwen3_vl")


@dataclass(frozen=True)
class Tiny:
    builder: str  # "module:function"
    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    frames: int = 9
    step: int | None = None
    query: tuple[int, ...] | None = None  # None: every frame
    family: str | None = None  # where its configs do not say
    base: "Tiny | None" = None  # Aether's other checkpoint

    def build(self, root: Path) -> Path:
        module, name = self.builder.split(":")
        function: Callable = getattr(import_module(f"{DEMO if module in OF_DEMO else 'tiny'}.{module}"), name)
        return function(root, *self.arguments)

    def load(self, root: Path, dtype: torch.dtype = torch.float32) -> Adapter:
        """Builds it in `root`, which must be empty, and loads all of its blocks."""
        path, options = self.build(root / "model"), dict(self.options)
        if self.base is not None:
            options["base"] = str(self.base.build(root / "base"))
        family = self.family or detect_family(Checkpoint.open(str(path)))
        adapter = make_adapter(adapter_class(family), path, **options)
        adapter.check_options()
        adapter.steps = () if self.step is None else (self.step,)
        adapter.load(adapter.num_layers, CPU, dtype, root / "cache")
        return adapter


def _images(builder: str, *size: int) -> Tiny:
    return Tiny(builder, options={"size": size} if size else {}, query=(0, 1, 5))


def _encoder(name: str, query: tuple[int, ...] | None = (0, 1, 5)) -> Tiny:
    return Tiny("encoders:build_encoder", (name,), frames=8, query=query)


_VIDEO, _HALVES = {"size": (32, 48)}, {"size": (64, 96), "half_frames": 9}

MODELS = {
    "wan": Tiny("wan:build_wan_t2v", (), {"size": (64, 96)}, step=749),
    "wan-2.2": Tiny("wan:build_wan_experts", (), {"size": (64, 96)}, step=749),
    "wan_i2v": Tiny("wan:build_wan_i2v", (), {"size": (64, 96)}, step=749),
    "cogvideox-2b": Tiny("cogvideox:build_cogvideox", ("2b",), _HALVES, 17, 749),
    "cogvideox-5b": Tiny("cogvideox:build_cogvideox", ("5b",), _HALVES, 17, 749),
    "aether": Tiny(
        "cogvideox:build_aether",
        (),
        _HALVES,
        17,
        749,
        family="aether",
        base=Tiny("cogvideox:build_cogvideox", ("5b-i2v",)),
    ),
    "open_sora": Tiny("open_sora:build_open_sora", (), _VIDEO, step=750, family="open_sora"),
    "hunyuan_video": Tiny("hunyuan_video:build_hunyuan_video", (), _VIDEO, step=749),
    "ltx": Tiny("ltx:build_ltx", (), {"size": (64, 96)}, step=749),
    "mochi": Tiny("mochi:build_mochi", (), _VIDEO, step=749),
    "cosmos": Tiny("cosmos:build_cosmos", (), _VIDEO, step=596),
    "qwen2_5_vl": _images("qwen2_5_vl:build_qwen2_5_vl", 56, 84),
    "qwen3_vl": _images("qwen3_vl:build_qwen3_vl", 64, 96),
    "qwen3_vl_moe": _images("qwen3_vl_moe:build_qwen3_vl_moe", 64, 96),
    "qwen3_5": _images("qwen3_5:build_qwen3_5", 64, 96),
    "internvl": _images("internvl:build_internvl"),
    "llava_onevision": _images("llava_onevision:build_llava_onevision", 56, 84),
    "glm4v": _images("glm4v:build_glm4v", 56, 84),
    "gemma3": _images("gemma3:build_gemma3"),
    "clip": _encoder("clip"),
    "siglip": _encoder("siglip"),
    "siglip2": _encoder("siglip2"),
    "aimv2": _encoder("aimv2"),
    "dinov2": _encoder("dinov2"),
    "dinov3": _encoder("dinov3"),
    "vjepa2": _encoder("vjepa2", None),
    "videomae": _encoder("videomae", None),
}
