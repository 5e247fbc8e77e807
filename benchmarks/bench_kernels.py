"""The Triton kernels against what torch makes of the same sums, at the sizes of the published study.

    python benchmarks/bench_kernels.py            on a GPU: times, shares of the ceiling, ratios to torch's forms
                                                  without one: what each call must move and compute, nothing timed
    python benchmarks/bench_kernels.py --record   writes results/kernels-<gpu, or "roofline">.json

Every case is first run at a small size and compared with its definition in float64 (under Triton's interpreter where
there is no GPU). Times are medians over CUDA events, contenders in turn, inputs rotated past the L2 cache. Ceilings are
measured in the same run: a device copy for bytes, a cuBLAS product for flops. A figure that was not measured is null.
"""

# ruff: noqa: E402  (Triton reads TRITON_INTERPRET when kernels are decorated)
import os

import torch

GPU = torch.cuda.is_available()
os.environ.setdefault("TRITON_INTERPRET", "0" if GPU else "1")

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from spatialprobe.kernels.contrastive_loss import contrastive_loss
from spatialprobe.kernels.pool_features import pool_features
from spatialprobe.kernels.probe_input import grouped_probe_input, probe_input

RESULTS = Path(__file__).parent / "results"
ROUNDS = 30
ASSUMED = {  # of an H200, for the roofline where none is measured
    "bytes_per_s": 4.3e12,
    "flops_per_s": 790e12,  # dense bfloat16
    "float32_flops_per_s": 67e12,  # of the plain units
}
DEVICE = "cuda" if GPU else "cpu"

Run = Callable[..., Tensor | list[Tensor]]


@dataclass
class Case:
    """One call at its full size, and the forms it is compared with."""

    name: str
    make: Callable[[bool], list[Tensor]]  # (small) -> inputs, the first of them rotated
    ours: Run
    theirs: dict[str, Run]  # name -> the same in plain torch; "definition" is what is right
    nbytes: float  # that must be read and written, at full size
    flops: float  # of products, at full size
    target: dict[str, float]  # contender, or "ceiling" -> ratio asked for on an H200
    units: str = "flops_per_s"  # which ceiling the flops have
    tolerance: float = 2e-2  # relative L2 to the definition in float64: bfloat16 has 3 digits


# -- pooling ----------------------------------------------------------------------------------------------------------


def pooling(name: str, tokens: tuple[int, int, int], channels: int, grid: tuple[int, int], target: dict) -> Case:
    (length, height, width), (h, w) = tokens, grid
    exact = height % h == 0 and width % w == 0

    def make(small: bool) -> list[Tensor]:
        rows = 2 if small else length
        shape = (1, rows, height // (1 + small), width // (1 + small), 64 if small else channels)
        return [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)]

    def target_grid(x: Tensor) -> tuple[int, int]:
        return (h, w) if x.shape[2:4] == (height, width) else (h // 2, w // 2)

    def ours(x: Tensor) -> Tensor:
        return pool_features(x, tuple(range(x.shape[1])), target_grid(x), dtype=torch.float16, impl="triton").data

    def adaptive(x: Tensor) -> list[Tensor]:
        y = F.adaptive_avg_pool2d(x.flatten(0, 1).permute(0, 3, 1, 2), target_grid(x)).permute(0, 2, 3, 1)
        return _with_stats(y.unflatten(0, x.shape[:2]))

    def view_mean(x: Tensor) -> list[Tensor]:
        gh, gw = target_grid(x)
        return _with_stats(x.unflatten(3, (gw, -1)).unflatten(2, (gh, -1)).mean((3, 5), dtype=torch.float32))

    plain = {"eager": adaptive, "compiled": _compiled(adaptive)}
    if exact:
        plain |= {"eager view": view_mean, "compiled view": _compiled(view_mean)}
    plain["definition"] = lambda x: adaptive(x.double())[0]
    moved = 2 * channels * (length * height * width + length * h * w) + 12 * length * h * w
    return Case(name, make, ours, plain, moved, 0.0, target, tolerance=2e-3)


def _with_stats(y: Tensor) -> list[Tensor]:
    """What pool_features also makes: each token's mean and reciprocal deviation, and its largest magnitude."""
    variance, mean = torch.var_mean(y.float(), -1, correction=0)
    return [y if y.dtype == torch.float64 else y.half(), mean, (variance + 1e-6).rsqrt(), y.abs().amax(-1)]


# -- LayerNorm and Linear, forward and backward -----------------------------------------------------------------------


def linear(name: str, width: int, target: dict, *, probes: int = 1, tokens: int = 65_520, channels: int = 5120) -> Case:
    def make(small: bool) -> list[Tensor]:
        m, c = (70, 96) if small else (tokens, channels)
        d = min(width, 264) if small else width  # past both thresholds of cuBLAS
        x = torch.randn(m, c, device=DEVICE, dtype=torch.bfloat16)
        variance, mean = torch.var_mean(x.float(), -1, correction=0)
        weight = torch.randn(probes, d, c, device=DEVICE) * c**-0.5
        parameters = [weight, torch.zeros(probes, d, device=DEVICE), torch.rand(probes, c, device=DEVICE) + 0.5]
        parameters.append(torch.randn(probes, c, device=DEVICE) * 0.1)
        return [x, mean, (variance + 1e-6).rsqrt(), *(p.requires_grad_() for p in parameters)]

    def step(forward: Callable) -> Run:
        def run(x, mean, rstd, *parameters):
            y = forward(x, mean, rstd, *parameters)
            return torch.autograd.grad(y, parameters, torch.ones_like(y))

        return run

    def ours(x, mean, rstd, w, b, gamma, beta):
        options = {"mean": mean, "rstd": rstd, "out_dtype": torch.bfloat16, "impl": "triton"}
        if probes == 1:
            return probe_input(x, w[0], b[0], gamma[0], beta[0], **options)
        return grouped_probe_input(x, w, b, gamma, beta, **options)

    def obvious(x, mean, rstd, w, b, gamma, beta):
        """As modules under autocast: each probe's LayerNorm, then its Linear."""
        each = zip(w, b, gamma, beta, strict=True)
        dtype = x.dtype
        ys = [
            F.linear(F.layer_norm(x.to(g.dtype), x.shape[-1:], g, e, 1e-6).to(dtype), v.to(dtype), a.to(dtype))
            for v, a, g, e in each
        ]
        return torch.stack(ys, 1)

    def rank_one(x, mean, rstd, w, b, gamma, beta):
        """One product of x itself and a fused epilogue: the best form that plain torch has."""
        folded = w * gamma[:, None]
        folded = (folded - folded.mean(-1, keepdim=True)).to(x.dtype).flatten(0, 1)
        shift = (w @ beta[..., None]).flatten() + b.flatten()
        y = (x @ folded.T).float() - mean[:, None] * folded.float().sum(-1)
        return (y * rstd[:, None] + shift).to(x.dtype)

    def exact(*inputs):
        features, parameters = inputs[:3], inputs[3:]
        wide = [t.detach().double().requires_grad_() for t in parameters]
        return step(obvious)(*(t.double() for t in features), *wide)

    theirs = {
        "eager": step(obvious),
        "compiled": step(_compiled(obvious)),
        "compiled rank-1": step(_compiled(rank_one)),
        "definition": exact,
    }
    n = probes * width
    moved = 2 * (2 * tokens * channels) + 2 * (2 * tokens * n) + 3 * 4 * n * channels  # x twice, y and dy, W and dW
    return Case(name, make, step(ours), theirs, moved, 2 * 2.0 * tokens * n * channels, target)


# -- the contrastive loss, forward and backward -----------------------------------------------------------------------


def contrastive(name: str, scenes: int, pixels: int, target: dict, channels: int = 32) -> Case:
    def make(small: bool) -> list[Tensor]:
        b, p = (2, 90) if small else (scenes, pixels)
        f = F.normalize(torch.randn(b, p, channels, device=DEVICE), dim=-1)
        return [f.requires_grad_(), torch.randint(0, 20, (b, p), device=DEVICE)]

    def whole(f, ids):
        distance = torch.cdist(f, f)
        same = ids[:, :, None] == ids[:, None, :]
        pairs = ~torch.eye(ids.shape[1], dtype=torch.bool, device=f.device)
        pull, push = same & pairs, ~same & pairs
        return (distance * pull).sum() / pull.sum() + ((1 - distance).relu() * push).sum() / push.sum()

    def step(loss: Callable) -> Run:
        return lambda f, ids: torch.autograd.grad(loss(f, ids), f)

    def exact(f, ids):
        f = f.detach().double().requires_grad_()
        return torch.autograd.grad(whole(f, ids), f)

    theirs = {"eager": step(whole), "compiled": step(_compiled(whole)), "definition": exact}
    ours = step(lambda f, ids: contrastive_loss(f, ids, impl="triton"))
    moved = scenes * pixels * (3 * 4 * channels + 2 * 8)  # f in both passes, its gradient, ids in both
    operations = (3 + 3 + 3) * scenes * pixels**2 * channels  # a pair and channel: distances twice, then the gradient
    return Case(name, make, ours, theirs, moved, operations, target, "float32_flops_per_s", tolerance=1e-5)


def _compiled(fn: Callable) -> Callable:
    return torch.compile(fn, mode="max-autotune-no-cudagraphs", dynamic=False) if GPU else fn


EXACT, UNEVEN = {"ceiling": 0.85, "compiled view": 1.05, "eager": 5}, {"compiled": 2.5, "eager": 5}
CASES = [
    pooling("pool 21x30x52x5120 -> 15x26", (21, 30, 52), 5120, (15, 26), EXACT),
    pooling("pool 13x30x45x3072 -> 15x22", (13, 30, 45), 3072, (15, 22), UNEVEN),
    pooling("pool 21x30x52x5120 -> 14x14", (21, 30, 52), 5120, (14, 14), UNEVEN),
    linear("LayerNorm+Linear, D=32", 32, {"compiled": 3.0}),
    linear("LayerNorm+Linear, D=512", 512, {"compiled": 1.8}),
    linear("LayerNorm+Linear, D=2048", 2048, {"compiled": 1.4}),
    linear("8 heads, D=512", 512, {"compiled": 6.0}, probes=8),
    contrastive("contrastive, 8 x 2,048 pixels", 8, 2048, {"compiled": 1.0}),
    contrastive("contrastive, 1 x 16,384 pixels", 1, 16_384, {}),
]  # fmt: skip


# -- measuring --------------------------------------------------------------------------------------------------------


def check(case: Case) -> float:
    """Relative L2 between ours and the definition, at the small size; asserted."""
    torch.manual_seed(0)
    inputs = case.make(True)
    pairs = list(zip(_tensors(case.ours(*inputs)), _tensors(case.theirs["definition"](*inputs)), strict=False))
    off = max(float((a.double() - b.reshape(a.shape)).norm() / b.norm()) for a, b in pairs)
    assert off < case.tolerance, f"{case.name}: relative error {off:.2e}, at most {case.tolerance:.0e} wanted"
    return off


def _tensors(found) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def measure(case: Case) -> dict[str, dict[str, float]]:
    """Median seconds and peak memory beyond the inputs of ours and of each form, in turn; on a GPU."""
    inputs = case.make(False)
    copies = 1 + 4 * torch.cuda.get_device_properties(0).L2_cache_size // inputs[0].nbytes
    rotated = [[inputs[0].detach().clone().requires_grad_(inputs[0].requires_grad), *inputs[1:]] for _ in range(copies)]
    forms = {"ours": case.ours} | {name: run for name, run in case.theirs.items() if name != "definition"}
    found: dict[str, dict[str, float]] = {}
    for name, run in forms.items():
        try:
            for number in range(3):
                run(*rotated[number % copies])
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run(*rotated[0])
            found[name] = {"peak_bytes": torch.cuda.max_memory_allocated() - before}
        except torch.OutOfMemoryError:
            found[name] = {"out_of_memory": True}
    times: dict[str, list[float]] = {name: [] for name, one in found.items() if "peak_bytes" in one}
    for number in range(ROUNDS):
        for name, seconds in times.items():
            seconds.append(timed(forms[name], rotated[number % copies]))
    for name, seconds in times.items():
        found[name]["seconds"] = statistics.median(seconds)
    return found


def timed(run: Run, inputs: list[Tensor]) -> float:  # seconds
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(20_000_000)  # the launch is queued behind it: no time of the host's is measured
    start.record()
    run(*inputs)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def ceilings() -> dict[str, float]:
    """Bytes per second of a device copy (read and write counted), flops per second of bfloat16 and float32 products."""
    x = torch.empty(1 << 31, dtype=torch.uint8, device=DEVICE)
    y = torch.empty_like(x)
    copy = statistics.median(timed(y.copy_, [x]) for _ in range(ROUNDS))
    found = {"bytes_per_s": 2 * x.nbytes / copy}
    for name, dtype in (("flops_per_s", torch.bfloat16), ("float32_flops_per_s", torch.float32)):  # IEEE: TF32 is off
        a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=dtype) for _ in range(2))
        torch.mm(a, b)
        found[name] = 2 * 8192**3 / statistics.median(timed(torch.mm, [a, b]) for _ in range(ROUNDS))
    return found


def report(case: Case, ceiling: dict[str, float], measured: dict | None) -> dict:
    floors = {"memory": case.nbytes / ceiling["bytes_per_s"], "compute": case.flops / ceiling[case.units]}
    result = {
        "case": case.name,
        "bytes": case.nbytes,
        "flops": case.flops,
        "floor_seconds": max(floors.values()),
        "bound_by": max(floors, key=floors.get),
        "relative_error": check(case),
        "targets": case.target,
        "measured": measured,
    }
    if measured:
        ours = measured["ours"]["seconds"]
        result["share_of_ceiling"] = result["floor_seconds"] / ours
        result["ratios"] = {n: one["seconds"] / ours for n, one in measured.items() if "seconds" in one}
    return result


def show(results: list[dict]) -> None:
    print(f"{'case':<32}{'MB':>8}{'TFLOP':>7}{'floor ms':>10}{'ms':>14}{'of ceiling':>14}  ratios to other forms")
    for one in results:
        none = "not measured"
        ms = f"{one['measured']['ours']['seconds'] * 1e3:.3f}" if one["measured"] else none
        share = f"{one['share_of_ceiling']:.0%}" if one["measured"] else none
        ratios = ", ".join(f"{n} {r:.2f}" for n, r in one.get("ratios", {}).items() if n != "ours") or none
        floor = one["floor_seconds"] * 1e3
        size = f"{one['bytes'] / 1e6:>8.0f}{one['flops'] / 1e12:>7.2f}{floor:>10.3f}"
        print(f"{one['case']:<32}{size}{ms:>14}{share:>14}  {ratios}")


def machine() -> dict:
    versions = {name: version(name) for name in ("torch", "triton")} | {"python": platform.python_version()}
    return {"gpu": torch.cuda.get_device_name() if GPU else None, "versions": versions}


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--record", action="store_true", help="write benchmarks/results/kernels-*.json")
    args = words.parse_args()
    ceiling = ceilings() if GPU else ASSUMED
    results = [report(case, ceiling, measure(case) if GPU else None) for case in CASES]
    show(results)
    if not GPU:
        print("no GPU: floors are for an assumed 4.3 TB/s, 790 bfloat16 and 67 float32 TFLOP/s; nothing was timed")
    if args.record:
        name = torch.cuda.get_device_name().lower().replace(" ", "-") if GPU else "roofline"
        what = {"machine": machine(), "ceiling": ceiling, "ceiling_is": "measured" if GPU else "assumed (H200)"}
        (RESULTS / f"kernels-{name}.json").write_text(json.dumps(what | {"cases": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
