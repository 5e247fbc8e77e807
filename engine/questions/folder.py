"""A folder of questions: parts of a fixed number of clips, each of which has its final name only when it is whole.

questions.json        the spec: a folder refuses another
part-00000.jsonl      records (lines.py) of the first PART_CLIPS clips
chat/part-00000.jsonl the same questions in chat format, if wanted
counts/part-00000.json  what was counted in the part, and which of its clips failed
summary.json          the sum of these
failed.jsonl          clips that could not be asked about, with the reason
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from spatialprobe.engine.durable import RunFolder, make_folder, publish, publish_first, room_for, write_text
from spatialprobe.engine.failures import append_failure
from spatialprobe.engine.questions.settings import Settings
from spatialprobe.engine.schema import differences

SPEC, PART_CLIPS = "questions.json", 256


@dataclass(frozen=True)
class QuestionSpec:
    """What changes a byte of the questions."""

    settings: Settings
    clips: int  # how many, and the hash of their ids in order
    clip_ids: str
    lifted: dict = field(hash=False)  # the spec of the folder that the object tables are of
    images: str | None = None  # pattern of the chat format's image paths; None: no chat format
    part_clips: int = PART_CLIPS
    version: str = ""  # of spatialprobe

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "QuestionSpec":
        raw = json.loads(text)
        settings = {name: tuple(x) if isinstance(x, list) else x for name, x in raw["settings"].items()}
        return cls(**raw | {"settings": Settings(**settings)})


def read_spec(path: Path) -> QuestionSpec:
    """Raises ValueError for a file that holds something else."""
    try:
        return QuestionSpec.from_json(path.read_text())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not the spec of a folder of questions: {error}") from error


class QuestionFolder:
    def __init__(self, root: Path, spec: QuestionSpec):
        """Makes the folder, or opens one of an equal spec. Raises ValueError for one of another, or of other things."""
        self.check_place(root, spec)
        make_folder(root)
        self.root, self.spec, self.run = root, spec, RunFolder(root / "tmp")
        temp = self.run.file()
        write_text(temp, spec.to_json())
        publish_first(temp, root / SPEC)
        self.check_place(root, spec)  # another process may have been first

    @staticmethod
    def check_place(root: Path, spec: QuestionSpec) -> None:
        """Raises what making the folder would, and writes nothing."""
        if root.exists() and not root.is_dir():
            raise ValueError(f"{root} is a file; questions are a folder")
        if (root / SPEC).exists():
            if changed := differences(read_spec(root / SPEC), spec):
                lines = "\n".join(f"  {line}" for line in changed)
                raise ValueError(f"{root} holds questions of another spec; choose another folder\n{lines}")
        elif root.is_dir() and (foreign := sorted(p.name for p in root.iterdir() if p.name != "tmp")):
            raise ValueError(f"{root} is not empty and no folder of questions: it holds {', '.join(foreign[:5])}")

    def path(self, part: int) -> Path:
        return self.root / f"part-{part:05d}.jsonl"

    def counts_path(self, part: int) -> Path:
        return self.root / "counts" / f"part-{part:05d}.json"

    def has(self, part: int) -> bool:
        return self.path(part).exists()

    def counts(self, part: int) -> dict:
        return json.loads(self.counts_path(part).read_text())

    def write_part(self, part: int, texts: Sequence[str], counts: dict) -> None:  # records, and chats if wanted
        """Stores a part; the records come last, and with them the part is done. Raises StoreFull."""
        self.path(part).unlink(missing_ok=True)  # of a part that is made again
        if self.spec.images is not None:
            self.write(self.root / "chat" / f"part-{part:05d}.jsonl", texts[1])
        self.write(self.counts_path(part), json.dumps(counts, indent=1))
        self.write(self.path(part), texts[0])

    def write(self, path: Path, text: str) -> None:
        """A whole file; one of that name is replaced."""
        with room_for(path, len(text)):
            temp = self.run.file()
            try:
                write_text(temp, text)
                publish(temp, path)
            finally:
                temp.unlink(missing_ok=True)

    def record_failure(self, clip_id: str, stage: str, reason: str) -> None:
        append_failure(self.root / "failed.jsonl", clip_id, stage, reason)

    def summary(self, parts: Iterable[int]) -> dict:
        """Sums of the counts of the parts that are there."""
        sums: dict[str, Counter] = {
            name: Counter() for name in ("clips", "levels", "wanted", "types", "forms", "truths")
        }
        for part in parts:
            if self.has(part):
                counts = self.counts(part)
                for name, sum_ in sums.items():
                    sum_.update(counts[name])
        return {name: dict(sum_) for name, sum_ in sums.items()}
