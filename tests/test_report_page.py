"""The page as a reader meets it: in a browser, from a file, without a network."""

import dataclasses
import json
import shutil
import time

import pytest

from potstill import report
from tests.report_runs import make, outcome

webdriver = pytest.importorskip("selenium.webdriver", reason="pip install 'potstill[dev]'")
pytestmark = [
    pytest.mark.xdist_group("browser"),  # one worker, so that it starts once
    pytest.mark.skipif(
        shutil.which("chromedriver") is None
        or (shutil.which("chromium") or shutil.which("google-chrome")) is None,
        reason="chromium and chromedriver are not installed",
    ),
]
BAD = "</script><script>alert(1)</script>"


@pytest.fixture(scope="module")
def browser():
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome")
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "window-size=1280,900"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Three groups with everything there can be, unfinished and damaged runs, a reproduction."""
    root = tmp_path_factory.mktemp("page")
    for seed in range(3):
        make(root / f"vanilla{seed}", 70.0 + seed, name="digits/vanilla", seed=seed)
        make(root / f"kd{seed}", 9.5 + seed, seed=seed, drawn=True)
    bad = make(root / "bad", 100.0, f"teachers.0.weights={BAD}", newer=False)
    spread = {"edges": [0.5, 0.75, 1.0], "images": {"seen": [1, 3], "unseen": [2, 0]}}
    worth = {"accuracy": {"top1": 70.0}, "ncm": {"top1": 60.0}, "weights": spread}
    (bad.directory / "cross_task.json").write_text(json.dumps(worth))
    make(root / "open", 72.0, seed=5, done=2)
    make(root / "damaged", 72.0, seed=6).directory.joinpath("result.json").write_text("{")
    found = dataclasses.replace(report.collect([root]), reproduced=[outcome()])
    file = root / "report.html"
    report.write_html(found, file, command=f"potstill report '{BAD}'", made="2026-11-29")
    return file.as_uri()


def show(browser, page, width=1280, theme="light"):
    """Open it, and return when every plot is drawn."""
    features = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page)
    await_true(browser, "return document.querySelectorAll('.plot .main-svg').length > 0")


def await_true(browser, script, seconds=20.0):
    end = time.monotonic() + seconds
    while not (value := browser.execute_script(script)):
        assert time.monotonic() < end, script
        time.sleep(0.05)
    return value


def test_every_plot_is_drawn(browser, page):
    show(browser, page)
    sizes = browser.execute_script("""
        return [...document.querySelectorAll(".js-plotly-plot")].map((plot) => {
            const box = plot.querySelector(".main-svg").getBoundingClientRect();
            const marks = plot.querySelectorAll(".scatterlayer .trace, .barlayer .trace").length;
            return [plot.dataset.plot, box.width, box.height, marks];
        });
    """)
    assert {size[0] for size in sizes} == {
        "curves", "terms", "reliability", "agreement", "cost", "weights", "subnetworks",
    }  # fmt: skip
    assert all(width > 300 and height > 200 and marks for _, width, height, marks in sizes), sizes


def test_nothing_is_fetched_and_nothing_complains(browser, page):
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # of what went before
    show(browser, page)
    show(browser, page, width=390, theme="dark")
    assert browser.get_log("browser") == []
    messages = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    urls = [
        m["params"]["request"]["url"]
        for m in messages
        if m["method"] == "Network.requestWillBeSent"
    ]
    assert urls, "or the log is not what it was"
    assert {url.partition(":")[0] for url in urls} <= {"file", "data", "blob"}, urls
    buttons = browser.execute_script(
        "return [...document.querySelectorAll('.modebar-btn')].map((b) => b.dataset.title)"
    )
    assert buttons and not any("cloud" in b.lower() or "share" in b.lower() for b in buttons)


def column(browser, head, title="Results"):
    """The texts of a column, without the notes, and its aria-sort."""
    return browser.execute_script(
        """
        const table = document.querySelector(`[aria-label="${arguments[1]}"] table`);
        const heads = [...table.tHead.rows[0].cells];
        const at = heads.findIndex((h) => h.textContent.trim() === arguments[0]);
        const text = (cell) => [...cell.childNodes].filter((n) => n.nodeName === "#text")
            .map((n) => n.textContent).join("").trim();
        return [[...table.tBodies[0].rows].map((row) => text(row.cells[at])),
                heads[at].getAttribute("aria-sort")];
        """,
        head,
        title,
    )


def head_button(browser, head):
    buttons = browser.find_elements("css selector", '[aria-label="Results"] th button')
    return next(b for b in buttons if b.text.strip().startswith(head))


def test_a_click_sorts_by_number_and_a_second_one_the_other_way(browser, page):
    """10.50 before 71.00, 980 before 1,030, which text would not have."""
    show(browser, page)
    assert column(browser, "top-1")[1] is None
    head_button(browser, "top-1").click()
    assert column(browser, "top-1") == [["10.50", "71.00", "100.00"], "ascending"]
    head_button(browser, "top-1").click()
    assert column(browser, "top-1") == [["100.00", "71.00", "10.50"], "descending"]
    head_button(browser, "parameters").click()
    assert column(browser, "parameters")[0] == ["980", "980", "1,030"]
    head_button(browser, "group").click()
    texts, sort = column(browser, "group")
    assert (texts, sort) == (sorted(texts), "ascending")
    assert column(browser, "top-1")[1] is None


def test_missing_values_are_last_both_ways(browser, page):
    show(browser, page)
    for _ in range(2):
        head_button(browser, "ECE %").click()
        assert column(browser, "ECE %")[0][-1] == "-"


def test_the_keyboard_sorts_too(browser, page):
    from selenium.webdriver.common.keys import Keys

    show(browser, page)
    head_button(browser, "top-1").send_keys(Keys.ENTER)
    assert column(browser, "top-1")[1] == "ascending"
    head_button(browser, "top-1").send_keys(Keys.SPACE)
    assert column(browser, "top-1")[0] == ["100.00", "71.00", "10.50"]


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_is_wider_than_the_screen(browser, page, width):
    show(browser, page, width=width)
    wide, screen = browser.execute_script(
        "return [document.documentElement.scrollWidth, innerWidth]"
    )
    assert screen == width and wide <= screen
    plots = browser.execute_script(
        "return [...document.querySelectorAll('.plot .main-svg')].map((p) => p.clientWidth)"
    )
    assert max(plots) <= width


def colours(browser):
    return browser.execute_script("""
        const body = getComputedStyle(document.body);
        const papers = [...document.querySelectorAll(".js-plotly-plot")].map(
            (plot) => getComputedStyle(plot.querySelector(".main-svg")).backgroundColor);
        return [body.backgroundColor, body.color, [...new Set(papers)]];
    """)


def contrast(one, other):
    """WCAG 2's contrast ratio of two "rgb(r, g, b)"."""

    def luminance(colour):
        parts = [int(x) / 255 for x in colour.partition("(")[2].rstrip(")").split(",")[:3]]
        linear = [x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return sum(x * w for x, w in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_dark_is_dark_plots_too_and_the_button_changes_both(browser, page):
    show(browser, page, theme="light")
    light, ink, papers = colours(browser)
    assert papers == [light] and contrast(light, ink) > 7
    show(browser, page, theme="dark")
    dark, ink, papers = colours(browser)
    assert dark != light and papers == [dark] and contrast(dark, ink) > 7
    browser.find_element("id", "theme").click()
    await_true(browser, "return document.documentElement.dataset.theme === 'light'")
    assert (colours(browser)[0], colours(browser)[2]) == (light, [light])


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_text_is_legible(browser, page, theme):
    """WCAG AA: 4.5 to 1, of each element with text of its own against what it lies on."""
    show(browser, page, theme=theme)
    browser.execute_script("document.querySelectorAll('details').forEach((d) => { d.open = true })")
    pairs = browser.execute_script("""
        const clear = "rgba(0, 0, 0, 0)";
        const under = (e) => {
            while (e && getComputedStyle(e).backgroundColor === clear) e = e.parentElement;
            return getComputedStyle(e ?? document.body).backgroundColor;
        };
        return [...document.body.querySelectorAll("*")]
            .filter((e) => !e.closest("script, style, .plot, svg") &&
                [...e.childNodes].some((n) => n.nodeName === "#text" && n.textContent.trim()))
            .map((e) => [e.tagName + "." + e.className, getComputedStyle(e).color, under(e)]);
    """)
    assert len(pairs) > 50
    assert not [pair for pair in pairs if contrast(*pair[1:]) < 4.5]


def test_the_legend_hides_and_shows(browser, page):
    show(browser, page)
    drawn = "return document.querySelectorAll('[data-plot=curves] .scatterlayer .trace').length"
    before = browser.execute_script(drawn)
    entries = browser.find_elements("css selector", "[data-legend=curves] button[aria-pressed]")
    name = entries[0].text
    entries[0].click()
    await_true(browser, f"{drawn} < {before}")
    entry = browser.find_elements("css selector", "[data-legend=curves] button[aria-pressed]")[0]
    assert (entry.text, entry.get_attribute("aria-pressed")) == (name, "false")
    assert browser.switch_to.active_element == entry, "the focus stays where it was"
    entry.click()
    await_true(browser, f"{drawn} === {before}")


def test_cost_is_by_parameters_flops_or_latency(browser, page):
    show(browser, page)
    title = "return document.querySelector('[data-plot=cost] .xtitle').textContent"
    seen = []
    for i in range(3):
        browser.find_elements("css selector", "[data-controls=cost] button")[i].click()
        seen.append(browser.execute_script(title))
    assert seen == ["parameters", "FLOPs of an image", "latency, ms an image"]
    browser.find_elements("css selector", "[data-controls=cost] button")[0].click()
    bars = "return document.querySelectorAll('[data-plot=cost] .errorbar').length"
    assert browser.execute_script(bars) == 2, "the run that is alone has no interval"


def test_loss_terms_can_be_logarithmic(browser, page):
    show(browser, page)
    kind = "return document.querySelector('[data-plot=terms]')._fullLayout.yaxis.type"
    assert browser.execute_script(kind) == "linear"
    browser.find_elements("css selector", "[data-controls=terms] button")[-1].click()
    assert browser.execute_script(kind) == "log"


def test_verdicts_are_words_and_a_shortened_reproduction_says_so_first(browser, page):
    show(browser, page)
    verdicts = browser.find_elements("css selector", ".verdict")
    assert [v.text for v in verdicts] == ["matches", "below", "waiting"]
    banner = browser.find_element("css selector", ".banner")
    assert banner.text.startswith("Shortened: 1 of 240 epochs")
    assert banner.location["y"] < verdicts[0].location["y"]


def test_what_people_write_stays_text(browser, page):
    """A setting, a name in every plot and a command line that would all run a script."""
    show(browser, page)
    assert browser.execute_script("return document.scripts.length") == 3
    text = browser.execute_script("return document.body.textContent")
    assert f"'{BAD}'" in text
    legend = browser.find_element("css selector", "[data-legend=curves]").text
    assert "alert(1)</script>" in legend


def test_the_page_tells_of_everything_that_was_found(browser, page):
    show(browser, page)
    text = browser.find_element("tag name", "main").text
    for words in (
        "epoch 2 of 4",
        "damaged is damaged and left out",
        "open has not finished",
        "chosen on the test set, not a result",
        "n = 1: no interval",
        "Kendall's tau",
        "abacus",
    ):
        assert words in text, words
    assert (
        "7 finished runs of 3 settings, 1 unfinished"
        in browser.find_element("tag name", "header").text
    )
