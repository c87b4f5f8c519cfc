"""What several strengths did, as the numbers of a line chart: where points, lines and ticks lie. The template draws
them.

Kept, edit and similarity share one axis: all of them are 1 where nothing or everything happened, and near it elsewhere.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from safegraft.contracts.report import Report, Summary
from safegraft.report import words
from safegraft.report.chart import Tick

LEFT, RIGHT, TOP, BOTTOM = 40.0, 12.0, 26.0, 56.0
# From the frame to the outermost points, for their labels.
INSET = 24.0
# Labels nearer than this to each other would touch, and to a point of another strength; a letter is LETTER wide.
APART, CLEAR, LINE, LETTER = 40.0, 28.0, 22.0, 7.5
# Two and three times an update's size are usual. What changed it by many times must not flatten the other lines: it
# lies on the upper edge, and `cut` says that something does.
HIGHEST = 4.0
# No eye sees it, and 1.01 would take a line of the chart more than 1.
UNSEEN = 0.02

LINES: tuple[tuple[str, Callable[[Summary], float]], ...] = (
    ("kept", lambda summary: summary.kept),
    ("edit", lambda summary: summary.edit),
    ("likeness", lambda summary: summary.similarity_after.median),
)


@dataclass(frozen=True)
class Dot:
    """One value of one line; `label` stands at `label_at`, or nowhere where it would hide another."""

    x: float
    y: float
    label: str
    label_at: float | None


@dataclass(frozen=True)
class Line:
    """`kept`, `edit` or `likeness`, by strength."""

    name: str
    dots: tuple[Dot, ...]

    @property
    def points(self) -> str:
        return " ".join(f"{dot.x:.1f},{dot.y:.1f}" for dot in self.dots)


@dataclass(frozen=True)
class Stripe:
    """What shows one strength's title to a pointer."""

    left: float
    width: float
    title: str


@dataclass(frozen=True)
class Curve:
    width: int
    height: int
    left: float
    right: float
    top: float
    bottom: float
    lines: tuple[Line, ...]
    stripes: tuple[Stripe, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    axis: str
    title: str
    description: str
    cut: bool


def curve_of(report: Report, *, width: int, height: int) -> Curve | None:
    """None where there is no curve: fewer than two strengths, or the same figures at all of them."""
    runs = {variant.strength: variant.summary for variant in sorted(report.variants, key=lambda item: item.strength)}
    values = {name: [take(summary) for summary in runs.values()] for name, take in LINES}
    known = [value for line in values.values() for value in line if math.isfinite(value)]
    if len(runs) < 2 or not known or all(max(line) - min(line) < 1e-6 for line in values.values()):
        return None
    left, right, top, bottom = LEFT, width - RIGHT, TOP, height - BOTTOM
    first, last = min(runs), max(runs)
    # A decade on an even axis would leave the smallest strengths on top of each other.
    logarithmic = first > 0 and last > 10 * first

    def x(strength: float) -> float:
        # Differences of logarithms: the ratio of the largest to the smallest number is infinite.
        at, start, end = map(math.log, (strength, first, last)) if logarithmic else (strength, first, last)
        where = (at - start) / (end - start)
        return left + INSET + where * (right - left - 2 * INSET)

    low, high, step = axis_of(known)

    def y(value: float) -> float:
        return bottom - (min(high, max(low, value)) - low) / (high - low) * (bottom - top)

    columns = [x(strength) for strength in runs]
    labelled = _spaced(columns, [words.plain(strength) for strength in runs])
    crowded = {
        at for one, two in pairwise(range(len(columns))) if columns[two] - columns[one] < CLEAR for at in (one, two)
    }
    places = [
        _label_places({name: y(line[index]) for name, line in values.items() if math.isfinite(line[index])})
        for index in range(len(columns))
    ]
    lines = tuple(
        Line(
            name,
            tuple(
                Dot(at, y(value), words.number(value), places[index].get(name) if index in labelled - crowded else None)
                for index, (at, value) in enumerate(zip(columns, line, strict=True))
                if math.isfinite(value)
            ),
        )
        for name, line in values.items()
    )
    parameter = words.shown(report.strength_parameter or "strength", 60)
    borders = [left, *((one + two) / 2 for one, two in pairwise(columns)), right]
    return Curve(
        width,
        height,
        left,
        right,
        top,
        bottom,
        lines,
        tuple(
            Stripe(start, end - start, _title(parameter, strength, summary))
            for (start, end), (strength, summary) in zip(pairwise(borders), runs.items(), strict=True)
        ),
        tuple(Tick(columns[index], words.plain(strength)) for index, strength in enumerate(runs) if index in labelled),
        tuple(
            Tick(y(at * step), words.number(at * step, 1)) for at in range(round(low / step), round(high / step) + 1)
        ),
        f"{parameter}, on a logarithmic scale" if logarithmic else parameter,
        f"Kept, changed by and median similarity over {parameter}",
        _description(parameter, runs),
        cut=max(known) > high + UNSEEN,
    )


def axis_of(values: list[float]) -> tuple[float, float, float]:
    """Where the axis of these values begins and ends, and its step; as in service/console/maps.js."""
    step = 0.2 if min(values) >= -0.2 and max(values) <= 1.4 else 0.5
    low = math.floor(max(-1.0, min(0.0, *values)) / step + 1e-9) * step
    high = math.ceil(max(1.0, min(HIGHEST, max(values) - UNSEEN)) / step - 1e-9) * step
    return low, high, step


def _spaced(columns: list[float], labels: list[str]) -> set[int]:
    """Which columns have room for their labels: the first, the last, and from the left what fits between."""

    def fits(one: int, two: int) -> bool:
        width = LETTER * (len(labels[one]) + len(labels[two])) / 2
        return columns[two] - columns[one] >= max(APART, width)

    last = len(columns) - 1
    found = [0]
    for index in range(1, last):
        if fits(found[-1], index) and fits(index, last):
            found.append(index)
    return {*found, last}


def _label_places(dots: dict[str, float]) -> dict[str, float]:
    """Baselines of the labels of one column: the highest above its dot, the lowest below, one between where it fits."""
    order = sorted(dots, key=lambda name: dots[name])
    if not order:
        return {}
    top, bottom = order[0], order[-1]
    found = {top: dots[top] - 8}
    if bottom != top:
        found[bottom] = dots[bottom] + 17
    for name in order[1:-1]:
        if dots[name] - dots[top] >= LINE:
            found[name] = dots[name] - 8
        elif dots[bottom] - dots[name] >= LINE:
            found[name] = dots[name] + 17
    return found


def _title(parameter: str, strength: float, summary: Summary) -> str:
    return (
        f"{parameter} {words.plain(strength)}: kept {words.percent(summary.kept)}, changed by "
        f"{words.change(summary.edit)}, median similarity {words.number(summary.similarity_after.median)}"
    )


def _description(parameter: str, runs: dict[float, Summary]) -> str:
    (first, one), *_, (last, two) = runs.items()
    return (
        f"{len(runs)} values of {parameter}. From {words.plain(first)} to {words.plain(last)}, kept goes from "
        f"{words.percent(one.kept)} to {words.percent(two.kept)}, the change from {words.change(one.edit)} to "
        f"{words.change(two.edit)}, the median similarity from {words.number(one.similarity_after.median)} to "
        f"{words.number(two.similarity_after.median)}."
    )
