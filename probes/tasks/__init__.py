"""Every task by its name. A task is a file here, and knows no other."""

from spatialprobe.probes.tasks.geometry import GEOMETRY
from spatialprobe.probes.tasks.instance import INSTANCE
from spatialprobe.probes.tasks.relation import RELATION
from spatialprobe.probes.tasks.tagging import TAGGING

TASKS = {task.name: task for task in (TAGGING, INSTANCE, GEOMETRY, RELATION)}
