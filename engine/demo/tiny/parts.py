"""What the builders of small random-weight checkpoints share: weights, tokenizers, folders that are never half made.

Such checkpoints hold no knowledge: their features are random projections of the pixels, good for running the engine,
timing it and comparing numbers. One file per family lies beside this one.
"""

import shutil
import string
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

# Words that become whole tokens of both tokenizers; any other text falls back to letters or bytes.
WORDS = (
    "system user assistant a the of in this is are from and photo room video image images frame frames Frame "
    "Describe The following consecutive"
).split()

# Qwen3-VL's own tokens, in the order in which the published tokenizer numbers them.
QWEN_SPECIAL_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()


def draw_weights(module: nn.Module, *, seed: int) -> None:
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


def third(module: nn.Module) -> int:
    """Bytes per shard that make about four files of the module."""
    return sum(p.numel() * p.element_size() for p in module.parameters()) // 3 + 1


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """A folder beside `path` that takes its name once the body is through, so that no half checkpoint bears it."""
    path = Path(path)
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"wanted a new or empty folder for the checkpoint, got {path}, which holds files")
    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    part.replace(path)


def t5_tokenizer() -> Any:
    """T5's class over a hand-made unigram vocabulary: words, then letters, at lower scores."""
    from transformers import T5TokenizerFast

    letters = sorted(set(string.printable) - set(string.whitespace))
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(f"▁{word}", -6.0) for word in WORDS if len(word) > 1] + [(letter, -8.0) for letter in letters]
    pieces += [(f"<extra_id_{index}>", 0.0) for index in reversed(range(100))]
    return T5TokenizerFast(vocab=pieces, model_max_length=512)


def qwen_tokenizer() -> Any:
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
