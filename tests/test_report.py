"""The report without a browser: every number is one of a file's, nothing is guessed, and names stay text."""

import json
import math
import re
import time
from dataclasses import asdict, replace
from html.parser import HTMLParser

import numpy as np
import pytest
from report_results import CLIP_BYTES, make_metrics, make_result, make_store, write_study

from spatialprobe.engine.cli import main
from spatialprobe.probes.report.charts import Scale
from spatialprobe.probes.report.collect import collect
from spatialprobe.probes.report.page import render
from spatialprobe.probes.report.published import FIGURES, published
from spatialprobe.probes.report.scores import best_of, make_scores
from spatialprobe.probes.report.words import NONE, number
from spatialprobe.probes.results import Result, write_results

BAD_NAME = "</script><img src=x onerror=alert(1)>\"'&\x00\x07"


class Page(HTMLParser):
    """Tables by caption: rows of (class, [(text, exact value or None, bold)]). Lists every tag and attribute too."""

    def __init__(self, page: str):
        super().__init__()
        self.tables, self.tags, self.open, self.caption = {}, [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.open.append(tag)
        if tag == "table":
            self.rows = []
        elif tag == "tr":
            self.rows.append((attributes.get("class") or "", []))
        elif tag in ("td", "th"):
            self.rows[-1][1].append(["", None, False])
        elif tag == "data" and "td" in self.open:
            self.rows[-1][1][-1][1:] = float(attributes["value"]), "strong" in self.open
        if tag in ("meta", "link", "img", "br", "col"):
            self.open.pop()

    def handle_data(self, data):
        if "caption" in self.open:
            self.caption = data
        elif "td" in self.open or "th" in self.open:
            self.rows[-1][1][-1][0] += data

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"{tag} closes what is not open"
        if tag == "table":
            self.tables[self.caption] = self.rows

    def row(self, caption: str, name: str) -> list:
        (found,) = [cells for _, cells in self.tables[caption] if cells[0][0] == name]
        return found


def report(*results: Result, tmp_path, title="T") -> tuple[Page, str]:
    write_results(tmp_path / "only" / "results.json", results)
    page = render(make_scores(collect([tmp_path / "only"])), title)
    return Page(page), page


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    runs = write_study(root)
    made = make_scores(collect([runs]))
    return runs, made, Page(render(made, "A study"))


# -- the study's table ------------------------------------------------------------------------------------------------


def files(runs, task: str, name: str) -> list[dict]:
    return json.loads((runs / task / name / "results.json").read_text())


def test_a_cell_is_the_probe_that_the_tasks_own_criterion_picks(study):
    runs, _, page = study
    for task, first, score, sign in (
        ("tagging", 1, "AP_head", -1),
        ("instance", 4, "loss", 1),
        ("geometry", 7, "loss", 1),
    ):
        results = files(runs, task, "cogvideox-2b")
        best = min(results, key=lambda r: sign * r["metrics"][score])
        row = page.row("Features by axes", "cogvideox-2b")
        metrics = {
            "tagging": ("mAP", "AP_mid"),
            "instance": ("T-mIoU", "T-SR"),
            "geometry": ("AUC@30", "point_error", "AbsRel"),
        }
        shown = [row[first + i] for i in range(len(metrics[task]))]
        assert [cell[1] for cell in shown] == [best["metrics"][m] for m in metrics[task]]
        assert [cell[0] for cell in shown] == [f"{best['metrics'][m]:.3f}" for m in metrics[task]]
        layer, step = best["keys"][0][1:]
        assert row[first + len(shown)][0] == f"block {layer}, step {step}; best of 4"


def test_bold_is_the_best_measured_number_of_its_column(study):
    _, made, page = study
    rows = page.tables["Features by axes"]
    columns = [m for bench in made.benches for m in (*bench.axis.measures, None)]
    for i, measure in enumerate(columns, start=1):
        measured = [
            cells[i] for class_, cells in rows[2:] if class_ == "" and len(cells) > i and cells[i][1] is not None
        ]
        if measure is None or len(measured) < 2:
            assert not any(cell[2] for cell in measured)
            continue
        best = (max if measure.higher else min)(cell[1] for cell in measured)
        assert [cell[2] for cell in measured] == [cell[1] == best for cell in measured], measure.metric
    assert not any(cell[2] for class_, cells in rows if class_ in ("published", "mean") for cell in cells)


def test_seeds_are_one_number_with_its_spread(study):
    runs, _, page = study
    by_layer = {
        layer: [r for r in files(runs, "instance", "wan2.1-t2v-14b") if r["keys"][0][1] == layer] for layer in (10, 20)
    }
    best = min(by_layer.values(), key=lambda seeds: np.mean([r["metrics"]["loss"] for r in seeds]))
    values = [r["metrics"]["T-mIoU"] for r in best]
    row = page.row("Features by axes", "wan2.1-t2v-14b")
    assert row[4][1] == pytest.approx(np.mean(values), abs=1e-12)
    assert row[4][0] == f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"
    assert "3 seeds (1, 2, 3); best of 2" in row[6][0]


def test_runs_of_one_seed_are_no_seeds_and_copies_count_once(tmp_path):
    source = make_store(tmp_path / "store", "dinov2-large")
    draw = np.random.default_rng(3)
    first, again = (make_result("instance", [source], make_metrics("instance", draw), seed=7) for _ in range(2))
    moved = replace(first, sources=[source | {"store": "gone"}])
    page, _ = report(first, again, moved, tmp_path=tmp_path)
    row = page.row("Features by axes", "dinov2-large")
    assert "gone" not in [cells[0][0] for _, cells in page.tables["Features by axes"]]
    assert row[1][1] == pytest.approx(np.mean([r.metrics["T-mIoU"] for r in (first, again)]), abs=1e-12)
    assert "2 runs of seed 7" in row[3][0]


def test_families_have_means_and_published_figures_are_told_apart(study):
    _, _, page = study
    three = [page.row("Features by axes", name) for name in ("wan2.1-t2v-14b", "wan2.1-t2v-1.3b", "cogvideox-2b")]
    (first, *_) = [cells for class_, cells in page.tables["Features by axes"] if class_ == "mean"]
    assert first[0][0] == "mean of the 3"
    assert first[1][1] == pytest.approx(np.mean([row[1][1] for row in three]), abs=1e-12)
    shown = [cells[0][0] for class_, cells in page.tables["Features by axes"] if class_ == "published"]
    assert shown == [f"published for {m}" for m in ("wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "internvl3-8b", "qwen3-vl-8b")]
    assert page.row("Features by axes", "published for wan2.1-t2v-14b")[1][0] == "0.800"


def test_published_figures_are_the_studys_own():
    assert published("qwen3-vl-2b") == pytest.approx({
        ("tagging", "AP_mid"): 0.901, ("tagging", "mAP"): 0.936, ("instance", "T-SR"): 0.136,
        ("instance", "T-mIoU"): 0.255, ("geometry", "point_error"): 0.202, ("geometry", "AbsRel"): 0.096,
        ("geometry", "AUC@30"): 0.371,
    })  # fmt: skip
    assert published("dinov2-large") == published(None) == {}
    assert {len(figures) for figures in FIGURES.values()} == {7}


def test_other_labels_have_columns_of_their_own(study):
    _, made, page = study
    assert [made.with_title(b) for b in made.benches] == [
        "Semantics", "Instances", "Geometry, data 1", "Geometry, data 2", "Relations",
    ]  # fmt: skip
    row = page.row("Features by axes", "qwen3-vl-8b")
    assert row[7][1] != row[11][1]
    assert page.row("Features by axes", "internvl3-8b")[11][0] == NONE


def test_features_of_one_model_are_told_apart_by_what_differs(study):
    _, made, _ = study
    assert [row.name for row in made.by_kind["encoders"]] == [
        f"dinov2-large (pos_embed {how})" for how in ("native", "none", "shuffled")
    ]


# -- the other tables -------------------------------------------------------------------------------------------------


def test_maps_show_every_layer_and_step(study):
    runs, _, page = study
    rows = page.tables["Geometry, data 1: AUC@30 of cogvideox-2b, by block and step"]
    values = {tuple(r["keys"][0][1:]): r["metrics"]["AUC@30"] for r in files(runs, "geometry", "cogvideox-2b")}
    assert [[cell[0] for cell in cells] for _, cells in rows[:1]] == [["block", "step 749", "step 900"]]
    for (_, cells), layer in zip(rows[1:], (10, 20), strict=True):
        assert [cell[1] for cell in cells[1:]] == [values[layer, step] for step in (749, 900)]
    shades = [a["class"] for t, a in page.tags if t == "td" and (a.get("class") or "").startswith("heat")]
    assert {"heat h0", "heat h8"} <= set(shades)


def test_a_gain_is_over_the_better_part_on_the_same_clips(study):
    runs, _, page = study
    table = "wan2.1-t2v-14b + qwen3-vl-8b: alone and joined"
    joined = files(runs, "geometry", "joined")[0]["metrics"]["point_error"]
    (alone,) = [r for r in files(runs, "geometry", "qwen3-vl-8b") if r["keys"][0][1] == 10]  # as in the joined
    assert page.row(table, "qwen3-vl-8b, alone")[8][1] == alone["metrics"]["point_error"]
    parts = [page.row(table, f"{name}, alone")[8][1] for name in ("wan2.1-t2v-14b", "qwen3-vl-8b")]
    gain = page.row(table, "gain over the better part")[8]
    assert gain[1] == pytest.approx(joined - min(parts), abs=1e-12)
    assert gain[0].endswith("better" if joined < min(parts) else "worse")


def test_relations_by_level_and_by_type(study):
    runs, _, page = study
    best = min(files(runs, "relation", "internvl3-8b"), key=lambda r: r["metrics"]["loss"])["metrics"]
    row = page.row("Yes or no: balanced accuracy, by level", "internvl3-8b")
    assert [cell[1] for cell in row[1:]] == [
        best[f"balanced_accuracy{k}"] for k in ("/level1", "/level2", "/level3", "")
    ]
    left = page.row("Relations by features", "left of")
    column = [cell[0] for cell in page.tables["Relations by features"][0][1]].index("internvl3-8b")
    assert left[column][1] == best["balanced_accuracy/left_of"]
    assert page.row("Relations by features", "clock")[column][1] == best["same_hour/clock"]


def test_encoders_by_positions_are_a_grid(study):
    runs, _, page = study
    (table,) = [name for name in page.tables if name.startswith("Instances: encoders")]
    assert [cell[0] for cell in page.tables[table][1][1]] == ["none", "2d", "none", "2d"]
    by = {r["config"]["position"]: r["metrics"]["T-mIoU"] for r in files(runs, "instance", "dinov2-shuffled")}
    assert [cell[1] for cell in page.row(table, "dinov2-large, positions shuffled")[1:3]] == [by["none"], by["2d"]]


def test_throughput_and_disk_are_the_stores_own(study):
    _, _, page = study
    row = [cell[0] for cell in page.row("Extraction runs and stores", "qwen3-vl-8b")]
    assert row[1:] == ["2", "2.47 MB", "1.23 MB", "25", "10.0", "2.50", "80%", "2.5 GB", "blocks, 8.0 s"]
    assert CLIP_BYTES == 1_234_000


# -- what is missing, and what is strange -----------------------------------------------------------------------------


def test_names_from_files_are_never_markup(tmp_path):
    source = make_store(tmp_path / "store", "any", family=BAD_NAME.replace("\x00", ""))
    source["store"] += "/gone" + BAD_NAME
    bad = make_result("tagging", [source], {"loss": 1.0, "mAP": 0.5, BAD_NAME: 0.25}, about={"labels": BAD_NAME})
    page, text = report(bad, bad, tmp_path=tmp_path, title=BAD_NAME)
    assert "<img src=x" not in text
    assert not re.search("[\x00\x07]", text)
    assert {tag for tag, _ in page.tags} & {"script", "img", "iframe"} == set()
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_one_result_of_a_lost_store_is_a_page_that_says_so(tmp_path):
    lost = {"store": str(tmp_path / "lost"), "spec": "0123456789abcdef", "weights": "content:1"}
    page, text = report(
        make_result("instance", [lost], {"loss": 1.0, "T-mIoU": 0.4, "T-SR": math.nan}), tmp_path=tmp_path
    )
    row = page.row("Features by axes", "lost")
    assert [cell[0] for cell in row] == ["lost", "0.400", NONE, "block 10"]
    assert not row[1][2], "one row is the best of none"
    assert "the store was not found" in text
    assert "Semantics against geometry" not in text


def test_a_store_is_found_beside_its_results_and_never_taken_for_another(tmp_path):
    source = make_store(tmp_path / "a" / "stores" / "one", "wan2.1-t2v-1.3b")
    moved = {**source, "store": "stores/one"}  # as named from a folder above the results
    found = make_result("instance", [moved], {"loss": 1.0, "T-mIoU": 0.4})
    write_results(tmp_path / "a" / "runs" / "results.json", [found])
    (facts,) = collect([tmp_path / "a" / "runs"]).stores.values()
    assert (facts.about["model"], facts.clips, facts.bytes) == ("wan2.1-t2v-1.3b", 2, 2 * CLIP_BYTES)
    other = replace(found, sources=[{**moved, "spec": "ffffffffffffffff"}])
    write_results(tmp_path / "a" / "runs" / "results.json", [other])
    (facts,) = collect([tmp_path / "a" / "runs"]).stores.values()
    assert (facts.spec, facts.missing) == (None, (f"the store that is there now has another spec, {source['spec']}",))


def test_points_and_settings_that_differ_are_said(tmp_path):
    stores = [
        make_store(tmp_path / "wan", "wan2.1-t2v-1.3b"),
        make_store(tmp_path / "points", "points", family="points"),
    ]
    metrics = {"loss": 1.0, "T-mIoU": 0.4, "T-SR": 0.1}
    made = [make_result("instance", [stores[i]], metrics, lr=lr) for i, lr in enumerate((1e-3, 1e-2))]
    page, text = report(*made, make_result("instance", stores, metrics), tmp_path=tmp_path)
    assert "Where these are the labels&#x27; own, they hold the answer to geometry" in text
    assert "Instances: settings of the probes differ between rows in lr." in text
    assert not any(cell[2] for _, cells in page.tables["Features by axes"] for cell in cells), "all are equal"
    gain = page.row("wan2.1-t2v-1.3b + points: alone and joined", "gain over the better part")
    assert [cell[0] for cell in gain[1:3]] == ["0.000 no change"] * 2


def test_diverged_probes_and_numbers_that_are_none(tmp_path):
    source = make_store(tmp_path / "store", "wan2.1-t2v-1.3b")
    good = make_result("geometry", [source], {"loss": 1.0, "AUC@30": math.nan, "point_error": 0.2, "AbsRel": math.inf})
    gone = make_result("geometry", [source], {}, layer=20, about={"stopped": "the loss is nan at step 3", "curve": []})
    page, text = report(good, gone, tmp_path=tmp_path)
    assert [cell[0] for cell in page.row("Features by axes", "wan2.1-t2v-1.3b")[1:4]] == [NONE, "0.200", NONE]
    assert "1 probe ended without numbers" in text
    assert "the loss is nan at step 3" in text


def test_a_run_of_which_nothing_is_left_is_a_page_too(tmp_path):
    source = make_store(tmp_path / "store", "wan2.1-t2v-1.3b")
    gone = make_result(
        "geometry", [source], {}, about={"stopped": "the loss is nan at step 3", "curve": [], "best_epoch": None}
    )
    page, text = report(gone, tmp_path=tmp_path)
    assert "1 probe ended without numbers" in text
    assert [name for name in page.tables if name.startswith("Features")] == []
    assert "the loss is nan at step 3" in text


def test_a_copy_of_a_file_is_no_second_seed(tmp_path):
    source = make_store(tmp_path / "store", "wan2.1-t2v-1.3b")
    one = make_result("instance", [source], {"loss": 1.0, "T-mIoU": 0.4, "T-SR": 0.1})
    for name in ("a", "b"):
        write_results(tmp_path / "runs" / name / "results.json", [one])
    made = make_scores(collect([tmp_path / "runs"]))
    ((probes,),) = made.cells.values()
    assert len(probes.results) == 1
    again = make_scores(collect([tmp_path / "runs" / "a", tmp_path / "runs", tmp_path / "runs" / "a" / "results.json"]))
    assert len(again.collection.runs) == 2


def test_a_task_of_ones_own_has_its_numbers_and_no_best(tmp_path):
    source = make_store(tmp_path / "store", "wan2.1-t2v-1.3b")
    about = {"task": "my task"}
    made = [
        make_result("instance", [source], {"loss": 2.0 - i, "mine": 0.1 * i}, layer=10 * i, about=about) for i in (1, 2)
    ]
    page, _ = report(*made, tmp_path=tmp_path)
    row = page.row("Features by axes", "wan2.1-t2v-1.3b")
    assert (row[1][0], row[1][2], row[2][0]) == ("0.200", False, "block 20; best of 2")


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("{", "does not hold the results of probes"),
        ("[]", "holds no results"),
        ('[{"task": "tagging"}]', "does not hold the results of probes"),
        ("BAD metrics", "has metrics that are no numbers"),
        ("BAD keys", "has keys that are not source, layer and step"),
        ("BAD config", "has a config without options"),
    ],
)
def test_files_that_hold_no_results_are_named(tmp_path, capsys, content, wanted):
    good = asdict(make_result("instance", [{"store": "s", "spec": "x", "weights": "w"}], {"loss": 1.0, "T-mIoU": 0.5}))
    if content.startswith("BAD"):
        field = content.split()[1]
        content = json.dumps([good | {field: {"metrics": {"mAP": "high"}, "keys": [[0, 1]], "config": {}}[field]}])
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "results.json").write_text(content)
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "bad" / "results.json"), "--out", str(page)]) == 2
    assert wanted in capsys.readouterr().err
    assert not page.exists()
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "results.json").write_text(json.dumps([good]))
    assert main(["report", str(tmp_path), "--out", str(page)]) == 1  # beside others it is left out, and said
    assert wanted in capsys.readouterr().err
    assert wanted in page.read_text()


def test_places_that_hold_nothing_are_one_line(tmp_path, capsys):
    out = ["--out", str(tmp_path / "page.html")]
    assert main(["report", str(tmp_path / "nowhere"), *out]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err
    assert main(["report", str(tmp_path), *out]) == 2
    assert f"no results.json in {tmp_path}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_hundreds_of_results_are_quick_and_small(tmp_path):
    source = make_store(tmp_path / "store", "wan2.1-t2v-1.3b")
    draw = np.random.default_rng(1)
    for run in range(30):
        made = [make_result("relation", [source], make_metrics("relation", draw), layer=i, step=run) for i in range(20)]
        write_results(tmp_path / "runs" / str(run) / "results.json", made)
    started = time.perf_counter()
    page = render(make_scores(collect([tmp_path / "runs"])), "many")
    assert time.perf_counter() - started < 10
    assert len(page) < 3_000_000


# -- small parts ------------------------------------------------------------------------------------------------------


def test_numbers_are_short_and_never_invented():
    assert [number(x) for x in (0.5, 0.0, 1e-5, 12345.678, 3, -0.25)] == [
        "0.500",
        "0.000",
        "1e-05",
        "1.23e+04",
        "3",
        "-0.250",
    ]
    assert number(None) == number(math.nan) == number(math.inf) == NONE
    assert best_of([]) is None


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1, 0), (0.613, 0.617), (-3, 250), (0.1, 0.1000001)])
def test_ticks_are_round_and_few(low, high):
    ticks = Scale(low, high, 0, 100).ticks
    assert 2 <= len(ticks) <= 7
    assert min(low, high) - 1e-9 <= ticks[0] < ticks[-1] <= max(low, high) + 1e-9
    steps = np.diff(ticks)
    assert steps == pytest.approx(steps[0], rel=1e-3)
    assert f"{steps[0]:.0e}"[0] in "125"
