"""The engine on a GPU at the published sizes, against its roofline and the published code's way of working.

    python benchmarks/bench_device.py                       with a GPU: times, memory, shares of the roofline, verdicts
                                                            without one: checks itself at small sizes, times nothing
    python benchmarks/bench_device.py --models wan2.1-t2v-14b --compile blocks --record

True architectures, random weights drawn on the device, nothing downloaded; the clips are PNG folders of photographs'
size. Both contenders run the same weights on the same clips; where they do the same work (the VAE in tiles, no pooling)
their features are compared. A floor is the clip's products and convolutions (`device_flops`) at the rate of a large
bfloat16 product measured in the same run. `--record` writes results/device-<gpu>.json, and only with a GPU: a figure
that was not measured is null.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from device_subject import MODELS, PROMPT_TOKENS, Model, Subject
from plain_device_loop import PlainCogVideoX, PlainDeviceLoop, PlainQwen3VL, PlainWan
from random_checkpoint import (
    draw,
    materialise,
    schedule,
    text_encoder_bytes,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from spatialprobe.engine.adapter import plan_clip
from spatialprobe.engine.extract import batch_noise, extract
from spatialprobe.engine.resolve import Resolved
from spatialprobe.engine.run import job_clips, load
from spatialprobe.engine.store import FeatureStore

RESULTS = Path(__file__).parent / "results"
STEPS = {1: (749,), 4: (449, 599, 749, 899)}
ASSUMED_RATE = 790e12  # dense bfloat16 flops per second of an H200, for floors where no rate was measured
BOUND = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative L2 between both contenders' features, by compute dtype
COMPILED_BOUND = 5e-2  # the same with compiled blocks, which keep sums that eager ones round
FLOPS_BOUND = 5e-3  # between counted and closed form: rotary tables are products too, in some releases
NONE = "not measured"


# -- the contenders ---------------------------------------------------------------------------------------------------


class Engine:
    """The engine as `engine extract` runs it, with drawn weights; every run fills a new store."""

    def __init__(self, subject: Subject):
        self.subject, self.resolved = subject, subject.resolve()
        self.adapter = self.resolved.adapter
        load(self.resolved, subject.cache(self.resolved))
        self.parts = self._parts()
        for folder, module in self.parts.items():
            draw(module, folder)

    def _parts(self) -> dict[str, nn.Module]:
        if self.subject.model.family == "qwen3_vl":
            return {"": self.adapter.model}
        is_wan = self.subject.model.family == "wan"
        transformer = self.adapter.experts["transformer"] if is_wan else self.adapter.transformer
        return {"transformer": transformer, "vae": self.adapter.vae}

    def first_batch(self) -> int:
        return self.adapter.AUTO_BATCH if self.resolved.batch == "auto" else self.resolved.batch

    def weight_bytes(self) -> int:
        return sum(p.nbytes for module in self.parts.values() for p in module.parameters())

    def run(
        self,
        out: Path,
        steps: tuple[int, ...],
        pool: tuple[int, int] | None,
        *,
        tiled: bool = False,
        clips: int | None = None,
    ) -> tuple[FeatureStore, dict[str, Any]]:
        """Extracts the subject's clips. Steady seconds leave out the first batch, for which the device waits."""
        spec = replace(self.resolved.spec, steps=steps if self.subject.has_steps else (), pool=pool)
        if tiled and self.subject.has_steps:
            spec = replace(spec, options=spec.options | {"vae_tiling": True})
            self.adapter.vae.enable_tiling()
        refs, marks = job_clips(self.subject.job)[:clips], []
        store = FeatureStore.create(out, spec)
        report = extract(
            refs,
            self.adapter,
            store,
            batch_size=self.resolved.batch,
            loaders=self.resolved.loaders,
            progress=lambda clip, outcome, reason: marks.append(time.perf_counter()),
        )
        if tiled and self.subject.has_steps:
            self.adapter.vae.disable_tiling()
        if report.written != len(refs):
            raise RuntimeError(
                f"{report.written} of {len(refs)} clips were written: {report.failures or report.stopped}"
            )
        first, timing = report.batch_size, report.timing
        rest = len(marks) - first
        return store, {
            "clips": len(refs),
            "batch": first,
            "seconds_per_clip": (marks[-1] - marks[first - 1]) / rest if rest > 0 else timing["seconds"] / len(refs),
            "seconds_per_clip_with_first": timing["seconds"] / len(refs),
            "peak_bytes": timing["peak_memory_bytes"],
            "stages_seconds": {name: stage["seconds"] for name, stage in timing["stages"].items()},
            "busy": timing["busy"],
            "held_back": timing.get("held_back"),
            "compile": timing.get("compile"),
        }


def plain_loop(subject: Subject, resolved: Resolved, steps: tuple[int, ...], resident: int) -> PlainDeviceLoop:
    """The plain loop on all blocks, with the engine's noise."""
    adapter, device, sizes = resolved.adapter, subject.device, subject.sizes
    plan, _ = plan_clip(sizes.window, adapter, resolved.spec)
    parts = {folder: materialise(m, folder, device, subject.dtype) for folder, m in subject.whole.items()}
    common = {"layer": sizes.layer, "device": device, "resident": resident, "dtype": subject.dtype, "size": sizes.size}
    if subject.model.family == "qwen3_vl":
        module, name = adapter.PROCESSOR.split(":")
        processor = getattr(import_module(module), name).from_pretrained(subject.folder)
        budget = adapter.pixel_budget(len(plan.shown))
        return PlainQwen3VL(
            parts[""], processor, subject.ids(resolved), frames=plan.shown, budget=budget, steps=(None,), **common
        )
    import diffusers

    def noise(clip_id: str, step: int) -> Tensor:
        return batch_noise([clip_id], adapter.noise_shape(plan), resolved.spec.seed, step, torch.device("cpu"))

    common |= {"steps": steps, "window": sizes.window, "prompt": subject.prompt(), "noise": noise}
    settings = schedule(subject.model.family)
    if subject.model.family == "wan":
        return PlainWan(**parts, scheduler=diffusers.UniPCMultistepScheduler(**settings), **common)
    scheduler = diffusers.CogVideoXDDIMScheduler(**settings)
    return PlainCogVideoX(**parts, scheduler=scheduler, half=sizes.half, **common)


def run_plain(subject: Subject, loop: PlainDeviceLoop, out: Path, clips: int) -> dict[str, Any]:
    cuda = subject.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    loop.run(sorted(subject.clips.iterdir())[:clips], out)
    seconds = (time.perf_counter() - start) / clips
    peak = torch.cuda.max_memory_allocated() if cuda else None
    return {"clips": clips, "seconds_per_clip": seconds, "peak_bytes": peak}


def difference(subject: Subject, resolved: Resolved, store: FeatureStore, dump: Path) -> float:
    """The largest relative L2 between the store's features and the plain loop's; 0 if all are the same bits."""
    _, kept = plan_clip(subject.sizes.window, resolved.adapter, resolved.spec)
    found = []
    for clip in store.ids():
        for layer, step in store.spec.tensors():
            wanted = load_file(dump / clip / f"feature_t{step}.sft")["feat"]
            wanted = wanted.flatten(0, wanted.ndim - 4)[list(kept)]  # CogVideoX's halves one after the other
            ours = store.read(clip, layer, step).data
            same = torch.equal(ours, wanted)
            found.append(0.0 if same else float((ours.double() - wanted.double()).norm() / wanted.double().norm()))
    return max(found)


# -- checks -----------------------------------------------------------------------------------------------------------


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Counts products and convolutions; attention as the products that it is made of."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def close(what: str, is_: float, wanted: float, bound: float) -> None:
    if not abs(is_ - wanted) <= bound * wanted:
        raise AssertionError(f"{what}: {is_:.6g} found, {wanted:.6g} wanted within {bound:.1%}")


def self_check(name: str, root: Path, *, plan: bool = False) -> dict[str, Any]:
    """Both contenders at a small size on the CPU, and counts at the true size. Raises AssertionError.

    `plan` also plans the memory that a GPU would need.
    """
    subject = Subject(name, MODELS[name].small, root / "small", torch.device("cpu"))
    subject.write_clips(2)
    engine, steps = Engine(subject), STEPS[4][:2] if subject.has_steps else (None,)
    store, run = engine.run(root / "store", steps, None, tiled=True)
    whole = plain_loop(subject, engine.resolved, steps, resident=1 << 20)
    run_plain(subject, whole, root / "dump", 2)
    off = difference(subject, engine.resolved, store, root / "dump")
    if off > BOUND[subject.dtype]:
        raise AssertionError(f"{name}: features differ from the plain loop's by {off:.2e}, at most 1e-4 is allowed")

    with counting() as counter:
        engine.run(root / "counted", steps, None, clips=1)
    work = subject.work(engine.resolved, causal=False)
    close(f"{name}, flops", counter.get_total_flops(), work["encode"] + len(steps) * work["step"], FLOPS_BOUND)
    weights, memory = engine.weight_bytes(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    predicted = engine.adapter.weight_bytes(engine.resolved.depth, subject.dtype)
    close(f"{name}, bytes of weights", weights, predicted, 0.05)
    if not weights < run["peak_bytes"] < memory:
        raise AssertionError(f"{name}: peak memory of {run['peak_bytes']} bytes, with {weights} of weights")
    true = Subject(name, MODELS[name].true, root / "true", torch.device("cpu"))
    true.write_clips(0)
    resolved = true.resolve()
    if true.has_steps:
        counted, work = count_on_meta(true, resolved), true.work(resolved, causal=False)
        for part in work:
            close(f"{name} at its true size, flops of {part}", counted[part], work[part], FLOPS_BOUND)
    rows = floors(true, resolved, ASSUMED_RATE)
    if plan:
        add_plan(rows, true, resolved)
    return {"difference": off, "rows": rows}


def add_plan(rows: dict[str, dict], subject: Subject, resolved: Resolved) -> None:
    """The peak is the same for any number of steps."""
    peak = subject.planned_peak(resolved)
    for row in rows.values():
        row["planned_peak_bytes"] = peak


@torch.inference_mode()
def count_on_meta(subject: Subject, resolved: Resolved) -> dict[str, float]:
    """Flops of the VAE and of a step as torch counts them, on tensors that have shapes alone."""
    adapter, sizes = resolved.adapter, subject.sizes
    plan, _ = plan_clip(sizes.window, adapter, resolved.spec)
    modules = {type(m).__name__: m.to("meta").eval() for m in adapter.skeleton(resolved.depth)}
    vae = next(m for name, m in modules.items() if name.startswith("Autoencoder"))
    transformer = next(m for name, m in modules.items() if "Transformer" in name)
    config, shape = adapter.config, adapter.noise_shape(plan)
    frames = sizes.half or 1 + 4 * (plan.grid[0] - 1)
    with counting() as encode:
        vae.encode(torch.empty(1, 3, frames, *sizes.size, device="meta"))
    text = torch.empty(1, PROMPT_TOKENS, config.get("text_dim") or config["text_embed_dim"], device="meta")
    latents = torch.empty(1, *(shape[1:] if sizes.half else shape), device="meta")
    rotary = {}
    if sizes.half:
        tokens = plan.grid[0] // 2 * plan.grid[1] * plan.grid[2]
        rotary = {"image_rotary_emb": (torch.empty(tokens, config["attention_head_dim"], device="meta"),) * 2}
    with counting() as step:
        timestep = torch.zeros(1, device="meta")
        transformer(hidden_states=latents, encoder_hidden_states=text, timestep=timestep, return_dict=False, **rotary)
    return {"encode": plan.passes * encode.get_total_flops(), "step": plan.passes * step.get_total_flops()}


def floors(subject: Subject, resolved: Resolved, rate: float) -> dict[str, dict[str, Any]]:
    """What a clip takes at least, by number of steps."""
    work = subject.work(resolved, causal=True)
    weights = resolved.adapter.weight_bytes(resolved.depth, subject.dtype)
    rows = {}
    for count in STEPS if subject.has_steps else (1,):
        total = work["encode"] + count * work["step"]
        rows[f"{count} step{'s' * (count > 1)}"] = {
            "tflop": total / 1e12,
            "encode_tflop": work["encode"] / 1e12,
            "weight_bytes": weights,
            "floor_seconds": total / rate,
        }
    return rows


# -- on a GPU ---------------------------------------------------------------------------------------------------------


def matmul_rate(device: torch.device) -> float:
    """Flops per second of a large bfloat16 product, median of 30."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(33):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.mm(a, b)
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return 2 * 8192**3 / statistics.median(seconds[3:])


def measure(
    subject: Subject, root: Path, rate: float, *, clips: int, plain_clips: int, resident: int
) -> dict[str, Any]:
    """The engine at one and at four steps, then the plain loop, each alone on the device.

    `rate` is the device's flops per second, `resident` the bytes of a text encoder beside the plain loop.
    """
    subject.write_clips(clips)
    engine = Engine(subject)
    rows = floors(subject, engine.resolved, rate)
    store, _ = engine.run(root / "compared", STEPS[1], None, tiled=True, clips=1)
    for number, (label, row) in enumerate(rows.items()):
        steps = STEPS[int(label.split()[0])]
        engine.run(root / f"warm{number}", steps, subject.pool(), clips=engine.first_batch())
        _, row["engine"] = engine.run(root / f"store{number}", steps, subject.pool())
    del engine
    free()
    resolved = subject.resolve()  # an adapter without weights
    loop = plain_loop(subject, resolved, STEPS[1], resident)
    run_plain(subject, loop, root / "dump", 1)  # also warms up
    off = difference(subject, resolved, store, root / "dump")
    for number, (label, row) in enumerate(rows.items()):
        loop.steps = STEPS[int(label.split()[0])] if subject.has_steps else (None,)
        row["plain"] = run_plain(subject, loop, root / f"plain{number}", plain_clips)
        row["share_of_roofline"] = row["floor_seconds"] / row["engine"]["seconds_per_clip"]
        row["ratio"] = row["plain"]["seconds_per_clip"] / row["engine"]["seconds_per_clip"]
    subject.whole.clear()
    del loop
    free()
    bound = COMPILED_BOUND if subject.words.get("compile", "none") != "none" else BOUND[subject.dtype]
    return {
        "words": subject.words,
        "options": dict(resolved.spec.options),
        "layer": subject.sizes.layer,
        "input": [subject.sizes.window, *subject.sizes.size],
        "flops_per_s": rate,
        "difference": off,
        "difference_bound": bound,
        "rows": rows,
    }


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.compiler.reset()  # recorded CUDA graphs keep their memory until then
        torch.cuda.empty_cache()


PLAN_TARGET = {"1 step, peak off its plan": ("<=", 0.15)}  # for every model
FIGURES: dict[str, Callable[[dict], float]] = {
    "s/clip": lambda row: row["engine"]["seconds_per_clip"],
    "times the plain loop": lambda row: row["ratio"],
    "peak GB": lambda row: row["engine"]["peak_bytes"] / 1e9,
    "peak off its plan": lambda row: abs(row["engine"]["peak_bytes"] / row["planned_peak_bytes"] - 1),
    "share of the roofline": lambda row: row["share_of_roofline"],
}


def verdicts(model: Model, rows: dict[str, dict]) -> dict[str, dict[str, Any]]:
    found = {}
    for target, (sign, bound) in (model.targets | PLAN_TARGET).items():
        label, _, figure = target.partition(", ")
        is_ = FIGURES[figure](rows[label])
        met = is_ <= bound if sign == "<=" else is_ >= bound
        found[target] = {"is": round(is_, 3), "wanted": f"{sign} {bound}", "met": met}
    return found


# -- what people see --------------------------------------------------------------------------------------------------


def table(models: dict[str, dict[str, Any]]) -> str:
    head = f"{'model':<18}{'':<9}{'TFLOP':>7}{'encode':>8}{'weights GB':>12}{'planned peak':>14}{'floor s':>9}"
    lines = [head + f"{'s/clip':>14}{'plain s/clip':>14}{'ratio':>14}{'of roofline':>14}{'peak GB':>14}"]
    for name, result in models.items():
        for label, row in result["rows"].items():
            planned = f"{row['planned_peak_bytes'] / 1e9:.2f}" if "planned_peak_bytes" in row else "not planned"
            sizes = f"{row['tflop']:7.0f}{row['encode_tflop']:8.0f}{row['weight_bytes'] / 1e9:12.2f}{planned:>14}"
            cells = [NONE] * 5
            if "engine" in row:
                mine = row["engine"]
                cells = [f"{mine['seconds_per_clip']:.3f}", f"{row['plain']['seconds_per_clip']:.2f}"]
                cells += [f"{row['ratio']:.2f}"]
                cells += [f"{row['share_of_roofline']:.0%}", f"{mine['peak_bytes'] / 1e9:.1f}"]
            line = f"{name:<18}{label:<9}{sizes}{row['floor_seconds']:9.3f}"
            lines.append(line + "".join(f"{cell:>14}" for cell in cells))
            if "engine" in row:
                stages = ", ".join(f"{stage} {s:.2f}" for stage, s in row["engine"]["stages_seconds"].items())
                lines.append(f"    stages, s: {stages}; {row['engine']['held_back']}")
        for target, found in (result.get("verdicts") or {}).items():
            lines.append(
                f"    {'met   ' if found['met'] else 'MISSED'} {target}: {found['is']}, wanted {found['wanted']}"
            )
    return "\n".join(lines)


def record(name: str, result: dict[str, Any], gpu: str, folder: Path) -> Path:
    """Puts a model's figures into the file of this GPU, beside those of other models."""
    path = folder / f"device-{gpu.lower().replace(' ', '-')}.json"
    before = json.loads(path.read_text())["models"] if path.exists() else {}
    versions = {name: version(name) for name in ("torch", "triton", "diffusers", "transformers")}
    machine = {"cores": len(os.sched_getaffinity(0)), "versions": versions | {"python": platform.python_version()}}
    models = before | {name: {"machine": machine} | result}
    path.write_text(json.dumps({"gpu": gpu, "models": models}, indent=1) + "\n")
    return path


def arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help=f"some of {', '.join(MODELS)}")
    parser.add_argument("--clips", type=int, help="of a timed run of the engine; default: the model's own number")
    parser.add_argument("--plain-clips", type=int, default=2, help="of a timed run of the plain loop")
    parser.add_argument("--compile", default="none", help="as of engine extract")
    parser.add_argument("--attention", default="auto", help="as of engine extract")
    parser.add_argument("--record", action="store_true", help="with a GPU: write results/device-<gpu>.json")
    found = parser.parse_args(words)
    found.models = found.models.split(",")
    if unknown := set(found.models) - set(MODELS):
        parser.error(f"models must be some of {', '.join(MODELS)}, got {', '.join(sorted(unknown))}")
    return found


def on_gpu(name: str, root: Path, asked: argparse.Namespace) -> dict[str, Any]:
    model, device = MODELS[name], torch.device("cuda")
    subject = Subject(name, model.true, root / name, device, {"compile": asked.compile, "attention": asked.attention})
    result = measure(
        subject,
        root / name,
        matmul_rate(device),
        clips=asked.clips or model.clips,
        plain_clips=asked.plain_clips,
        resident=text_encoder_bytes(model.family),
    )
    add_plan(result["rows"], subject, subject.resolve())
    is_h200 = "H200" in torch.cuda.get_device_name()
    result["verdicts"] = verdicts(model, result["rows"]) if is_h200 else None
    if asked.record:
        print(f"{name} recorded in {record(name, result, torch.cuda.get_device_name(), RESULTS)}")
    return result


def main(words: list[str]) -> int:
    asked, gpu, results = arguments(words), torch.cuda.is_available(), {}
    if not gpu:
        torch.set_num_threads(1)  # small sizes gain nothing from more
    for name in asked.models:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = on_gpu(name, Path(folder), asked) if gpu else self_check(name, Path(folder), plan=True)
    print(table(results))
    for name, result in results.items():
        off = result["difference"]
        print(f"{name}: features against the plain loop's: {f'off by {off:.2e}' if off else 'the same bits'}")
    if not gpu:
        print(
            "no GPU: nothing was timed or recorded; floors are for an assumed 790 bfloat16 TFLOP/s. Small models on the"
        )
        print("CPU gave the plain loop's features; flops and bytes of weights were those of the closed forms.")
        return 0
    missed = [t for one in results.values() for t, found in (one["verdicts"] or {}).items() if not found["met"]]
    return int(bool(missed) or any(one["difference"] > one["difference_bound"] for one in results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
