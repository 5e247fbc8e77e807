"""Several stores of one spec, such as the parts that several machines extracted, read as one."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

from spatialprobe.engine.files.schema import differences
from spatialprobe.engine.reading.rows import FeatureSource, OpenClip


class Shards:
    """A `FeatureSource` of the clips that are in its parts when it is made."""

    def __init__(self, parts: Sequence[FeatureSource]):
        """Raises ValueError if the parts are of different specs, naming the fields, or have a clip in common."""
        if not parts:
            raise ValueError("shards must be at least one store, got none")
        self.parts, first = list(parts), parts[0]
        self.spec, self.spec_hash = first.spec, first.spec_hash
        self._part: dict[str, FeatureSource] = {}
        for part in parts:
            if part.spec_hash != first.spec_hash:
                fields = "; ".join(differences(first.spec, part.spec))
                raise ValueError(f"{source_name(first)} and {source_name(part)} hold features of two specs: {fields}")
            for clip_id in part.ids():
                if clip_id in self._part:
                    both = f"{source_name(self._part[clip_id])} and {source_name(part)}"
                    raise ValueError(f"clip {clip_id} is in both {both}")
                self._part[clip_id] = part

    @property
    def root(self) -> str:
        return ", ".join(source_name(part) for part in self.parts)

    def ids(self) -> list[str]:
        return sorted(self._part)

    def open_clip(self, clip_id: str, *, check: bool = False) -> AbstractContextManager[OpenClip]:
        if clip_id not in self._part:
            raise FileNotFoundError(f"clip {clip_id} is not in {self.root}")
        return self._part[clip_id].open_clip(clip_id, check=check)


def source_name(source: FeatureSource) -> str:
    """Where a source is, for messages."""
    return str(getattr(source, "root", None) or type(source).__name__)
