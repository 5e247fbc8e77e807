"""The models of `bench_device` at their true and at small sizes: checkpoint, clips, and the work that a clip is."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import device_flops as flops
import numpy as np
import torch
from PIL import Image
from random_checkpoint import published, with_tokens, write_hollow_checkpoint
from torch import Tensor

from spatialprobe.engine.adapter import plan_clip
from spatialprobe.engine.device.memory_plan import plan_memory
from spatialprobe.engine.job import Job
from spatialprobe.engine.parts.prompt_cache import cached, prompt_file
from spatialprobe.engine.resolve import Resolved, resolve
from spatialprobe.engine.types import COMPUTE_DTYPES
from spatialprobe.engine.words import parse_size

STUDY_QUERY = "0,1:76:4"
DISTINCT = 4  # clips on disk; the others are links to them, and are decoded as often
PROMPT_TOKENS = 226


@dataclass(frozen=True)
class Sizes:
    """One size of a model and its input."""

    size: tuple[int, int]  # pixels, height and width
    source: tuple[int, int]  # pixels of the PNG files
    window: int
    query: str
    layer: int
    pool: str = "none"  # of the timed runs: what the study's probes see
    half: int | None = None  # frames of a CogVideoX half
    smaller: dict[str, dict] = field(default_factory=dict)  # fields over the published configs


@dataclass(frozen=True)
class Model:
    family: str
    config: str  # in tests/published
    true: Sizes
    small: Sizes
    clips: int  # of a timed run
    targets: dict[str, tuple[str, float]] = field(default_factory=dict)  # on an H200: figure -> (<= or >=, bound)


def _wan(config: str, clips: int, heads: int, targets: dict) -> Model:
    transformer = {
        "num_layers": 4,
        "num_attention_heads": heads,
        "attention_head_dim": 24,
        "ffn_dim": 96,
        "text_dim": 32,
    }
    smaller = {"transformer/config.json": transformer, "vae/config.json": {"base_dim": 8, "num_res_blocks": 1}}
    true = Sizes((480, 832), (540, 960), 81, ":", 20, "15x26")
    return Model("wan", config, true, Sizes((64, 96), (72, 108), 9, ":", 1, "2x3", smaller=smaller), clips, targets)


_COGVIDEOX = {
    "transformer/config.json": {
        "num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 32, "time_embed_dim": 16,
        "text_embed_dim": 32, "sample_width": 12, "sample_height": 8,
    },
    "vae/config.json": {"block_out_channels": [8, 8, 8, 16], "layers_per_block": 1, "norm_num_groups": 2},
}  # fmt: skip
_QWEN3_VL = {
    "config.json": {
        "text_config": {
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 1024,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True,
            },
        },
        "vision_config": {
            "depth": 4, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
            "num_position_embeddings": 256, "deepstack_visual_indexes": [0, 1, 2],
        },
    },
}  # fmt: skip

MODELS = {
    "wan2.1-t2v-1.3b": _wan("wan2.1-t2v-1.3b", 12, 2, {}),
    "wan2.1-t2v-14b": _wan(
        "wan2.1-t2v-14b",
        6,
        4,
        {
            "1 step, s/clip": ("<=", 1.9),
            "4 steps, s/clip": ("<=", 6.2),
            "1 step, times the plain loop": (">=", 4.0),
            "4 steps, times the plain loop": (">=", 4.0),
            "1 step, peak GB": ("<=", 20.0),
            "4 steps, peak GB": ("<=", 20.0),
        },
    ),
    "cogvideox-5b": Model(
        "cogvideox",
        "cogvideox-5b",
        Sizes((480, 720), (540, 960), 81, STUDY_QUERY, 20, "15x22", 49),
        Sizes((64, 96), (72, 108), 17, "0,1:17:4", 1, half=9, smaller=_COGVIDEOX),
        12,
    ),
    "qwen3-vl-8b": Model(
        "qwen3_vl",
        "qwen3-vl-8b",
        Sizes((540, 960), (540, 960), 81, STUDY_QUERY, 21),
        Sizes((64, 96), (72, 108), 9, "0,1:9:4", 1, smaller=_QWEN3_VL),
        40,
        {"1 step, share of the roofline": (">=", 0.7)},
    ),
}


# -- a model, its clips and its work ----------------------------------------------------------------------------------


class Subject:
    """A model at one of its sizes in a folder of its own: a hollow checkpoint and the words of a job."""

    def __init__(
        self,
        name: str,
        sizes: Sizes,
        root: Path,
        device: torch.device,
        words: dict[str, Any] | None = None,
        dtype: torch.dtype | None = None,  # None: bfloat16, of small sizes on the CPU float32
    ):
        self.name, self.model, self.sizes, self.root, self.device = name, MODELS[name], sizes, root, device
        self.words = words or {}
        usual = torch.bfloat16 if device.type == "cuda" or sizes is self.model.true else torch.float32
        self.dtype = dtype or usual
        self.configs = published(self.model.config, sizes.smaller)
        if self.model.family == "qwen3_vl":
            self.configs = with_tokens(self.configs)
        self.folder = root / "checkpoint"
        self.folder.mkdir(parents=True)
        self.whole = write_hollow_checkpoint(self.folder, self.model.family, self.configs, self.dtype)
        self.has_steps = self.model.family != "qwen3_vl"

    def resolve(self) -> Resolved:
        options: dict[str, Any] = {"size": self.sizes.size}
        options |= {"half_frames": self.sizes.half} if self.sizes.half else {}
        options |= {"vae_tiling": False} if self.has_steps else {}
        job = Job(
            clips=str(self.clips),
            model=str(self.folder),
            out="",
            layers=[self.sizes.layer],
            window=self.sizes.window,
            query=self.sizes.query,
            pool="none",
            compute_dtype=next(name for name, dtype in COMPUTE_DTYPES.items() if dtype == self.dtype),
            options=options,
            device=str(self.device),
            **self.words,
        )
        self.job = job
        return resolve(job)

    @property
    def clips(self) -> Path:
        return self.root / "clips"

    def prompt(self) -> Tensor | None:  # [1, PROMPT_TOKENS, D], in place of a text encoder's output
        if not self.has_steps:
            return None
        config = self.configs["transformer/config.json"]
        width = config.get("text_dim") or config["text_embed_dim"]
        return torch.randn(1, PROMPT_TOKENS, width, generator=torch.Generator().manual_seed(0)).to(self.dtype)

    def cache(self, resolved: Resolved) -> Path:
        """The folder in which an adapter finds what a text encoder would have made of its prompt."""
        folder, options = self.root / "cache", resolved.adapter.options
        if (prompt := self.prompt()) is not None:
            what = (options["prompt"], options["prompt_tokens"], self.dtype)
            cached(prompt_file(folder, resolved.adapter.checkpoint, *what), lambda: {"prompt": prompt})
        return folder

    def planned_peak(self, resolved: Resolved) -> int:
        """Bytes that `engine extract --dry-run` foretells for a GPU."""
        spec = replace(resolved.spec, device="cuda", steps=(749,) if self.has_steps else (), pool=self.pool())
        batch, window = resolved.adapter.AUTO_BATCH, self.sizes.window
        return plan_memory(resolved.adapter, spec, resolved.depth, batch, window, self.cache(resolved)).peak

    def pool(self) -> tuple[int, int] | None:
        return None if self.sizes.pool == "none" else parse_size("pool", self.sizes.pool)

    def work(self, resolved: Resolved, *, causal: bool) -> dict[str, float]:
        """Flops of one clip: {"encode": once, "step": of every step}."""
        adapter, depth = resolved.adapter, resolved.depth
        plan, _ = plan_clip(self.sizes.window, adapter, resolved.spec)
        if self.model.family == "qwen3_vl":
            images, rows, columns = plan.grid
            text, vision = (self.configs["config.json"][f"{part}_config"] for part in ("text", "vision"))
            patches = rows * columns * vision["spatial_merge_size"] ** 2
            return {
                "encode": flops.qwen3_vl_vision(vision, images, patches),
                "step": flops.qwen3_vl_decoder(text, depth, self.ids(resolved).shape[1], causal=causal),
            }
        transformer, vae = adapter.config, adapter.vae_config
        if self.model.family == "wan":
            encode = flops.wan_vae(vae, 1 + 4 * (plan.grid[0] - 1), *self.sizes.size)
            return {"encode": encode, "step": flops.wan_transformer(transformer, depth, plan.grid, PROMPT_TOKENS)}
        half = (plan.grid[0] // 2, *plan.grid[1:])
        encode = flops.cogvideox_vae(vae, self.sizes.half, *self.sizes.size)
        step = flops.cogvideox_transformer(transformer, depth, half, PROMPT_TOKENS)
        return {"encode": plan.passes * encode, "step": plan.passes * step}

    def ids(self, resolved: Resolved) -> Tensor:  # [1, N], of Qwen's prompt
        from transformers import AutoTokenizer

        plan, _ = plan_clip(self.sizes.window, resolved.adapter, resolved.spec)
        tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        return tokenizer(resolved.adapter.text(plan), add_special_tokens=False, return_tensors="pt")["input_ids"]

    def write_clips(self, count: int) -> None:
        """`count` folders of PNG frames, of which DISTINCT take disk."""
        kinds = [self.root / "frames" / f"{k}" for k in range(min(DISTINCT, count))]
        with ThreadPoolExecutor() as pool:
            tuple(
                pool.map(lambda k: write_frames(kinds[k], k, self.sizes.window, self.sizes.source), range(len(kinds)))
            )
        shutil.rmtree(self.clips, ignore_errors=True)
        self.clips.mkdir()
        for number in range(count):
            (self.clips / f"clip{number:03d}").symlink_to(kinds[number % len(kinds)], target_is_directory=True)


def write_frames(folder: Path, seed: int, frames: int, size: tuple[int, int]) -> None:
    """Moving colours under grain, so that a frame takes a photograph's bytes and time to decode."""
    if folder.exists():
        return
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    wave, phase = rng.uniform(0.005, 0.05, (3, 2)), rng.uniform(0, 6, 3)
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
    for f in range(frames):
        rgb = np.stack([np.sin(wave[c, 0] * y + wave[c, 1] * x + phase[c] + 0.3 * f) for c in range(3)], -1)
        pixels = np.clip(127.5 + 120 * rgb + rng.integers(-6, 7, (*size, 1)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{f:03d}.png", compress_level=1)
