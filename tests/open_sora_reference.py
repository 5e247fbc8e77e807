"""Open-Sora 2.0's transformer written twice more, to compare with: slowly in float64, and as diffusers' Flux.

The first follows the paper head by head and token by token. The second renames the weights for a library's model of
the same architecture: Flux pairs a head's channels 2i and 2i + 1, the released file i and i + D/2.
"""

import cmath
import math

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].double().T + weights[f"{name}.bias"].double()


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu_tanh(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def standardise(token: Tensor) -> Tensor:
    centred = token - token.sum() / len(token)
    return centred / torch.sqrt((centred**2).sum() / len(token) + 1e-6)


def shifted(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.stack([standardise(token) * (1 + scale) + shift for token in tokens])


def turned(vector: Tensor, scale: Tensor, place: tuple[int, int, int]) -> list[complex]:
    """A head's query or key, normalised, as D/2 complex numbers turned by the angles of its place."""
    half = len(vector) // 2
    vector = vector / torch.sqrt((vector**2).sum() / len(vector) + 1e-6) * scale.double()
    shares = [2 * half // 8, 7 * half // 8, 7 * half // 8]
    angles = [at * 10_000 ** (-2 * i / n) for at, n in zip(place, shares, strict=True) for i in range(n // 2)]
    return [complex(vector[i], vector[i + half]) * cmath.exp(1j * angles[i]) for i in range(half)]


def attention(
    q: Tensor, k: Tensor, v: Tensor, norms: list[tuple[Tensor, Tensor]], places: list[tuple[int, int, int]], head: int
) -> Tensor:
    out = torch.zeros_like(v)
    for begin in range(0, q.shape[1], head):
        of = slice(begin, begin + head)
        queries = [turned(x[of], norms[n][0], places[n]) for n, x in enumerate(q)]
        keys = [turned(x[of], norms[n][1], places[n]) for n, x in enumerate(k)]
        for n, query in enumerate(queries):
            scores = [sum((a * b.conjugate()).real for a, b in zip(query, key, strict=True)) for key in keys]
            powers = [math.exp(score / math.sqrt(head)) for score in scores]
            out[n, of] = sum(p * x[of] for p, x in zip(powers, v, strict=True)) / sum(powers)
    return out


def slow(
    weights: Weights,
    patches: Tensor,  # of one clip: [N, 64]
    condition: Tensor,
    text: Tensor,
    pooled: Tensor,
    time: float,
    grid: tuple[int, int, int],
    head: int,
) -> list[Tensor]:
    """The video tokens after every block, float64."""
    patches, condition, text, pooled = (x.double() for x in (patches, condition, text, pooled))
    video = linear(weights, "img_in", patches) + linear(weights, "cond_in", condition)
    text = linear(weights, "txt_in", text)
    angles = [1000 * time * 10_000 ** (-i / 128) for i in range(128)]
    waves = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles], dtype=torch.float64)
    vector = sum(
        linear(weights, f"{name}.out_layer", silu(linear(weights, f"{name}.in_layer", x)))
        for name, x in (("time_in", waves), ("vector_in", pooled))
    )
    places = [(0, 0, 0)] * len(text)
    places += [(t, y, x) for t in range(grid[0]) for y in range(grid[1]) for x in range(grid[2])]
    outputs = []
    for i in range(count(weights, "double_blocks")):
        video, text = slow_double(weights, f"double_blocks.{i}", video, text, vector, places, head)
        outputs.append(video)
    tokens = torch.cat([text, video])
    for i in range(count(weights, "single_blocks")):
        tokens = slow_single(weights, f"single_blocks.{i}", tokens, vector, places, head)
        outputs.append(tokens[len(text) :])
    return outputs


def count(weights: Weights, kind: str) -> int:
    return len({name.split(".")[1] for name in weights if name.startswith(kind)})


def slow_double(weights, block, video, text, vector, places, head):
    streams = {"txt": text, "img": video}
    mods, projected, norms = {}, {"q": [], "k": [], "v": []}, []
    for s, x in streams.items():
        mods[s] = linear(weights, f"{block}.{s}_mod.lin", silu(vector)).chunk(6)
        x = shifted(x, mods[s][0], mods[s][1])
        for part in "qkv":
            projected[part].append(linear(weights, f"{block}.{s}_attn.{part}_proj", x))
        norm = [weights[f"{block}.{s}_attn.norm.{part}_norm.scale"] for part in ("query", "key")]
        norms += [tuple(norm)] * len(x)
    attended = attention(*(torch.cat(projected[part]) for part in "qkv"), norms, places, head)
    parts = {"txt": attended[: len(text)], "img": attended[len(text) :]}
    for s, x in streams.items():
        x = x + mods[s][2] * linear(weights, f"{block}.{s}_attn.proj", parts[s])
        hidden = gelu_tanh(linear(weights, f"{block}.{s}_mlp.0", shifted(x, mods[s][3], mods[s][4])))
        streams[s] = x + mods[s][5] * linear(weights, f"{block}.{s}_mlp.2", hidden)
    return streams["img"], streams["txt"]


def slow_single(weights, block, tokens, vector, places, head):
    shift, scale, gate = linear(weights, f"{block}.modulation.lin", silu(vector)).chunk(3)
    x = shifted(tokens, shift, scale)
    q, k = (linear(weights, f"{block}.{part}_proj", x) for part in "qk")
    both = linear(weights, f"{block}.v_mlp", x)
    v, hidden = both[:, : q.shape[1]], both[:, q.shape[1] :]
    norm = tuple(weights[f"{block}.norm.{part}_norm.scale"] for part in ("query", "key"))
    attended = attention(q, k, v, [norm] * len(x), places, head)
    return tokens + gate * linear(weights, f"{block}.linear2", torch.cat([attended, gelu_tanh(hidden)], dim=1))


# -- the same as diffusers' Flux ------------------------------------------------------------------------------------


def flux(weights: Weights, head: int):
    """FluxTransformer2DModel whose image tokens are patches and condition side by side."""
    from diffusers import FluxTransformer2DModel

    width, patch = weights["img_in.weight"].shape
    double, single = count(weights, "double_blocks"), count(weights, "single_blocks")
    model = FluxTransformer2DModel(
        in_channels=patch + weights["cond_in.weight"].shape[1],
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=head,
        num_attention_heads=width // head,
        joint_attention_dim=weights["txt_in.weight"].shape[1],
        pooled_projection_dim=weights["vector_in.in_layer.weight"].shape[1],
        axes_dims_rope=(head // 8, 7 * head // 16, 7 * head // 16),
    )
    renamed = dict(as_flux(weights, head))
    tail = {name: x for name, x in model.state_dict().items() if name.startswith(("norm_out.", "proj_out."))}
    model.load_state_dict(renamed | tail, strict=True)
    return model.eval()


def as_flux(weights: Weights, head: int):
    yield "x_embedder.weight", torch.cat([weights["img_in.weight"], weights["cond_in.weight"]], dim=1)
    yield "x_embedder.bias", weights["img_in.bias"] + weights["cond_in.bias"]
    names = {"context_embedder": "txt_in"}
    for theirs, ours in (("timestep_embedder", "time_in"), ("text_embedder", "vector_in")):
        names |= {f"time_text_embed.{theirs}.linear_1": f"{ours}.in_layer"}
        names |= {f"time_text_embed.{theirs}.linear_2": f"{ours}.out_layer"}
    rotated = {}  # (theirs, ours) of queries and keys
    for i in range(count(weights, "double_blocks")):
        t, o = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for s, norm, ff, out, proj in (
            ("img", "norm1", "ff", "attn.to_out.0", "attn.to_{}"),
            ("txt", "norm1_context", "ff_context", "attn.to_add_out", "attn.add_{}_proj"),
        ):
            names |= {f"{t}.{norm}.linear": f"{o}.{s}_mod.lin", f"{t}.{out}": f"{o}.{s}_attn.proj"}
            names |= {f"{t}.{ff}.net.0.proj": f"{o}.{s}_mlp.0", f"{t}.{ff}.net.2": f"{o}.{s}_mlp.2"}
            names |= {f"{t}.{proj.format('v')}": f"{o}.{s}_attn.v_proj"}
            added = "added_" if s == "txt" else ""
            for part, full in (("q", "query"), ("k", "key")):
                rotated[f"{t}.{proj.format(part)}"] = f"{o}.{s}_attn.{part}_proj"
                rotated[f"{t}.attn.norm_{added}{part}"] = f"{o}.{s}_attn.norm.{full}_norm"
    for i in range(count(weights, "single_blocks")):
        t, o = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        names |= {f"{t}.norm.linear": f"{o}.modulation.lin", f"{t}.proj_out": f"{o}.linear2"}
        for kind in ("weight", "bias"):
            both, width = weights[f"{o}.v_mlp.{kind}"], weights["img_in.weight"].shape[0]
            yield f"{t}.attn.to_v.{kind}", both[:width]
            yield f"{t}.proj_mlp.{kind}", both[width:]
        for part, full in (("q", "query"), ("k", "key")):
            rotated[f"{t}.attn.to_{part}"] = f"{o}.{part}_proj"
            rotated[f"{t}.attn.norm_{part}"] = f"{o}.norm.{full}_norm"
    for theirs, ours in names.items():
        yield f"{theirs}.weight", weights[f"{ours}.weight"]
        yield f"{theirs}.bias", weights[f"{ours}.bias"]
    for theirs, ours in rotated.items():
        if ours.endswith("_norm"):
            yield f"{theirs}.weight", interleaved(weights[f"{ours}.scale"], head)
        else:
            yield f"{theirs}.weight", interleaved(weights[f"{ours}.weight"], head)
            yield f"{theirs}.bias", interleaved(weights[f"{ours}.bias"], head)


def interleaved(x: Tensor, head: int) -> Tensor:
    """Rows 0, D/2, 1, D/2 + 1, ... of every head."""
    order = torch.arange(head).view(2, -1).T.flatten()
    return x.unflatten(0, (-1, head))[:, order].flatten(0, 1)
