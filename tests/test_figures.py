"""Figures as they are in the file: where colours are, that text is inside, apart and large enough, and files repeat."""

import colorsys
import itertools

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image

from spatialprobe.probes import figures
from spatialprobe.probes.figures import (
    NEUTRAL,
    bar_figure,
    curve_figure,
    depth_figure,
    id_colours,
    instance_figure,
    layer_step_figure,
    line_colours,
    match_groups,
    spread,
)
from spatialprobe.probes.pointcloud import UNKNOWN, colour_depth

PHONE = 390  # points that a phone's screen is wide
LEGIBLE = 8  # points of type on it


@pytest.fixture
def drawn(monkeypatch):
    """Figures that were saved, in order."""
    saved, save = [], figures._save

    def keep(figure, path):
        save(figure, path)
        saved.append(figure)

    monkeypatch.setattr(figures, "_save", keep)
    return saved


def pixels(path) -> np.ndarray:  # int [H, W, 3]
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def places(image: np.ndarray, colour) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels of a colour."""
    return np.nonzero((np.abs(image - np.array(colour)) <= 2).all(-1))


def box(image: np.ndarray, colour) -> tuple[int, int, int, int]:
    """Top, left, height, width of all pixels of a colour."""
    rows, columns = places(image, colour)
    return rows.min(), columns.min(), np.ptp(rows) + 1, np.ptp(columns) + 1


def shown(figure) -> list[Text]:
    """All text but that of ticks outside the axes, which matplotlib keeps and does not draw."""
    outside = set()
    for axis in (axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)):
        low, high = sorted(axis.get_view_interval())
        outside |= {tick.label1 for tick in axis.get_major_ticks() if not low - 1e-9 <= tick.get_loc() <= high + 1e-9}
    found = (text for text in figure.findobj(Text) if text.get_text() and text.get_visible())
    return [text for text in found if text not in outside]


def texts(figure) -> list[str]:
    return [text.get_text() for text in shown(figure)]


def assert_legible(figure):
    """All text lies within the figure, apart from other text, and is large enough on a phone."""
    figure.draw_without_rendering()
    boxes = {text: text.get_window_extent() for text in shown(figure)}
    boxes = {text: extent for text, extent in boxes.items() if extent.width}  # the others are not drawn
    for text, extent in boxes.items():
        assert text.get_fontsize() / 72 / figure.get_figwidth() * PHONE >= LEGIBLE, text.get_text()
        inside = extent.min > -1, extent.max < figure.bbox.size + 1
        assert np.all(inside), f"{text.get_text()!r} is cut off"
    for a, b in itertools.combinations(boxes, 2):
        (p, q), (r, s) = boxes[a].intervalx, boxes[a].intervaly
        across = min(q, boxes[b].x1) - max(p, boxes[b].x0)
        down = min(s, boxes[b].y1) - max(r, boxes[b].y0)
        assert min(across, down) <= 2, f"{a.get_text()!r} and {b.get_text()!r} overlap"


# -- learning curves --------------------------------------------------------------------------------------------------


def rows(values, **more) -> list[dict]:
    return [{"train_loss": v / 2, "val_loss": v} | {k: x[i] for k, x in more.items()} for i, v in enumerate(values)]


def test_a_higher_loss_is_drawn_higher_and_later_epochs_to_the_right(tmp_path):
    path = tmp_path / "curve.png"
    curve_figure({"low": rows([3.0, 2.0, 1.0]), "high": rows([9.0, 9.0, 9.0])}, path)
    image = pixels(path)
    low, high = (tuple(round(255 * c) for c in to_rgb(colour)) for colour in line_colours(2))
    image = image[:, : box(image, (228, 228, 228))[1] + box(image, (228, 228, 228))[3]]  # the axes, by their grid
    ys, xs = places(image, high)
    solid = ys < (ys.min() + ys.max()) / 2  # validation at 9, training dashed at 4.5
    assert np.ptp(ys[solid]) < 15
    (left, right), level = (xs.min(), xs.max()), np.median(ys[solid])
    bottom = np.median(ys[~solid])
    per_unit = (bottom - level) / 4.5
    ys, xs = places(image, low)
    for share, loss in ((0.02, 3.0), (0.5, 2.0), (0.98, 1.0)):
        column = np.abs(xs - (left + share * (right - left))) < 4
        assert ys[column].min() == pytest.approx(level + (9 - loss) * per_unit, abs=12)


def test_one_probe_names_its_two_lines_and_its_score(tmp_path, drawn):
    curve_figure({"probe": rows([2, 1, 0.5], mAP=[0.1, 0.2, 0.5])}, tmp_path / "c.png", score="mAP", title="a store")
    found = texts(drawn[0])
    assert {"validation", "training", "probe", "loss", "mAP", "epoch", "a store", "1", "2", "3"} <= set(found)
    assert_legible(drawn[0])
    loss, score = drawn[0].axes
    validation, training = loss.lines[:2]
    np.testing.assert_array_equal(validation.get_ydata(), [2, 1, 0.5])
    np.testing.assert_array_equal(training.get_ydata(), [1, 0.5, 0.25])
    np.testing.assert_array_equal(score.lines[0].get_ydata(), [0.1, 0.2, 0.5])
    assert (validation.get_linestyle(), training.get_linestyle()) == ("-", "--")
    np.testing.assert_array_equal(validation.get_xdata(), [1, 2, 3])


@pytest.mark.parametrize("probes", [2, 8, 16, 30])
def test_names_of_many_probes_stand_apart_in_the_order_of_their_lines(probes, tmp_path, drawn):
    ends = {f"lr {i}e-3, seed 42": 1 + 0.001 * ((7 * i) % probes) for i in range(probes)}
    curve_figure({name: rows([3.0, end]) for name, end in ends.items()}, tmp_path / "c.png")
    assert_legible(drawn[0])
    labels = sorted((t for t in drawn[0].findobj(Text) if t.get_text() in ends), key=lambda t: t.get_position()[1])
    assert [t.get_text() for t in labels] == sorted(ends, key=ends.get)
    assert len({t.get_color() for t in labels}) == probes
    extents = [t.get_window_extent() for t in labels]
    distances = np.diff([extent.y0 for extent in extents])
    assert distances == pytest.approx(max(extent.height for extent in extents), rel=0.03), "as near as they can be"


def test_gaps_and_probes_that_ended_early(tmp_path, drawn):
    curves = {
        "a": rows([2, 1, 3]),
        "b": rows([2, float("nan"), 1]),
        "none": [{"train_loss": None, "val_loss": float("inf")}],
        "dead": [],
    }
    curve_figure(curves, tmp_path / "c.png")
    assert "epoch\n(1 of 4 probes ended before their first)" in texts(drawn[0])
    assert "none" not in texts(drawn[0])
    np.testing.assert_array_equal(drawn[0].axes[0].lines[2].get_ydata(), [2, np.nan, 1])
    assert_legible(drawn[0])
    curve_figure({"a": rows([2])}, tmp_path / "one.png")
    low, high = drawn[1].axes[0].get_xlim()
    assert (low, high) == (0.5, 1.5)


def test_names_are_legible_on_white():
    def luminance(colour):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        return np.dot(linear, (0.2126, 0.7152, 0.0722))

    for count, contrast in ((8, 4.5), (30, 3.0)):  # WCAG's, of text and of what is large
        colours = line_colours(count)
        assert len(set(colours)) == count
        assert min(1.05 / (luminance(colour) + 0.05) for colour in colours) >= contrast


@pytest.mark.parametrize("gap", [0.05, 0.3, 0.6])
def test_spread(gap):
    wanted = [0.5, 0.1, 0.5, 0.98]
    found = spread(wanted, gap)
    assert all(0 <= place <= 1 for place in found)
    assert np.diff(sorted(found)).min() >= min(gap, 1 / 3) - 1e-12
    assert found[1] < found[0] < found[2] < found[3]
    assert spread([0.1, 0.9], gap) == [0.1, 0.9]
    if gap == 0.05:
        assert found == pytest.approx([0.5, 0.1, 0.55, 0.98])


@pytest.mark.parametrize(
    ("curves", "score", "match"),
    [
        ({}, None, r"at least 1 probe, got none of \[\]"),
        ({"a": []}, None, r"got none of \['a'\]"),
        ({"a": rows([1.0])}, "mAP", "score must be one of train_loss, val_loss, got 'mAP'"),
    ],
)
def test_bad_curves_are_refused(curves, score, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        curve_figure(curves, tmp_path / "c.png", score=score)
    assert not list(tmp_path.iterdir())


# -- panels -----------------------------------------------------------------------------------------------------------

FRAME = (10, 200, 30)


def test_instance_panels_show_each_map_in_its_column(tmp_path, drawn):
    frames = np.full((2, 30, 40, 3), FRAME, np.uint8)
    truth = np.zeros((2, 20, 80), int)  # of another aspect than the frames
    truth[0, :10, :40] = 7  # upper left quarter of the first view
    truth[1, 10:, :] = 9  # lower half of the second
    predicted = np.full((2, 20, 80), -1)
    predicted[0, :10, 40:] = 3  # on nothing
    predicted[1, 10:, 40:] = 0  # on a part of 9
    path = tmp_path / "panels.png"
    instance_figure(frames, truth, predicted, path, rows=["frame 0", "frame 5"], title="room 1")
    image = pixels(path)
    top, left, _, wide = box(image, FRAME)
    panel_height = wide * 3 / 4
    first = image[: round(top + panel_height + 4)]
    second = image[round(top + panel_height + 4) :]
    assert box(first, FRAME)[2:] == pytest.approx((panel_height, wide), abs=2), "the frame's aspect is kept"
    seven, nine = (id_colours(np.array(i)) for i in (7, 9))
    y, x, h, w = box(first, seven)
    assert (y, h, w) == pytest.approx((top, panel_height / 2, wide / 2), abs=2)
    assert len(places(first, seven)[0]) == pytest.approx(h * w, rel=0.01), "one solid block"
    truth_left = x
    assert truth_left > left + wide
    rows_, columns = places(second, nine)
    truth_side = columns < truth_left + wide + 2
    assert np.ptp(columns[truth_side]) == pytest.approx(wide, abs=3)
    assert np.ptp(columns[~truth_side]) == pytest.approx(wide / 2, abs=3), "the group has its instance's colour"
    assert np.ptp(rows_) == pytest.approx(panel_height / 2, abs=3)
    own = id_colours(match_groups(truth, predicted))[0, 0, 79]
    y, x, h, w = box(first, own)
    assert x > truth_left + wide * 1.5
    assert (h, w) == pytest.approx((panel_height / 2, wide / 2), abs=2)
    assert {
        "frame",
        "ground truth\n(grey: none)",
        "predicted groups\n(grey: noise)",
        "frame 0",
        "frame 5",
        "room 1",
    } == set(texts(drawn[0]))
    assert_legible(drawn[0])


def test_groups_take_the_names_of_the_instances_they_overlap_most():
    truth = np.array([0, 0, 4, 4, 4, 4, 8, 8, 8, 2])
    predicted = np.array([-1, 5, 5, 5, 6, 0, 0, 0, 0, -1])
    # IoU: group 0 with 8 is 3/4, group 5 with 4 is 2/5, group 6 with 4 is 1/4
    assert match_groups(truth, predicted).tolist() == [0, 4, 4, 4, 12, 8, 8, 8, 8, 0]
    assert match_groups(truth[None, :, None], predicted[None, :, None]).shape == (1, 10, 1)
    renamed = np.array([7, 1, 1, 1, 3, 2, 2, 2, 2, 7])
    renamed[[0, -1]] = -5
    found = match_groups(truth, renamed)
    assert found[1:4].tolist() == [4] * 3
    assert found[5:9].tolist() == [8] * 4
    assert found[4] not in truth
    assert match_groups(np.zeros(3, int), np.array([-1, 0, 1])).tolist() == [0, 2, 3]


def test_an_id_has_one_colour_wherever_it_is():
    ids = np.array([[3, 0, 70000], [2**40, 1, 3]])
    found = id_colours(ids)
    assert found.dtype == np.uint8
    assert found.shape == (2, 3, 3)
    for place, i in np.ndenumerate(ids):
        assert found[place].tolist() == id_colours(np.array([i]))[0].tolist()
    assert found[0, 1].tolist() == list(NEUTRAL)
    colours = id_colours(np.arange(41)).astype(int)
    apart = np.abs(colours[:, None] - colours).sum(-1) + 1000 * np.eye(41, dtype=int)
    assert apart.min() > 20
    assert all(colorsys.rgb_to_hsv(*c / 255)[1] > 0.4 for c in colours[1:]), "none looks like the grey"


DEPTHS = np.array([[1.0, 1.0, 2.0, 4.0], [1.0, 2.0, 4.0, 4.0]])


def test_depth_panels_share_one_scale(tmp_path, drawn):
    truth = np.stack([DEPTHS, DEPTHS[::-1]]).repeat(20, 1).repeat(20, 2)
    predicted = np.full_like(truth, 2.0)
    predicted[1] = 50.0  # farther than any true depth
    predicted[0, :, :20] = np.nan
    path = tmp_path / "depth.png"
    frames = np.full((2, 40, 80, 3), FRAME, np.uint8)
    depth_figure(frames, truth, predicted, path, rows=["frame 0", "frame 1"], unit="m")
    image = pixels(path)
    near, middle, far = (colour_depth(np.array(d), 1.0, 4.0) for d in (1.0, 2.0, 4.0))
    top, left, _, wide = box(image, FRAME)
    tall = wide / 2
    gutter = (box(image[: round(top + tall)], near)[1] - left) - wide
    assert 0 < gutter < 60
    grid = [[image[round(top + tall * (y + 0.5) / 2), round(left + wide * (x + 0.5) / 4 + column * (wide + gutter))] for x in range(4)] for column in (1, 2) for y in (0, 1)]  # fmt: skip # noqa: E501
    expected = [[near, near, middle, far], [near, middle, far, far], *[[np.array(UNKNOWN), middle, middle, middle]] * 2]
    np.testing.assert_allclose(np.array(grid), np.array(expected), atol=2)
    below = image[round(top + 2 * tall + 30) :]
    y, x, h, _ = box(below, far)  # the bar's far end is on the right
    assert box(below, near)[1] < x
    line = below[y + h // 2, box(below, near)[1] + 2 : x]
    at = np.argmin(np.abs(line - middle).sum(-1)) / len(line)
    assert at == pytest.approx((1 - 1 / 2) / (1 - 1 / 4), abs=0.03), "even in 1 / depth"
    assert {"frame", "true depth", "predicted depth", "depth (m); grey: unknown", "1", "4"} <= set(texts(drawn[0]))
    assert_legible(drawn[0])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"frames": np.zeros((2, 4, 4, 3))}, r"frame must be pictures of 2 rows \(a, b\), got float64 \[2, 4, 4, 3\]"),
        ({"frames": np.zeros((1, 4, 4, 3), np.uint8)}, r"frame must be pictures of 2 rows .* got uint8 \[1, 4, 4, 3\]"),
        ({"truth": np.zeros((2, 4, 4))}, r"integers of one shape \[R, h, w\], got float64 \[2, 4, 4\] and int64"),
        ({"truth": np.zeros((2, 3, 4), int)}, r"of one shape \[R, h, w\], got int64 \[2, 3, 4\] and int64 \[2, 4, 4\]"),
    ],
)
def test_bad_panels_are_refused(change, match, tmp_path):
    ids = np.zeros((2, 4, 4), int)
    given = {"frames": np.zeros((2, 4, 4, 3), np.uint8), "truth": ids, "predicted": ids} | change
    with pytest.raises(ValueError, match=match):
        instance_figure(**given, path=tmp_path / "p.png", rows=["a", "b"])


def test_depth_panels_need_a_known_depth(tmp_path):
    nothing = np.array([[[0.0, np.nan], [np.inf, -1.0]]])
    with pytest.raises(ValueError, match="a true depth that is positive and finite, got none"):
        depth_figure(np.zeros((1, 2, 2, 3), np.uint8), nothing, nothing, tmp_path / "d.png", rows=["a"], unit="m")


# -- layer x step map -------------------------------------------------------------------------------------------------


def test_the_map_prints_and_colours_every_cell(tmp_path, drawn):
    values = np.array([[0.1, 0.25, 0.4], [np.nan, 0.3333, 0.2]])
    path = tmp_path / "map.png"
    layer_step_figure(values, [8, 20], [100, 749, 900], path, metric="T-mIoU", title="wan")
    figure, image = drawn[0], pixels(path)
    ax = figure.axes[0]
    cells = {tuple(np.round(t.get_position()).astype(int)): t.get_text() for t in ax.texts}
    assert cells == {(0, 0): "0.100", (1, 0): "0.250", (2, 0): "0.400", (0, 1): "-", (1, 1): "0.333", (2, 1): "0.200"}
    assert {"8", "20", "100", "749", "900", "T-mIoU", "wan", "block (from 0)"} <= set(texts(figure))
    assert_legible(figure)
    area = ax.get_window_extent()
    scale = image.shape[1] / figure.bbox.width
    colour_of = {}
    for i, j in np.ndindex(2, 3):
        x, y = (
            (area.x0 + area.width * (j + 0.1) / 3) * scale,
            image.shape[0] - (area.y1 - area.height * (i + 0.1) / 2) * scale,
        )
        colour_of[i, j] = image[round(y), round(x)]
    assert colour_of[0, 0].tolist() == [68, 1, 84], "the least: viridis' first"
    assert colour_of[0, 2].tolist() == [253, 231, 36], "the most: its last"
    assert colour_of[1, 0].tolist() == list(NEUTRAL)
    green = [colour_of[cell][1] for cell in ((0, 0), (1, 2), (0, 1), (1, 1), (0, 2))]
    assert green == sorted(green)
    ink = {t.get_text(): t.get_color() for t in ax.texts}
    assert (ink["0.100"], ink["0.400"], ink["-"]) == ("white", "black", "black")


@pytest.mark.parametrize("values", [np.full((1, 1), 0.5), np.full((3, 1), np.nan)])
def test_a_map_of_a_model_without_steps(values, tmp_path, drawn):
    layer_step_figure(values, range(len(values)), [None], tmp_path / "m.png", metric="mAP", decimals=1)
    assert "none" in texts(drawn[0])
    assert [t.get_text() for t in drawn[0].axes[0].texts] == (["0.5"] if len(values) == 1 else ["-"] * 3)


def test_a_map_of_another_shape_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"values must be \[2, 3\], layers x steps, got \[3, 2\]"):
        layer_step_figure(np.zeros((3, 2)), [1, 2], [1, 2, 3], tmp_path / "m.png", metric="mAP")


# -- files ------------------------------------------------------------------------------------------------------------


def test_bars_are_as_long_as_their_numbers(tmp_path, drawn):
    told = {"right answers": {"left": 0.875, "above": 0.5}, "near": {"far": 1.0}, "nothing": {}}
    bar_figure(told, tmp_path / "bars.png", chance={"right answers": 0.5}, title="probe")
    (figure,) = drawn
    first, second = figure.axes
    assert [bar.get_width() for bar in first.patches] == [0.875, 0.5]
    assert [text.get_text() for text in first.texts] == ["0.88", "0.50"]
    assert [label.get_text() for label in first.get_yticklabels()] == ["left", "above"]
    assert first.get_title("left") == "right answers (dashed: guessing)"
    assert list(first.lines[0].get_xdata()) == [0.5, 0.5]
    assert not second.lines
    image = pixels(tmp_path / "bars.png")
    blue = [round(255 * c) for c in to_rgb(figures.COLOURS[0])]
    _, left, _, width = box(image, blue)
    rows, columns = places(image, blue)
    top = rows < rows.min() + 10  # the first bar, beside the longest in the picture
    assert np.ptp(columns[top]) / width == pytest.approx(0.875, abs=0.01)
    assert columns[top].min() == left, "the first name is above the second"
    with pytest.raises(ValueError, match="bars need at least one number, got none"):
        bar_figure({"nothing": {}}, tmp_path / "none.png")


def test_files_repeat_whatever_the_users_settings_are(tmp_path):
    from matplotlib import rc_context

    def draw(name) -> bytes:
        curve_figure({"a": rows([2, 1])}, tmp_path / name)
        return (tmp_path / name).read_bytes()

    first = draw("a.png")
    with rc_context({"font.size": 30, "axes.facecolor": "black", "lines.linewidth": 9, "savefig.dpi": 30}):
        assert draw("b.png") == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]
    assert Image.open(tmp_path / "a.png").text == {}
