"""The page says what happened, in every mode; it loads nothing, and no name of a customer becomes markup."""

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest

from safegraft.contracts.methods import NlsrParameters
from safegraft.contracts.report import ReferenceUsed, Warning
from safegraft.report import to_html
from safegraft.report.html import MAX_ROWS
from tests.report.samples import KINDS, line, lines, report, sha

VOID = {"meta", "br", "wbr", "link", "img", "input", "hr"}
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7*7 }}&amp;</style></title>"


class Page(HTMLParser):
    """A page as a browser sees it: elements, attributes and visible text. Fails on tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.pieces.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.pieces))

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def hostile_page() -> str:
    modules = [
        line(f"model.layers.0.{HOSTILE}", 0, 0.4, 0.9, kind=HOSTILE),
        line("model.layers.1.q_proj", 1, 0.8),
        line("model.layers.2.\u202eq_proj\x00\x1b", 2, 0.8),
    ]
    return to_html(
        report(
            modules,
            base_model=HOSTILE,
            reference=ReferenceUsed(id=HOSTILE, name=HOSTILE, sha256=HOSTILE),
            warnings=[Warning(code=HOSTILE, message=HOSTILE)],
            dropped_files=[HOSTILE],
        )
    )


@pytest.mark.parametrize("html", [to_html(report(lines(30))), hostile_page()], ids=["plain", "hostile"])
def test_the_page_loads_nothing_and_runs_nothing_but_its_own_script(html: str) -> None:
    page = Page(html)
    for tag, attributes in page.tags:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base", "form", "a", "use", "image"}
        for name in attributes:
            assert not name.startswith("on")
            assert name not in {"src", "href", "xlink:href", "action", "formaction", "srcset", "style", "background"}
    (style,) = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    assert "url(" not in style
    assert "@import" not in style
    assert len(page.named("script")) == 1
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    policy = next(meta["content"] for meta in page.named("meta") if meta.get("http-equiv"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert f"'sha256-{digest}'" in policy


def test_a_plain_page_names_no_address() -> None:
    assert not re.search(
        r"https?:|//[a-z]", re.sub(r"<script>.*?</script>", "", to_html(report(lines(30))), flags=re.S)
    )


def test_hostile_text_is_shown_as_text() -> None:
    html = hostile_page()
    assert "<script>alert" not in html
    assert "<img" not in html
    assert "49" not in re.findall(r"<li><code>(.*?)</code></li>", html, re.DOTALL)[0], "no template in a template"
    text = Page(html).text
    assert text.count("<script>alert(1)</script>") >= 5
    assert not any(letter in html for letter in "\u202e\x00\x1b")


def test_every_module_and_value_is_readable_without_colour_or_script() -> None:
    original = report(lines(3))
    page = Page(to_html(original))
    for module in original.modules:
        assert module.name in page.text
        assert f"{module.similarity_before:.4f}" in page.text
        assert f"{module.similarity_after:.4f}" in page.text
    cells = [cell for cell in page.named("td") if cell.get("title")]
    assert len(cells) == 2 * len(original.modules), "before and after"
    repaired = [cell for cell in cells if (cell["title"] or "").endswith("repaired")]
    assert len(repaired) == 2 * original.summary.repaired
    # The mark is text; it also appears once in the legend and once per repaired row of the table.
    assert page.text.count("●") == len(repaired) + original.summary.repaired + 1


def test_the_largest_change_comes_first() -> None:
    original = report(lines(6))
    html = to_html(original)
    names = [re.sub("<wbr>", "", name) for name in re.findall(r'<td class="name"><code>(.*?)</code>', html)]
    edits = {module.name: module.edit for module in original.modules}
    assert names[0] == max(edits, key=lambda name: edits[name])
    assert [edits[name] for name in names] == sorted(edits.values(), reverse=True)


def test_a_repair_is_told_in_words() -> None:
    original = report(lines(30))
    text = Page(to_html(original)).text.replace("\xa0", " ")
    assert "84 of 210 modules were repaired; the adapter kept 93 % of its update and changed by 27 %" in text
    assert original.method.explanation in text
    assert "both restricted to the safety-critical output neurons" in text
    assert "trained on top of the aligned model" in text
    assert "the other 126 are byte for byte as they came" in text
    assert "Safer, not safe." in text
    assert "no backdoor scanner" in text
    assert "training_args.bin" in text
    for fact in (sha("input"), sha("output"), sha("reference"), "ref_01HZX3", '"skip_share": 0.6', "torch 2.8.0"):
        assert fact in text


def test_a_continued_adapter_is_called_so() -> None:
    text = Page(to_html(report(lines(2), lineage="continued", lineage_similarity=0.97))).text
    assert "trained further from the provider’s aligned adapter" in text.replace("'", "’")
    assert "0.97" in text


def test_analysis_claims_no_change() -> None:
    text = Page(to_html(report(lines(30, share=0), mode="analyze"))).text
    assert "210 modules were measured, nothing was changed" in text
    assert "no adapter was written" in text
    assert "none: this was a measurement" in text
    assert " --analyze" in text
    for wrong in ("were repaired;", "Before and after", "Update kept", "After writing"):
        assert wrong not in text


def test_nothing_repaired_is_said_plainly() -> None:
    text = Page(to_html(report(lines(30, share=0), warnings=[], dropped_files=[]))).text
    assert "Nothing was changed; the output is the input, byte for byte" in text
    assert "the same file as the input" in text
    assert "warning" not in text
    assert "Before and after" not in text


def test_modules_without_layers_have_a_row_of_their_own() -> None:
    page = Page(to_html(report([line("lm_head", None, 0.4, 0.8), line("embed.proj", None, 0.6)])))
    assert "Too few numbered layers for a chart" in page.text
    assert "other" in page.text
    assert any("outside the layers" in (cell.get("title") or "") for cell in page.named("td"))


def test_experts_share_a_cell() -> None:
    modules = [line(f"model.layers.0.experts.{index}.w1", 0, 0.2 * index, 0.9 if index else None) for index in range(3)]
    page = Page(to_html(report(modules)))
    titles = [cell["title"] for cell in page.named("td") if cell.get("title")]
    assert titles[0] == "layer 0, w1: 0.2000, mean of 3, 2 of 3 repaired"
    assert "◐" in page.text


def test_a_drawn_selection_shows_its_probabilities() -> None:
    sample = report([line("model.layers.0.q_proj", 0, 0.4, 0.8, selection_probability=0.625)])
    parameters = NlsrParameters(selection="bernoulli", seed=7)
    method = sample.method.model_copy(update={"parameters": parameters, "seed": 7})
    text = Page(to_html(sample.model_copy(update={"method": method}))).text
    assert "62.5 %" in text
    assert "seeded random draw" in text
    assert "(seed 7)" in text


def test_a_large_model_stays_below_a_megabyte() -> None:
    assert len(to_html(report(lines(80))).encode()) < 1_000_000


def test_very_many_modules_are_cut_off_and_said_so() -> None:
    experts = [
        line(f"model.layers.{layer}.experts.{index}.w1", layer, 0.5, 0.9) for layer in range(12) for index in range(100)
    ]
    html = to_html(report(experts))
    assert html.count('<td class="name">') == MAX_ROWS
    assert "the other 200 are in the JSON and CSV files" in html
    assert len(html.encode()) < 1_000_000


@pytest.mark.parametrize("layers", [1, 2, 80])
def test_a_chart_needs_two_layers(layers: int) -> None:
    page = Page(to_html(report(lines(layers, KINDS[:2], 1.0))))
    assert len(page.named("polyline")) == (0 if layers == 1 else 4), "two lines, drawn for wide and for narrow screens"


def test_figures_that_are_no_numbers_do_not_stop_the_page() -> None:
    nan = float("nan")
    text = Page(
        to_html(report([line("model.layers.0.q_proj", 0, nan, nan), line("model.layers.1.q_proj", 1, nan)]))
    ).text
    assert "nan" not in text.lower()
