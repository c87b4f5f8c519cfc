"""Headlines and numbers: exact where it matters, never flattering."""

import pytest

from safegraft.contracts.report import Digest
from safegraft.report import headline
from safegraft.report.grid import LEVELS, Scale, grid_of, level_colours, short_kinds
from safegraft.report.words import number, percent, shown, size
from tests.report.samples import KINDS, line, lines, report, sha


def plain(text: str) -> str:
    return text.replace("\xa0", " ")


def test_headline_of_a_repair() -> None:
    assert (
        plain(headline(report(lines(30))))
        == "84 of 210 modules were repaired; the adapter kept 93 % of its update and changed by 27 %"
    )
    assert headline(report(lines(2, share=1.0))).startswith("All 14 modules were repaired; ")
    assert headline(report(lines(1, KINDS[:1], 1.0))).startswith("The only module was repaired; ")
    assert headline(report([line("a", 0, 0.1, 0.9), line("b", 0, 0.9)])).startswith("1 of 2 modules was repaired; ")


def test_headline_where_nothing_changed() -> None:
    assert headline(report(lines(2, share=0))) == "Nothing was changed; the output is the input, byte for byte"
    other = report(lines(2, share=0), output=Digest(sha256=sha("other"), bytes=1))
    assert headline(other) == "None of 14 modules was repaired", "sameness is only claimed where the hashes agree"
    analysis = report([line("model.layers.0.q_proj", 0, -0.25)], mode="analyze")
    assert headline(analysis) == "1 module was measured, nothing was changed; median similarity −0.25, lowest −0.25"


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0 %"),
        (0.001, "< 1 %"),
        (0.271, "27 %"),
        (0.9999, "> 99 %"),
        (1.0, "100 %"),
        (1.2, "120 %"),
        (-0.05, "−5 %"),
        (float("nan"), "–"),
    ],
)
def test_percent_calls_little_not_nothing_and_much_not_all(share: float, text: str) -> None:
    assert plain(percent(share)) == text


def test_numbers() -> None:
    assert [number(value) for value in (0.734, -0.001, -0.5, float("inf"))] == ["0.73", "0.00", "−0.50", "–"]
    assert plain(percent(0.9999, 1)) == "> 99.9 %"
    assert [plain(size(count)) for count in (7, 1500, 20_277_624)] == ["7 bytes", "1.5 kB", "20.3 MB"]


def test_shown_cuts_the_middle_and_replaces_what_cannot_be_seen() -> None:
    assert shown("a\u202eb\x00c") == "a\ufffdb\ufffdc"
    cut = shown("start" + "x" * 1000 + "end")
    assert len(cut) < 170
    assert cut.startswith("start")
    assert cut.endswith("end")


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        ([0.52, 0.98], 0.5, 1.0),
        ([-0.31, 0.2], -0.35, 0.2),
        ([0.9991, 0.9999], 0.9, 1.0),
        ([-1.0], -1.0, -0.9),
        ([1.0000002, 0.3], 0.3, 1.0),
        ([float("nan")], 0.0, 1.0),
    ],
)
def test_the_scale_spans_the_data(values: list[float], low: float, high: float) -> None:
    scale = Scale.of(values)
    assert [scale.low, scale.high] == pytest.approx([low, high])
    assert all(0 <= scale.level(value) < LEVELS for value in values if value == value)
    assert [position for position, _ in scale.ticks()][:: len(scale.ticks()) - 1] == [0.0, 1.0]


def test_the_colours_rise_in_lightness_and_hold_readable_text() -> None:
    def luminance(code: str) -> float:
        parts = [int(code[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    backs = [luminance(back) for back, _ in level_colours()]
    assert backs == sorted(backs)
    for back, text in level_colours():
        light, dark = sorted((luminance(back), luminance(text)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.3


def test_the_grid_averages_what_shares_a_cell() -> None:
    grid = grid_of(
        report(
            [line("l.0.e.0.w", 0, 0.2, 0.6), line("l.0.e.1.w", 0, 0.4), line("l.10.w", 10, 0.5), line("w", None, 0.1)]
        )
    )
    assert grid.layers == (0, 10, None)
    cell = grid.cells[0, "w"]
    assert [cell.before, cell.after] == pytest.approx([0.3, 0.5])
    assert (cell.modules, cell.repaired, cell.mark) == (2, 1, "◐")


def test_projections_come_in_the_order_of_a_block() -> None:
    grid = grid_of(report([line(f"l.0.{kind}", 0, 0.5) for kind in ("zeta", *reversed(KINDS))]))
    assert grid.kinds == (*KINDS, "zeta")
    assert short_kinds(grid.kinds) == ("q", "k", "v", "o", "gate", "up", "down", "zeta")
    assert short_kinds(("q", "q_proj")) == ("q", "q_proj"), "never two columns of one name"
