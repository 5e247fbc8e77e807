"""Floating-point operations of one clip, in closed form from a model's configs: products and convolutions alone.

A multiplication and an addition are two. `causal` halves a decoder's attention, which a kernel may: the floor counts it
so, while torch's FlopCounterMode counts the whole square. Knows configs only; nothing here is measured.
"""

import math
from itertools import pairwise
from typing import Any

Config = dict[str, Any]


def linear(rows: int, *widths: int) -> float:
    """Of layers one after the other: rows x widths[0] -> widths[1] -> ..."""
    return sum(2.0 * rows * a * b for a, b in pairwise(widths))


def attention(queries: int, keys: int, channels: int) -> float:
    return 4.0 * queries * keys * channels


# -- Wan --------------------------------------------------------------------------------------------------------------


def wan_transformer(config: Config, depth: int, grid: tuple[int, int, int], text: int) -> float:
    """One step of the first `depth` blocks and what is around them; `text` is the prompt's tokens."""
    n, c = math.prod(grid), config["num_attention_heads"] * config["attention_head_dim"]
    patch = math.prod(config["patch_size"])
    own = 4 * linear(n, c, c) + attention(n, n, c)
    cross = 2 * linear(n, c, c) + 2 * linear(text, c, c) + attention(n, text, c)
    block = own + cross + linear(n, c, config["ffn_dim"], c)
    embeds = linear(n, config["in_channels"] * patch, c) + linear(text, config["text_dim"], c, c)
    embeds += linear(1, config["freq_dim"], c, c, 6 * c)
    return depth * block + embeds + linear(n, c, config["out_channels"] * patch)


def wan_vae(config: Config, frames: int, height: int, width: int) -> float:
    """Encoding a window untiled: frame 0 alone, then 4 at a time, so that time is halved to (frames + 1) / 2."""
    widths = [config["base_dim"] * m for m in (1, *config["dim_mult"])]
    total, f, h, w = 0.0, frames, height, width

    def conv(inside: int, outside: int, kernel: int) -> float:
        return linear(f * h * w, inside * kernel, outside)

    total += conv(3, widths[0], 27)
    for level, (inside, outside) in enumerate(pairwise(widths)):
        for number in range(config["num_res_blocks"]):
            a = inside if number == 0 else outside
            total += conv(a, outside, 27) + conv(outside, outside, 27) + (conv(a, outside, 1) if a != outside else 0)
        if level < len(config["dim_mult"]) - 1:
            h, w = h // 2, w // 2
            total += conv(outside, outside, 9)
            if config["temperal_downsample"][level]:
                f = (f - 1) // 2  # frame 0 passes the convolution in time by
                total += conv(outside, outside, 3)
                f += 1
    c, z = widths[-1], 2 * config["z_dim"]
    total += 4 * conv(c, c, 27) + conv(c, 3 * c, 1) + conv(c, c, 1) + f * attention(h * w, h * w, c)
    return total + conv(c, z, 27) + conv(z, z, 1)


# -- CogVideoX --------------------------------------------------------------------------------------------------------


def cogvideox_transformer(config: Config, depth: int, grid: tuple[int, int, int], text: int) -> float:
    """One step of one half: video and text go through the blocks together."""
    video, c, time = (
        math.prod(grid),
        config["num_attention_heads"] * config["attention_head_dim"],
        config["time_embed_dim"],
    )
    n, patch = video + text, config["patch_size"] ** 2
    block = 4 * linear(n, c, c) + attention(n, n, c) + linear(n, c, 4 * c, c) + 2 * linear(1, time, 6 * c)
    embeds = linear(video, config["in_channels"] * patch, c) + linear(text, config["text_embed_dim"], c)
    embeds += linear(1, c, time, time) + linear(1, time, 2 * c)
    return depth * block + embeds + linear(video, c, config["out_channels"] * patch)


def cogvideox_vae(config: Config, frames: int, height: int, width: int) -> float:
    """Encoding a half untiled. Averages halve time, which are not counted, then convolutions the plane."""
    widths = [config["block_out_channels"][0], *config["block_out_channels"]]
    total, f, h, w = 0.0, frames, height, width

    def conv(inside: int, outside: int, kernel: int) -> float:
        return linear(f * h * w, inside * kernel, outside)

    total += conv(3, widths[0], 27)
    for level, (inside, outside) in enumerate(pairwise(widths)):
        for number in range(config["layers_per_block"]):
            a = inside if number == 0 else outside
            total += conv(a, outside, 27) + conv(outside, outside, 27) + (conv(a, outside, 1) if a != outside else 0)
        if level < len(widths) - 2:
            f = (f + 1) // 2 if level < int(math.log2(config["temporal_compression_ratio"])) else f
            h, w = h // 2, w // 2
            total += conv(outside, outside, 9)
    c = widths[-1]
    return total + 4 * conv(c, c, 27) + conv(c, 2 * config["latent_channels"], 27)


# -- Qwen3-VL ---------------------------------------------------------------------------------------------------------


def qwen3_vl_vision(config: Config, images: int, patches: int) -> float:
    """The tower and its mergers on `images` of `patches` each; attention is within an image."""
    n, c, merged = images * patches, config["hidden_size"], config["hidden_size"] * config["spatial_merge_size"] ** 2
    pixels = 3 * config["temporal_patch_size"] * config["patch_size"] ** 2
    block = 4 * linear(n, c, c) + images * attention(patches, patches, c) + linear(n, c, config["intermediate_size"], c)
    mergers = 1 + len(config["deepstack_visual_indexes"])
    merge = linear(n * c // merged, merged, merged, config["out_hidden_size"])
    return linear(n, pixels, c) + config["depth"] * block + mergers * merge


def qwen3_vl_decoder(config: Config, depth: int, tokens: int, *, causal: bool) -> float:
    """The first `depth` blocks on a prompt of `tokens`, images and text."""
    c, head = config["hidden_size"], config["head_dim"]
    query, key = (head * config[f"num_{kind}_heads"] for kind in ("attention", "key_value"))
    block = (
        linear(tokens, c, query, c) + 2 * linear(tokens, c, key) + 3 * linear(tokens, c, config["intermediate_size"])
    )
    return depth * (block + attention(tokens, tokens, query) / (2 if causal else 1))
