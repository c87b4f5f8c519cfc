"""What a terminal shows: the same headline as the page, maps that fit, and no letter that the encoding lacks."""

import io
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from safegraft.contracts.report import Report, Warning
from safegraft.report import headline
from safegraft.report.text import ASCII_SHADES, SHADES, Look, story
from tests.report.samples import evaluation, five, line, lines, report

KINDS_OF_TERMINAL = [Look(width, colours, unicode) for width in (40, 80, 200) for colours, unicode in
                     ((True, True), (False, True), (False, False))]  # fmt: skip


def shown(sample: Report, look: Look) -> str:
    """As it is printed, without colours."""
    return story(sample, look).plain


def maps(text: str) -> list[str]:
    """The rows of the maps, without their labels."""
    return re.findall(r"^ *(?:q|k|v|o|gate|up|down) (.*)$", text, re.M)


@pytest.mark.parametrize("look", KINDS_OF_TERMINAL, ids=lambda look: f"{look.width} {look.colours} {look.unicode}")
@pytest.mark.parametrize("layers", [1, 30, 70])
def test_every_layer_and_projection_is_there_and_no_line_is_too_long(look: Look, layers: int) -> None:
    sample = report(lines(layers))
    text = shown(sample, look)
    first, *rest = text.splitlines()
    assert first == look.text(headline(sample)), "the page's own sentence"
    assert max(map(cell_len, rest)) <= look.width
    cells = sum(map(len, maps(text)))
    assert cells % (2 * len(sample.modules)) == 0, "before and after"
    assert 1 <= cells / (2 * len(sample.modules)) <= 3


def test_seventy_layers_fit_in_one_block_of_eighty_columns() -> None:
    rows = maps(shown(report(lines(70)), Look(80, False, True)))
    assert [len(row) for row in rows] == [70] * 14


def test_narrow_terminals_get_blocks_that_begin_with_a_round_number() -> None:
    text = shown(report(lines(70)), Look(40, False, True))
    starts = [row.split()[0] for row in text.splitlines() if re.fullmatch(r"[\s\d]+", row) and row.strip()]
    assert starts == ["0", "30", "60"] * 2


def test_more_ink_is_less_similar() -> None:
    sample = report([line("l.0.q_proj", 0, 0.2, 0.9), line("l.1.q_proj", 1, 0.9)])
    before, after = maps(shown(sample, Look(80, False, True)))
    assert (before[0], before[-1]) == (SHADES[-1], SHADES[0])
    assert set(after) == {SHADES[0]}
    before, _ = maps(shown(sample, Look(80, False, False)))
    assert (before[0], before[-1]) == (ASCII_SHADES[-1], ASCII_SHADES[0])


@pytest.mark.parametrize("sample", [report(lines(3)), five(evaluation=evaluation())], ids=["one", "strengths"])
def test_ascii_is_ascii(sample: Report) -> None:
    assert shown(sample, Look(80, False, False)).isascii()


def test_what_was_repaired_has_a_dot_where_there_are_colours() -> None:
    sample = report(lines(30))
    assert shown(sample, Look(80, True, True)).count("•") == sample.summary.repaired + 1, "and one in the legend"
    assert "•" not in shown(report(lines(3, share=1.0)), Look(80, True, True)), "all of them: said in words"


def test_an_analysis_has_one_map_and_no_changes() -> None:
    text = shown(report(lines(30, share=0), mode="analyze"), Look(80, False, True))
    assert len(maps(text)) == 7
    assert "Largest changes" not in text
    assert "After" not in text


def test_an_evaluation_is_told() -> None:
    text = shown(report(lines(2), evaluation=evaluation()), Look(80, False, True))
    assert "Harm score fell from 1.00 to 0.00." in text


def test_what_is_missing_or_no_number_is_shown_as_missing() -> None:
    nan = float("nan")
    sample = report([line("l.0.q_proj", 0, 0.2), line("l.1.k_proj", 1, nan), line("lm_head", None, 0.9)])
    text = shown(sample, Look(80, False, True))
    assert re.search(r"^ *q █+·+$", text, re.M)
    assert re.search(r"^ *k ·+$", text, re.M)
    assert re.search(r"^ *lm_head ·+░+$", text, re.M)
    assert re.search(r"^ *0 .*\+$", text, re.M), "the axis has a sign for what is in no layer"


def test_names_move_no_cursor() -> None:
    name = "model.layers.0.\x1b[31m\u202eq_proj"
    sample = report([line(name, 0, 0.4, 0.8)], warnings=[Warning(code="x", message=name)])
    text = shown(sample, Look(80, True, True))
    assert not {"\x1b", "\u202e"} & set(text)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"color_system": "truecolor"}, True),
        ({"color_system": "256"}, True),
        ({"color_system": "standard"}, False),
        ({"color_system": None}, False),
        ({"color_system": "truecolor", "no_color": True}, False),
    ],
)
def test_colours_are_used_where_there_are_enough(settings: dict[str, object], expected: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, **settings)  # type: ignore[arg-type]
    assert Look.of(console).colours is expected


def test_the_encoding_decides_about_letters() -> None:
    for encoding, unicode in (("utf-8", True), ("ascii", False), ("iso8859-1", False)):
        console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        assert Look.of(console).unicode is unicode
