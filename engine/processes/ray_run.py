"""`--ray`: the workers of a run are actors of a Ray cluster, on any number of machines that share the store's folder.

Ray places the actors, waits for machines that an autoscaler adds, starts dead ones again and repeats their tasks. Who
does which clip is told by the leases of `sharing`, as between any processes: so a list of clips may be with two actors
at once, a clip that killed two is recorded as failed, and an actor that never comes back holds nobody up.
"""

import os
import secrets
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from spatialprobe.engine.device.tiling import OPTION, chosen
from spatialprobe.engine.files.durable import RunFolder
from spatialprobe.engine.files.schema import differences
from spatialprobe.engine.job import Job
from spatialprobe.engine.pipeline.outcomes import Report
from spatialprobe.engine.processes.ray_cluster import GONE_AFTER, LOCAL, Cluster, cluster, ray_library
from spatialprobe.engine.processes.ray_worker import RayWorker, Ticket
from spatialprobe.engine.processes.sharing import Sharing, positions
from spatialprobe.engine.processes.workers import Pool, merged_timing
from spatialprobe.engine.run import job_clips, open_run, survey, write_report
from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.types import ClipRef, FeatureSpec

TASK_SECONDS = 30.0  # a task's clips are read ahead and written behind, but not across its ends
FIRST_TASK, LARGEST_TASK = 4, 256  # clips
RESTARTS = 20  # of an actor, by Ray
STOP_WITHIN = 30.0  # seconds, after an interrupt
QUIET = {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}


def run_ray(
    job: Job, *, retry_failed: bool = False, gone_after: float = GONE_AFTER, **of_leases: Any
) -> tuple[Report, Path]:
    """Extracts what the store lacks of a job's clips, by actors of the Ray cluster at `job.ray`.

    Raises ValueError for a job that cannot be done, and what kept every actor from beginning.
    """
    ray_library()
    check_words(job)
    out, started, address = Path(job.out), datetime.now(UTC), job.ray
    words = replace(job, ray=None, ray_workers=None)
    if address == LOCAL:  # all that can be known is known here: no cluster is started for a job that cannot be done
        words = replace(words, device=words.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        listed = clips_of(words, retry_failed)
        if not listed[1]:
            run = open_run(words, retry_failed=retry_failed)
            return run.extract(), run.store.root
    cpus = max(os.cpu_count() or 1, job.ray_workers or 1)
    with cluster(address, out, cpus=cpus) as there:
        gpus, machines = there.counts()
        if address != LOCAL:
            words = replace(words, device=words.device or ("cuda" if gpus else "cpu"))
            listed = clips_of(words, retry_failed)
        refs, todo = listed
        crew = Crew(there, words, len(refs), todo, gone_after, of_leases)
        if todo:
            count = job.ray_workers or (gpus if words.device == "cuda" else 1 if address == LOCAL else machines)
            try:
                crew.start(max(1, count))
                crew.work()
            finally:
                crew.end()
            if crew.store is None and there.gone and not crew.interrupted:
                raise ConnectionError(f"the Ray cluster at {there.address} went away")
            if crew.store is None:
                return crew.nothing_began(), out
    store = crew.store or FeatureStore.create(out, FeatureStore.open(out).spec)
    with Sharing(store, since=crew.since, session=crew.session, **of_leases) as sharing:
        report = crew.add_up(store, sharing)
    if there.gone and not report.interrupted and report.stopped:
        report.stopped = f"the Ray cluster at {there.address} went away"
    RunFolder(out / "tmp").close()  # clears away what dead actors left
    parts = [{"machine": hand.node, "ended": hand.ended} | (hand.report or {}) for hand in crew.workers]
    write_report(store, job, started, {"workers": parts}, report)
    return report, out


def check_words(job: Job) -> None:
    if "://" in job.ray:  # Ray's client protocol: its other end is where the store would be looked for
        raise ValueError(f"ray must be HOST:PORT or auto, on a machine of the cluster, got {job.ray!r}")
    if job.devices:
        raise ValueError(f"ray and devices exclude each other, got {job.ray} and {job.devices}")
    if job.device not in (None, "cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda with ray, which picks the GPU, got {job.device!r}")
    if job.offload == "spread":
        raise ValueError("offload spread uses every GPU for one model: it does not go with ray")


def clips_of(job: Job, retry_failed: bool) -> tuple[list[ClipRef], list[ClipRef]]:
    """The job's clips and those that the store lacks; checks what can be checked on this machine."""
    if job.device == "cpu" or torch.cuda.is_available():
        return survey(job, retry_failed=retry_failed)[1:]
    refs, done = job_clips(job), set()  # the model's side of the job is checked by the first actor, which has a GPU
    if (Path(job.out) / "spec.json").exists():
        store = FeatureStore.open(job.out)
        done, failed = set(store.ids()), store.failures()
        refs = [ref for ref in refs if ref.id in failed] if retry_failed else refs
    elif retry_failed:
        raise ValueError(f"there is nothing to retry: {job.out} is not a feature store")
    return refs, [ref for ref in refs if ref.id not in done]


@dataclass
class Hand:
    """An actor, as this end knows it."""

    number: int
    actor: Any
    task: Any  # what it is at, as Ray's reference; None if it is free
    ids: list[str] = field(default_factory=list)  # the clips of that task
    copies: int = 0  # how many others have been given the same clips
    node: str = "not up"
    pid: int = 0
    loaded: bool = False
    report: dict | None = None
    timings: list[dict] = field(default_factory=list)
    error: dict | None = None  # "type" and "text"
    ended: str = ""  # how, in words


class Crew(Pool):
    """The actors of a run, what they do, and what they have said."""

    def __init__(self, there: Cluster, job: Job, asked: int, todo: list[ClipRef], gone_after: float, of_leases: dict):
        super().__init__(asked, todo)
        self.there, self.ray, self.job, self.gone_after = there, there.ray, job, gone_after
        self.since, self.session, self.of_leases = positions(Path(job.out)), secrets.token_hex(8), of_leases
        self.queue = deque(ref.id for ref in todo)
        self.store: FeatureStore | None = None  # from when the first actor has loaded the model
        self.seconds_per_clip, self.batch = 0.0, 1
        self.stop_at = float("inf")

    def start(self, count: int) -> None:
        """Asks for the actors. Those that find no room yet wait for it; work begins with the first that is up."""
        options = {
            "num_cpus": 1, "num_gpus": int(self.job.device == "cuda"), "scheduling_strategy": "SPREAD",
            "max_restarts": RESTARTS, "max_task_retries": -1, "concurrency_groups": {"control": 1},
        }  # fmt: skip
        if not self.there.own:  # a cluster of our own has this process's variables
            options["runtime_env"] = {"env_vars": QUIET}
        words = asdict(self.job) | {"out": str(Path(self.job.out).absolute())}
        for name in ("clips", "model", "latents", "targets"):  # actors have a working folder of their own
            if words[name] and (name != "model" or Path(words[name]).exists()):  # it may be a preset or Hub id
                words[name] = str(Path(words[name]).absolute())
        remote = self.ray.remote(**options)(RayWorker)
        for number in range(count):
            actor = remote.remote(words, torch.get_num_threads())
            self.workers.append(Hand(number, actor, actor.load.remote()))

    def work(self) -> None:
        """Until every clip is settled, or nobody is left."""
        while len(self.outcomes) < len(self.todo) and not self.there.gone:
            tasks = {hand.task: hand for hand in self.workers if hand.task is not None}
            if not tasks or time.monotonic() > self.stop_at:
                return
            try:
                done, _ = self.ray.wait(list(tasks), timeout=1.0)
                for task in done:
                    self._hear(tasks[task], task)
                if not done:
                    self.there.look(self.gone_after)
                for hand in self.workers:
                    if hand.task is None and not hand.ended:
                        self._give(hand)
            except KeyboardInterrupt:
                if self.interrupted:
                    raise
                self._interrupt()

    def _hear(self, hand: Hand, task: Any) -> None:
        hand.task = None
        try:
            said = self.ray.get(task)
        except self.ray.exceptions.RayActorError:
            return self._lose(
                hand, "died, and Ray starts it no more" if hand.loaded else "died while it loaded the model"
            )
        if hand.pid not in (0, said["pid"]):
            self._say(f"worker {hand.number} ({hand.node}) died and was started again on {said['node']}")
        hand.node, hand.pid = said["node"], said["pid"]
        if "error" in said:
            hand.error = {"type": said["type"], "text": said["error"]}
            return self._lose(hand, said["error"])
        if "clips" in said:
            return self._take_in(hand, said)
        spec = FeatureSpec.from_json(said["spec"])
        if self.store is None:
            self.store = FeatureStore.create(self.job.out, spec, said["about"])
        if said["may_tile"]:  # it will follow the store's, where a GPU with other memory free was up first
            spec = chosen(spec, bool(self.store.spec.options[OPTION]))
        if changed := differences(self.store.spec, spec):
            return self._lose(hand, f"would store other features: {'; '.join(changed)}")
        hand.loaded = True

    def _take_in(self, hand: Hand, said: dict) -> None:
        for clip_id, outcome, reason, _ in said["clips"]:
            self._settle(clip_id, outcome, reason)
        seconds = [seconds for _, outcome, _, seconds in said["clips"] if not outcome.endswith("elsewhere")]
        if seconds:
            self.seconds_per_clip, self.batch = sum(seconds) / len(seconds), max(1, said["batch_size"])
        hand.timings += [said["timing"]] if said["timing"] else []
        hand.report = {name: said[name] for name in ("stopped", "interrupted", "batch_size")}
        hand.report["timing"] = in_turn(hand.timings)
        if said["stopped"]:
            return self._lose(hand, f"stopped: {said['stopped']}")
        hand.ids = []
        if said["interrupted"]:
            hand.ended = "was interrupted"

    def _lose(self, hand: Hand, how: str) -> None:
        """An actor that works no more. Its clips are free for the others."""
        hand.ended = how
        self.queue.extendleft(reversed([clip_id for clip_id in hand.ids if clip_id not in self.outcomes]))
        hand.ids = []
        left = sum(not other.ended for other in self.workers)
        then = f"{left} of {len(self.workers)} workers go on" if left else "no worker is left"
        if not self.interrupted and (hand.loaded or left):
            self._say(f"worker {hand.number} ({hand.node}) {how}; {then}")

    def _give(self, hand: Hand) -> None:
        """A list of clips for a free actor: the next of the queue, or else those of another, which it shares then."""
        while self.queue and self.queue[0] in self.outcomes:
            self.queue.popleft()
        ids = [self.queue.popleft() for _ in range(min(len(self.queue), self._size()))]
        if not ids:
            busy = [other for other in self.workers if other.ids and other is not hand]
            if not busy:
                return
            other = max(busy, key=lambda other: len(other.ids) / (1 + other.copies))
            other.copies += 1
            ids = [clip_id for clip_id in reversed(other.ids) if clip_id not in self.outcomes]
        if ids:
            sign = str(self.store.run.path.relative_to(self.store.root))
            ticket = Ticket(sign, self.store.spec_hash, {"since": self.since, "session": self.session} | self.of_leases)
            hand.ids, hand.copies = ids, 0
            hand.task = hand.actor.work.remote(ids, asdict(ticket))

    def _size(self) -> int:
        """Clips of the next task: of some seconds, in whole batches, and smaller towards the end."""
        up = sum(hand.loaded and not hand.ended for hand in self.workers)
        size = TASK_SECONDS / self.seconds_per_clip if self.seconds_per_clip else FIRST_TASK
        size = min(size, LARGEST_TASK, len(self.queue) / (2 * max(1, up)))
        return max(1, -(-int(size) // self.batch)) * self.batch

    def _interrupt(self) -> None:
        self.interrupted, self.stop_at = True, time.monotonic() + STOP_WITHIN
        for hand in self.workers:
            if hand.task is not None and hand.loaded:
                hand.actor.stop.options(concurrency_group="control").remote()
            elif not hand.ended:
                hand.task, hand.ended = None, "was interrupted"

    def _say(self, text: str) -> None:
        tqdm.write(f"engine: {text}", sys.stderr)

    def end(self) -> None:
        """No actor is left behind, whatever happened here."""
        self._bar.close()
        if self.there.gone:
            return
        closing = [
            hand.actor.close.remote() for hand in self.workers if hand.loaded and not (hand.task and self.interrupted)
        ]
        if closing:
            self.ray.wait(closing, num_returns=len(closing), timeout=10.0)
        for hand in self.workers:
            hand.ended = hand.ended or ("done" if hand.loaded else "was not needed")
            self.ray.kill(hand.actor)


def in_turn(timings: list[dict]) -> dict:
    """Of one actor's tasks, one after the other."""
    if not timings:
        return {}
    seconds = sum(timing["seconds"] for timing in timings)
    busy = sum(timing["busy"] * timing["seconds"] for timing in timings) / seconds if seconds else 0.0
    return merged_timing(timings) | {"seconds": round(seconds, 4), "busy": round(busy, 4)}
