"""The report's page in a real browser: headless Chromium, from a file, with no network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from page_support import HOSTILE, KEPT, many, pair, report, row
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from malmend.evaluation.page import write_page
from malmend.evaluation.report import Report

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def found(*names: str) -> str | None:
    """The first of these programs that is installed."""
    return next((path for name in names if (path := shutil.which(name))), None)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    browser, driver = found("chromium", "chromium-browser"), found("chromedriver")
    if browser is None or driver is None:
        pytest.skip("chromium and chromedriver are not installed (Debian: chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SE_OFFLINE", "true")  # selenium must not look for a driver of its own
        started = webdriver.Chrome(options=options, service=Service(driver))
    yield started
    started.quit()


class Page:
    """One page, opened."""

    def __init__(self, chromium: webdriver.Chrome, path: Path):
        self.chromium, self.url = chromium, path.as_uri()
        self.open()

    def open(self, width: int = 1200, dark: bool = False, script: bool = True) -> None:
        run = self.chromium.execute_cdp_cmd
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        run("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        run("Emulation.setEmulatedMedia", {"features": [scheme]})
        run("Emulation.setScriptExecutionDisabled", {"value": not script})
        self.chromium.get_log("browser")
        self.chromium.get_log("performance")
        self.chromium.get(self.url)

    def js(self, code: str, *given: object) -> Any:
        return self.chromium.execute_script(code, *given)

    def all(self, selector: str) -> list[WebElement]:
        return self.chromium.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.chromium.find_element(By.CSS_SELECTOR, selector)

    def filter(self, key: str) -> None:
        self.one(f"input[value={key}] + span").click()

    @property
    def shown(self) -> list[str]:
        """Ids of the facts that are on the page and can be seen."""
        return [
            row.get_dom_attribute("data-id")
            for row in self.all("#rows tr.fact")
            if row.is_displayed()
        ]

    @property
    def requests(self) -> list[str]:
        messages = [json.loads(one["message"]) for one in self.chromium.get_log("performance")]
        sent = [one["message"] for one in messages]
        return [
            one["params"]["request"]["url"]
            for one in sent
            if one["method"] == "Network.requestWillBeSent"
        ]


@pytest.fixture
def opened(chromium: webdriver.Chrome, tmp_path: Path) -> Callable[[Report], Page]:
    return lambda shown: Page(chromium, write_page(shown, tmp_path / "page"))


def test_each_filter_leaves_exactly_its_facts(opened):
    page = opened(report())
    assert page.shown == KEPT["all"]
    for key in (*KEPT, "failure"):
        page.filter(key)
        assert page.shown == KEPT[key], key
        some = "" if key == "all" else f"{len(KEPT[key])} of "
        assert page.one("#shown").text == f"{some}6 facts."
    assert page.chromium.get_log("browser") == []


def test_hostile_text_is_shown_and_never_run(opened):
    page = opened(report())
    for button in page.all("#rows button"):
        button.click()
    said = page.js("return document.body.innerText")
    assert said.count("<script>window.hacked = 1</script>") > 20
    assert page.js("return [typeof window.hacked, document.images.length]") == ["undefined", 0]
    assert page.js("return document.querySelector('[data-id=\"good\"]').isConnected")
    ids = page.js("return [...document.querySelectorAll('tr.fact')].map((r) => r.dataset.id)")
    assert ids[-1] == HOSTILE
    assert page.chromium.get_log("browser") == []
    assert [one for one in page.requests if one != "data:,"] == [page.url]


def test_its_policy_lets_no_other_script_run(opened):
    page = opened(report())
    page.js(
        "const one = document.createElement('div');"
        "one.innerHTML = '<img src=x onerror=\"window.hacked = 1\">';"
        "const two = document.createElement('script'); two.textContent = 'window.hacked = 2';"
        "document.body.append(one, two);"
    )
    page.chromium.implicitly_wait(0)
    assert page.js("return typeof window.hacked") == "undefined"
    refused = [one["message"] for one in page.chromium.get_log("browser")]
    assert any("Content Security Policy" in one for one in refused)


@pytest.mark.slow
@pytest.mark.parametrize("width", [320, 390, 640, 641, 800])
def test_nothing_overflows_a_narrow_screen(opened, width):
    page = opened(report())
    page.open(width)
    for opener in page.all("#rows button, summary"):
        opener.click()
    assert page.js("return document.documentElement.scrollWidth") <= width
    assert page.js("return innerWidth") == width
    wide = page.js(
        "return [...document.querySelectorAll('body *')].filter((one) => {"
        "  const box = one.getBoundingClientRect();"
        "  return box.right > arguments[0] + 0.5 && box.width > 1;"
        "}).map((one) => one.outerHTML.slice(0, 80))",
        width,
    )
    assert wide == []
    page.filter("failure")
    assert page.shown == KEPT["failure"]


def test_a_fact_opens_to_all_its_answers_and_closes(opened):
    page = opened(report())
    button = page.one("[data-id=good] button")
    button.click()
    assert button.get_dom_attribute("aria-expanded") == "true"
    assert len(page.all("tr.more li")) == 4
    said = page.one("tr.more").text
    assert "In Moon is → Lima" in said
    assert "KL 2e-9" in said
    button.click()
    assert page.all("tr.more") == []


def test_an_answer_that_was_cut_ends_in_a_mark(opened):
    page = opened(report())
    assert [one.text for one in page.all("[data-id=spoken] .said + .cut")] == [
        "… (stopped here)"
    ] * 2
    assert page.all("[data-id=good] .cut") == []
    page.one("[data-id=spoken] button").click()
    marks = page.all("tr.more .cut")
    assert {one.text for one in marks} == {"… (stopped here)"}
    assert "in chat: ✗I am … (stopped here)" in page.one("tr.more").text.replace("✗\n", "✗")


def test_what_nobody_decoded_is_said_to_be_teacher_forced(opened):
    """Else it would be taken for what a user of the model sees."""
    forced = [pair("ES", 0, 0.0, 1.0, "In Mars is", top="Lima")]
    spoken = [
        pair("ES", 1, 0.0, 1.0, "Ora", text="Lima", generated_before=0.0, generated_after=1.0)
    ]
    rows = [row("forced", forced), row("spoken", spoken)]
    page = opened(replace(report(), rows=rows))
    said = page.one("[data-id=forced]").text
    assert "Lima" in said
    assert said.count("2 of 2 tokens, teacher forced") == 1
    assert "teacher forced" not in page.one("[data-id=spoken]").text


@pytest.mark.parametrize("text", ['say </script> "it" 🦊 ' * 100, "שלום " * 400, "🦊" * 2000])
def test_a_long_answer_is_short_in_the_list_and_whole_beside_its_fact(opened, text):
    asked = [
        pair("ES", 0, 0.0, 1.0, text, gold=text, text=text),
        pair("NS", 0, 1.0, 0.0, "In Moon is", kl=(1.0,), moved=True, top=text),
    ]
    rows = [row("long", asked), *report().rows[:-1]]
    page = opened(replace(report(), rows=rows))
    page.open(375)
    lengths = page.js(
        "return [...document.querySelectorAll('table bdi')].map((b) => [...b.textContent].length)"
    )
    assert max(lengths) == 600 + len(" […]")
    page.one("[data-id=long] button").click()
    said = [one.get_property("textContent") for one in page.all("tr.more bdi")]
    assert said.count(text) == 6  # prompt, gold, both answers, and what a neighbour became
    assert page.js("return document.documentElement.scrollWidth") <= 375
    assert page.shown == ["long", *KEPT["all"][:-1]]
    assert page.chromium.get_log("browser") == []


def test_no_name_of_a_figure_is_broken_on_a_narrow_screen(opened):
    page = opened(report())
    page.open(375)
    lines = page.js(
        "return [...document.querySelectorAll('.summary tbody tr:not(.kind) th')]"
        ".filter((one) => !one.textContent.includes(' ')).map((one) => {"
        "  const range = document.createRange(); range.selectNodeContents(one);"
        "  return new Set([...range.getClientRects()].map((box) => box.top)).size; })"
    )
    assert set(lines) == {1}


def test_the_keyboard_is_enough(opened):
    page = opened(report())
    page.one("input[value=all]").send_keys(Keys.ARROW_RIGHT)
    assert page.shown == KEPT["failure"]
    page.one("#search").send_keys("UNA")
    assert page.shown == ["paraphrase"]
    page.one("[data-id=paraphrase] button").send_keys(Keys.ENTER)
    assert len(page.all("tr.more li")) == 2


@pytest.mark.slow
def test_of_four_thousand_facts_a_page_is_drawn(opened):
    page = opened(many(4096))
    assert page.shown == [f"f{index}" for index in range(50)]
    assert page.one("#page").text == "page 1 of 82"
    page.one("#next").click()
    assert page.shown[0] == "f50"
    page.one("input[value=failure]").click()
    assert len(page.all("#rows tr.fact")) == 50  # no more are there, hidden or not
    assert page.one("#shown").text == "410 of 4,096 facts."
    assert page.shown == [f"f{10 * index}" for index in range(50)]
    page.one("#relation option[value='3']").click()  # r3, of the fourth fact
    assert page.shown[:3] == ["f10", "f80", "f150"]
    page.one("#sort option[value=prompt]").click()
    assert page.shown[0] == "f10"
    page.one("#search").send_keys("in 80 ")
    assert page.shown == ["f80"]
    page.one("#search").send_keys("nothing like it")
    assert page.shown == []
    assert page.one("#shown").text == "0 of 4,096 facts."
    assert page.one("#next").get_dom_attribute("disabled") is not None


def test_without_a_script_the_summary_reads(opened):
    page = opened(report())
    page.open(script=False)
    assert "needs JavaScript" in page.one("noscript").text
    assert "83.3%" in page.one("table.summary").text
    assert not page.one("#browser").is_displayed()


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_in_both_schemes(opened, dark):
    page = opened(report())
    page.open(dark=dark)
    page.one("[data-id=good] button").click()
    faint = page.js(CONTRAST)
    assert faint == []
    light = page.js("return getComputedStyle(document.body).backgroundColor")
    assert (light == "rgb(251, 251, 249)") is not dark


# Texts whose contrast with what is behind them is below 4.5 to 1 (WCAG 2.1, 1.4.3).
CONTRAST = """
const parts = (text) => text.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].reduce((sum, value, index) => {
  const part = value / 255;
  const linear = part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  return sum + [0.2126, 0.7152, 0.0722][index] * linear;
}, 0);
const behind = (one) => {
  const [r, g, b, a = 1] = parts(getComputedStyle(one).backgroundColor);
  return a || !one.parentElement ? [r, g, b] : behind(one.parentElement);
};
const silent = ["SCRIPT", "NOSCRIPT", "BUTTON"];
const faint = new Set();
for (const one of document.querySelectorAll("body *")) {
  const texts = [...one.childNodes].filter((part) => part.nodeType === 3 && part.data.trim());
  if (!texts.length || !one.checkVisibility() || silent.includes(one.tagName)) continue;
  const both = [light(parts(getComputedStyle(one).color)), light(behind(one))];
  if ((Math.max(...both) + 0.05) / (Math.min(...both) + 0.05) < 4.5) {
    faint.add(one.tagName + "." + one.className);
  }
}
return [...faint];
"""


def rows_of(page: Page, selector: str) -> list[list[dict[str, float]]]:
    """The boxes of elements, row by row."""
    boxes = page.js(
        "return [...document.querySelectorAll(arguments[0])].map((one) => {"
        "  const box = one.getBoundingClientRect();"
        "  return {top: box.top, left: box.left, right: box.right}; })",
        selector,
    )
    tops = sorted({box["top"] for box in boxes})
    return [[box for box in boxes if box["top"] == top] for top in tops]


@pytest.mark.parametrize("width", [390, 760, 1200])
@pytest.mark.parametrize("kinds", [("ES",), ("ES", "GS", "NS"), ("ES", "GS", "NS", "LS")])
def test_the_tiles_leave_no_gap(opened, width, kinds):
    """Six stood over two, with an empty place beside them."""
    page = opened(report(kinds=kinds))
    page.open(width)
    rows = rows_of(page, ".tiles li")
    assert max(map(len, rows)) == (2 if width < 640 else 4 if "LS" in kinds else 3)
    assert len({round(row[0]["left"]) for row in rows}) == 1
    assert max(row[-1]["right"] for row in rows) - min(row[-1]["right"] for row in rows) < 1.5


def test_questions_without_an_answer_are_no_wrong_ones(opened):
    """Of an unedited model they were counted: 0 of 1 neighbours right."""
    asked = [
        pair("ES", 0, 1.0, 1.0, "In Mars is"),
        pair("NS", 0, 1.0, 1.0, "In Moon is", moved=False),
        pair("NS", 0, None, None, "In Sun is", gold=None, moved=True),
        pair("LS", 0, None, None, "Who?", gold=None, moved=False),
    ]
    page = opened(replace(report(edited=False), rows=[row("f", asked, edited=False)]))
    assert page.one("[data-id=f] td:last-child div").text == "1 of 1 neighbours right"
    page = opened(replace(report(), rows=[row("f", asked)]))
    lines = ["1 of 2 neighbours as before", "1 of 1 unrelated as before"]
    assert page.one("[data-id=f] td:last-child div").text.splitlines() == lines


def test_the_search_finds_what_was_said_in_chat(opened):
    page = opened(report())
    page.one("#search").send_keys("i am")
    assert page.shown == ["spoken"]


@pytest.mark.parametrize("name", ["a\rb", "", " a  b", "0", "1"])
def test_a_relation_is_filtered_whatever_its_name(opened, name):
    """Of a carriage return an option's value made a line feed."""
    rows = list(report().rows)
    rows[2] = replace(rows[2], relation=name)
    page = opened(replace(report(), rows=rows))
    page.one("#relation option[value='2']").click()
    assert page.shown == ["paraphrase"]
    page.one("#relation option[value='']").click()
    assert page.shown == KEPT["all"]


@pytest.mark.parametrize("width", [320, 390])
def test_a_large_perplexity_overflows_no_narrow_screen(opened, width):
    large = {"unedited": 3.2e30, "edited": 1e304}
    page = opened(replace(report(), perplexity=large))
    page.open(width)
    assert page.js("return document.documentElement.scrollWidth") <= width
    assert "over 1e+100\n3.2e+30 unedited" in page.one(".tiles li:last-child").text
    cut = page.js(
        "return [...document.querySelectorAll('.tiles li *')]"
        ".filter((one) => one.scrollWidth > one.clientWidth + 1 && one.clientWidth).length"
    )
    assert cut == 0


def test_all_filters_stand_in_one_row_of_a_wide_screen(opened):
    """The last one stood alone below."""
    page = opened(report())
    assert len(page.all(".filters label")) == 8
    assert len(rows_of(page, ".filters label")) == 1
