"""Pictures of what probes learn, as PNG: learning curves, instance and depth panels, a layer x step map.

They take plain arrays, know no task, and depend on nothing but their arguments and matplotlib's version. Type is large
enough for a phone's width. R rows of panels, H x W pixels; the arrays of a panel may have sizes of their own.
"""

import colorsys
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from matplotlib import colormaps, style
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from spatialprobe.probes.pointcloud import colour_depth

WIDTH = 6.0  # inches; a figure is 1200 pixels wide at DPI
DPI = 200
STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11}
COLOURS = ("#0072b2", "#c24a00", "#00785a", "#b0457f", "#8a6400", "#222222", "#5b4bb5", "#7d2418")  # of lines and names
NEUTRAL = (205, 205, 205)  # RGB of what has no id
GOLDEN = (math.sqrt(5) - 1) / 2


# -- learning curves --------------------------------------------------------------------------------------------------


def curve_figure(
    curves: Mapping[str, Sequence[Mapping[str, float | None]]],  # probe -> a row per epoch
    path: str | Path,
    *,
    score: str | None = None,  # key of the rows that gets a panel of its own
    title: str = "",
) -> None:
    """train_loss (dashed) and val_loss (solid) of every epoch and, below, `score`. Names stand at the lines' ends.

    A gap where a row has no finite number; probes without an epoch are counted below. Raises ValueError if no probe has
    an epoch, or no row the score.
    """
    drawn = {name: rows for name, rows in curves.items() if rows}
    if not drawn:
        raise ValueError(f"a learning curve needs an epoch of at least 1 probe, got none of {list(curves)}")
    if score is not None and not any(score in row for rows in drawn.values() for row in rows):
        there = sorted({key for rows in drawn.values() for row in rows for key in row})
        raise ValueError(f"score must be one of {', '.join(there)}, got {score!r}")
    panels = 1 if score is None else 2
    with _styled():
        figure = Figure((WIDTH, panels * max(3.0, 0.24 * len(drawn) + 0.8) + 0.3), layout="constrained")
        axes = figure.subplots(panels, sharex=True, squeeze=False)[:, 0]
        single = len(drawn) == 1
        ends: list[list[tuple[str, str, float]]] = [[] for _ in axes]
        for (name, rows), colour in zip(drawn.items(), line_colours(len(drawn)), strict=True):
            ends[0] += _line(axes[0], rows, "val_loss", colour, "validation" if single else name)
            trained = _line(axes[0], rows, "train_loss", colour, "training", linestyle=(0, (4, 3)), linewidth=1.0)
            if single:
                ends[0] += trained
            if score is not None:
                ends[1] += _line(axes[1], rows, score, colour, name)
        for ax, label in zip(axes, ("loss", score), strict=False):
            ax.set_ylabel(label)
            ax.grid(axis="y", color="#e4e4e4")
        axes[0].set_title("solid: validation   dashed: training", loc="left", color="#555555")
        without = f"\n({len(curves) - len(drawn)} of {len(curves)} probes ended before their first)"
        axes[-1].set_xlabel("epoch" if len(drawn) == len(curves) else "epoch" + without)
        epochs = max(len(rows) for rows in drawn.values())
        axes[-1].set_xlim(1 - (margin := 0.02 * (epochs - 1) or 0.5), epochs + margin)
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        _suptitle(figure, title)
        _label_ends(figure, axes, ends)
        _save(figure, path)


def line_colours(count: int) -> list[str]:
    """COLOURS as far as they go; for more lines a ramp from dark blue to red. All legible on white."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    return [to_hex(colour) for colour in colormaps["plasma"](np.linspace(0, 0.6, count))]


def _line(
    ax: Axes, rows: Sequence[Mapping[str, float | None]], key: str, colour: str, name: str, **style
) -> list[tuple[str, str, float]]:
    """Draws a line over the epochs, from 1. Returns its name, colour and last finite value; nothing without one."""
    values = np.array([np.nan if row.get(key) is None else row[key] for row in rows], float)
    values[~np.isfinite(values)] = np.nan
    ax.plot(np.arange(1, len(rows) + 1), values, color=colour, marker="o" if len(rows) <= 20 else None, ms=3, **style)
    return [(name, colour, float(value)) for value in values[~np.isnan(values)][-1:]]


def _label_ends(figure: Figure, axes: Sequence[Axes], ends: list[list[tuple[str, str, float]]]) -> None:
    """Names beside the right border at their line's last value, moved apart where they would overlap."""
    texts = [
        [ax.text(1.03, 0, name, color=colour, transform=ax.transAxes, va="center") for name, colour, _ in of_panel]
        for ax, of_panel in zip(axes, ends, strict=True)
    ]
    figure.draw_without_rendering()  # lays the axes out around the names
    for ax, of_panel, labels in zip(axes, ends, texts, strict=True):
        height = ax.get_window_extent().height
        low, high = ax.get_ylim()
        wanted = [(value - low) / (high - low) for *_, value in of_panel]
        gap = max((label.get_window_extent().height for label in labels), default=0) / height
        for label, target, place in zip(labels, wanted, spread(wanted, gap), strict=True):
            label.set_y(place)
            ax.plot([1, 1.025], [target, place], color="#bbbbbb", lw=0.8, transform=ax.transAxes, clip_on=False)


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Places in 0 .. 1, in the order of `wanted` and near it, at least `gap` apart; closer where they do not fit."""
    gap = min(gap, 1 / max(len(wanted) - 1, 1))
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    places, floor = [0.0] * len(wanted), 0.0
    for i in order:
        places[i] = floor = max(wanted[i], floor)
        floor += gap
    ceiling = 1.0
    for i in reversed(order):
        places[i] = min(places[i], ceiling)
        ceiling = places[i] - gap
    return places


# -- panels -----------------------------------------------------------------------------------------------------------


def instance_figure(
    frames: ArrayLike,  # uint8 [R, H, W, 3]
    truth: ArrayLike,  # int [R, h, w], 0 is none
    predicted: ArrayLike,  # int [R, h, w], negative is noise; of the truth's size
    path: str | Path,
    *,
    rows: Sequence[str],  # [R], what each row is
    title: str = "",
) -> None:
    """Columns frame | ground truth | predicted groups. An id has one colour in all rows; grey is none, or noise.

    A group that `match_groups` gives to an instance has the instance's colour, the others have colours of their own.
    """
    truth, predicted = np.asarray(truth), np.asarray(predicted)
    if truth.shape != predicted.shape or {truth.dtype.kind, predicted.dtype.kind} - set("iu"):
        got = f"{truth.dtype} {list(truth.shape)} and {predicted.dtype} {list(predicted.shape)}"
        raise ValueError(f"truth and predicted must be integers of one shape [R, h, w], got {got}")
    columns = {
        "frame": np.asarray(frames),
        "ground truth\n(grey: none)": id_colours(truth),
        "predicted groups\n(grey: noise)": id_colours(match_groups(truth, predicted)),
    }
    with _styled():
        figure, _ = _panels(columns, rows, title)
        _save(figure, path)


def match_groups(
    truth: np.ndarray,  # int [...], 0 is none
    predicted: np.ndarray,  # int [...], negative is noise
) -> np.ndarray:  # int64 [...], 0 is noise
    """Groups renamed to instances: pairs by their overlap (IoU), the best first, each instance and group once.

    Groups without an instance get numbers above all instances'.
    """
    instances, t = np.unique(truth, return_inverse=True)
    groups, p = np.unique(predicted, return_inverse=True)
    both = np.bincount(t.ravel() * len(groups) + p.ravel(), minlength=len(instances) * len(groups))
    both = both.reshape(len(instances), len(groups))
    overlap = both / (both.sum(0) + both.sum(1)[:, None] - both)
    overlap[instances == 0], overlap[:, groups < 0] = 0, 0
    names = np.where(groups < 0, 0, max(int(instances.max()), 0) + 1 + np.arange(len(groups)))
    while overlap.any():
        i, g = np.unravel_index(overlap.argmax(), overlap.shape)
        names[g] = instances[i]
        overlap[i], overlap[:, g] = 0, 0
    return names[p].reshape(predicted.shape)


def id_colours(ids: np.ndarray) -> np.ndarray:  # int [...] -> uint8 [..., 3] RGB
    """A colour that depends on the id alone and is far from those of the ids next to it; NEUTRAL for 0."""
    found, place = np.unique(ids, return_inverse=True)
    palette = np.array([[round(255 * c) for c in _id_colour(int(i))] if i else NEUTRAL for i in found], np.uint8)
    return palette[place.reshape(ids.shape)]


def _id_colour(i: int) -> tuple[float, float, float]:
    """Hues by the golden ratio, so that equal ones are far apart; saturated, pale, dark and dull in turn."""
    saturation, value = ((0.85, 0.85), (0.45, 0.95), (0.8, 0.5), (0.5, 0.7))[i % 4]
    return colorsys.hsv_to_rgb(i * GOLDEN % 1, saturation, value)


def depth_figure(
    frames: ArrayLike,  # uint8 [R, H, W, 3]
    truth: ArrayLike,  # float [R, h, w]; what is not positive and finite is unknown
    predicted: ArrayLike,  # float [R, h, w], in the truth's unit and scale
    path: str | Path,
    *,
    rows: Sequence[str],  # [R], what each row is
    unit: str,
    title: str = "",
) -> None:
    """Columns frame | true depth | predicted depth, one colour bar for all: from the 2nd to the 98th percentile of the
    true depths, even in 1 / depth. Raises ValueError if no true depth is known.
    """
    truth, predicted = np.asarray(truth, float), np.asarray(predicted, float)
    known = truth[np.isfinite(truth) & (truth > 0)]
    if not known.size:
        raise ValueError("depth panels need a true depth that is positive and finite, got none")
    near, far = np.percentile(known, [2, 98])
    columns = {
        "frame": np.asarray(frames),
        "true depth": colour_depth(truth, near, far),
        "predicted depth": colour_depth(predicted, near, far),
    }
    with _styled():
        figure, axes = _panels(columns, rows, title, below=0.7)
        places = np.linspace(0, 1, 256)
        depths = 1 / (1 / near + places * (1 / far - 1 / near))
        ramp = ScalarMappable(Normalize(0, 1), ListedColormap(colour_depth(depths, near, far) / 255))
        bar = figure.colorbar(ramp, ax=axes, location="bottom", aspect=40, label=f"depth ({unit}); grey: unknown")
        bar.set_ticks(places[::51], labels=[f"{depth:.3g}" for depth in depths[::51]])
        _save(figure, path)


def _panels(
    columns: Mapping[str, np.ndarray],  # title -> uint8 [R, h, w, 3]; the first gives all panels their aspect
    rows: Sequence[str],
    title: str,
    below: float = 0.0,  # inches kept free for a colour bar
) -> tuple[Figure, np.ndarray]:
    for name, images in columns.items():
        if images.ndim != 4 or images.shape[3] != 3 or len(images) != len(rows) or images.dtype != np.uint8:
            what, got = name.split("\n")[0], f"{images.dtype} {list(images.shape)}"
            raise ValueError(f"{what} must be pictures of {len(rows)} rows ({', '.join(rows)}), got {got}")
    _, height, width, _ = next(iter(columns.values())).shape
    tall = (WIDTH - 0.4) / len(columns) * height / width
    figure = Figure((WIDTH, len(rows) * (tall + 0.08) + 0.6 + below + 0.3 * bool(title)), layout="compressed")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for j, (column, images) in enumerate(columns.items()):
        axes[0, j].set_title(column)
        for ax, image in zip(axes[:, j], images, strict=True):
            ax.imshow(image, extent=(0, width, height, 0), interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
    for ax, row in zip(axes[:, 0], rows, strict=True):
        ax.set_ylabel(row)
    _suptitle(figure, title)
    return figure, axes


# -- bars -------------------------------------------------------------------------------------------------------------


def bar_figure(
    panels: Mapping[str, Mapping[str, float]],  # what is measured -> name -> share of 1
    path: str | Path,
    *,
    chance: Mapping[str, float] | None = None,  # what is measured -> what guessing scores, a dashed line
    title: str = "",
) -> None:
    """A panel per measure, a horizontal bar per name with its number beside it; 0 to 1. Raises ValueError for none."""
    panels, chance = {name: bars for name, bars in panels.items() if bars}, chance or {}
    if not panels:
        raise ValueError("bars need at least one number, got none")
    counts = [len(bars) for bars in panels.values()]
    with _styled():
        figure = Figure((WIDTH, 0.27 * sum(counts) + 0.65 * len(counts) + 0.4), layout="constrained")
        axes = figure.subplots(len(panels), squeeze=False, height_ratios=counts)[:, 0]
        for ax, (measure, bars) in zip(axes, panels.items(), strict=True):
            ax.barh(range(len(bars)), list(bars.values()), height=0.7, color=COLOURS[0])
            for place, value in enumerate(bars.values()):
                ax.text(min(max(value, 0), 1) + 0.01, place, f"{value:.2f}", va="center")
            if measure in chance:
                ax.axvline(chance[measure], color="#222222", lw=1.2, ls=(0, (4, 3)))
            ax.set_yticks(range(len(bars)), list(bars))
            ax.set(xlim=(0, 1.1), ylim=(len(bars) - 0.5, -0.5), xticks=np.linspace(0, 1, 5))
            ax.set_title(measure + (" (dashed: guessing)" if measure in chance else ""), loc="left")
            ax.tick_params(axis="y", length=0)
        _suptitle(figure, title)
        _save(figure, path)


# -- layer x step map -------------------------------------------------------------------------------------------------


def layer_step_figure(
    values: ArrayLike,  # float [L, K], NaN where there is none
    layers: Sequence[int],  # [L], blocks counted from 0
    steps: Sequence[int | None],  # [K], indices into the noise schedule; None for features without steps
    path: str | Path,
    *,
    metric: str,
    title: str = "",
    decimals: int = 3,
) -> None:
    """One cell per layer and noise step, coloured and printed: dark blue is the least, yellow the most."""
    values = np.asarray(values, float)
    if values.shape != (len(layers), len(steps)) or not values.size:
        raise ValueError(f"values must be [{len(layers)}, {len(steps)}], layers x steps, got {list(values.shape)}")
    with _styled():
        size = (max(WIDTH, 0.8 * len(steps) + 1.2), 0.45 * len(layers) + 1.5)
        figure = Figure(size, layout="constrained")
        ax = figure.subplots()
        shown = np.ma.masked_invalid(values)
        ramp = colormaps["viridis"].with_extremes(bad=np.array(NEUTRAL) / 255)
        image = ax.imshow(shown, cmap=ramp, aspect="auto", interpolation="nearest")
        bright = image.to_rgba(shown)[..., :3] @ (0.299, 0.587, 0.114) > 0.5
        for (i, j), value in np.ndenumerate(values):
            text, ink = f"{value:.{decimals}f}" if math.isfinite(value) else "-", "black" if bright[i, j] else "white"
            ax.text(j, i, text, color=ink, ha="center", va="center")
        ax.set_xticks(range(len(steps)), ["none" if step is None else str(step) for step in steps])
        ax.set_yticks(range(len(layers)), [str(layer) for layer in layers])
        ax.set(xlabel="noise step (index; 0 is the noisiest)", ylabel="block (from 0)")
        ax.set_title(metric, loc="left")
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
        _suptitle(figure, title)
        _save(figure, path)


# -- files ------------------------------------------------------------------------------------------------------------


@contextmanager
def _styled() -> Iterator[None]:
    """matplotlib's defaults and STYLE, whatever the user's own settings are."""
    with style.context(["default", STYLE]):
        yield


def _suptitle(figure: Figure, title: str) -> None:
    if title:
        figure.suptitle(title, fontsize=12, x=0.01, ha="left")


def _save(figure: Figure, path: str | Path) -> None:
    """The file has its name only when it is whole."""
    path = Path(path)
    temp = path.with_name(f".{path.name}.part")
    # Without the version in its header the file depends on the picture alone.
    figure.savefig(temp, format="png", dpi=DPI, metadata={"Software": None}, facecolor="white")
    temp.replace(path)
