"""The demo page on probes: the table of results and the pictures, with what they do and do not mean."""

import math
from collections.abc import Iterator
from html import escape

from spatialprobe.engine.demo.page import png_uri
from spatialprobe.engine.demo.probes import Trained

ROWS = {  # features, as `train_task` names them
    "vgm": "Wan, a video generator",
    "vlm": "Qwen3-VL, a vision-language model",
    "joined": "both, joined",
    "noise": "noise instead of features",
}
COLUMNS = {  # task -> metric -> heading
    "tagging": {"mAP": "mAP ↑"},
    "instance": {"T-mIoU": "T-mIoU ↑", "T-SR": "T-SR ↑"},
    "geometry": {"point_error": "point error ↓", "AbsRel": "AbsRel ↓", "AUC@30": "AUC@30 ↑"},
}
FIGURES = {  # least width of a picture -> task, picture of the video generator's probes, what it shows
    "17rem": (
        ("tagging", "layers", "Tagging by block and noise step: mean average precision of the most common classes."),
        ("instance", "layers", "Instance grouping by block and noise step: T-mIoU."),
        ("geometry", "layers", "Geometry by block and noise step: AUC@30 of the cameras."),
        ("tagging", "curve", "Tagging: losses of each block and step, and the score that picks the best epoch."),
        ("instance", "curve", "Instance grouping: losses. The epoch with the least on the validation clips is kept."),
        ("geometry", "curve", "Geometry: losses. The last epoch is kept."),
    ),
    "26rem": (
        ("instance", "instance", "A validation clip, its objects, and the groups found in what the probe says."),
        ("geometry", "depth", "The same clip's depth, and what the probe says, scaled to the true median."),
    ),
}


def probe_section(trained: dict[str, dict[str, Trained]]) -> Iterator[str]:
    """HTML of all probes, by task and features. Every number in its table is one of a `results.json`."""
    vgm = {task: by_features["vgm"] for task, by_features in trained.items()}
    one, tried = vgm["tagging"].best, len(vgm["tagging"].results)
    yield "<h2>Probes on these features</h2>"
    yield (
        f"<p>Light probes, trained on {one.train_clips} clips and measured on {one.val_clips} others, for three tasks: "
        "which classes a clip shows (tagging), which pixels of all views belong to one object (instance), and depth, "
        "points and cameras (geometry). Each reads one model's features, both joined channel by channel, or random "
        "numbers in their place, which say what a probe scores that sees nothing of a clip.</p>"
    )
    yield from results_table(trained)
    yield (
        "<p><b>What the numbers mean.</b> The weights are random, so no row says anything about Wan or Qwen3-VL: their "
        f"features are random mixtures of what is in a patch. {one.val_clips} clips cannot tell similar rows apart; "
        "epochs, and Wan's block and step, were chosen on these same clips. Only a wide gap to the row of noise means "
        "that something was read from features. What the table does show is the whole path at work, from clips to "
        "every metric: stores joined, and a grid of probes trained in one pass over the data.</p>"
    )
    chosen = "; ".join(f"{task} {place(probes)}" for task, probes in vgm.items())
    yield (
        f"<p>Wan's row is of the block and step, of {tried}, with the least validation loss ({chosen}); the same are "
        f"joined. mAP: mean average precision over the {one.metrics['classes_scored']} classes of the validation "
        "clips. T-mIoU: overlap of objects with their groups in all views at once; T-SR: share of objects found. Point "
        "error: in units of the mean distance in the first view, after alignment; AbsRel: relative error of depth; "
        "AUC@30: area under the curve of relative camera poses within 30 degrees.</p>"
    )
    for least, figures in FIGURES.items():
        yield f'<div class="figures" style="--least: {least}">'
        for task, picture, caption in figures:
            if picture in vgm[task].pictures:
                yield figure(vgm[task].pictures[picture].read_bytes(), caption)
        yield "</div>"
    yield (
        f"<p>The geometry probe's points, coloured by their frames, are in {escape(str(vgm['geometry'].folder))} as "
        "points.ply. The command trains the same instance probes again, into a folder beside these; a task is also a "
        "call of <code>train</code>.</p>"
    )
    yield f"<pre>{escape(vgm['instance'].command)}</pre>"


def results_table(trained: dict[str, dict[str, Trained]]) -> Iterator[str]:
    """A row for each choice of features; the last is what scores in random order are expected to get, where known."""
    tasks = "".join(f'<th colspan="{len(metrics)}">{task}</th>' for task, metrics in COLUMNS.items())
    headings = "".join(f"<th>{heading}</th>" for metrics in COLUMNS.values() for heading in metrics.values())
    yield f'<div class="scroll"><table class="numbers"><tr><th></th>{tasks}</tr><tr><th>features</th>{headings}</tr>'
    for name, words in ROWS.items():
        best = {task: by_features[name].best.metrics for task, by_features in trained.items()}
        yield row(words, [best[task].get(metric) for task, metrics in COLUMNS.items() for metric in metrics])
    chance = trained["tagging"]["vgm"].best.metrics.get("mAP_chance")
    yield row("random order, computed", [chance] + [None] * (sum(map(len, COLUMNS.values())) - 1))
    yield "</table></div>"


def row(name: str, numbers: list[float | None]) -> str:
    cells = ("-" if x is None or math.isnan(x) else f"{x:.3f}" for x in numbers)
    return f"<tr><td>{name}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def place(probes: Trained) -> str:
    return f"block {probes.best.config['layer']}, step {probes.best.config['step']}"


def figure(png: bytes, caption: str) -> str:
    image = f'<img alt="{escape(caption)}" src="{png_uri(png)}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"
