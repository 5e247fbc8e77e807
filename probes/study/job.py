"""What a study asks: which encoders, positions and tasks, and where everything of it lies. Checked as a whole.

A part is one encoder with its positions in one way. What is wrong with one encoder is not known before it is run.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from spatialprobe.engine.files.durable import must_be_no_file
from spatialprobe.engine.job import Job
from spatialprobe.engine.parts.image_encoder import POSITIONS
from spatialprobe.engine.run import job_clips
from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.types import check_clip_id
from spatialprobe.probes.backbone import Position
from spatialprobe.probes.labels import Labels
from spatialprobe.probes.setup import device_of, grid_configs, split
from spatialprobe.probes.task import ProbeConfig
from spatialprobe.probes.tasks import TASKS

SUMMARY = "study.json"


@dataclass(frozen=True)
class Part:
    """An encoder with its positions in one way: one store, and one training run of each task."""

    encoder: str  # its name in this study
    model: str  # preset, Hub id or local folder
    pos_embed: str  # of POSITIONS

    @property
    def name(self) -> str:
        return f"{self.encoder}-{self.pos_embed}"


@dataclass(frozen=True)
class StudyJob:
    """What is asked for, checked as a whole. `out` gets stores/<part>, runs/<part>/<task> and study.json.

    Raises ValueError for anything that would be wrong with every encoder; what is wrong with one is its own failure.
    """

    out: Path
    encoders: dict[str, str]  # name -> model
    pos_embed: tuple[str, ...]
    words: dict[str, Any]  # of a Job, but for model and out
    labels: Labels
    axes: dict[str, dict[str, Any]]  # task -> settings of its probes, instead of its defaults
    position: tuple[str, ...]  # of the probes
    seeds: tuple[int, ...] = ()  # none: the task's own
    val: float | None = None  # as of `train`
    skip_failed: bool = False  # train on what could be extracted, where clips failed
    training: dict[str, Any] = field(default_factory=dict)  # device, threads and the like, for `train`

    def __post_init__(self):
        for name in self.encoders:
            if "/" in check_clip_id(name):
                raise ValueError(f"an encoder's name becomes a folder, got {name!r}: say name={name}")
        for name, values, table in (
            ("pos_embed", self.pos_embed, POSITIONS),
            ("position", self.position, get_args(Position)),
            ("tasks", tuple(self.axes), tuple(TASKS)),
        ):
            if not values or len(set(values)) < len(values) or set(values) - set(table):
                raise ValueError(f"{name} must be some of {', '.join(table)}, got {', '.join(values) or 'none'}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must differ, got {', '.join(map(str, self.seeds))}")
        if not self.encoders:
            raise ValueError("encoders must be at least one, got none")
        if "pos_embed" in self.words.get("options", {}):
            raise ValueError("pos_embed is what the study varies, not an option of every encoder")
        self._check_probes()
        self._check_clips()
        self._check_place()

    def _check_probes(self) -> None:
        device_of(self.training.get("device"))
        for task in self.axes:
            if missing := [name for name in TASKS[task].labels if name not in self.labels.names]:
                raise ValueError(f"{task} needs {', '.join(missing)}, which {self.labels.root} has not")
            depth = self.configs(task)[0].depth
            turned = [position for position in self.position if position != "none"]
            if turned and not depth:
                raise ValueError(
                    f"position {', '.join(turned)} turns attention, and probes of {task} with depth 0 have none: "
                    "set depth to 1 or more, or position to none"
                )

    def _check_clips(self) -> None:
        """Raises what `split` would, once all clips are extracted."""
        clips = _Listed([ref.id for ref in job_clips(self.job(self.parts[0]))])
        for seed in {self.configs(task)[0].data_seed for task in self.axes}:
            split([clips], self.labels, self.val, seed, "raise")

    def _check_place(self) -> None:
        """Raises ValueError where `out` is something else, or a study of other data, whose runs would look the same."""
        must_be_no_file(self.out, "a study is a folder")
        file = self.out / SUMMARY
        # Listed before the summary is looked for: another process may be making the study.
        names = {path.name for path in self.out.iterdir()} if self.out.is_dir() else set()
        if not file.exists():
            if foreign := sorted(names - {"stores", "runs", ".tmp"}):
                raise ValueError(f"{self.out} is not empty and no study: it holds {', '.join(foreign)}")
            return
        try:
            there = json.loads(file.read_text())["asked"]
            differing = [f"{name}: {there[name]} there, {x} asked" for name, x in self.data.items() if there[name] != x]
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{file} is no study's; choose another folder ({error!r})") from error
        if differing:
            raise ValueError(f"{self.out} is a study of other data; choose another folder: {'; '.join(differing)}")

    @property
    def data(self) -> dict[str, Any]:
        """What clips and labels are known by, beside their ids."""
        places = {"clips": str(Path(self.words["clips"]).resolve()), "labels": str(self.labels.root.resolve())}
        return places | {"classes": len(self.labels.class_names)}

    @property
    def parts(self) -> list[Part]:
        return [Part(name, model, how) for name, model in self.encoders.items() for how in self.pos_embed]

    def job(self, part: Part) -> Job:
        """Of a part's store. Native positions are every family's default, so families without the option have them."""
        options = {} if part.pos_embed == "native" else {"pos_embed": part.pos_embed}
        options |= self.words.get("options", {})
        place = {"model": part.model, "out": str(self.out / "stores" / part.name), "options": options}
        return Job.from_words(self.words | place)

    def grid(self, store: FeatureStore | None = None) -> dict[str, list[Any]]:
        """Of a training run: positions, seeds if asked for, and the layers and steps of a store that has several."""
        grid: dict[str, list[Any]] = {"position": list(self.position)}
        several = {} if store is None else {"layer": store.spec.layers, "step": store.spec.steps}
        if store is not None and store.spec.merge_steps:
            del several["step"]
        grid |= {name: list(values) for name, values in several.items() if len(values) > 1}
        return grid | ({"seed": list(self.seeds)} if self.seeds else {})

    def configs(self, task: str, store: FeatureStore | None = None) -> list[ProbeConfig]:
        return grid_configs(TASKS[task], self.grid(store), self.axes[task])


@dataclass(frozen=True)
class _Listed:
    """Clips in the place of a store that is not there yet."""

    clips: list[str]

    def ids(self) -> list[str]:
        return self.clips
