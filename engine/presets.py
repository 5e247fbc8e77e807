"""Every model and family we know, in tables. Another size of a known family is one more line.

`layer` i is the output of block i (transformers calls the same tensor hidden_states[i + 1]). `step` is an index into
the schedule of 1000 steps, noisiest first: Wan's step 749 is timestep 502. Importing this is quick: no torch.
"""

import math
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spatialprobe.engine.adapter import Adapter
    from spatialprobe.engine.checkpoint import Checkpoint


@dataclass(frozen=True)
class Family:
    adapter: str  # "module:Class" in `adapters`, imported when a model of the family is used
    marks: tuple[str, ...]  # `_class_name` in model_index.json or `model_type` in config.json; none: --family says it
    window: int  # frames, as in the published study
    query: str  # frames of the window whose features are wanted
    default_step: int | None = None


STUDY_QUERY = "0,1:76:4"  # 0, 1, 5, ..., 73

GENERATORS = {  # of videos
    "wan": Family("wan:Wan", ("WanPipeline",), 81, ":", 749),
    "wan_i2v": Family("wan:WanI2V", ("WanImageToVideoPipeline",), 81, ":", 749),
    "cogvideox": Family("cogvideox:CogVideoX", ("CogVideoXPipeline", "CogVideoXImageToVideoPipeline"), 97, ":", 749),
    "aether": Family("aether:Aether", (), 81, ":", 749),
    # 129 frames, of which the study kept the rows of the first 81; step 750 is its t = .25, before the shift
    "open_sora": Family("open_sora:OpenSora", (), 129, ":81", 750),
    # the other schedules' default steps have as much noise as Wan's 749: about half
    "hunyuan_video": Family("hunyuan_video:HunyuanVideo", ("HunyuanVideoPipeline",), 81, ":", 874),
    "ltx": Family("ltx:LTX", ("LTXPipeline",), 81, ":", 898),
    "mochi": Family("mochi:Mochi", ("MochiPipeline",), 81, ":", 847),
    "cosmos": Family("cosmos:Cosmos", ("Cosmos2VideoToWorldPipeline",), 81, ":", 596),
}
VISION_LANGUAGE = {
    "qwen2_5_vl": Family("qwen2_5_vl:Qwen25VL", ("qwen2_5_vl",), 81, STUDY_QUERY),
    "qwen3_vl": Family("qwen3_vl:Qwen3VL", ("qwen3_vl",), 81, STUDY_QUERY),
    "qwen3_vl_moe": Family("qwen3_vl_moe:Qwen3VLMoe", ("qwen3_vl_moe",), 81, STUDY_QUERY),
    "qwen3_5": Family("qwen3_5:Qwen35", ("qwen3_5",), 81, STUDY_QUERY),
    "internvl": Family("internvl:InternVL", ("internvl", "internvl_chat"), 81, STUDY_QUERY),
    "llava_onevision": Family("llava_onevision:LlavaOneVision", ("llavaonevision1_5",), 81, STUDY_QUERY),
    "glm4v": Family("glm4v:Glm4v", ("glm4v",), 81, STUDY_QUERY),
    "gemma3": Family("gemma3:Gemma3", ("gemma3",), 81, STUDY_QUERY),
}
ENCODERS = {  # of images and videos
    "clip": Family("clip:CLIP", ("clip", "clip_vision_model"), 81, STUDY_QUERY),
    "siglip": Family("siglip:SigLIP", ("siglip", "siglip_vision_model"), 81, STUDY_QUERY),
    "siglip2": Family("siglip2:SigLIP2", ("siglip2", "siglip2_vision_model"), 81, STUDY_QUERY),
    "aimv2": Family("aimv2:AIMv2", ("aimv2", "aimv2_vision_model"), 81, STUDY_QUERY),
    "dinov2": Family("dinov2:DINOv2", ("dinov2", "dinov2_with_registers"), 81, STUDY_QUERY),
    "dinov3": Family("dinov3:DINOv3", ("dinov3_vit",), 81, STUDY_QUERY),
    "vjepa2": Family("vjepa2:VJEPA2", ("vjepa2",), 64, ":"),  # as pretrained
    "videomae": Family("videomae:VideoMAE", ("videomae",), 16, ":"),  # takes no other
}
FAMILIES = GENERATORS | VISION_LANGUAGE | ENCODERS


@dataclass(frozen=True)
class Preset:
    family: str
    repo: str  # Hugging Face id
    blocks: int
    channels: int
    layers: dict[str, int]  # probe task -> block the published study used; empty for a model it did not have
    grid: tuple[int, int, int]  # (T, H, W) tokens that are kept at the family's default window, query and size
    weights: tuple[float, float]  # GB in bfloat16: what runs before the blocks, and one block
    pool: tuple[int, int] | None = None  # token grid the study's probes see; None is the model's own
    options: dict[str, Any] = field(
        default_factory=dict
    )  # of the family, where this model wants other than its defaults
    later: tuple[int, float] | None = None  # where blocks are of two kinds: the first of the second, and GB of each

    @property
    def clip_bytes(self) -> int:
        """Of one clip's features of one layer and step in float16."""
        rows, *grid = self.grid
        return 2 * rows * math.prod(self.pool or grid) * self.channels

    def memory_gb(self, layer: int) -> float:
        """Weights on the device, in bfloat16, to run up to block `layer`."""
        depth = layer + 1
        first, later = self.later or (depth, 0.0)
        return self.weights[0] + min(depth, first) * self.weights[1] + max(0, depth - first) * later


def _wan(repo: str, blocks: int, channels: int, weights: tuple[float, float], family: str = "wan", **options) -> Preset:
    layers = {"tagging": 18, "instance": 18, "geometry": 20}
    return Preset(family, repo, blocks, channels, layers, (21, 30, 52), weights, (15, 26), options)


def _cogvideox(repo: str, blocks: int, channels: int, weights: tuple[float, float]) -> Preset:
    layers = {"tagging": 18, "instance": 18, "geometry": 20}
    return Preset("cogvideox", repo, blocks, channels, layers, (26, 30, 45), weights, (15, 22))


def _qwen3_vl(repo: str, blocks: int, channels: int, weights: tuple[float, float]) -> Preset:
    layers = dict.fromkeys(("tagging", "instance", "geometry"), 21)  # the study's hidden_states[22]
    return Preset("qwen3_vl", repo, blocks, channels, layers, (20, 17, 30), weights)


def _qwen2_5_vl(repo: str, blocks: int, channels: int, weights: tuple[float, float]) -> Preset:
    layers = dict.fromkeys(("tagging", "instance", "geometry"), 20)  # the study's hidden_states[21]
    return Preset("qwen2_5_vl", repo, blocks, channels, layers, (20, 19, 34), weights)


def _qwen3_5(repo: str, blocks: int, channels: int, weights: tuple[float, float]) -> Preset:
    return Preset("qwen3_5", repo, blocks, channels, {}, (20, 17, 30), weights)


def _internvl(repo: str, blocks: int, channels: int, layer: int, weights: tuple[float, float]) -> Preset:
    layers = dict.fromkeys(("tagging", "instance", "geometry"), layer)  # one below the study's hidden_states
    return Preset("internvl", repo, blocks, channels, layers, (20, 16, 16), weights)


PRESETS = {
    # the study's 18 models
    "wan2.1-t2v-1.3b": _wan("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 30, 1536, (0.16, 0.093), flow_shift=3.0),
    "wan2.1-t2v-14b": _wan("Wan-AI/Wan2.1-T2V-14B-Diffusers", 40, 5120, (0.57, 0.703), flow_shift=3.0),
    "wan2.1-i2v-14b": _wan("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", 40, 5120, (1.81, 0.808), "wan_i2v"),
    "cogvideox-2b": _cogvideox("THUDM/CogVideoX-2b", 30, 1920, (0.21, 0.112)),
    "cogvideox-5b": _cogvideox("THUDM/CogVideoX-5b", 42, 3072, (0.22, 0.264)),
    "cogvideox-5b-i2v": _cogvideox("THUDM/CogVideoX-5b-I2V", 42, 3072, (0.22, 0.264)),
    "open-sora-2": Preset(
        "open_sora",
        "hpcai-tech/Open-Sora-v2",
        57,
        3072,
        {"tagging": 37, "instance": 37, "geometry": 39},  # the study's single blocks 18 and 20, after 19 double ones
        (21, 30, 53),
        (0.27, 0.680),
        (15, 26),
        later=(19, 0.283),
    ),
    "aether": Preset(
        "aether",
        "AetherWorldModel/AetherV1",
        42,
        3072,
        {"tagging": 18, "instance": 18, "geometry": 20},
        (22, 30, 45),
        (11.33, 0.0),  # its reconstruction runs every block
        (15, 22),
    ),
    "internvl3-1b": _internvl("OpenGVLab/InternVL3-1B-hf", 24, 896, 20, (0.89, 0.030)),
    "internvl3-2b": _internvl("OpenGVLab/InternVL3-2B-hf", 28, 1536, 20, (1.09, 0.094)),
    "internvl3-8b": _internvl("OpenGVLab/InternVL3-8B-hf", 28, 3584, 17, (1.75, 0.466)),
    "internvl3.5-4b": _internvl("OpenGVLab/InternVL3_5-4B-HF", 36, 2560, 21, (1.42, 0.202)),
    "internvl3.5-8b": _internvl("OpenGVLab/InternVL3_5-8B-HF", 36, 4096, 21, (1.92, 0.386)),
    "qwen2.5-vl-3b": _qwen2_5_vl("Qwen/Qwen2.5-VL-3B-Instruct", 36, 2048, (1.96, 0.154)),
    "qwen2.5-vl-7b": _qwen2_5_vl("Qwen/Qwen2.5-VL-7B-Instruct", 28, 3584, (2.44, 0.466)),
    "qwen3-vl-2b": _qwen3_vl("Qwen/Qwen3-VL-2B-Instruct", 28, 2048, (1.44, 0.101)),
    "qwen3-vl-4b": _qwen3_vl("Qwen/Qwen3-VL-4B-Instruct", 36, 2560, (1.61, 0.202)),
    "qwen3-vl-8b": _qwen3_vl("Qwen/Qwen3-VL-8B-Instruct", 36, 4096, (2.40, 0.386)),
    # other video generators
    "wan2.2-ti2v-5b": Preset("wan", "Wan-AI/Wan2.2-TI2V-5B-Diffusers", 30, 3072, {}, (21, 15, 26), (0.48, 0.327)),
    # weights are those of one expert: by default step 749 runs the low-noise one alone
    "wan2.2-t2v-a14b": Preset("wan", "Wan-AI/Wan2.2-T2V-A14B-Diffusers", 40, 5120, {}, (21, 30, 52), (0.57, 0.703)),
    "wan2.2-i2v-a14b": Preset("wan_i2v", "Wan-AI/Wan2.2-I2V-A14B-Diffusers", 40, 5120, {}, (21, 30, 52), (0.57, 0.703)),
    "cogvideox1.5-5b": Preset(
        "cogvideox", "THUDM/CogVideoX1.5-5B", 42, 3072, {}, (14, 48, 85), (0.22, 0.264), options={"size": (768, 1360)}
    ),
    "ltx-video": Preset("ltx", "Lightricks/LTX-Video", 28, 2048, {}, (11, 16, 22), (0.45, 0.134)),
    "mochi-1": Preset("mochi", "genmo/mochi-1-preview", 48, 3072, {}, (15, 30, 53), (0.39, 0.415)),
    "cosmos-predict2-2b": Preset(
        "cosmos", "nvidia/Cosmos-Predict2-2B-Video2World", 28, 2048, {}, (21, 44, 80), (0.14, 0.138)
    ),
    "cosmos-predict2-14b": Preset(
        "cosmos", "nvidia/Cosmos-Predict2-14B-Video2World", 36, 5120, {}, (21, 44, 80), (0.33, 0.786)
    ),
    "hunyuanvideo": Preset(
        "hunyuan_video",
        "hunyuanvideo-community/HunyuanVideo",
        60,
        3072,
        {},
        (21, 30, 52),
        (0.92, 0.680),
        later=(20, 0.283),
    ),
    # other vision-language models
    "qwen3-vl-30b-a3b": Preset(
        "qwen3_vl_moe", "Qwen/Qwen3-VL-30B-A3B-Instruct", 48, 2048, {}, (20, 17, 30), (1.70, 1.246)
    ),
    "qwen3.5-0.8b": _qwen3_5("Qwen/Qwen3.5-0.8B", 24, 1024, (0.71, 0.043)),
    "qwen3.5-4b": _qwen3_5("Qwen/Qwen3.5-4B", 32, 2560, (1.94, 0.226)),
    "qwen3.5-9b": _qwen3_5("Qwen/Qwen3.5-9B", 32, 4096, (2.95, 0.437)),
    "qwen3.5-27b": _qwen3_5("Qwen/Qwen3.5-27B", 64, 5120, (3.46, 0.767)),
    "glm-4.1v-9b": Preset("glm4v", "zai-org/GLM-4.1V-9B-Thinking", 40, 4096, {}, (20, 19, 34), (3.03, 0.408)),
    "llava-onevision-1.5-8b": Preset(
        "llava_onevision", "lmms-lab/LLaVA-OneVision-1.5-8B-Instruct", 36, 4096, {}, (20, 19, 34), (1.92, 0.386)
    ),
    "gemma-3-4b": Preset("gemma3", "google/gemma-3-4b-it", 34, 2560, {}, (20, 16, 16), (2.18, 0.189)),
    "gemma-3-12b": Preset("gemma3", "google/gemma-3-12b-it", 48, 3840, {}, (20, 16, 16), (2.86, 0.448)),
    # encoders
    "clip-vit-large-14": Preset("clip", "openai/clip-vit-large-patch14", 24, 1024, {}, (20, 16, 16), (0.002, 0.0252)),
    "siglip-so400m-14-384": Preset(
        "siglip", "google/siglip-so400m-patch14-384", 27, 1152, {}, (20, 27, 27), (0.003, 0.0305)
    ),
    "siglip2-so400m-14-384": Preset(
        "siglip", "google/siglip2-so400m-patch14-384", 27, 1152, {}, (20, 27, 27), (0.003, 0.0305)
    ),
    "siglip2-so400m-16-naflex": Preset(
        "siglip2", "google/siglip2-so400m-patch16-naflex", 27, 1152, {}, (20, 12, 21), (0.003, 0.0305)
    ),
    "aimv2-large-14-224": Preset("aimv2", "apple/aimv2-large-patch14-224", 24, 1024, {}, (20, 16, 16), (0.002, 0.0257)),
    "dinov2-large": Preset("dinov2", "facebook/dinov2-large", 24, 1024, {}, (20, 16, 16), (0.004, 0.0252)),
    "dinov2-reg-large": Preset(
        "dinov2", "facebook/dinov2-with-registers-large", 24, 1024, {}, (20, 16, 16), (0.004, 0.0252)
    ),
    "dinov3-vitl16": Preset(
        "dinov3", "facebook/dinov3-vitl16-pretrain-lvd1689m", 24, 1024, {}, (20, 14, 14), (0.002, 0.0252)
    ),
    "vjepa2-vitl-256": Preset("vjepa2", "facebook/vjepa2-vitl-fpc64-256", 24, 1024, {}, (32, 16, 16), (0.003, 0.0252)),
    "videomae-large": Preset("videomae", "MCG-NJU/videomae-large", 24, 1024, {}, (8, 14, 14), (0.003, 0.0252)),
}

TEACHERS = {  # depth models for `engine targets` -> Hugging Face id
    "depth-anything-v2": "depth-anything/Depth-Anything-V2-Metric-Indoor-Large-hf",
    "depth-pro": "apple/DepthPro-hf",
    "zoedepth": "Intel/zoedepth-nyu-kitti",
}

LEFT_OUT = {  # models that were asked for and cannot be had -> why
    "vggt": "no class in the installed libraries; label files that were made with it are read as they are",
}


def encoder_layers(blocks: int) -> tuple[int, int]:
    """Of an encoder, as long as nobody says: the block three quarters of the way up, and the last.

    Our choice, for the study had no encoders; a share of the depth, so that encoders of other depths compare.
    """
    return -(-3 * blocks // 4) - 1, blocks - 1


def adapter_class(family: str) -> "type[Adapter]":
    module, name = FAMILIES[family].adapter.split(":")
    return getattr(import_module(f"spatialprobe.engine.adapters.{module}"), name)


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
        f"(model_index.json or config.json); known are {known}; or name the family with --family"
    )
