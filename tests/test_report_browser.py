"""The report in a real browser: Debian's chromium, driven by playwright, and axe's accessibility rules.

Without a browser these tests skip; with REQUIRE_BROWSER=1 they fail instead.
"""

import json
import os
import shutil

import pytest
from report_results import make_result, make_store, write_study

from spatialprobe.engine.cli import main
from spatialprobe.probes.results import write_results

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]  # no sandbox: root in a container
PHONE = {"width": 360, "height": 740}
DESK = {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium")
    if path is None:
        if os.environ.get("REQUIRE_BROWSER") == "1":
            pytest.fail("REQUIRE_BROWSER=1, but there is no chromium on the PATH")
        pytest.skip("no chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A study, a store that is gone, a long name, and a run with a picture and many probes."""
    root = tmp_path_factory.mktemp("study")
    runs = write_study(root, generators=["wan2.1-t2v-14b", "cogvideox-2b"], positions=["native", "none"])
    lost = {"store": "/nowhere/" + "long" * 40, "spec": "0123456789abcdef", "weights": "content:1"}
    write_results(
        runs / "lost" / "results.json", [make_result("instance", [lost], {"loss": 1.0, "T-mIoU": 0.4, "T-SR": 0.0})]
    )
    source = make_store(root / "stores" / "ltx", "ltx-video")
    many = [
        make_result("tagging", [source], {"AP_head": 0.5, "mAP": 0.1 + 0.001 * i}, lr=1e-4 * (1 + i)) for i in range(12)
    ]
    write_results(runs / "many" / "results.json", many)
    from matplotlib.figure import Figure

    Figure((6, 2)).savefig(runs / "many" / "instance.png")
    return runs


@pytest.fixture(scope="module")
def url(runs):
    page = runs / "page.html"
    assert main(["report", str(runs), "--out", str(page), "--title", "A study"]) == 0
    return page.as_uri()


@pytest.fixture
def opened(browser, url):
    """Opens the page in some light; at the end nothing was asked of a network, and nothing complained."""
    contexts, asked, said = [], [], []

    def open_(viewport=DESK, **light):
        context = browser.new_context(viewport=viewport, **light)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(url)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert [one for one in asked if not one.startswith("data:")] == [url] * len(contexts)
    assert said == []


@pytest.mark.parametrize(
    ("viewport", "light", "folds", "rules"),
    [
        (DESK, "light", "open", "all"),
        (PHONE, "light", "closed", "all"),
        (PHONE, "dark", "open", "color-contrast"),  # all that light and dark differ in
    ],
)
def test_axe_finds_no_fault(opened, viewport, light, folds, rules):
    from axe_playwright_python.sync_playwright import Axe

    page = opened(viewport, color_scheme=light)
    if folds == "open":
        page.evaluate("document.querySelectorAll('details').forEach(fold => fold.open = true)")
    found = Axe().run(page, options={} if rules == "all" else {"runOnly": [rules]})
    assert found.violations_count == 0, found.generate_report()
    wanted = {"color-contrast", "scrollable-region-focusable", "heading-order", "svg-img-alt", "td-headers-attr"}
    passed = {rule["id"] for rule in found.response["passes"]}
    assert (wanted if rules == "all" else {rules}) <= passed


@pytest.mark.parametrize("width", [320, 360, 768, 1280])
def test_the_page_is_never_wider_than_the_screen(opened, width):
    page = opened({"width": width, "height": 740})
    for _ in range(2):
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.evaluate("document.querySelectorAll('details').forEach(fold => fold.open = true)")
    wide = page.evaluate(
        """[...document.querySelectorAll('main *')].filter(one => !one.closest('.scroll, pre, svg')
        && one.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(one => one.outerHTML)"""
    )
    assert wide == []


def test_wide_tables_scroll_in_their_own_box_by_keyboard(opened):
    page = opened(PHONE)
    box = page.locator(".scroll").filter(has=page.locator("table.study"))
    box.focus()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.activeElement.scrollLeft > 0")
    name = page.locator("table.study th[scope=row]").first
    assert name.bounding_box()["x"] >= 0, "the name of a row stays in sight"


def test_folds_open_by_keyboard(opened):
    page = opened()
    fold = page.locator("details").filter(has_text="tagging, ltx-video: 12 probes")
    picture = fold.locator("img")
    assert not picture.is_visible()
    fold.locator("summary").focus()
    page.keyboard.press("Enter")
    picture.wait_for(state="visible")
    assert fold.locator("svg[role=img]").is_visible()
    assert page.evaluate("document.querySelector('details[open] img').naturalWidth") > 0
    page.keyboard.press("Space")
    picture.wait_for(state="hidden")


def test_tab_reaches_every_link_fold_and_box_in_order(opened):
    page = opened()
    order = page.evaluate(
        """[...document.querySelectorAll('a[href], summary, [tabindex]')].filter(one => one.checkVisibility()).length"""
    )
    seen = set()
    for _ in range(order):
        page.keyboard.press("Tab")
        seen.add(
            page.evaluate(
                "document.activeElement.outerHTML.slice(0, 300) + document.activeElement.getBoundingClientRect().y"
            )
        )
    assert len(seen) == order


def test_what_is_shown_is_what_the_files_say(opened, runs):
    page = opened()
    cells = page.locator("table.study tbody tr").filter(
        has=page.get_by_role("rowheader", name="internvl3-8b", exact=True)
    )
    shown = cells.locator("td").all_inner_texts()
    results = json.loads((runs / "tagging" / "internvl3-8b" / "results.json").read_text())
    best = max(results, key=lambda r: r["metrics"]["AP_head"])
    assert shown[:2] == [f"{best['metrics'][m]:.3f}" for m in ("mAP", "AP_mid")]
    assert shown[2] == f"block {best['keys'][0][1]}; best of 2"


def test_bold_looks_bold_and_is_the_greatest_of_its_column(opened):
    page = opened()
    column = page.locator("table.study tbody tr:not(.published, .mean)").locator("td:nth-of-type(1)")
    cells = [(float(c.locator("data").get_attribute("value")), c) for c in column.all() if c.locator("data").count()]
    weights = [c.locator("data").evaluate("one => +getComputedStyle(one).fontWeight") for _, c in cells]
    best = max(x for x, _ in cells)
    assert len(cells) == 8
    assert [weight >= 600 for weight in weights] == [x == best for x, _ in cells]


def test_dark_is_dark(opened):
    luminance = """() => { const [r, g, b] = getComputedStyle(document.body).backgroundColor.match(/\\d+/g);
        return (+r + +g + +b) / 3 }"""
    assert opened(color_scheme="dark").evaluate(luminance) < 60
    assert opened(color_scheme="light").evaluate(luminance) > 200


def test_it_prints_with_no_table_cut(opened):
    page = opened({"width": 1030, "height": 720})  # A4 on its side within its margins, at 96 pixels per inch
    page.emulate_media(media="print")
    cut = page.evaluate(
        """[...document.querySelectorAll('table')].filter(one => one.checkVisibility()
        && one.getBoundingClientRect().right > document.documentElement.clientWidth).map(one => one.innerText)"""
    )
    assert cut == []
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    pdf = page.pdf(prefer_css_page_size=True)
    assert pdf.startswith(b"%PDF")
    assert 3 <= pdf.count(b"/Type /Page\n") <= 40 or 3 <= pdf.count(b"/Type /Page ") <= 40
