"""The page of a sweep in a real browser, opened from its file."""

import importlib.util
import os
import re

import pytest
from browser import CHROMIUM, open_browser, open_page
from sample_sweep import METHODS, sample_report, take_away

from sead_dist.sweep.page import render_page

pytestmark = pytest.mark.browser
TASKS = ("cola", "sst2", "mrpc", "rte", "stsb", "wic")


@pytest.fixture(scope="module")
def browser():
    """One for all tests; they are skipped where there is none, unless it must be there."""
    lacking = None
    if CHROMIUM is None:
        lacking = "chromium is not installed: apt-get install chromium"
    elif importlib.util.find_spec("playwright") is None:
        lacking = "playwright is not installed: pip install 'sead-dist[browser]'"
    if lacking and os.environ.get("SEAD_DIST_NEED_BROWSER") == "1":
        pytest.fail(lacking)
    elif lacking:
        pytest.skip(lacking)
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def report():
    found = sample_report(TASKS, METHODS)
    take_away(found, "stsb", "confidence", "not_applicable", "labels are scores")
    take_away(found, "rte", "tinybert", "failed", "the loss became NaN")
    return found


@pytest.fixture(scope="module")
def path(report, tmp_path_factory):
    return render_page(report, tmp_path_factory.mktemp("report"))


def column(page, name):
    """The methods' cells in a column of the table of scores, from the top down."""
    heads = page.locator("#score-table thead th").all_inner_texts()
    (at,) = [n for n, text in enumerate(heads) if re.search(rf"\b{name}\b", text)]
    cells = page.locator(f"#score-table tbody:first-of-type tr > :nth-child({at + 1})")
    return cells.all_inner_texts()


def numbers(cells):
    """Their scores; a mark's difference has a sign."""
    return [float(re.search(r"(?<![+-])\d\.\d{4}", cell)[0]) for cell in cells if "0." in cell]


def test_a_click_on_a_head_sorts_and_another_turns_it(browser, path, report):
    with open_page(browser, path) as (page, wrong):
        before = column(page, "method")
        cola = numbers(column(page, "cola"))
        assert cola != sorted(cola, reverse=True), "the sample must not be sorted by it already"
        head = page.locator("#score-table thead th", has_text="cola")
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == "descending"
        assert numbers(column(page, "cola")) == sorted(cola, reverse=True)
        assert column(page, "method") != before
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == "ascending"
        assert numbers(column(page, "cola")) == sorted(cola)
        # the teachers stay below, and one column alone says that it is sorted
        assert page.locator("#score-table tbody.reference tr").count() == 5
        assert page.locator("#score-table [aria-sort]").count() == 1
        # what has no score comes last, whichever way
        page.locator("#score-table thead th", has_text="stsb").get_by_role("button").click()
        assert column(page, "stsb")[-1] == "does not apply"
        page.locator("#score-table thead th", has_text="stsb").get_by_role("button").click()
        assert column(page, "stsb")[-1] == "does not apply"
        assert wrong == []


def test_numbers_are_sorted_as_numbers_by_the_keyboard_too(browser, path):
    with open_page(browser, path) as (page, wrong):
        column = page.locator("#cost-table tbody tr > :nth-child(6)")
        page.locator("#cost-table thead th", has_text="seconds").get_by_role("button").focus()
        page.keyboard.press("Enter")
        seconds = [float(cell) for cell in column.all_inner_texts()]
        assert seconds == sorted(seconds, reverse=True)
        assert max(seconds) > 100 > min(seconds) > 10, "as texts, 157.5 would come before 72.0"
        page.keyboard.press("Space")
        assert [float(cell) for cell in column.all_inner_texts()] == seconds[::-1]
        assert wrong == []


def test_plots_can_be_seen_and_nothing_goes_wrong(browser, path):
    with open_page(browser, path) as (page, wrong):
        plots = page.get_by_role("img")
        assert plots.count() == 2
        for n, least in enumerate((300, 150)):
            box = plots.nth(n).bounding_box()
            assert box["width"] > 600
            assert box["height"] > least
            assert plots.nth(n).is_visible()
        # the letters of a picture are drawn at a size that can be read
        letters = page.locator("svg text", has_text="distilbert").first.bounding_box()
        assert letters["height"] > 8
        assert wrong == []


def test_without_javascript_the_tables_are_there(browser, path, report):
    with open_page(browser, path, javascript=False) as (page, wrong):
        rows = page.locator("#score-table tbody:first-of-type tr")
        assert rows.count() == len(METHODS)
        assert page.locator("th button").count() == 0
        means = {of["method"]: of["score"] for of in report["means"] if of["score"] is not None}
        assert column(page, "method")[0] == max(means, key=means.get)
        assert page.locator("#all-table").is_visible() is False
        page.locator("summary").click()
        assert page.locator("#all-table").is_visible()
        assert wrong == []


def test_a_phone_scrolls_tables_in_their_own_box_and_not_the_page(browser, path):
    with open_page(browser, path, width=390) as (page, _):
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        inner = "document.querySelector('#score-table').parentElement"
        assert page.evaluate(f"{inner}.scrollWidth > {inner}.clientWidth")


def test_a_dark_page_has_light_letters_in_its_pictures_too(browser, path):
    with open_page(browser, path, dark=True) as (page, _):
        style = "element => getComputedStyle(element)"
        letters = page.locator("svg text").first.evaluate(f"{style}.fill")
        paper = page.locator("body").evaluate(f"{style}.backgroundColor")
        light = [int(value) for value in re.findall(r"\d+", letters)]
        dark = [int(value) for value in re.findall(r"\d+", paper)]
        assert min(light) > 180 > 60 > max(dark)


def test_a_name_that_is_a_script_does_not_run(browser, tmp_path):
    hostile = "<script>document.title = 'run'</script>"
    found = sample_report()
    take_away(found, "sst2", "mean", "failed", hostile)
    for of in (*found["cells"], *found["means"]):
        of["method"] = of["method"].replace("single", f"<img src=x onerror=alert(1)>{hostile}")
    with open_page(browser, render_page(found, tmp_path)) as (page, wrong):
        assert page.title().startswith("Sweep:")
        assert hostile in page.locator("#undone-table").inner_text()
        assert wrong == []
