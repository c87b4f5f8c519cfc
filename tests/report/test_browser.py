"""The page as a browser shows it: nothing is loaded, nothing overflows, and every exact value is reached by keys."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from safegraft.contracts.report import Report
from safegraft.report import figures, to_csv, to_html
from tests.report.samples import evaluation, five, line, lines, probe, report
from tests.report.test_html import hostile_page

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

MEGABYTE = 1_000_000


@contextmanager
def opened(browser: "Browser", folder: Path, html: str, width: int = 1200, **settings: Any) -> "Iterator[Page]":
    """The page in a window of that width. Fails where it logs, asks, or loads anything but itself."""
    path = folder / "report.html"
    path.write_text(html, encoding="utf-8")
    seen: list[str] = []
    context = browser.new_context(viewport={"width": width, "height": 800}, **settings)
    page = context.new_page()
    page.on("console", lambda message: seen.append(message.text))
    page.on("pageerror", lambda error: seen.append(str(error)))
    page.on("request", lambda request: seen.append(request.url))
    page.on("dialog", lambda dialog: seen.append(dialog.message))
    page.goto(path.as_uri())
    yield page
    assert seen == [path.as_uri()]
    context.close()


def test_seventy_layers_are_one_page_below_a_megabyte(deep: Report) -> None:
    html = to_html(deep)
    assert len(deep.modules) == 490
    assert 0 < deep.summary.repaired < 490
    assert len(html.encode()) < MEGABYTE
    assert len(to_csv(deep).encode()) < MEGABYTE
    assert all(len(data) < MEGABYTE for data in figures(deep).values())


@pytest.mark.parametrize("width", [360, 768, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_window(
    browser: "Browser", tmp_path: Path, deep: Report, width: int, scheme: str
) -> None:
    crowded = report([line(f"model.layers.{i}.kind{k}", i, 0.5, 0.9) for i in range(4) for k in range(20)])
    for html in (
        to_html(deep),
        to_html(five(probe=probe(), evaluation=evaluation())),
        to_html(crowded),
        hostile_page(),
    ):
        with opened(browser, tmp_path, html, width, color_scheme=scheme) as page:
            found = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
            assert found == [width, width]


@pytest.mark.parametrize("width", [360, 768, 1200])
def test_no_figure_of_a_map_is_cut_off(browser: "Browser", tmp_path: Path, deep: Report, width: int) -> None:
    with opened(browser, tmp_path, to_html(deep), width) as page:
        cut = page.evaluate(
            "[...document.querySelectorAll('.map td')].filter(cell => cell.scrollWidth > cell.clientWidth + 1).length"
        )
        assert cut == 0
        if width == 1200:
            tops = page.evaluate("[...document.querySelectorAll('.map')].map(map => map.getBoundingClientRect().top)")
            assert len(set(tops)) == 1, "side by side: a row is one layer in all three"


def test_keys_reach_every_exact_value(browser: "Browser", tmp_path: Path, deep: Report) -> None:
    with opened(browser, tmp_path, to_html(deep)) as page:
        readout = page.locator("#readout")
        assert readout.is_hidden()
        page.locator(".map").first.focus()
        page.keyboard.press("Tab")
        (first,) = [module for module in deep.modules if (module.layer, module.kind) == (0, "q_proj")]
        assert readout.inner_text().startswith(f"layer 0, q_proj: {first.similarity_before:.4f} before, ")
        for key in ("ArrowDown", "ArrowRight", "PageDown"):
            page.keyboard.press(key)
        (there,) = [module for module in deep.modules if (module.layer, module.kind) == (11, "k_proj")]
        told = readout.inner_text()
        assert told.startswith(f"layer 11, k_proj: {there.similarity_before:.4f} before, {there.similarity_after:.4f} ")
        assert page.locator(".map .here").count() == 3, "the same module in all maps"
        page.keyboard.press("End")
        assert "layer 11, down_proj" in readout.inner_text()
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        assert "layer 11, down_proj" in readout.inner_text(), "no key leaves the map"


def test_pointer_and_finger_show_the_same(browser: "Browser", tmp_path: Path) -> None:
    with opened(browser, tmp_path, to_html(report(lines(3))), has_touch=True) as page:
        cell = page.locator(".map td").nth(5)
        cell.hover()
        assert page.locator("#readout").inner_text() == cell.get_attribute("title")
        other = page.locator(".map td").nth(9)
        other.tap()
        assert page.locator("#readout").inner_text() == other.get_attribute("title")


def test_a_table_sorts_by_keys(browser: "Browser", tmp_path: Path) -> None:
    sample = report(lines(3))
    with opened(browser, tmp_path, to_html(sample)) as page:
        table = page.locator("[aria-labelledby=modules] table").first
        head = table.get_by_role("button", name="Before")
        head.focus()
        page.keyboard.press("Enter")
        values = [float(text) for text in table.locator("tbody td:nth-child(5)").all_inner_texts()]
        assert values == sorted(values, reverse=True)
        assert table.locator("th[aria-sort=descending]").count() == 1


def test_without_script_nothing_is_missing(browser: "Browser", tmp_path: Path) -> None:
    with opened(browser, tmp_path, to_html(report(lines(3))), java_script_enabled=False) as page:
        assert page.locator("#readout").is_hidden()
        assert page.locator("#keys-hint").is_hidden(), "no keys are promised"
        assert page.locator(".map td").first.get_attribute("title")
        page.locator("summary", has_text="All 21 modules").click()
        assert page.locator("details th.name").last.is_visible()


def test_hostile_names_run_nothing(browser: "Browser", tmp_path: Path) -> None:
    with opened(browser, tmp_path, hostile_page()) as page:
        assert page.evaluate("document.scripts.length") == 1
        assert page.locator("img").count() == 0
        page.locator(".map td[class^=k]", has_text="0.40").first.hover()
        assert "<script>alert(1)</script>" in page.locator("#readout").inner_text()


def test_what_is_printed_has_each_map_on_one_page(browser: "Browser", tmp_path: Path, deep: Report) -> None:
    with opened(browser, tmp_path, to_html(deep)) as page:
        pdf = page.pdf(format="A4", prefer_css_page_size=True)
        assert len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 7
        page.emulate_media(media="print")
        page.set_viewport_size({"width": 688, "height": 1000})
        # 182 mm × 265 mm of an A4 page are left between the margins, at 96 pixels an inch.
        section = page.locator("section.deep").bounding_box()
        assert section is not None
        assert section["height"] <= 265 / 25.4 * 96
        assert page.locator("#readout").is_hidden()
