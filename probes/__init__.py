from spatialprobe.probes.grouping import HDBSCAN, group, group_scenes, principal_components, temporal_overlap

__all__ = ["HDBSCAN", "group", "group_scenes", "principal_components", "temporal_overlap"]
