"""What the console says of a report, in the browser that says it, against what the report's other forms say."""

import json
import re
from collections.abc import Iterator
from html import unescape
from typing import TYPE_CHECKING, Any

import pytest

from safegraft.contracts.methods import MODELS, SafetyLockParameters
from safegraft.contracts.report import Report
from safegraft.report import headline, to_html, to_json, words
from safegraft.report.chart import chart_of
from safegraft.report.curve import axis_of
from tests.report.samples import BIASES, SIDE_CAR, five, line, lines, report, sweep, variant
from tests.service.pages import ORIGIN, opened

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

GIVEN = [line(f"model.layers.{layer}.o_proj", layer, 0.2, 0.9, kept=1.0, edit=0.0) for layer in range(3)]
PUSHED = SafetyLockParameters(output="lora_bias")
SAMPLES = {
    "repair": report(lines(3)),
    "leaning": report(lines(3), method="gram"),
    "analysis": report(lines(3, share=0), mode="analyze"),
    "nothing": report(lines(3, share=0)),
    "side-car": report(lines(3, share=0), method="safetylock", warnings=[SIDE_CAR]),
    "biases": sweep(variant(6, 1.0, 0.0), method=PUSHED, modules=GIVEN, warnings=[BIASES]),
    "large": sweep(variant(0.1, 0.9, 1.93), method="gram"),
    "strengths": five(),
}
LINEAGES = [report(lines(1), lineage=name, lineage_similarity=cosine) for name in ("continued", "fresh", "foreign")
            for cosine in (0.0213, -0.001, None)]  # fmt: skip


@pytest.fixture(scope="module")
def page(browser: "Browser") -> "Iterator[Page]":
    with opened(browser, "/") as page:
        page.get_by_label("API key").wait_for()
        yield page


def call(page: "Page", name: str, function: str, given: Any = None) -> Any:
    """Calls a function of one of the console's modules."""
    program = f"async (given) => ({function})(await import('{ORIGIN}/console/{name}'), given)"
    return page.evaluate(program, given)


def show(page: "Page", sample: Report, **changes: Any) -> None:
    """The report as the console draws it, alone on the page."""
    given = json.loads(to_json(sample)) | changes
    program = """(m, report) => document.body.replaceChildren(
        m.reportView(report, {job: {id: "rlg_1", result: {variants: []}}, signal: new AbortController().signal})
    )"""
    call(page, "report.js", program, given)


@pytest.mark.parametrize("name", SAMPLES)
def test_the_headline_is_the_reports(page: "Page", name: str) -> None:
    show(page, SAMPLES[name])
    assert page.locator(".lead").inner_text() == f"{headline(SAMPLES[name])}."


def test_reports_of_before_have_their_plainest_figures_for_a_headline(page: "Page") -> None:
    wanted = {"repair": "21 modules measured, 8 repaired.", "analysis": "21 modules measured."}
    for name, told in wanted.items():
        show(page, SAMPLES[name], headline=None)
        assert page.locator(".lead").inner_text() == told


def test_a_lineage_is_told_as_the_report_tells_it(page: "Page") -> None:
    given = [json.loads(to_json(sample)) for sample in LINEAGES]
    found = call(page, "report.js", "(m, all) => all.map((one) => m.lineage(one))", given)
    assert found == [words.lineage(sample) for sample in LINEAGES]
    show(page, SAMPLES["repair"])
    assert words.lineage(SAMPLES["repair"]) in page.locator(".reasons").inner_text()


def test_an_edit_is_told_as_the_report_tells_it(page: "Page") -> None:
    edits = [0.0, 0.004, 0.2687, 1.0, 1.004, 1.01, 1.8, 1.93, 2.5, 9.99, 37.0, 12.34, 1234.6, 1e6, 1e308]
    assert call(page, "format.js", "(m, all) => all.map(m.change)", edits) == [words.change(edit) for edit in edits]
    show(page, SAMPLES["large"])
    assert page.locator(".tile", has_text="Changed by").locator(".figure").inner_text() == "1.93 ×"
    show(page, SAMPLES["biases"])
    assert "without the biases" in page.locator(".tile", has_text="Changed by").inner_text()


@pytest.mark.parametrize(
    "values", [[0.2, 0.9], [0.3, 1.01, 0.9], [0.5, 1.5], [0.4, 2.9], [0.1, 3.4], [0.5, 4.01], [0.5, 37.0], [-0.3, 1.2]]
)
def test_the_chart_of_strengths_has_the_reports_axis(page: "Page", values: list[float]) -> None:
    found = call(page, "maps.js", "(m, values) => m.axisOf(values)", values)
    low, high, step = axis_of(values)
    assert [found["low"], found["high"], found["step"]] == pytest.approx([low, high, step])
    assert found["cut"] is (max(values) > high + 0.02)


@pytest.mark.parametrize(("edit", "cut"), [(2.9, False), (37.0, True)])
def test_a_large_edit_is_drawn_where_it_is_or_said_to_be_cut(page: "Page", edit: float, cut: bool) -> None:
    show(page, sweep(variant(0.1, 0.3, edit), variant(1, 0.5, 2.0), variant(3, 0.8, 0.4)))
    page.locator(".curve .stripe").first.wait_for()
    assert page.get_by_text(words.CUT).count() == cut
    heights = page.evaluate("[...document.querySelectorAll('.curve .edit-dot')].map((dot) => dot.y.baseVal.value)")
    ratio = (heights[2] - heights[0]) / (heights[2] - heights[1])
    assert ratio == pytest.approx((min(edit, 4.0) - 0.4) / (2.0 - 0.4))


def test_pointer_and_keys_tell_every_figure_of_the_chart(page: "Page") -> None:
    show(page, sweep(variant(0.1, 0.3, 37.0, 0.96), variant(1, 0.5, 2.9, 0.91), variant(3, 0.8, 0.4, 0.86)))
    strengths = page.locator("[aria-labelledby=variants-title]")
    stripes = strengths.locator(".curve .stripe")
    stripes.first.wait_for()
    readout = strengths.locator(".curve + .readout")
    assert readout.inner_text() == "Point at a strength, or move with the arrow keys."
    stripes.nth(1).hover()
    assert (
        readout.inner_text()
        == "general_weight 1: kept 50\u00a0%, changed by 2.9 times its size, median similarity 0.91"
    )
    page.mouse.move(0, 0)
    page.get_by_role("region", name="Table of the strengths").focus()
    page.keyboard.press("Shift+Tab")
    assert readout.inner_text().startswith("general_weight 0.1: kept 30\u00a0%, changed by 37 times its size")
    for key, told in (("ArrowLeft", "0.1"), ("ArrowRight", "1"), ("ArrowRight", "3"), ("ArrowRight", "3")):
        page.keyboard.press(key)
        assert readout.inner_text().startswith(f"general_weight {told}:")
    labels = [stripe.get_attribute("aria-label") for stripe in stripes.all()]
    assert labels[2] == readout.inner_text()
    assert strengths.locator(".curve .stripe[tabindex='0']").count() == 1


def test_layers_are_drawn_and_told_as_the_report_does(page: "Page") -> None:
    sample = report([*lines(12), line("lm_head", None, 0.5)])
    show(page, sample)
    drawn = page.locator("[aria-labelledby=layers-title]")
    stripes = drawn.locator(".stripe")
    stripes.first.wait_for()
    charted = chart_of(sample.layers, width=1040, height=280, two_sides=True)
    assert charted is not None
    assert stripes.count() == len(charted.points) == 12
    for number in (0, 7):
        stripes.nth(number).hover()
        assert drawn.locator(".readout").inner_text() == charted.points[number].title
    show(page, report([line("model.layers.3.q_proj", 3, 0.5, 0.9)]))
    assert page.locator("[aria-labelledby=layers-title]").count() == 0


def test_what_is_pointed_at_in_one_map_is_told_below_all(page: "Page") -> None:
    show(page, report(lines(4)))
    maps = page.locator("figure.map")
    maps.nth(1).locator("td").nth(9).hover()
    told = [readout.inner_text().partition(" · ")[2] for readout in maps.locator(".readout").all()]
    assert len(told) == 3
    assert len(set(told)) == 1


def test_the_five_terms_are_the_reports(page: "Page") -> None:
    show(page, report(lines(3)))
    theirs = unescape(re.sub(r"<[^>]+>", "", to_html(report(lines(3)))))
    for text in page.locator("[aria-labelledby=terms-title] dd").all_inner_texts():
        assert text in theirs
    assert page.locator("[aria-labelledby=terms-title] dt").count() == 5


WEIGHT = "Write a number from 0.01 to 1000; 0.2 is the default."
PAIRS = "Write a whole number from 1 to 1048576, or leave it empty."
SEED = "Write a whole number from 0 to 4294967295; 0 is the default."


@pytest.mark.parametrize(
    ("method", "name", "text", "wanted"),
    [
        ("gram", "general_weight", "0", f"general_weight cannot be 0. {WEIGHT}"),
        ("gram", "general_weight", "0.01", ""),
        ("gram", "general_weight", "1e9", f"general_weight cannot be 1e9. {WEIGHT}"),
        ("gram", "general_weight", "", f"general_weight is empty. {WEIGHT}"),
        ("gram", "pairs", "0", f"pairs cannot be 0. {PAIRS}"),
        ("gram", "pairs", "1.5", f"pairs cannot be 1.5. {PAIRS}"),
        ("gram", "pairs", "", ""),
        ("safelora", "threshold", "-2", "threshold cannot be -2. Write a number from −1 to 1; 0.5 is the default."),
        ("nlsr", "seed", "4294967295", ""),
        ("nlsr", "seed", "4294967296", f"seed cannot be 4294967296. {SEED}"),
    ],
)  # fmt: skip
def test_a_number_out_of_range_is_told_with_its_range(
    page: "Page", method: str, name: str, text: str, wanted: str
) -> None:
    schema = MODELS[method].model_json_schema()["properties"][name]
    field = {"name": name, "schema": schema, "input": {"value": text, "validity": {"badInput": False}}}
    assert call(page, "start.js", "(m, field) => m.numberProblem(field)", field) == wanted
