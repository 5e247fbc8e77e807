"""What people import of probes. Each name is loaded when it is first used: grouping needs no torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spatialprobe.probes.grouping import HDBSCAN, group, group_scenes, principal_components, temporal_overlap
    from spatialprobe.probes.labels import open_labels
    from spatialprobe.probes.loading.loader import FeatureLoader
    from spatialprobe.probes.loop import evaluate, train
    from spatialprobe.probes.tasks.geometry import GEOMETRY
    from spatialprobe.probes.tasks.instance import INSTANCE
    from spatialprobe.probes.tasks.relation import RELATION
    from spatialprobe.probes.tasks.tagging import TAGGING

_HOME = {
    "loading.loader": ("FeatureLoader",),
    "grouping": ("HDBSCAN", "group", "group_scenes", "principal_components", "temporal_overlap"),
    "labels": ("open_labels",),
    "loop": ("evaluate", "train"),
    "tasks.geometry": ("GEOMETRY",),
    "tasks.instance": ("INSTANCE",),
    "tasks.relation": ("RELATION",),
    "tasks.tagging": ("TAGGING",),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "GEOMETRY",
    "HDBSCAN",
    "INSTANCE",
    "RELATION",
    "TAGGING",
    "FeatureLoader",
    "evaluate",
    "group",
    "group_scenes",
    "open_labels",
    "principal_components",
    "temporal_overlap",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE[name]}"), name)
