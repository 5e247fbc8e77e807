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

from spatialprobe.engine.files.failures import read_failures
from spatialprobe.engine.files.spec_folder import SpecFolder
from spatialprobe.engine.questions.settings import Settings

Failure = tuple[str, str, str]  # clip id, stage, reason
SPEC, PART_CLIPS = "questions.json", 256
COUNTED = ("clips", "levels", "wanted", "types", "forms", "truths")  # in a part, and in the summary


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


class QuestionFolder(SpecFolder[QuestionSpec]):
    NAME, WHAT, READ = SPEC, "questions", staticmethod(read_spec)

    def name(self, part: int) -> str:
        return f"part-{part:05d}"

    def part_path(self, part: int) -> Path:
        return self.root / f"{self.name(part)}.jsonl"

    def has(self, part: int) -> bool:
        return self.part_path(part).exists()

    def stamp(self, part: int) -> tuple[int, int] | None:
        """Another one for a part that was made again, None for one that is not there."""
        try:
            stat = self.part_path(part).stat()
        except FileNotFoundError:
            return None
        return stat.st_ino, stat.st_mtime_ns

    def counts(self, part: int) -> dict:
        return json.loads((self.root / f"counts/{self.name(part)}.json").read_text())

    def failures_of(self, part: int) -> list[Failure]:
        """What is wrong with clips of a part that is there."""
        records, _ = read_failures(self.root / "failed.jsonl")
        return [(i, records[i]["stage"], records[i]["reason"]) for i in self.counts(part)["failed"]]

    def write_part(
        self,
        part: int,
        texts: Sequence[str],  # records, and chats if wanted
        counts: dict,
        failures: Sequence[Failure],
    ) -> None:
        """Stores a part; the records come last, and with them the part is done. Raises StoreFull."""
        self.part_path(part).unlink(missing_ok=True)  # of a part that is made again
        for failure in failures:
            self.record_failure(*failure)
        if self.spec.images is not None:
            self.write_record(f"chat/{self.name(part)}.jsonl", texts[1])
        self.write_record(f"counts/{self.name(part)}.json", json.dumps(counts, indent=1))
        self.write_record(self.part_path(part).name, texts[0])

    def summary(self, parts: Iterable[int]) -> dict:
        """Sums of the counts of the parts that are there."""
        sums: dict[str, Counter] = {name: Counter() for name in COUNTED}
        for part in parts:
            if self.has(part):
                counts = self.counts(part)
                for name, counter in sums.items():
                    counter.update(counts[name])
        return {name: dict(counter) for name, counter in sums.items()}
