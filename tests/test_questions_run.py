"""Folders of questions: whole parts, the same bytes after a kill, failures listed, other settings refused."""

import json
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pytest
from synthetic_tables import random_table

from spatialprobe.engine.cli import main
from spatialprobe.engine.files.failures import read_failures
from spatialprobe.engine.questions.folder import QuestionFolder, QuestionSpec
from spatialprobe.engine.questions.run import ask_parts, check_images, clip_ids
from spatialprobe.engine.questions.settings import Settings

IDS = [f"boxes-{n:05d}" for n in range(11)]
PARTS = range(3)  # of 4 clips
IMAGES = "frames/{clip}/{frame:06d}.jpg"


def read(path: Path):
    """A table in place of a file; the fifth clip's has no object that is seen well, the eighth's cannot be read."""
    number = int(path.stem[-5:])
    if number == 8:
        raise OSError("truncated")
    table = random_table(number, alike=number % 2 == 0)
    return replace(table, whole=table.whole * 0.4) if number == 5 else table


def spec(**changes) -> QuestionSpec:
    return QuestionSpec(Settings(per_clip=20), len(IDS), "hash", {"seed": 1}, IMAGES, part_clips=4, **changes)


def run(out: Path, parts=PARTS, reader=read, **options):
    return ask_parts(Path("lifted"), IDS, parts, QuestionFolder(out, spec()), reader, **options)


def contents(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("part-*"))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("questions") / "out"
    run(out)
    return out


def lines(out: Path, folder: str = ".") -> list[dict]:
    return [json.loads(line) for path in sorted((out / folder).glob("part-*.jsonl")) for line in path.open()]


def test_every_clip_is_asked_about_in_order_and_the_rest_is_listed(whole):
    records = lines(whole)
    assert list(dict.fromkeys(q["clip"] for q in records)) == [i for i in IDS if i not in (IDS[5], IDS[8])]
    assert {path.name for path in whole.glob("part-*")} == {f"part-0000{k}.jsonl" for k in PARTS}
    assert [q["id"] for q in records if q["clip"] == IDS[0]] == [f"{IDS[0]}#{k}" for k in range(20)]
    failed, torn = read_failures(whole / "failed.jsonl")
    assert not torn
    assert {i: (f["stage"], f["reason"]) for i, f in failed.items()} == {
        IDS[5]: ("ask", "none of its 8 objects is seen well in any of 6 views"),
        IDS[8]: ("read", "truncated"),
    }
    summary = QuestionFolder(whole, spec()).summary(PARTS)
    assert summary["clips"] == {"asked": 9, "failed": 2}
    for name, key in (("types", "type"), ("forms", "form")):
        assert summary[name] == Counter(q[key] for q in records)
    assert summary["levels"] == summary["wanted"] == Counter(str(q["level"]) for q in records)
    assert summary["truths"] == Counter(str(q["truth"]).lower() for q in records if q["form"] == "truth")


def test_records_hold_the_numbers_that_their_words_use(whole):
    for q in lines(whole):
        table = random_table(int(q["clip"][-5:]), alike=int(q["clip"][-5:]) % 2 == 0)
        assert set(q["frames"]) <= set(table.frames.tolist())
        view = table.frames.tolist().index(q["frames"][0])
        for thing in q.get("objects", ()):
            i = table.ids.tolist().index(thing["id"])
            assert thing["tag"] == table.tags[i]
            assert thing["box"] == [round(edge) for edge in table.box[i, view].tolist()]
        for u, v in q.get("points", ()):
            assert [u, v] in table.sample_pixels[view].tolist()
            assert f"({u}, {v})" in q["question"]
            assert q["size"] == [table.size[1], table.size[0]]
            assert f"{q['size'][0]}x{q['size'][1]} image" in q["question"]
        if q["form"] == "choice":
            assert q["choices"]["ABCD".index(q["letter"])] == q["right"]
            if "choice_values" in q and not q["unit"] == "":
                assert q["choice_values"]["ABCD".index(q["letter"])] == q["value"]


def test_chats_have_an_image_token_for_every_image(whole):
    chats, records = lines(whole, "chat"), lines(whole)
    assert [chat["id"] for chat in chats] == [q["id"] for q in records]
    for chat, q in zip(chats, records, strict=True):
        user, assistant = chat["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert user["content"] == "<image>\n" * len(q["frames"]) + q["question"]
        assert assistant["content"] == q["answer"]
        assert chat["images"] == [IMAGES.format(clip=q["clip"], frame=frame) for frame in q["frames"]]
        assert set(chat) == {"id", "images", "messages"}


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(whole, tmp_path):
    out = tmp_path / "out"
    code = f"""
import os, signal
from pathlib import Path
import test_questions_run as t
from spatialprobe.engine.questions.folder import QuestionFolder
write, calls = QuestionFolder.write_record, []
def dies(self, name, text):
    calls.append(name)
    if len(calls) == 6:  # the records of the second part: its chats and counts are there
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, name, text)
QuestionFolder.write_record = dies
t.run(Path({str(out)!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, check=False)
    assert done.returncode == -9
    assert sorted(path.name for path in out.glob("part-*")) == ["part-00000.jsonl"]
    report = run(out)
    assert (report.asked, report.present, report.written, report.failed) == (11, 4, 5, 2)
    assert contents(out) == contents(whole)
    assert run(out).present == 11
    assert not (out / "leases").exists()


def two_runs(out: Path, reader, **options):
    """Two runs at once, each with a part before either goes on. Their reports, and how often clips were read."""
    both, reads = Barrier(2, timeout=60), Counter()
    first = [IDS[part * 4] for part in PARTS]

    def noted(path: Path):
        reads[path.stem] += 1
        if path.stem in first and sum(reads[name] for name in first) <= 2:
            both.wait()
        return reader(path)

    with ThreadPoolExecutor(2) as pool:
        return [*pool.map(lambda _: run(out, reader=noted, **options), range(2))], reads


def test_two_runs_split_the_parts_and_make_none_twice(whole, tmp_path):
    reports, reads = two_runs(tmp_path, read)
    assert reads == dict.fromkeys(IDS, 1)
    assert contents(tmp_path) == contents(whole)
    failed, _ = read_failures(whole / "failed.jsonl")
    for mine, theirs in (reports, reports[::-1]):
        assert (mine.asked, mine.present, mine.failed, mine.elsewhere) == (11, 0, 2, theirs.written)
        assert mine.written + mine.elsewhere == 9
        assert mine.written > 0
        assert mine.failures == {i: f"{f['stage']}: {f['reason']}" for i, f in failed.items()}
    assert len((tmp_path / "failed.jsonl").read_text().splitlines()) == 2
    assert not (tmp_path / "leases").exists()


def test_two_runs_retry_a_part_once(whole, tmp_path):
    run(tmp_path)
    still = lambda path: read(path) if path.stem == IDS[5] else random_table(int(path.stem[-5:]))  # noqa: E731
    reports, reads = two_runs(tmp_path, still, retry_failed=True)
    assert reads == dict.fromkeys(IDS[4:], 1)  # clip 5 fails again, and once
    for mine, theirs in (reports, reports[::-1]):
        assert (mine.present, mine.failed, mine.elsewhere) == (4, 1, theirs.written)
        assert mine.written + mine.elsewhere == 6
        assert list(mine.failures) == [IDS[5]]


def test_shards_make_the_same_parts(whole, tmp_path):
    for parts in ([0, 2], [1]):
        run(tmp_path / "out", parts)
    assert contents(tmp_path / "out") == contents(whole)


def test_failed_clips_are_tried_again_on_demand(whole, tmp_path):
    out = tmp_path / "out"
    assert run(out).failed == 2
    before = contents(out)
    mended = run(out, reader=lambda path: random_table(int(path.stem[-5:])), retry_failed=True)
    assert (mended.present, mended.written, mended.failed) == (4, 7, 0)
    assert set(IDS) == {q["clip"] for q in lines(out)}
    assert contents(out)["part-00000.jsonl"] == before["part-00000.jsonl"]


def test_a_folder_of_other_settings_or_other_things_is_refused(whole, tmp_path):
    other = replace(spec(), settings=Settings(per_clip=21))
    with pytest.raises(ValueError, match=r"holds questions of another spec.*\n  settings.per_clip: 20 there, 21 asked"):
        QuestionFolder(whole, other)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty and no folder of questions: it holds notes.txt"):
        QuestionFolder(tmp_path, spec())
    with pytest.raises(ValueError, match=r"there is nothing to retry: .* is no folder of questions"):
        QuestionFolder.check_retry(tmp_path)
    with pytest.raises(ValueError, match=r"is no folder of lifted clips: it has no lift.json"):
        clip_ids(tmp_path)


@pytest.mark.parametrize("pattern", ["{clip}.png", "{clip}/{number}.png", "{frame.real}", "{clip"])
def test_image_patterns_without_a_frame_are_refused(pattern):
    with pytest.raises(ValueError, match=r"images must be a path with \{clip\} and \{frame\} in it"):
        check_images(pattern)


def test_a_limit_of_no_clips_is_refused(tmp_path, capsys):
    assert main(["ask", str(tmp_path), "--out", str(tmp_path / "out"), "--limit", "0"]) == 2
    assert "limit must be a whole number from 1, got '0'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
