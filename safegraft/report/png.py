"""The report's figures as pictures of 16:9 for slides and tickets: the maps, similarity by layer, the largest changes,
where there are several strengths, their curve, and what an evaluation measured.

Layers run from left to right, so that 30 and 100 of them fill the same slide. Exact values are in the page and the
CSV: a slide that is read from the last row has no room for them.

matplotlib's objects only: pyplot keeps figures and settings per process, and a worker runs many jobs. Imported inside
the functions, because a gateway that only serves JSON has no matplotlib.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from safegraft.contracts.report import ModuleLine, Report
from safegraft.report import words
from safegraft.report.chart import Chart, Tick, chart_of
from safegraft.report.curve import Curve, curve_of
from safegraft.report.grid import (
    Grid,
    Scale,
    Side,
    grid_of,
    has_two_sides,
    level_colours,
    most_notable,
    short_kinds,
    sides_of,
)
from safegraft.report.interval import wilson
from safegraft.report.slide import HEIGHT, WIDTH, Slide, advance, inches

INK, SOFT, EMPTY, RULE = "#17202b", "#566272", "#eef0f2", "#dfe3e8"
# As in style.css.
BEFORE, AFTER, LIKENESS = "#a45a12", "#17628f", "#6a3fa0"
# In points. Nothing on a slide is smaller than SMALL, but for rows so many that their names would touch.
TITLE, TEXT, SMALL, TINY = 24, 14, 12, 8
# In inches: what a line of names takes.
LINE_OF_SMALL, LINE_OF_TINY = 0.165, 0.11
# In inches, from the edges.
LEFT, RIGHT, TOP, BOTTOM = 0.6, 0.6, 0.42, 0.68
# What a line of text has, and the heights of the bold title's lines and of those below it.
ROOM = WIDTH - LEFT - RIGHT
TITLE_LINE, ORIGIN_LINE, UNDER_TITLE = 0.43, 0.29, 0.14
# Of a panel with a map: its heading, and the highest that a row gets.
HEADING, TALLEST_ROW = 0.4, 0.62
ROWS = 10
# From a mark on an axis to its label, and from the labels to the axis' name.
PAD, AXIS_NAME = 0.06, 0.22
# Of a key: a line's sample, from it to its name, and from there to the next; its middle above the drawing.
SAMPLE, TO_NAME, TO_NEXT, KEY_UP = 0.62, 0.15, 0.48, 0.14
# Units of a chart's own drawing per inch: what is 12 high there is 17 points high here.
UNITS = 51.0
LINES = {"kept": ("kept", AFTER, "-", "o"), "edit": ("changed by", BEFORE, "--", "o")} | {
    "likeness": ("median similarity", LIKENESS, ":", "D")
}


def to_png(report: Report) -> bytes:
    """The maps: before, after and their difference, or one where nothing was changed."""
    return _picture(report, _maps, at_first=True)


def figures(report: Report) -> dict[str, bytes]:
    """All pictures by the ending of their files, without those for which there is nothing to draw."""
    found = {"png": to_png(report), "changes.png": _picture(report, _changes, at_first=True)}
    if chart_of(report.layers, width=1, height=1, two_sides=False) is not None:
        found["layers.png"] = _picture(report, _layers, at_first=True)
    if curve_of(report, width=100, height=100) is not None:
        found["strengths.png"] = _picture(report, _strengths, at_first=False)
    if report.evaluation is not None:
        found["evaluation.png"] = _picture(report, _evaluation, at_first=True)
    return found


def _picture(report: Report, draw: Callable[[Slide, Report, float], None], *, at_first: bool) -> bytes:
    """A slide with the headline; at_first: where there are several strengths, the picture is of the first."""
    slide = Slide()
    title = _balanced(_drawable(words.headline(report)), ROOM)
    origin = _origin(report, ROOM, at_first=at_first)
    below = TOP + TITLE_LINE * len(title)
    slide.write("\n".join(title), LEFT, TOP, size=TITLE, weight="bold", color=INK, linespacing=1.2)
    slide.write("\n".join(origin), LEFT, below, size=TEXT, color=SOFT, linespacing=1.35)
    draw(slide, report, below + ORIGIN_LINE * len(origin) + UNDER_TITLE)
    return slide.png()


def _wrapped(text: str, room: float, size: float, weight: str = "normal") -> list[str]:
    """Lines that are no wider than `room`, in inches; between words, and within one that fits on no line."""
    lines, used, space = [""], 0.0, advance(" ", size, weight)
    for word in text.split(" "):
        width = advance(word, size, weight)
        if lines[-1] and used + space + width <= room:
            lines[-1] += f" {word}"
            used += space + width
            continue
        lines.append(word)
        used = width
        if width > room:
            lines[-1], used = "", 0.0
            for letter in word:
                width = advance(letter, size, weight)
                if used + width > room:
                    lines.append("")
                    used = 0.0
                lines[-1] += letter
                used += width
    return [line for line in lines if line]


def _balanced(text: str, room: float) -> list[str]:
    """As few lines as possible, and these of about one width: a last line of one word looks like an accident."""
    lines, narrow = _wrapped(text, room, TITLE, "bold"), 0.0
    for _ in range(6):
        middle = (narrow + room) / 2
        tried = _wrapped(text, middle, TITLE, "bold")
        if len(tried) == len(lines):
            lines, room = tried, middle
        else:
            narrow = middle
    return lines


def _origin(report: Report, room: float, *, at_first: bool = True) -> list[str]:
    """What was compared with what, and how, in as many lines of that width as it needs."""
    model, name = _plain(report.base_model, 60), _plain(report.reference.name, 60)
    method = _plain(report.method.type if words.is_sweep(report) else words.with_strength(report), 80)
    if words.is_sweep(report) and at_first:
        # The title is about all strengths, the picture is of one.
        method += f", shown at {_plain(words.first_strength(report), 80)}"
    parts = [_plain(part, 80) for part in words.subject(report)] + [model]
    lines = [parts[0]]
    caution = [] if report.mode == "analyze" else ["weights, not behaviour"]
    if report.evaluation is not None:
        # A slide goes round without the others: where behaviour speaks against its figures, it says so itself.
        against = words.evaluated_against(report.evaluation)
        caution = [] if against is None else [_plain(against.rstrip("."), 160)]
    for part in (*parts[1:], f"reference {name}", method, *caution):
        longer = f"{lines[-1]}  ·  {part}"
        if inches(longer, TEXT) <= room:
            lines[-1] = longer
        else:
            lines.append(part)
    return [piece for line in lines for piece in _wrapped(line, room, TEXT)]


def _maps(slide: Slide, report: Report, top: float) -> None:
    """One panel a side, from top to bottom."""
    grid, sides = grid_of(report), sides_of(report)
    marked = has_two_sides(report) and report.summary.repaired < report.summary.modules
    names = [_plain(kind, 14) for kind in short_kinds(grid.kinds)]
    left = LEFT + 0.12 + max(inches(name, SMALL) for name in names)
    width = WIDTH - RIGHT - 1.3 - left
    panel = (HEIGHT - top - BOTTOM) / len(sides)
    row = min(TALLEST_ROW, (panel - HEADING) / len(names))
    for index, side in enumerate(sides):
        down = top + index * (row * len(names) + HEADING)
        text = words.moved(report) if side == "difference" else words.spread(_spread(report, side))
        heading = {"before": "Before" if len(sides) > 1 else "Similarity", "after": "After"}.get(side, "Difference")
        slide.write(f"{heading}: {text}", left, down + 0.1, size=TEXT, color=INK)
        _map(
            slide, grid, side, names, (left, down + HEADING, width, row),
            marked=marked and side != "difference", last=index == len(sides) - 1,
        )  # fmt: skip
    map_height, step = row * len(names), row * len(names) + HEADING
    bar = WIDTH - RIGHT - 0.95
    height = map_height + (step if len(sides) > 1 else 0)
    _bar(slide, bar, top + HEADING, height, grid.scale, "before", words.number)
    if len(sides) > 1:
        _bar(slide, bar, top + 2 * step + HEADING, map_height, grid.differences, "difference", words.signed)
    notes = []
    if len(sides) > 1:
        notes.append("a dot marks what was repaired" if marked else "every module was repaired")
    if grid.averaged:
        notes.append("cells are means" + ("; a ring marks where some were repaired" if marked else ""))
    slide.write(";  ".join(notes), left, HEIGHT - 0.32, size=SMALL, color=SOFT)


def _spread(report: Report, side: Side) -> Any:
    return report.summary.similarity_before if side == "before" else report.summary.similarity_after


def _map(
    slide: Slide,
    grid: Grid,
    side: Side,
    names: list[str],
    place: tuple[float, float, float, float],
    *,
    marked: bool,
    last: bool,
) -> None:
    """place: left edge, upper edge, width, and a row's height."""
    left, down, width, row = place
    levels, scale = level_colours(side), grid.scale_of(side)
    colours = [[EMPTY] * len(grid.layers) for _ in grid.kinds]
    cell_width = width / len(grid.layers)
    dots: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    for column, layer in enumerate(grid.layers):
        for line, kind in enumerate(grid.kinds):
            cell = grid.cells.get((layer, kind))
            if cell is None or not math.isfinite(cell.value(side)):
                continue
            colours[line][column], text = levels[scale.level(cell.value(side))]
            if marked and cell.repaired:
                middle = left + (column + 0.5) * cell_width, down + (line + 0.5) * row
                dots.setdefault((text, cell.repaired == cell.modules), []).append(middle)
    # Lines between the cells, where these are wide enough to show them.
    slide.field(colours, left, down, width, row * len(names), gap=min(0.022, 0.07 * min(row, cell_width)))
    for (text, whole), places in dots.items():
        slide.line(
            *zip(*places, strict=True),
            marker="o",
            linestyle="none",
            markersize=min(5.0, 24 * row, 24 * cell_width),
            markerfacecolor=text if whole else "none",
            markeredgecolor=text,
            markeredgewidth=0.6,
        )
    # Every row is named as long as the names do not touch: smaller before fewer.
    every = max(1, math.ceil(LINE_OF_TINY / row))
    size = SMALL if row >= LINE_OF_SMALL else TINY
    for line in range(0, len(names), every):
        _beside(slide, names[line], left - PAD, down + (line + 0.5) * row, ha="right", size=size, color=SOFT)
    if last:
        step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if step * cell_width >= 0.32 or step == 1000)
        numbered = [(index, layer) for index, layer in enumerate(grid.layers) if layer is not None]
        ticks = [(index, str(layer)) for index, layer in numbered if layer % step == 0]
        if None in grid.layers:
            ticks = [(at, label) for at, label in ticks if (len(grid.layers) - 1 - at) * cell_width > 0.6]
            ticks.append((len(grid.layers) - 1, "other"))
        below = down + row * len(names) + PAD
        for at, label in ticks:
            slide.write(label, left + (at + 0.5) * cell_width, below, ha="center", size=SMALL, color=SOFT)
        slide.write("layer", left + width / 2, below + AXIS_NAME, ha="center", size=SMALL, color=SOFT)


def _beside(slide: Slide, text: str, x: float, y: float, **style: Any) -> None:
    """A text whose middle above its baseline lies at that height."""
    slide.write(text, x, y, va="center_baseline", **style)


def _bar(
    slide: Slide, left: float, down: float, height: float, scale: Scale, side: Side, said: Callable[[float, int], str]
) -> None:
    slide.field([[back] for back, _ in reversed(level_colours(side))], left, down, 0.22, height)
    for position, label in scale.ticks(said):
        _beside(slide, label, left + 0.22 + PAD, down + (1 - position) * height, size=SMALL, color=SOFT)


class _Drawing:
    """A chart or curve, whose own units begin `top` inches below the upper edge."""

    def __init__(self, slide: Slide, top: float, drawn: Chart | Curve) -> None:
        self._slide, self._top, self._drawn = slide, top, drawn

    def x(self, at: float) -> float:
        return LEFT + at / UNITS

    def y(self, at: float) -> float:
        return self._top + at / UNITS

    def line(self, x: Sequence[float], y: Sequence[float], **style: Any) -> None:
        self._slide.line([self.x(at) for at in x], [self.y(at) for at in y], **style)

    def axes(self, x_ticks: tuple[Tick, ...], below: float, name: str) -> None:
        """Rules at the values' ticks, the others' labels `below` the drawing, and the name below these."""
        drawn, slide = self._drawn, self._slide
        left, right = self.x(drawn.left), self.x(drawn.right)
        slide.rules(
            [(left, self.y(tick.at), right, self.y(tick.at)) for tick in drawn.y_ticks], color=RULE, linewidth=1
        )
        for tick in drawn.y_ticks:
            slide.write(tick.label, left - 7 / UNITS, self.y(tick.at), ha="right", va="center", size=TEXT, color=SOFT)
        for tick in x_ticks:
            place = self.x(tick.at), self.y(drawn.bottom + below)
            slide.write(tick.label, *place, ha="center", va="center", size=TEXT, color=SOFT)
        place = (left + right) / 2, self.y(drawn.height - 4)
        slide.write(name, *place, ha="center", va="center", size=TEXT, color=SOFT)

    def key(self, entries: list[tuple[str, dict[str, Any]]]) -> None:
        _key(self._slide, self.x(self._drawn.width), self._top, entries)


def _key(slide: Slide, right: float, top: float, entries: list[tuple[str, dict[str, Any]]]) -> None:
    """Names with samples of their lines or dots, from the right, above what begins at `top`."""
    middle = top - KEY_UP
    for name, style in reversed(entries):
        _beside(slide, name, right, middle, ha="right", size=TEXT, color=INK)
        right -= inches(name, TEXT) + TO_NAME
        alone = style.get("linestyle") == "none"
        ends = [right - SAMPLE / 2] if alone else [right - SAMPLE, right]
        slide.line(ends, [middle] * len(ends), **style | ({} if alone else {"marker": "none"}))
        if not alone:
            slide.line([right - SAMPLE / 2], [middle], **style)
        right -= SAMPLE + TO_NEXT


def _size(top: float, below: float = 0.3) -> tuple[int, int]:
    """Width and height that are left below `top`, in a drawing's units."""
    return round((WIDTH - LEFT - RIGHT) * UNITS), round((HEIGHT - top - below) * UNITS)


def _layers(slide: Slide, report: Report, top: float) -> None:
    two_sides = has_two_sides(report)
    slide.write("Similarity by layer, mean of each layer’s modules", LEFT, top, size=TEXT, color=INK)
    width, height = _size(top + 0.6)
    chart = chart_of(report.layers, width=width, height=height, two_sides=two_sides)
    assert chart is not None
    drawing = _Drawing(slide, top + 0.6, chart)
    drawing.axes(chart.x_ticks, 12, "layer")
    x = [point.x for point in chart.points]
    before, after = [point.before for point in chart.points], [point.after for point in chart.points]
    first: dict[str, Any] = {"marker": "o", "markersize": 7 if len(x) <= 50 else 4, "linewidth": 2.5, "color": AFTER}
    if not two_sides:
        drawing.line(x, before, **first)
        return
    band = [*map(drawing.y, before), *map(drawing.y, reversed(after))]
    slide.area([*map(drawing.x, x), *map(drawing.x, reversed(x))], band, color=AFTER, alpha=0.12)
    other = first | {"color": BEFORE, "linestyle": "--", "markerfacecolor": "white"}
    drawing.line(x, before, **other)
    drawing.line(x, after, **first)
    drawing.key([("before", other), ("after", first)])


def _strengths(slide: Slide, report: Report, top: float) -> None:
    notes = _wrapped(_drawable(words.leaning_at(report) or ""), WIDTH - LEFT - RIGHT, SMALL)
    width, height = _size(top + 0.6 + len(notes) * ORIGIN_LINE)
    curve = curve_of(report, width=width, height=height)
    assert curve is not None
    slide.write(_drawable(f"The {words.strengths(report)}, side by side"), LEFT, top, size=TEXT, color=INK)
    if curve.cut:
        notes.append(words.CUT)
    for number, note in enumerate(notes, 1):
        slide.write(note, LEFT, top + number * ORIGIN_LINE, size=SMALL, color=SOFT)
    drawing = _Drawing(slide, top + 0.6 + (len(notes) - curve.cut) * ORIGIN_LINE, curve)
    drawing.axes(curve.x_ticks, 26, _plain(curve.axis, 100))
    entries = []
    for line in curve.lines:
        name, colour, style, marker = LINES[line.name]
        drawn = {"color": colour, "linestyle": style, "linewidth": 2.5, "marker": marker, "markersize": 8}
        drawn["markerfacecolor"] = "white" if line.name == "edit" else colour
        drawing.line([dot.x for dot in line.dots], [dot.y for dot in line.dots], **drawn)
        entries.append((name, drawn))
        for dot in line.dots:
            if dot.label_at is not None:
                place = drawing.x(dot.x), drawing.y(dot.label_at)
                slide.write(dot.label, *place, va="baseline", ha="center", size=TEXT, weight="bold", color=colour)
    drawing.key(entries)


def _upright(
    slide: Slide, left: float, down: float, width: float, height: float, ticks: list[tuple[float, str]]
) -> None:
    """Upright rules at these places between 0 and 1, and their labels below."""
    places = [left + at * width for at, _ in ticks]
    slide.rules([(x, down, x, down + height) for x in places], color=RULE, linewidth=1)
    for x, (_, label) in zip(places, ticks, strict=True):
        slide.write(label, x, down + height + PAD, ha="center", size=TEXT, color=SOFT)


def _evaluation(slide: Slide, report: Report, top: float) -> None:
    """Each measure before and after, with its 95 % interval."""
    assert report.evaluation is not None
    slide.write("How it behaves: before and after, with 95 % intervals", LEFT, top, size=TEXT, color=INK)
    measures = report.evaluation.measures()
    left, down, row = LEFT + 2.2, top + 0.75, 1.25
    width = WIDTH - RIGHT - 4.6 - left
    marks = [(0.0, "0"), (0.25, "0.25"), (0.5, "0.50"), (0.75, "0.75"), (1.0, "1")]
    _upright(slide, left, down, width, row * len(measures), marks)
    drawn = {
        side: {
            "color": colour, "marker": "o", "markersize": 10, "linestyle": "none", "markeredgewidth": 2,
            "markerfacecolor": face,
        } for side, colour, face in (("before", BEFORE, "white"), ("after", AFTER, AFTER))
    }  # fmt: skip
    for index, (measure, before, after) in enumerate(measures):
        middle = down + (index + 0.5) * row
        name = f"{words.MEASURES[measure][0]}\n{words.MEASURES[measure][1].rpartition('; ')[2]}"
        slide.write(name, left - 0.2, middle, va="center", ha="right", multialignment="right", size=TEXT, color=INK)
        for share, side, y in ((before, "before", middle - 0.14 * row), (after, "after", middle + 0.14 * row)):
            colour = drawn[side]["color"]
            ends = [left + end * width for end in wilson(share.hits, share.total)]
            slide.line(ends, [y, y], color=colour, linewidth=2.5, solid_capstyle="butt")
            slide.line([left + share.hits / share.total * width], [y], **drawn[side])
            text = f"{side} {words.share(share)}, {words.interval(share)} ({share.hits:,} of {share.total:,})"
            slide.write(text, left + width + 0.25, y, size=TEXT, color=colour, va="center")
    _key(slide, left + width, down, list(drawn.items()))


def _changes(slide: Slide, report: Report, top: float) -> None:
    """The modules that changed most as a line from before to after; without a repair, the least similar."""
    two_sides = has_two_sides(report)
    lines = sorted(report.modules, key=most_notable)[:ROWS]
    heading = "The largest changes: similarity before and after" if two_sides else "The least similar modules"
    slide.write(heading, LEFT, top, size=TEXT, color=INK)
    names = [_plain(line.name, 44) for line in lines]
    left = LEFT + 0.2 + max(inches(name, TEXT) for name in names)
    width = WIDTH - RIGHT - (1.9 if two_sides else 0.8) - left
    down = top + 0.75
    height = min(0.47 * len(lines), HEIGHT - down - 0.55)
    scale = Scale.of(value for line in lines for value in (line.similarity_before, line.similarity_after))
    # A little room, so that a dot at the scale's end lies within.
    pad = width * 0.02
    inner = width - 2 * pad
    rows = [down + (index + 0.6) * height / (len(lines) + 0.2) for index in range(len(lines))]
    _upright(slide, left + pad, down, inner, height, scale.round_ticks())
    styles: dict[str, dict[str, Any]] = {
        "before": {
            "marker": "o", "markersize": 10, "linestyle": "none", "color": BEFORE, "markerfacecolor": "white",
            "markeredgewidth": 2,
        },
        "after": {"marker": "o", "markersize": 10, "linestyle": "none", "color": AFTER},
    }  # fmt: skip
    for name, line, y in zip(names, lines, rows, strict=True):
        _beside(slide, name, left - PAD, y, ha="right", size=TEXT, color=INK)
        # Nothing is drawn at nan.
        before, after = (
            left + pad + inner * scale.position(value) if math.isfinite(value) else math.nan
            for value in (line.similarity_before, line.similarity_after)
        )
        if two_sides:
            slide.line([before, after], [y, y], color=RULE, linewidth=5, solid_capstyle="round", zorder=1)
        slide.line([before], [y], **styles["before"])
        if two_sides:
            slide.line([after], [y], **styles["after"])
        said = _changed(report, line) if two_sides else words.number(line.similarity_before)
        slide.write(said, left + width * 1.02, y, va="center", size=TEXT, color=INK)
    if two_sides:
        _key(slide, left + width, down, list(styles.items()))


def _changed(report: Report, line: ModuleLine) -> str:
    return words.changed(report, line).replace(" times its size", " ×")


def _plain(text: str, limit: int) -> str:
    return _drawable(words.shown(text, limit))


def _drawable(text: str) -> str:
    """Letters that matplotlib's own font holds; others would draw boxes and warn."""
    return "".join(letter if ord(letter) < 0x250 or letter in f"…–·×’{words.MINUS}" else "?" for letter in text)
