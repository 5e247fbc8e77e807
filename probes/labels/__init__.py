from spatialprobe.probes.labels.base import Labels, presence_rates
from spatialprobe.probes.labels.demo import DemoLabels
from spatialprobe.probes.labels.dl3dv import DL3DVLabels
from spatialprobe.probes.labels.folders import open_labels
from spatialprobe.probes.labels.lifted import LiftedLabels
from spatialprobe.probes.labels.scannet import ScanNetLabels

__all__ = ["DL3DVLabels", "DemoLabels", "Labels", "LiftedLabels", "ScanNetLabels", "open_labels", "presence_rates"]
