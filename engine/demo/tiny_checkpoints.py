"""Small random-weight checkpoints in the published Hugging Face folder layout, made with the real library classes.

They hold no knowledge: their features are random projections of the pixels, good for running the engine, timing it
and comparing numbers. `TINY`, at the end because it names the builders, lists the families.
"""

import json
import math
import shutil
import string
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

# Words that become whole tokens of both tokenizers; any other text falls back to letters or bytes.
WORDS = (
    "system user assistant a the of in this is are from and photo room video image images frame frames Frame "
    "Describe The following consecutive"
).split()

WAN_SCHEDULER = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}

# Qwen3-VL's own tokens, in the order in which the published tokenizer numbers them.
QWEN_SPECIAL_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()

# One turn per message; an image or a video is one placeholder token, which the caller repeats per visual token.
QWEN3_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

QWEN3_VISION = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}
QWEN3_PIXELS = QWEN3_VISION | {
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
}
# Published repositories keep these three apart; transformers 5 would save one processor_config.json. Sizes in pixels.
QWEN3_FILES = {
    "preprocessor_config.json": QWEN3_PIXELS
    | {"size": {"shortest_edge": 65536, "longest_edge": 16777216}, "image_processor_type": "Qwen2VLImageProcessorFast"},
    "video_preprocessor_config.json": QWEN3_PIXELS
    | {"size": {"shortest_edge": 4096, "longest_edge": 25165824}, "video_processor_type": "Qwen3VLVideoProcessor"},
    "chat_template.json": {"chat_template": QWEN3_CHAT_TEMPLATE},
}


def build_wan_t2v(
    path: str | Path,
    *,
    num_layers: int = 4,
    heads: int = 2,
    head_dim: int = 24,  # a multiple of 6 splits evenly over time, rows and columns
    vae_dim: int = 8,
    shard_size: int | str | None = None,  # bytes or "5GB", of the transformer alone; None: about four files
    seed: int = 0,
) -> Path:
    """Writes a Wan 2.1 text-to-video pipeline in fp32, as published, and returns its folder.

    Features have `heads * head_dim` channels. Raises ValueError when `path` already holds something.
    """
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = _t5_tokenizer()
    with torch.random.fork_rng(devices=[]):  # the constructors draw weights too; those are all replaced below
        text_encoder = UMT5EncoderModel(
            UMT5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        )
        vae = AutoencoderKLWan(base_dim=vae_dim, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
        transformer = WanTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            ffn_dim=4 * heads * head_dim,
            num_layers=num_layers,
            text_dim=32,
        )
    _draw_weights(text_encoder, seed=seed)
    _draw_weights(vae, seed=seed)
    _keep_local_colour(vae.encoder)
    _match_latents(vae, seed=seed)
    _draw_weights(transformer, seed=seed)
    pipeline = WanPipeline(tokenizer, text_encoder, vae, UniPCMultistepScheduler(**WAN_SCHEDULER), transformer)
    with _whole_folder(path) as folder:
        pipeline.save_config(folder)
        for name in ("tokenizer", "text_encoder", "vae", "scheduler"):
            getattr(pipeline, name).save_pretrained(folder / name)
        transformer.save_pretrained(folder / "transformer", max_shard_size=shard_size or _third(transformer))
    return Path(path)


def build_qwen3_vl(
    path: str | Path,
    *,
    num_layers: int = 5,
    heads: int = 4,
    head_dim: int = 16,
    vision_layers: int = 4,  # at least 3, for DeepStack
    vision_heads: int = 2,
    vision_head_dim: int = 16,
    tie_word_embeddings: bool = False,  # False as 8B (lm_head on disk), True as 2B and 4B
    dtype: torch.dtype = torch.bfloat16,  # as published
    shard_size: int | str | None = None,  # bytes or "5GB"; None: about four files
    seed: int = 0,
) -> Path:
    """Writes a Qwen3-VL checkpoint with its tokenizer and preprocessing files and returns its folder.

    Features have `heads * head_dim` channels. Raises ValueError when `path` already holds something.
    """
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    if vision_layers < 3:
        raise ValueError(f"wanted vision_layers of at least 3 (DeepStack takes blocks 0, 1 and 2), got {vision_layers}")
    tokenizer = _qwen_tokenizer()
    height = width = 5 * head_dim // 32  # the published split of the rotary pairs is 24, 20, 20 for head_dim 128
    text = {
        "vocab_size": math.ceil(len(tokenizer) / 64) * 64,  # larger than the tokenizer's, as published
        "hidden_size": heads * head_dim,
        "intermediate_size": 3 * heads * head_dim,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "head_dim": head_dim,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [head_dim // 2 - height - width, height, width],
            "mrope_interleaved": True,
        },
    }
    vision = {
        "depth": vision_layers,
        "hidden_size": vision_heads * vision_head_dim,
        "intermediate_size": 4 * vision_heads * vision_head_dim,
        "num_heads": vision_heads,
        "patch_size": QWEN3_VISION["patch_size"],
        "temporal_patch_size": QWEN3_VISION["temporal_patch_size"],
        "spatial_merge_size": QWEN3_VISION["merge_size"],
        "out_hidden_size": heads * head_dim,
        "num_position_embeddings": 256,  # 16 x 16, resampled to each image's grid
        "deepstack_visual_indexes": [0, 1, 2],
    }
    ids = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    ids |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    config = Qwen3VLConfig(
        text_config=text | {"tie_word_embeddings": tie_word_embeddings},
        vision_config=vision,
        tie_word_embeddings=tie_word_embeddings,
        **{key: tokenizer.convert_tokens_to_ids(token) for key, token in ids.items()},
    )
    with torch.random.fork_rng(devices=[]):
        model = Qwen3VLForConditionalGeneration(config)
    _draw_weights(model, seed=seed)
    model.to(dtype)
    with _whole_folder(path) as folder:
        model.save_pretrained(folder, max_shard_size=shard_size or _third(model))
        tokenizer.save_pretrained(folder)
        for name, content in QWEN3_FILES.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    return Path(path)


def _draw_weights(module: nn.Module, *, seed: int) -> None:
    """Replaces every parameter: matrices and convolutions N(0, 1/fan-in), so that variance survives each of them.

    The libraries' own draws suit training: with std .02 a narrow block adds next to nothing to its residual stream,
    and some projections start at zero. Scales (one-dimensional weights, `gamma`) stay at the ones they start with.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if id(parameter) in embeddings or name.endswith("bias"):
                parameter.normal_(0, 0.1, generator=generator)
            elif name.endswith("scale_shift_table"):  # shift, scale and gate of a Wan block, beside the timestep's
                parameter.normal_(0, 0.3, generator=generator)
            elif parameter.squeeze().ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)


def _keep_local_colour(encoder: nn.Module) -> None:
    """Makes the kernels of a random Wan encoder averages; white ones drown the picture in aliased detail.

    Each kernel's sum is spread evenly over rows and columns and 1:3:9 over frames, the latest most: the first latent
    frame is encoded behind zero frames and would otherwise be fainter than the rest. It also skips `time_conv`,
    which therefore must not mix channels. Residual branches (they end in `conv2`) are halved.
    """
    with torch.no_grad():
        for name, conv in encoder.named_modules():
            if not isinstance(conv, nn.Conv2d | nn.Conv3d):
                continue
            total = conv.weight.flatten(2).sum(2)  # [out, in]
            if name.endswith("time_conv"):
                total = torch.eye(len(total))
                conv.bias.zero_()
            if name.endswith("conv2"):
                total = total / 2
            window = torch.ones(conv.kernel_size)
            if isinstance(conv, nn.Conv3d):
                window *= 3.0 ** torch.arange(len(window)).reshape(-1, 1, 1)
            conv.weight.copy_(total.reshape(*total.shape, *[1] * window.ndim) * window / window.sum())


def _match_latents(vae: nn.Module, *, seed: int) -> None:
    """Gives the latents of random colour patches the mean and std that the VAE's config states, per channel.

    Noise of a given sigma then hides as much of them as of the published model's. Rounded to bfloat16, so that the
    last bit of a convolution, which may vary with the thread count, does not reach the file.
    """
    colours = torch.rand(8, 3, 1, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    clips = nn.functional.interpolate(colours, size=(5, 64, 64))  # [B, C, F, H, W], nearest
    with torch.no_grad():
        std, mean = torch.std_mean(vae.encode(clips).latent_dist.mean, dim=(0, 2, 3, 4))
        conv = vae.quant_conv  # its first half makes the mean of the latents, its second half their log variance
        gain = (torch.tensor(vae.config.latents_std) / std).bfloat16().float()
        offset = torch.tensor(vae.config.latents_mean) - gain * (mean - conv.bias[: len(mean)])
        conv.weight[: len(mean)] *= gain.reshape(-1, 1, 1, 1, 1)
        conv.bias[: len(mean)] = offset.bfloat16().float()


def _third(module: nn.Module) -> int:
    """Bytes per shard that make about four files of the module."""
    return sum(p.numel() * p.element_size() for p in module.parameters()) // 3 + 1


@contextmanager
def _whole_folder(path: str | Path) -> Iterator[Path]:
    """A folder beside `path` that takes its name once the body is through, so that no half checkpoint bears it."""
    path = Path(path)
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"wanted a new or empty folder for the checkpoint, got {path}, which holds files")
    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    part.replace(path)


def _t5_tokenizer() -> Any:
    """T5's class over a hand-made unigram vocabulary: words, then letters, at lower scores."""
    from transformers import T5TokenizerFast

    letters = sorted(set(string.printable) - set(string.whitespace))
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(f"▁{word}", -6.0) for word in WORDS if len(word) > 1] + [(letter, -8.0) for letter in letters]
    pieces += [(f"<extra_id_{index}>", 0.0) for index in reversed(range(100))]
    return T5TokenizerFast(vocab=pieces, model_max_length=512)


def _qwen_tokenizer() -> Any:
    """Qwen's class over the 256 byte symbols and the merges that spell `WORDS` from left to right."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import AddedToken, Qwen2Tokenizer

    merges = {}  # a dict for its order: earlier merges win
    for word in WORDS:
        spelled = f"Ġ{word}"  # Ġ is the byte-level spelling of a space
        merges |= {(spelled[:end], spelled[end]): None for end in range(1, len(spelled))}
    symbols = sorted(ByteLevel.alphabet()) + [left + right for left, right in merges]
    vocab = {symbol: index for index, symbol in enumerate(dict.fromkeys(symbols))}
    vocab["<|endoftext|>"] = len(vocab)
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=list(merges), eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=262144
    )
    tokenizer.add_tokens([AddedToken(token, special=True) for token in QWEN_SPECIAL_TOKENS])
    return tokenizer


@dataclass(frozen=True)
class TinyFamily:
    build: Callable[..., Path]  # build(path, *, seed=0, shard_size=None, **sizes)
    small: str  # what differs from the published sizes, with the defaults


TINY = {
    "wan-t2v": TinyFamily(build_wan_t2v, "4 blocks of 2 heads x 24, VAE of 8 channels, UMT5 of 2 layers x 32"),
    "qwen3-vl": TinyFamily(build_qwen3_vl, "5 layers of 4 heads x 16, ViT of 4 layers x 32, about 400 tokens"),
}
