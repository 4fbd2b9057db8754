"""The site that `make site` builds, opened from the disk without a network."""

from pathlib import Path

import pytest
from playwright.sync_api import expect

HTML = Path(__file__).parents[2] / "build" / "site" / "html"
# In the page: images that are not described or not there, and formulas without extent.
BROKEN = """() => [
    ...[...document.images].filter(i => !i.alt.trim() || !i.complete || !i.naturalWidth)
        .map(i => `image ${i.src}`),
    ...[...document.querySelectorAll("math")].filter(m => !m.closest("details:not([open])"))
        .filter(m => m.namespaceURI !== "http://www.w3.org/1998/Math/MathML"
            || m.getBoundingClientRect().height < 5)
        .map(m => `formula ${m.textContent}`)
]"""
PROSE = """() => {
    const article = document.querySelector("article").cloneNode(true);
    article.querySelectorAll("pre, code").forEach(node => node.remove());
    return article.textContent;
}"""


@pytest.fixture(scope="module", autouse=True)
def built():
    if not (HTML / "index.html").is_file():
        pytest.fail(f"There is no site in {HTML}: run `make site` first.")


@pytest.fixture(scope="module")
def page(pages):
    with pages.open(offline=True) as page:
        yield page


def test_every_page_is_whole(page):
    found = [path for path in sorted(HTML.rglob("*.html")) if "_modules" not in path.parts]
    assert len(found) > 40
    formulas = images = 0
    for path in found:
        page.goto(path.as_uri())
        assert page.evaluate(BROKEN) == [], path
        prose = page.evaluate(PROSE)
        assert "$" not in prose and "\\frac" not in prose, path
        formulas += page.locator("math").count()
        images += page.locator("article img").count()
    assert formulas > 50 and images > 20
    assert page.faults == []


def test_navigation(page, take):
    page.goto((HTML / "index.html").as_uri())
    expect(page.get_by_role("heading", level=1)).to_contain_text("EfficientAD, step by step")
    take(page, "site-index")
    page.locator(".sidebar-tree").get_by_role("link", name="05 · ").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("Combine two maps on one scale")
    take(page, "site-notebook")
    page.locator(".math-block").first.scroll_into_view_if_needed()
    take(page, "site-formula")
    page.locator("article").get_by_role("link", name="notebook 03").first.click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("03")
    page.locator(".related-pages .next-page").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("04")
    page.locator(".sidebar-tree").get_by_role("link", name="The package").click()
    page.locator("article").get_by_role("link", name="effad_core.losses").click()
    expect(page.locator("dt[id='effad_core.losses.hard_feature_loss']")).to_be_visible()
    take(page, "site-module")
    page.locator("dt[id='effad_core.losses.hard_feature_loss']").get_by_text("[source]").click()
    expect(page.locator("article")).to_contain_text("def hard_feature_loss")
    assert page.faults == []


def test_search_finds_a_function_and_a_notebook(page, take):
    page.goto((HTML / "index.html").as_uri())
    search = page.get_by_role("textbox", name="Search")
    search.fill("hard_feature_loss")
    search.press("Enter")
    results = page.locator("#search-results")
    function = results.get_by_role("link", name="effad_core.losses.hard_feature_loss")
    expect(function).to_be_visible()
    take(page, "site-search")
    function.click()
    expect(page.locator("dt[id='effad_core.losses.hard_feature_loss']")).to_be_in_viewport()
    search.fill("quantiles by hand")
    search.press("Enter")
    results.get_by_role("link", name="05 · Combine two maps on one scale").first.click()
    expect(page.locator("article")).to_contain_text("Quantiles by hand")
    assert page.faults == []


def test_the_page_of_notebook_06_says_where_its_controls_answer(page, take):
    page.goto((HTML / "notebooks" / "06_threshold_explorer.html").as_uri())
    hint = page.get_by_text("Controls stand here")
    expect(hint.first).to_be_visible()
    assert page.get_by_text("Error displaying widget").count() == 0
    hint.first.scroll_into_view_if_needed()
    take(page, "site-explorer")


def test_on_a_phone(pages, take):
    with pages.open(offline=True, viewport={"width": 390, "height": 844}) as page:
        page.goto((HTML / "notebooks" / "05_quantile_normalization.html").as_uri())
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 390
        take(page, "site-phone")
        assert page.faults == []
