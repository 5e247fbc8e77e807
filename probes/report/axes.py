"""The study's axes: what each task asks, which of its numbers a table shows, and which way of them is better."""

from collections.abc import Iterable
from dataclasses import dataclass

from spatialprobe.probes.tasks import TASKS


@dataclass(frozen=True)
class Measure:
    metric: str
    heading: str
    higher: bool | None  # is better; None where that is not known here
    meaning: str = ""

    @property
    def arrow(self) -> str:
        return {True: "\u00a0↑", False: "\u00a0↓", None: ""}[self.higher]

    def best(self, values: Iterable[float]) -> float | None:
        """Of numbers; None where there are none, or where it is not known which way is better."""
        there = [x for x in values if x == x]
        return None if self.higher is None or not there else max(there) if self.higher else min(there)

    def top(self, values: Iterable[float]) -> float | None:
        """The best of numbers that are not all the same: what is in bold."""
        there = {x for x in values if x == x}
        return self.best(there) if len(there) > 1 else None


@dataclass(frozen=True)
class Axis:
    task: str
    title: str
    question: str
    measures: tuple[Measure, ...]  # the first is the one of cards, maps and charts
    chance: str | None = None  # metric that says what answers at random score on the first measure

    @property
    def headline(self) -> Measure:
        return self.measures[0]


AXES = (
    Axis(
        "tagging",
        "Semantics",
        "Which kinds of things does a clip show?",
        (
            Measure("mAP", "mAP", True, "mean average precision over the classes that the validation clips show"),
            Measure("AP_mid", "AP mid", True, "the same over the classes of middling frequency in training"),
        ),
        "mAP_chance",
    ),
    Axis(
        "instance",
        "Instances",
        "Which pixels belong to one object, in all views?",
        (
            Measure("T-mIoU", "T-mIoU", True, "overlap of objects with their groups, in all views at once"),
            Measure("T-SR", "T-SR", True, "share of objects that are found in every view that shows them"),
        ),
    ),
    Axis(
        "geometry",
        "Geometry",
        "Where is everything in 3D, and where were the cameras?",
        (
            Measure("AUC@30", "AUC@30", True, "area under the curve of relative camera poses within 30 degrees"),
            Measure(
                "point_error", "point error", False, "mean distance of points, in units of the first view's, aligned"
            ),
            Measure("AbsRel", "AbsRel", False, "relative error of depth, on the pixels the probe is most sure of"),
        ),
    ),
    Axis(
        "relation",
        "Relations",
        "Left or right, nearer or farther, how far apart?",
        (
            Measure("balanced_accuracy", "balanced accuracy", True, "mean over answers of the share told right"),
            Measure("within_50_200", "within 50 to 200%", True, "share of lengths told to a factor of two"),
            Measure("within_25", "within 25%", True, "share of lengths told to a quarter"),
            Measure("median_relative_error", "median rel. error", False, "of lengths"),
        ),
    ),
)
BY_TASK = {axis.task: axis for axis in AXES}


def axis_of(task: str, metrics: Iterable[str]) -> Axis:
    """The axis of a task; for one that is not of the study an axis of all its plain `metrics`, which has no best."""
    if task in BY_TASK:
        return BY_TASK[task]
    plain = sorted({name for name in metrics if name != "loss" and "/" not in name})
    measures = tuple(Measure(name, name, None) for name in plain) or (Measure("loss", "loss", False),)
    return Axis(task, task, "", measures)


def criterion(task: str) -> Measure:
    """By which a task picks one of several probes: its score, or the loss where that is none of its metrics."""
    score = TASKS[task].score if task in TASKS else "loss"
    if score in ("loss", "last"):
        return Measure("loss", "validation loss", False)
    return Measure(score, score, TASKS[task].higher_is_better)
