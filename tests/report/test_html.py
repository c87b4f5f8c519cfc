"""The page says what happened, in every mode; it loads nothing, and no name of a customer becomes markup."""

import base64
import hashlib
import re
import shlex
from html import unescape
from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise
from typing import Literal

import pytest

from safegraft.cli import parse_parameters
from safegraft.contracts.methods import (
    AntidoteParameters,
    GramParameters,
    Method,
    NlsrParameters,
    SafeLoraParameters,
    SafetyLockParameters,
)
from safegraft.contracts.report import Digest, Recommendation, ReferenceUsed, Report, Subject, Warning
from safegraft.report import to_html
from safegraft.report.grid import level_colours
from safegraft.report.html import LARGEST, MAX_ROWS
from tests.report.samples import (
    BIASES,
    KINDS,
    METHODS,
    SIDE_CAR,
    evaluation,
    five,
    line,
    lines,
    parameters_of,
    probe,
    report,
    sha,
    sweep,
    variant,
)

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
    several = [variant(0.1, 0.3, 0.7, output=HOSTILE), variant(3, 0.8, 0.2)]
    return to_html(
        sweep(
            *(item.model_copy(update={"output": Digest(sha256=HOSTILE, bytes=1)}) for item in several),
            modules=modules,
            base_model=HOSTILE,
            reference=ReferenceUsed(id=HOSTILE, name=HOSTILE, sha256=HOSTILE),
            recommendation=Recommendation(method=HOSTILE, reason=f"\u202e{HOSTILE}"),
            strength_parameter=HOSTILE,
            probe=probe().model_copy(update={"prompts_sha256": HOSTILE}),
            evaluation=evaluation(judge=HOSTILE),
            warnings=[Warning(code=HOSTILE, message=HOSTILE)],
            dropped_files=[HOSTILE],
        )
    )


@pytest.mark.parametrize(
    "html",
    [to_html(report(lines(30))), to_html(five(probe=probe(), evaluation=evaluation())), hostile_page()],
    ids=["plain", "strengths", "hostile"],
)
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
    assert text.count("<script>alert(1)</script>") >= 20
    for sentence in ("Had no method been named, ", "The 2 strengths of ", "At ", "Output at "):
        assert f"{sentence}<script>alert(1)</script>" in text
    (check,) = re.findall(r"<dt>Probe prompts</dt><dd>(.*?)</dd>", html, re.DOTALL)
    assert unescape(check) == f"<code>sha256:{HOSTILE}</code>"
    assert not any(letter in html for letter in "\u202e\x00\x1b")


def test_every_module_and_value_is_readable_without_colour_or_script() -> None:
    original = report(lines(3))
    page = Page(to_html(original))
    for module in original.modules:
        assert module.name in page.text
        assert f"{module.similarity_before:.4f}" in page.text
        assert f"{module.similarity_after:.4f}" in page.text
    cells = [cell for cell in page.named("td") if cell.get("title")]
    assert len(cells) == 3 * len(original.modules), "before, after and the difference"
    repaired = [cell for cell in cells if (cell["title"] or "").endswith(", repaired")]
    assert len(repaired) == 3 * original.summary.repaired
    marked = [cell for cell in cells if "repaired" in (cell["class"] or "").split()]
    assert len(marked) == 3 * original.summary.repaired
    assert to_html(original).count('<span aria-hidden="true">●</span> yes') >= original.summary.repaired


def test_every_cell_says_its_layer_projection_and_exact_values() -> None:
    original = report(lines(2))
    titles = [cell["title"] for cell in Page(to_html(original)).named("td") if cell.get("title")]
    for module in original.modules:
        difference = f"{module.similarity_after - module.similarity_before:+.4f}" if module.repaired else "0.0000"
        state = "repaired" if module.repaired else "not repaired"
        told = (
            f"layer {module.layer}, {module.kind}: {module.similarity_before:.4f} before, "
            f"{module.similarity_after:.4f} after, difference {difference}, {state}"
        )
        assert titles.count(told) == 3


def test_a_difference_has_its_sign_and_a_colour_of_its_own() -> None:
    modules = [
        line("model.layers.0.q_proj", 0, 0.5, 0.9),
        line("model.layers.1.q_proj", 1, 0.5, 0.3),
        line("model.layers.2.q_proj", 2, 0.5),
    ]
    html = to_html(report(modules))
    difference = html[html.index('aria-label="Map: difference"') :]
    cells = re.findall(r'<td class="([^"]*)" title="[^"]*">(.*?)</td>', difference)[:3]
    assert cells == [("d24 repaired", "+0.40"), ("d6 repaired", "−0.20"), ("same", "0")]


def test_where_everything_was_repaired_no_cell_is_marked() -> None:
    html = to_html(report(lines(2, share=1.0)))
    assert "Every module was repaired." in html
    assert not any("repaired" in (cell.get("class") or "").split() for cell in Page(html).named("td"))


@pytest.mark.parametrize("side", ["before", "difference"])
def test_numbers_in_cells_can_be_read(side: Literal["before", "difference"]) -> None:
    """WCAG 2's level AA: 4.5 to 1."""
    for back, text in level_colours(side):
        one, two = sorted((luminance(back), luminance(text)))
        assert (two + 0.05) / (one + 0.05) >= 4.5, (back, text)


def test_text_can_be_read_in_every_theme() -> None:
    style = (files("safegraft.report") / "style.css").read_text()
    themes = [
        dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", block)) for block in re.findall(r":root {(.*?)}", style, re.S)
    ]
    assert len(themes) == 3, "light, dark, print"
    for theme in themes:
        for back in ("paper", "sheet"):
            for text in ("ink", "soft", "accent", "before", "after", "likeness"):
                one, two = sorted((luminance(theme[back]), luminance(theme[text])))
                assert (two + 0.05) / (one + 0.05) >= 4.5, (theme[back], text)


def luminance(code: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = [int(code[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_tables_and_pictures_have_names_for_those_who_do_not_see_them() -> None:
    html = to_html(five(probe=probe(), evaluation=evaluation()))
    page = Page(html)
    assert len(page.named("caption")) == len(page.named("table"))
    assert all(head["scope"] in ("row", "col") for head in page.named("th"))
    for row in re.findall(r"<tbody>(.*?)</tbody>", html, re.S):
        assert row.count("<tr>") == row.count('scope="row"'), "each row has its head"
    for svg in page.named("svg"):
        named = svg.get("aria-label") or svg.get("aria-labelledby")
        assert svg.get("aria-hidden") == "true" or (svg.get("role") == "img" and named)
    regions = [part for _, part in page.tags if part.get("role") == "region"]
    assert all(part["tabindex"] == "0" and part["aria-label"] for part in regions), "what scrolls is reached by keys"


def test_an_evaluation_is_told_with_its_intervals() -> None:
    text = Page(to_html(report(lines(3), evaluation=evaluation()))).text.replace("\xa0", " ")
    assert "Harm score fell from 1.00 to 0.00." in text
    assert "1.000.86 to 1.0024 of 24" in text
    assert "0.000.00 to 0.140 of 24" in text
    assert "Task accuracy rose from 0.91 to 0.92; the intervals overlap, so this may be chance." in text
    assert "Judged by: key phrases." in text
    assert "But for the evaluation above, this report measures weights" in text
    assert "How it behaves" not in Page(to_html(report(lines(3)))).text


def test_a_page_says_whose_it_is() -> None:
    subject = Subject(adapter="c-17 <b>", realignment_id="rlg_0123", written_at=1_800_000_000)
    html = to_html(report(lines(3), subject=subject))
    page = Page(html)
    assert "c-17 <b> · rlg_0123 · 2027-01-15 08:00 UTC" in page.text
    assert "<title>c-17 &lt;b&gt;: " in html
    local = Page(to_html(report(lines(3), subject=Subject(adapter="mine", written_at=253402300799)))).text
    assert "mine · 9999-12-31 23:59 UTC" in local
    assert 'class="subject' not in to_html(report(lines(3)))


def test_the_largest_change_comes_first() -> None:
    original = report(lines(6))
    html = to_html(original)
    names = [re.sub("<wbr>", "", name) for name in re.findall(r'class="name"><code>(.*?)</code>', html)]
    edits = {module.name: module.edit for module in original.modules}
    most = sorted(edits.values(), reverse=True)
    assert [edits[name] for name in names] == most[:LARGEST] + most, "the largest, and then all"


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
    assert titles[0] == "layer 0, w1: 0.2000 before, 0.6000 after, difference +0.4000, mean of 3, 2 of 3 repaired"
    assert any("partly" in (cell.get("class") or "") for cell in page.named("td"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lineage", ["continued", "fresh", "foreign"])
def test_every_method_and_lineage_has_its_page(method: str, lineage: str) -> None:
    repaired = 0 if method == "none" else 0.4
    sample = report(lines(3, share=repaired), method=method, lineage=lineage)
    text = Page(to_html(sample)).text
    assert sample.method.explanation in text
    assert f"Where the adapter comes from: {lineage}" in text
    assert ("nobody has confirmed" in text) == (lineage == "foreign")
    assert ("It is the one that is recommended" in text) == (method == "gram")
    assert ("Had no method been named, gram would have run" in text) == (method != "gram")
    assert "Chosen for repair" in text


def test_long_facts_stand_where_there_is_room() -> None:
    html = to_html(report(lines(3), method="safetylock"))
    heads = report(lines(3), method="safetylock").method.resolved["heads"]
    assert Page(html).text.count(heads) == 1, "in full, and not in a paragraph"
    (fact,) = re.findall(r"<dt>Resolved</dt><dd>(.*?)</dd>", html, re.DOTALL)
    assert heads in fact


def test_an_exact_rank_is_named_and_no_sameness_of_bytes_claimed() -> None:
    text = Page(to_html(report(lines(30), output_rank="exact"))).text
    assert "Rank of the output exact: what the repair needs" in re.sub("(output)(exact)", r"\1 \2", text)
    assert "byte for byte" not in text
    assert "Rank of the outputthe adapter’s own" in Page(to_html(report(lines(30)))).text


def test_several_strengths_are_drawn_and_listed() -> None:
    sample = five()
    page = Page(to_html(sample))
    text = page.text.replace("\xa0", " ")
    assert "The 5 strengths of general_weight, side by side" in text
    assert "those of the first that was asked for, general_weight 0.3." in text
    assert "At general_weight 0.3:" in text
    assert "general_weight 0.1: kept 37 %, changed by 71 %, median similarity 0.98" in text
    (table,) = re.findall(r'aria-label="All strengths">(.*?)</table>', to_html(sample), re.DOTALL)
    rows = re.findall(r'<tr><th scope="row".*?</tr>', table, re.DOTALL)
    cells = [[re.sub("<.*?>", "", cell) for cell in re.findall("<t[hd].*?</t[hd]>", row)] for row in rows]
    assert [row[0] for row in cells] == ["0.1", "0.3", "0.5", "1", "3"], "in the order of the strength"
    for row, item in zip(cells, sorted(sample.variants, key=lambda found: found.strength), strict=True):
        assert row[1] == "14 of 14"
        assert row[2] == f"{100 * item.summary.kept:.1f}\xa0%"
        assert row[3] == f"{100 * item.summary.edit:.1f}\xa0%"
        assert row[4] == f"{item.summary.similarity_after.median:.4f}"
        assert row[5] == "none", "modules that act more on safety prompts than on general ones"
        assert row[6] == "1.2\xa0%"
        assert item.output is not None
        assert row[7] == item.output.sha256
    # Three lines of a curve beside the four of the chart by layer, each drawn for wide and for narrow screens.
    assert len(page.named("polyline")) == 2 * 3 + 2 * 2


def test_a_curve_is_named_and_described_for_those_who_do_not_see_it() -> None:
    html = to_html(five())
    page = Page(html)
    identities = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(identities)) == len(identities)
    curves = [svg for svg in page.named("svg") if "curve" in (svg.get("class") or "").split()]
    assert len(curves) == 2
    for svg in curves:
        assert svg["role"] == "img"
        title, text = (svg["aria-labelledby"] or "").split()
        assert f'<title id="{title}">Kept, changed by and median similarity over general_weight</title>' in html
        assert f'<desc id="{text}">5 values of general_weight. From 0.1 to 3, kept goes from 37' in html


def test_without_strengths_and_probe_nothing_speaks_of_them() -> None:
    html = to_html(report(lines(3)))
    text = Page(html).text
    for wrong in ("side by side", "first token", "Probe prompts", "Strength", "--strengths", "--output-rank"):
        assert wrong not in text
    assert 'class="lines curve' not in html
    assert 'class="lines curve' not in to_html(sweep(variant(0.3, 0.5, 0.5))), "one strength has no curve"


def test_an_analysis_compares_no_strengths() -> None:
    measured = five(mode="analyze", modules=lines(2, share=0), output=None)
    text = Page(to_html(measured)).text
    assert "Measurements do not depend on the strength." in text
    assert "side by side" not in text


@pytest.mark.parametrize(
    ("output", "warning", "reason"),
    [
        ("side_car", SIDE_CAR, "the repair is in the side-car files"),
        ("lora_bias", BIASES, "they compare weights, and see no biases"),
    ],
)
def test_strengths_that_no_figure_tells_apart_are_listed_and_not_drawn(
    output: str, warning: Warning, reason: str
) -> None:
    method = SafetyLockParameters.model_validate({"output": output})
    repaired = 12 if output == "lora_bias" else 0
    several = [variant(value, 1.0, 0.0, 1.0, repaired=repaired) for value in (2, 6)]
    html = to_html(sweep(*several, method=method, warnings=[warning]))
    assert f"In these figures the strengths do not differ: {reason}." in Page(html).text
    assert 'class="lines curve' not in html
    assert html.count('<td class="digest">') == 2


def test_a_side_car_is_not_told_as_if_nothing_had_happened() -> None:
    method = SafetyLockParameters(output="side_car")
    text = Page(to_html(report(lines(3, share=0), method=method, warnings=[SIDE_CAR]))).text
    assert "the repair is in a side-car file beside it" in text
    assert "What was done24 attention heads are pushed" in text
    for wrong in ("Nothing was changed", "No module was changed", "handed back as it came"):
        assert wrong not in text


def test_a_probe_is_told_in_words_and_figures() -> None:
    text = Page(to_html(report(lines(3), probe=probe()))).text.replace("\xa0", " ")
    assert "On 32 prompts, the repair brought the adapter nearer to the model that it sits on" in text
    assert "the adapter as it came, with the model that it sits on1.23456.2 %" in text
    assert "the repaired adapter, with the model that it sits on0.12393.8 %" in text
    assert "the repaired adapter, with the adapter as it came0.98859.4 %" in text
    assert f"sha256:{sha('probe prompts')}" in text
    assert "not behaviour (of which the probe shows one token an answer)" in text


def test_an_edit_larger_than_the_update_is_a_multiple_in_its_tile() -> None:
    sample = report(lines(2, share=1.0), summary=variant(1, 0.2, 1.8).summary)
    assert '<div class="figure">1.8 ×</div>' in to_html(sample)


@pytest.mark.parametrize(
    "method",
    [
        *(parameters_of(name) for name in METHODS),
        NlsrParameters(form="neuron", scorer="random", selection="bernoulli", amplification=0.5, seed=9),
        GramParameters(general_weight=0.05, amplification=0.25, pairs=12),
        SafeLoraParameters(projector="orthogonal", selection="lowest", modules=3),
        AntidoteParameters(density=0.3, basis="rows", spare="safety"),
        SafetyLockParameters(strength=2.5, heads=3, output="lora_bias"),
    ],
    ids=lambda method: method.type,
)
def test_the_command_gives_the_same_parameters_again(method: Method) -> None:
    command = command_of(report(lines(2), method=method))
    at = command.index("--method")
    settings = [value for name, value in pairwise(command) if name == "--set"]
    assert parse_parameters(command[at + 1], settings) == method


def test_the_command_asks_for_all_strengths_and_the_rank() -> None:
    command = command_of(five(output_rank="exact"))
    assert "--strengths=0.3,0.1,3.0,0.5,1.0" in command, "in the order asked for: the first one makes the report"
    assert command[command.index("--output-rank") + 1] == "exact"
    assert not any(part.startswith("general_weight") for part in command), "said once"


def command_of(sample: Report) -> list[str]:
    (found,) = re.findall(r"<dt>Command</dt><dd><pre>(.*?)</pre></dd>", to_html(sample), re.DOTALL)
    return shlex.split(unescape(found))


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
    assert html.count('class="name"') == LARGEST + MAX_ROWS
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
