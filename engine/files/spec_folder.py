"""Folders of what one spec made, which lies in it: targets and lifted clips, a file for each, and questions.

A file is done when it has its final name. What is in it, its maker knows.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor

from spatialprobe.engine.files.clipfile import all_files, write_file
from spatialprobe.engine.files.durable import (
    RunFolder,
    make_folder,
    must_be_no_file,
    publish,
    publish_first,
    room_for,
    write_text,
)
from spatialprobe.engine.files.failures import append_failure, read_failures
from spatialprobe.engine.files.schema import differences
from spatialprobe.engine.pipeline.outcomes import run_file
from spatialprobe.engine.types import check_clip_id

SUFFIX = ".sft"
S = TypeVar("S")  # a dataclass with to_json


class SpecFolder(Generic[S]):
    """The spec, which no other may be mixed with, records of runs, and failures."""

    NAME: ClassVar[str]  # of the spec's file
    WHAT: ClassVar[str]  # the folder holds, in the plural
    READ: ClassVar[Callable[[Path], Any]]  # the spec of a file; raises ValueError for a file that holds something else

    def __init__(self, root: Path, spec: S):
        """Makes the folder, or opens one of an equal spec. Raises ValueError for one of another, or of other things."""
        self.check_place(root, spec)
        make_folder(root)
        self.root, self.spec, self.run = root, spec, RunFolder(root / "tmp")
        temp = self.run.file()
        write_text(temp, spec.to_json())
        publish_first(temp, root / self.NAME)
        self.check_place(root, spec)  # another process may have been first

    @classmethod
    def check_place(cls, root: Path, spec: S) -> None:
        """Raises what making the folder would, and writes nothing."""
        must_be_no_file(root, f"{cls.WHAT} are a folder")
        # Listed before the spec is looked for: another process may be making the folder.
        foreign = sorted(p.name for p in root.iterdir() if p.name != "tmp") if root.is_dir() else []
        if (root / cls.NAME).exists():
            if changed := differences(cls.READ(root / cls.NAME), spec):
                lines = "\n".join(f"  {line}" for line in changed)
                raise ValueError(f"{root} holds {cls.WHAT} of another spec; choose another folder\n{lines}")
        elif foreign:
            raise ValueError(f"{root} is not empty and no folder of {cls.WHAT}: it holds {', '.join(foreign[:5])}")

    @classmethod
    def check_retry(cls, root: Path) -> None:
        """Raises ValueError where no earlier run can have failed."""
        if not (root / cls.NAME).exists():
            raise ValueError(f"there is nothing to retry: {root} is no folder of {cls.WHAT}")

    def write_record(self, name: str, text: str) -> None:
        """Writes a small file, whole or not at all; one of that name is replaced."""
        with room_for(self.root / name, len(text)):
            temp = self.run.file()
            write_text(temp, text)
            publish(temp, self.root / name)

    def record_report(self, shard: str | None, record: dict[str, Any]) -> None:
        """Keeps a run's report, each shard's in a file of its own."""
        self.write_record(run_file(shard), json.dumps(record, indent=1))

    def record_failure(self, clip_id: str, stage: str, reason: str) -> None:
        append_failure(self.root / "failed.jsonl", clip_id, stage, reason)


class ClipFolder(SpecFolder[S]):
    """One `<clip id>.sft` per clip: what `pipeline.outcomes` and `each_clip` need of a place to write to."""

    @classmethod
    def failed(cls, root: Path) -> set[str]:
        """Clips whose last attempt failed and that have no file. Raises ValueError for no such folder."""
        cls.check_retry(root)
        records, _ = read_failures(root / "failed.jsonl")
        return {clip_id for clip_id in records if not (root / f"{clip_id}{SUFFIX}").exists()}

    def path(self, clip_id: str) -> Path:
        return self.root / f"{check_clip_id(clip_id)}{SUFFIX}"

    def __contains__(self, clip_id: str) -> bool:
        return self.path(clip_id).is_file()

    def ids(self) -> list[str]:
        """Clips that are done, sorted."""
        return sorted(name.removesuffix(SUFFIX) for name, _ in all_files(self.root) if name.endswith(SUFFIX))

    def write(self, clip_id: str, tensors: dict[str, Tensor], provenance: dict[str, Any]) -> int:
        """Stores a clip's tensors and returns its file's size. Raises StoreFull if the disk is full."""
        final, temp = self.path(clip_id), self.run.file()
        with room_for(final, sum(x.nbytes for x in tensors.values())):
            try:
                size = write_file(temp, tensors, provenance | {"clip": clip_id, "spec": asdict(self.spec)})
                publish(temp, final)
            finally:
                temp.unlink(missing_ok=True)
        return size
