"""Similarity by layer as the numbers of a line chart: where points, lines and ticks lie. The template draws them."""

import math
from dataclasses import dataclass

from safegraft.contracts.report import LayerLine
from safegraft.report.grid import Scale
from safegraft.report.words import counted, number

LEFT, RIGHT, TOP, BOTTOM = 40.0, 10.0, 10.0, 34.0


@dataclass(frozen=True)
class Point:
    """One layer; (left, width) is the stripe that shows its title to a pointer."""

    x: float
    before: float
    after: float
    left: float
    width: float
    title: str


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Chart:
    width: int
    height: int
    left: float
    right: float
    top: float
    bottom: float
    points: tuple[Point, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    description: str

    def line(self, side: str) -> str:
        return " ".join(f"{point.x:.1f},{getattr(point, side):.1f}" for point in self.points)

    @property
    def band(self) -> str:
        """The area between the two lines."""
        there = [f"{point.x:.1f},{point.before:.1f}" for point in self.points]
        return " ".join([*there, *(f"{point.x:.1f},{point.after:.1f}" for point in reversed(self.points))])


def chart_of(layers: list[LayerLine], *, width: int, height: int, two_sides: bool) -> Chart | None:
    """None where fewer than two numbered layers were measured: no line can be drawn then."""
    lines = [
        line
        for line in layers
        if line.layer is not None and math.isfinite(line.similarity_before) and math.isfinite(line.similarity_after)
    ]
    numbers = [line.layer for line in lines if line.layer is not None]
    if len(set(numbers)) < 2:
        return None
    scale = Scale.of(value for line in lines for value in (line.similarity_before, line.similarity_after))
    first, last = min(numbers), max(numbers)
    left, right, top, bottom = LEFT, width - RIGHT, TOP, height - BOTTOM

    def x(layer: float) -> float:
        return left + 8 + (layer - first) / (last - first) * (right - left - 16)

    def y(value: float) -> float:
        return bottom - scale.position(value) * (bottom - top)

    stripe = (right - left) / (last - first + 1)
    points = tuple(
        Point(
            x=x(layer),
            before=y(line.similarity_before),
            after=y(line.similarity_after),
            left=x(layer) - stripe / 2,
            width=stripe,
            title=_title(line, two_sides),
        )
        for layer, line in zip(numbers, lines, strict=True)
    )
    every = max(1, math.ceil((last - first + 1) / (width / 64)))
    # Round steps read better than exact ones.
    every = next((step for step in (1, 2, 5, 10, 20, 50, 100) if step >= every), every)
    starts = first if every == 1 else math.ceil(first / every) * every
    return Chart(
        width,
        height,
        left,
        right,
        top,
        bottom,
        points,
        tuple(Tick(x(layer), str(layer)) for layer in range(starts, last + 1, every)),
        tuple(Tick(bottom - position * (bottom - top), label) for position, label in scale.round_ticks()),
        _description(lines, two_sides),
    )


def _title(line: LayerLine, two_sides: bool) -> str:
    if not two_sides:
        return f"Layer {line.layer}: {number(line.similarity_before, 4)}, mean of {counted(line.modules)}"
    return (
        f"Layer {line.layer}: {number(line.similarity_before, 4)} before, {number(line.similarity_after, 4)} after; "
        f"{line.repaired} of {counted(line.modules)} repaired"
    )


def _description(lines: list[LayerLine], two_sides: bool) -> str:
    lowest = min(lines, key=lambda line: line.similarity_before)
    text = f"Mean similarity by layer. Lowest at layer {lowest.layer}: {number(lowest.similarity_before)}"
    return f"{text} before, {number(lowest.similarity_after)} after." if two_sides else f"{text}."
