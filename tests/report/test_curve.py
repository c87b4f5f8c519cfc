"""The curve of several strengths: values at their places, labels that do not hide each other, no line where none is."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safegraft.contracts.report import Report
from safegraft.report.curve import APART, CLEAR, HIGHEST, Curve, curve_of
from tests.report.samples import five, lines, report, sweep, variant

WIDE, NARROW = (1040, 360), (360, 320)


def drawn(sample: Report, size: tuple[int, int] = WIDE) -> Curve:
    curve = curve_of(sample, width=size[0], height=size[1])
    assert curve is not None
    return curve


def at(curve: Curve, label: str) -> float:
    (found,) = [tick.at for tick in curve.y_ticks if tick.label == label]
    return found


def test_every_value_lies_where_the_axis_says() -> None:
    sample = sweep(variant(1, 0.2, 0.8, 1.0), variant(2, 0.4, 0.6, 0.9), variant(4, 0.6, 0.4, 0.8))
    curve = drawn(sample)
    kept, edit, likeness = curve.lines
    assert [line.name for line in curve.lines] == ["kept", "edit", "likeness"]
    assert [dot.y for dot in kept.dots] == pytest.approx([at(curve, label) for label in ("0.2", "0.4", "0.6")])
    assert [dot.y for dot in edit.dots] == pytest.approx([at(curve, label) for label in ("0.8", "0.6", "0.4")])
    middle = (at(curve, "0.8") + at(curve, "1.0")) / 2
    assert [dot.y for dot in likeness.dots] == pytest.approx([at(curve, "1.0"), middle, at(curve, "0.8")])
    assert [dot.label for dot in kept.dots] == ["0.20", "0.40", "0.60"]
    assert [tick.label for tick in curve.x_ticks] == ["1", "2", "4"]
    first, second, third = (dot.x for dot in kept.dots)
    assert (third - first) == pytest.approx(3 * (second - first)), "an even axis"
    assert [line.points.count(",") for line in curve.lines] == [3, 3, 3]


@pytest.mark.parametrize(
    ("strengths", "logarithmic"),
    [((0.1, 0.3, 1.0), False), ((0.1, 0.3, 3.0), True), ((0.0, 0.1, 50.0), False), ((-1.0, 0.2, 1.0), False)],
    ids=["a decade", "more", "from zero", "below zero"],
)
def test_strengths_over_more_than_a_decade_are_drawn_on_a_logarithmic_axis(
    strengths: tuple[float, ...], logarithmic: bool
) -> None:
    curve = drawn(sweep(*(variant(value, 0.5, 0.1 * index) for index, value in enumerate(strengths))))
    first, second, third = (dot.x for dot in curve.lines[0].dots)
    share = (second - first) / (third - first)
    low, middle, high = strengths
    if logarithmic:
        assert share == pytest.approx(math.log(middle / low) / math.log(high / low))
    else:
        assert share == pytest.approx((middle - low) / (high - low))
    assert ("logarithmic" in curve.axis) == logarithmic, "said to those who read it"


def test_the_order_in_which_strengths_were_asked_for_does_not_bend_the_line() -> None:
    curve = drawn(five())
    assert [dot.label for dot in curve.lines[0].dots] == ["0.37", "0.52", "0.59", "0.70", "0.81"]
    assert all(one.x < two.x for line in curve.lines for one, two in pairwise(line.dots))
    assert [stripe.title.split(":")[0] for stripe in curve.stripes] == [
        f"general_weight {value}" for value in ("0.1", "0.3", "0.5", "1", "3")
    ]
    assert curve.stripes[0].left == curve.left
    assert sum(stripe.width for stripe in curve.stripes) == pytest.approx(curve.right - curve.left)


def test_the_description_names_both_ends() -> None:
    assert drawn(five()).description.replace("\xa0", " ") == (
        "5 values of general_weight. From 0.1 to 3, kept goes from 37 % to 81 %, the change from 71 % to 26 %, the "
        "median similarity from 0.98 to 0.86."
    )


@pytest.mark.parametrize(
    "sample",
    [report(lines(2)), sweep(variant(1, 0.5, 0.5)), sweep(variant(2, 1.0, 0.0), variant(6, 1.0, 0.0))],
    ids=["none", "one", "all alike"],
)
def test_no_curve_is_drawn_where_there_is_none(sample: Report) -> None:
    assert curve_of(sample, width=1040, height=360) is None


def test_an_edit_far_above_the_others_lies_on_the_edge_with_its_value() -> None:
    curve = drawn(sweep(variant(1, 0.5, 37.0), variant(2, 0.6, 0.4)))
    kept, edit, _ = curve.lines
    assert curve.cut
    assert curve.y_ticks[-1].label == f"{HIGHEST:.1f}" == "4.0"
    assert edit.dots[0].y == curve.top
    assert edit.dots[0].label == "37.00"
    assert kept.dots[0].y - kept.dots[1].y > 5, "the others are not flattened"
    assert not drawn(five()).cut


def test_a_few_times_the_updates_size_lie_where_the_axis_says() -> None:
    curve = drawn(sweep(variant(0.1, 0.3, 3.4), variant(1, 0.4, 2.9), variant(3, 0.6, 0.5)))
    edit = curve.lines[1]
    assert curve.y_ticks[-1].label == "3.5"
    assert not curve.cut
    wanted = [at(curve, "3.5") + 0.2 * (at(curve, "3.0") - at(curve, "3.5")), at(curve, "0.5")]
    assert [edit.dots[0].y, edit.dots[2].y] == pytest.approx(wanted)
    assert at(curve, "3.0") < edit.dots[1].y < at(curve, "2.5")


def test_what_is_hardly_more_than_the_whole_takes_no_line_above_it() -> None:
    curve = drawn(sweep(variant(2, 1.0, 0.1), variant(6, 1.006, 0.3)))
    assert curve.y_ticks[-1].label == "1.0"
    assert not curve.cut


def test_values_below_zero_have_an_axis_below_zero() -> None:
    curve = drawn(sweep(variant(1, -0.3, 1.2, -0.45), variant(2, 0.1, 0.9, 0.2)))
    assert curve.y_ticks[0].label == "−0.5"
    assert all(curve.top <= dot.y <= curve.bottom for line in curve.lines for dot in line.dots)
    assert curve.lines[0].dots[0].y > at(curve, "0.0")


def test_strengths_of_any_size_lie_in_the_frame() -> None:
    for strengths in ((5e-324, 1.0, 1e6), (-1e6, 0.0, 1e6), (1e-320, 1e-310, 1e-300)):
        curve = drawn(sweep(*(variant(value, 0.5, 0.1 * index) for index, value in enumerate(strengths))))
        assert all(curve.left < dot.x < curve.right for line in curve.lines for dot in line.dots), strengths


def test_what_is_no_number_has_no_point() -> None:
    nan = float("nan")
    curve = drawn(sweep(variant(1, nan, 0.5), variant(2, 0.5, 0.4), variant(3, 0.6, 0.3)))
    assert [len(line.dots) for line in curve.lines] == [2, 3, 3]
    assert "nan" not in " ".join(line.points for line in curve.lines)
    assert curve_of(sweep(variant(1, nan, nan, nan), variant(2, nan, nan, nan)), width=360, height=320) is None


@given(
    runs=st.lists(
        st.tuples(st.floats(0.01, 100), st.floats(-1, 1.2), st.floats(0, 3), st.floats(-1, 1)),
        min_size=2,
        max_size=16,
        unique_by=lambda run: f"{run[0]:g}",
    ),
    size=st.sampled_from([WIDE, NARROW]),
)
@settings(deadline=None, max_examples=40)
def test_labels_hide_neither_each_other_nor_a_point(
    runs: list[tuple[float, float, float, float]], size: tuple[int, int]
) -> None:
    curve = curve_of(sweep(*(variant(*run) for run in runs)), width=size[0], height=size[1])
    if curve is None:
        return
    assert all(0 <= tick.at <= curve.width for tick in curve.x_ticks)
    columns = [tick.at for tick in curve.x_ticks]
    # Seven units are the width of a digit.
    widths = [7 * len(tick.label) for tick in curve.x_ticks]
    assert all(two - one >= APART for one, two in pairwise(columns))
    gaps = [two - one for one, two in pairwise(columns)]
    assert all(gap >= (one + two) / 2 for gap, (one, two) in zip(gaps, pairwise(widths), strict=True))
    ends = curve.lines[0].dots[0].x, curve.lines[0].dots[-1].x
    assert (columns[0], columns[-1]) == ends, "first and last are labelled"
    for column in columns:
        dots = [dot for line in curve.lines for dot in line.dots if dot.x == column]
        labels = sorted(dot.label_at for dot in dots if dot.label_at is not None)
        near = [dot.x for dot in curve.lines[0].dots if 0 < abs(dot.x - column) < CLEAR]
        assert len(labels) == 0 if near else len(labels) >= 2, "points of other strengths are not hidden either"
        if near:
            continue
        # Twelve units are the height of a letter.
        assert all(lower - upper >= 12 for upper, lower in pairwise(labels))
        assert labels[0] >= 12
        assert labels[-1] <= curve.bottom + 20, "above the numbers of the axis"
        for dot in dots:
            if dot.label_at is not None:
                others = [other.y for other in dots if abs(other.y - dot.y) > 5]
                assert not any(dot.label_at - 10 < y < dot.label_at for y in others)
