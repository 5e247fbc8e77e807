"""One contender of `bench_extract` in a process of its own, so that the memory it takes is its own.

Reads requests from stdin, a JSON object per line, and answers each with one on stdout. `bench_extract.Contender` is
the other end.
"""

import gc
import json
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn


class Work:
    """Counts what is really run, from any thread: image files opened, VAE passes, transformer blocks."""

    def __init__(self, vae: nn.Module, blocks: Sequence[nn.Module]):
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        Image.open = self._counted("images", Image.open)
        vae.encode = self._counted("encodes", vae.encode)
        for block in blocks:
            block.forward = self._counted("blocks", block.forward)

    def _counted(self, name: str, call: Callable) -> Callable:
        def counted(*args, **kwargs):
            with self._lock:
                self.counts[name] += 1
            return call(*args, **kwargs)

        return counted

    def measure(self, run: Callable[[], object]) -> dict:
        """Runs once: seconds, CPU seconds of all threads, peak memory of this process meanwhile, counts."""
        gc.collect()
        self.counts.clear()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
        start, cpu_start = time.perf_counter(), time.process_time()
        run()
        spent = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
        return spent | {"peak_bytes": peak_bytes(), "counts": dict(self.counts)}


def peak_bytes() -> int:
    """Peak resident memory of this process. Not getrusage's: a child's ru_maxrss begins at its parent's peak."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


class Engine:
    """The engine as `engine extract` runs it, loaded once; every round fills a new store."""

    def __init__(self, task: dict):
        from spatialprobe.engine.job import Job
        from spatialprobe.engine.resolve import resolve
        from spatialprobe.engine.run import job_clips
        from spatialprobe.engine.types import COMPUTE_DTYPES

        job = Job(
            clips=task["clips"],
            model=task["checkpoint"],
            out="",  # named anew by every round
            layers=task["layers"],
            steps=task["steps"],
            window=task["window"],
            pool="none",
            compute_dtype="float32",
            seed=task["seed"],
            options={"size": tuple(task["size"])},
            device="cpu",
        )
        resolved = resolve(job)
        self.job, self.refs = job, job_clips(job)
        self.spec, self.adapter, self.batch = resolved.spec, resolved.adapter, resolved.batch
        self.workers = {"loaders": resolved.loaders, "writers": self.job.writers}
        dtype = COMPUTE_DTYPES[self.spec.compute_dtype]
        self.adapter.load(resolved.depth, resolved.device, dtype, Path(task["scratch"]) / "cache")
        self.work = Work(self.adapter.vae, self.adapter.blocks)

    def round(self, out: str, pool: list[int] | None) -> dict:
        from spatialprobe.engine.extract import extract
        from spatialprobe.engine.store import FeatureStore

        store = FeatureStore.create(out, replace(self.spec, pool=pool and tuple(pool)))
        reports = []
        measured = self.work.measure(
            lambda: reports.append(extract(self.refs, self.adapter, store, batch_size=self.batch, **self.workers))
        )
        assert reports[0].written == len(self.refs), reports[0].failures
        return measured | {"report": asdict(reports[0])}


class Plain:
    """The plain loop, and the cost of each of its parts alone."""

    def __init__(self, task: dict):
        from plain_loop import PlainLoop

        self.task, self.clips = task, sorted(Path(task["clips"]).iterdir())
        self.loop = PlainLoop(
            Path(task["checkpoint"]),
            size=tuple(task["size"]),
            layers=task["layers"],
            steps=task["steps"],
            noise=self.noise,
        )
        self.blocks = self.loop.transformer.blocks
        self.block_input: tuple = ()
        hook = self.blocks[0].register_forward_pre_hook(self._keep_input, with_kwargs=True)
        with torch.inference_mode():
            self.latents = self.loop.encode(self.loop.read(self.clips[0]))
            self.loop.forward(self.latents, task["steps"][0], self.noise(self.clips[0].name, task["steps"][0]))
        hook.remove()
        self.work = Work(self.loop.vae, self.blocks)

    def _keep_input(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        self.block_input = (args, kwargs)

    def noise(self, clip_id: str, step: int) -> Tensor:
        """The engine's noise, so that both contenders' features can be compared."""
        from spatialprobe.engine.extract import batch_noise

        frames, (height, width) = (self.task["window"] - 1) // 4 + 1, self.task["size"]
        shape = (self.loop.vae.config.z_dim, frames, height // 8, width // 8)
        return batch_noise([clip_id], shape, self.task["seed"], step, torch.device("cpu"))

    def round(self, out: str) -> dict:
        return self.work.measure(lambda: self.loop.run(self.clips, Path(out)))

    @torch.inference_mode()
    def parts(self, out: str) -> dict[str, float]:
        """Seconds of one clip's decode and resize, one VAE pass, one block (all blocks in turn, as cold as in a run),
        and saving one layer and step."""
        video = self.loop.read(self.clips[0])
        (args, kwargs), (tokens, *_) = self.block_input, self.loop.outputs.values()
        path = Path(out) / "save.sft"
        return {
            "decode": seconds(lambda: self.loop.read(self.clips[0])),
            "encode": seconds(lambda: self.loop.encode(video)),
            "block": seconds(lambda: [block(*args, **kwargs) for block in self.blocks]) / len(self.blocks),
            "save": statistics.median(seconds(lambda: self.loop.save(tokens, len(video), path)) for _ in range(5)),
        }


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main(name: str, task: dict) -> None:
    torch.set_num_threads(task["threads"])
    contender = {"plain": Plain, "engine": Engine}[name](task)
    answer({"ready": name})
    for line in sys.stdin:
        request = json.loads(line)
        answer(getattr(contender, request.pop("do"))(**request))


def answer(value: dict) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
