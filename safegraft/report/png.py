"""The report's figures as pictures of 16:9 for slides and tickets: the maps, similarity by layer, the largest changes,
where there are several strengths, their curve, and what an evaluation measured.

Layers run from left to right, so that 30 and 100 of them fill the same slide. Exact values are in the page and the
CSV: a slide that is read from the last row has no room for them.

matplotlib's objects only: pyplot keeps figures and settings per process, and a worker runs many jobs. Imported inside
the functions, because a gateway that only serves JSON has no matplotlib.
"""

import io
import math
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from safegraft.contracts.report import ModuleLine, Report
from safegraft.report import words
from safegraft.report.chart import Tick, chart_of
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

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Inches: PowerPoint's own 16:9, so that a point here is a point there. 1920 × 1080 pixels.
WIDTH, HEIGHT, DPI = 40 / 3, 7.5, 144
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


def _picture(report: Report, draw: Callable[["Figure", Report, float], None], *, at_first: bool) -> bytes:
    """A slide with the headline; at_first: where there are several strengths, the picture is of the first."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    title = _balanced(_drawable(words.headline(report)), ROOM)
    origin = _origin(report, ROOM, at_first=at_first)
    below = TOP + TITLE_LINE * len(title)
    _write(figure, "\n".join(title), LEFT, TOP, size=TITLE, weight="bold", color=INK, linespacing=1.2)
    _write(figure, "\n".join(origin), LEFT, below, size=TEXT, color=SOFT, linespacing=1.35)
    draw(figure, report, below + ORIGIN_LINE * len(origin) + UNDER_TITLE)
    data = io.BytesIO()
    # Without the version of matplotlib in it, equal reports give equal bytes.
    figure.savefig(data, format="png", dpi=DPI, metadata={"Software": None})
    return data.getvalue()


def _write(figure: "Figure", text: str, left: float, down: float, **style: Any) -> None:
    # parse_math: a `$` in a customer's name is no formula.
    figure.text(left / WIDTH, 1 - down / HEIGHT, text, va="top", parse_math=False, **style)


def _axes(figure: "Figure", left: float, down: float, width: float, height: float) -> "Axes":
    """Axes without frame; all in inches, `down` to their upper edge."""
    axes = figure.add_axes((left / WIDTH, 1 - (down + height) / HEIGHT, width / WIDTH, height / HEIGHT))
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, colors=SOFT, labelsize=SMALL, pad=4)
    return axes


@lru_cache(maxsize=1024)  # all pictures of a report have one headline
def _inches(text: str, size: float, weight: str = "normal") -> float:
    """How wide a text is as it is drawn: a W has three times the width of an l."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties

    font = FontProperties(size=size, weight=weight)
    renderer: Any = RendererAgg(1, 1, DPI)  # type: ignore[no-untyped-call]
    return float(renderer.get_text_width_height_descent(text, font, False)[0]) / DPI


def _wrapped(text: str, room: float, size: float, weight: str = "normal") -> list[str]:
    """Lines that are no wider than `room`, in inches; between words, and within one that fits on no line."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".lstrip()
        if _inches(longer, size, weight) <= room:
            lines[-1] = longer
            continue
        lines.append("")
        for letter in word:
            if _inches(lines[-1] + letter, size, weight) > room:
                lines.append("")
            lines[-1] += letter
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
        if _inches(longer, TEXT) <= room:
            lines[-1] = longer
        else:
            lines.append(part)
    return [piece for line in lines for piece in _wrapped(line, room, TEXT)]


def _maps(figure: "Figure", report: Report, top: float) -> None:
    """One panel a side, from top to bottom."""
    grid, sides = grid_of(report), sides_of(report)
    marked = has_two_sides(report) and report.summary.repaired < report.summary.modules
    names = [_plain(kind, 14) for kind in short_kinds(grid.kinds)]
    left = LEFT + 0.12 + max(_inches(name, SMALL) for name in names)
    width = WIDTH - RIGHT - 1.3 - left
    panel = (HEIGHT - top - BOTTOM) / len(sides)
    row = min(TALLEST_ROW, (panel - HEADING) / len(names))
    for index, side in enumerate(sides):
        down = top + index * (row * len(names) + HEADING)
        text = words.moved(report) if side == "difference" else words.spread(_spread(report, side))
        heading = {"before": "Before" if len(sides) > 1 else "Similarity", "after": "After"}.get(side, "Difference")
        _write(figure, f"{heading}: {text}", left, down + 0.1, size=TEXT, color=INK)
        axes = _axes(figure, left, down + HEADING, width, row * len(names))
        _map(axes, grid, side, names, row, marked=marked and side != "difference", last=index == len(sides) - 1)
    map_height, step = row * len(names), row * len(names) + HEADING
    bar = WIDTH - RIGHT - 0.95
    height = map_height + (step if len(sides) > 1 else 0)
    _bar(_axes(figure, bar, top + HEADING, 0.22, height), grid.scale, "before", words.number)
    if len(sides) > 1:
        down = top + 2 * step + HEADING
        _bar(_axes(figure, bar, down, 0.22, map_height), grid.differences, "difference", words.signed)
    notes = []
    if len(sides) > 1:
        notes.append("a dot marks what was repaired" if marked else "every module was repaired")
    if grid.averaged:
        notes.append("cells are means" + ("; a ring marks where some were repaired" if marked else ""))
    _write(figure, ";  ".join(notes), left, HEIGHT - 0.32, size=SMALL, color=SOFT)


def _spread(report: Report, side: Side) -> Any:
    return report.summary.similarity_before if side == "before" else report.summary.similarity_after


def _map(axes: "Axes", grid: Grid, side: Side, names: list[str], row: float, *, marked: bool, last: bool) -> None:
    import numpy as np
    from matplotlib.colors import to_rgb

    colours = [(to_rgb(back), text) for back, text in level_colours(side)]
    scale = grid.scale_of(side)
    shape = (len(grid.kinds), len(grid.layers))
    picture = np.full((*shape, 3), to_rgb(EMPTY))
    dots: dict[tuple[str, bool], list[tuple[int, int]]] = {}
    for column, layer in enumerate(grid.layers):
        for line, kind in enumerate(grid.kinds):
            cell = grid.cells.get((layer, kind))
            if cell is None or not math.isfinite(cell.value(side)):
                continue
            back, text = colours[scale.level(cell.value(side))]
            picture[line, column] = back
            if marked and cell.repaired:
                dots.setdefault((text, cell.repaired == cell.modules), []).append((column, line))
    axes.imshow(picture, aspect="auto", interpolation="nearest")
    cell_width = axes.get_position().width * WIDTH / shape[1]
    for (text, whole), places in dots.items():
        axes.plot(
            *zip(*places, strict=True),
            marker="o",
            linestyle="none",
            markersize=min(5.0, 24 * row, 24 * cell_width),
            markerfacecolor=text if whole else "none",
            markeredgecolor=text,
            markeredgewidth=0.6,
        )
    # Lines between the cells, where these are wide enough to show them.
    axes.set_xticks([index - 0.5 for index in range(1, shape[1])], minor=True)
    axes.set_yticks([index - 0.5 for index in range(1, shape[0])], minor=True)
    axes.grid(which="minor", color="white", linewidth=min(1.6, 5 * min(row, cell_width)))
    axes.tick_params(which="minor", length=0)
    # Every row is named as long as the names do not touch: smaller before fewer.
    every = max(1, math.ceil(LINE_OF_TINY / row))
    axes.set_yticks(range(0, shape[0], every))
    axes.set_yticklabels(names[::every], parse_math=False, size=SMALL if row >= LINE_OF_SMALL else TINY)
    axes.set_xticks([])
    if last:
        step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if step * cell_width >= 0.32 or step == 1000)
        numbered = [(index, layer) for index, layer in enumerate(grid.layers) if layer is not None]
        ticks = [(index, str(layer)) for index, layer in numbered if layer % step == 0]
        if None in grid.layers:
            ticks = [(at, label) for at, label in ticks if (len(grid.layers) - 1 - at) * cell_width > 0.6]
            ticks.append((len(grid.layers) - 1, "other"))
        axes.set_xticks([at for at, _ in ticks], [label for _, label in ticks])
        axes.set_xlabel("layer", size=SMALL, color=SOFT, labelpad=2)


def _bar(axes: "Axes", scale: Scale, side: Side, said: Callable[[float, int], str]) -> None:
    import numpy as np
    from matplotlib.colors import to_rgb

    colours = [to_rgb(back) for back, _ in level_colours(side)]
    axes.imshow(np.array(colours)[:, None, :], aspect="auto", origin="lower", extent=(0, 1, 0, 1))
    axes.yaxis.tick_right()
    axes.set_xticks([])
    ticks = scale.ticks(said)
    axes.set_yticks([position for position, _ in ticks], [label for _, label in ticks])


def _chart_axes(figure: "Figure", top: float, width: float, height: float) -> "Axes":
    """Axes in the units of a drawing whose y goes down, as the page's are."""
    axes = _axes(figure, LEFT, top, width / UNITS, height / UNITS)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.axis("off")
    return axes


def _rules(axes: "Axes", drawing: Any, x_ticks: tuple[Tick, ...], name: str) -> None:
    for tick in drawing.y_ticks:
        axes.plot([drawing.left, drawing.right], [tick.at] * 2, color=RULE, linewidth=1, zorder=0)
        axes.text(drawing.left - 7, tick.at, tick.label, size=TEXT, color=SOFT, ha="right", va="center")
    for tick in x_ticks:
        axes.text(tick.at, drawing.bottom + 12, tick.label, size=TEXT, color=SOFT, ha="center", va="center")
    axes.text(
        (drawing.left + drawing.right) / 2, drawing.height - 4, name, size=TEXT, color=SOFT, ha="center",
        va="center", parse_math=False,
    )  # fmt: skip


def _size(top: float, below: float = 0.3) -> tuple[int, int]:
    """Width and height that are left below `top`, in a drawing's units."""
    return round((WIDTH - LEFT - RIGHT) * UNITS), round((HEIGHT - top - below) * UNITS)


def _layers(figure: "Figure", report: Report, top: float) -> None:
    two_sides = has_two_sides(report)
    _write(figure, "Similarity by layer, mean of each layer’s modules", LEFT, top, size=TEXT, color=INK)
    width, height = _size(top + 0.6)
    chart = chart_of(report.layers, width=width, height=height, two_sides=two_sides)
    assert chart is not None
    axes = _chart_axes(figure, top + 0.6, width, height)
    _rules(axes, chart, chart.x_ticks, "layer")
    x = [point.x for point in chart.points]
    before, after = [point.before for point in chart.points], [point.after for point in chart.points]
    size = 7 if len(x) <= 50 else 4
    first: dict[str, Any] = {"marker": "o", "markersize": size, "linewidth": 2.5}
    if not two_sides:
        axes.plot(x, before, color=AFTER, **first)
        return
    axes.fill_between(x, before, after, color=AFTER, alpha=0.12, linewidth=0)
    axes.plot(x, before, color=BEFORE, linestyle="--", markerfacecolor="white", label="before", **first)
    axes.plot(x, after, color=AFTER, label="after", **first)
    _key(axes, 2)


def _key(axes: "Axes", columns: int) -> None:
    axes.legend(
        loc="lower right", bbox_to_anchor=(1.0, 0.99), ncols=columns, frameon=False, fontsize=TEXT, labelcolor=INK,
        handlelength=3.2, borderaxespad=0, columnspacing=2.5,
    )  # fmt: skip


def _strengths(figure: "Figure", report: Report, top: float) -> None:
    notes = _wrapped(_drawable(words.leaning_at(report) or ""), WIDTH - LEFT - RIGHT, SMALL)
    width, height = _size(top + 0.6 + len(notes) * ORIGIN_LINE)
    curve = curve_of(report, width=width, height=height)
    assert curve is not None
    _write(figure, _drawable(f"The {words.strengths(report)}, side by side"), LEFT, top, size=TEXT, color=INK)
    if curve.cut:
        notes.append(words.CUT)
    for number, note in enumerate(notes, 1):
        _write(figure, note, LEFT, top + number * ORIGIN_LINE, size=SMALL, color=SOFT)
    axes = _chart_axes(figure, top + 0.6 + (len(notes) - curve.cut) * ORIGIN_LINE, width, height)
    _curve(axes, curve)


def _curve(axes: "Axes", curve: Curve) -> None:
    _rules(axes, curve, (), _plain(curve.axis, 100))
    for tick in curve.x_ticks:
        axes.text(tick.at, curve.bottom + 26, tick.label, size=TEXT, color=SOFT, ha="center", va="center")
    for line in curve.lines:
        name, colour, style, marker = LINES[line.name]
        x, y = [dot.x for dot in line.dots], [dot.y for dot in line.dots]
        face = "white" if line.name == "edit" else colour
        axes.plot(
            x, y, color=colour, linestyle=style, linewidth=2.5, marker=marker, markersize=8, markerfacecolor=face,
            label=name,
        )  # fmt: skip
        for dot in line.dots:
            if dot.label_at is not None:
                axes.text(dot.x, dot.label_at, dot.label, size=TEXT, weight="bold", color=colour, ha="center")
    _key(axes, 3)


def _evaluation(figure: "Figure", report: Report, top: float) -> None:
    """Each measure before and after, with its 95 % interval."""
    assert report.evaluation is not None
    _write(figure, "How it behaves: before and after, with 95 % intervals", LEFT, top, size=TEXT, color=INK)
    measures = report.evaluation.measures()
    left, down, row = LEFT + 2.2, top + 0.75, 1.25
    axes = _axes(figure, left, down, WIDTH - RIGHT - 4.6 - left, row * len(measures))
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(len(measures) - 0.5, -0.5)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.50", "0.75", "1"], size=TEXT)
    axes.set_yticks(range(len(measures)))
    names = [(words.MEASURES[name][0], words.MEASURES[name][1].rpartition("; ")[2]) for name, _, _ in measures]
    axes.set_yticklabels(["\n".join(pair) for pair in names], size=TEXT, color=INK)
    axes.grid(axis="x", color=RULE, linewidth=1)
    axes.set_axisbelow(True)
    for index, (_, before, after) in enumerate(measures):
        for share, side, colour, face, at in (
            (before, "before", BEFORE, "white", -0.14), (after, "after", AFTER, AFTER, 0.14),
        ):  # fmt: skip
            low, high = wilson(share.hits, share.total)
            value, label = share.hits / share.total, side if index == 0 else None
            axes.plot([low, high], [index + at] * 2, color=colour, linewidth=2.5, solid_capstyle="butt")
            axes.plot(
                [value], [index + at], marker="o", markersize=10, linestyle="none", color=colour, markeredgewidth=2,
                markerfacecolor=face, label=label,
            )  # fmt: skip
            text = f"{side} {words.share(share)}, {words.interval(share)} ({share.hits:,} of {share.total:,})"
            axes.text(1.06, index + at, text, size=TEXT, color=colour, va="center")
    _key(axes, 2)


def _changes(figure: "Figure", report: Report, top: float) -> None:
    """The modules that changed most as a line from before to after; without a repair, the least similar."""
    two_sides = has_two_sides(report)
    lines = sorted(report.modules, key=most_notable)[:ROWS]
    heading = "The largest changes: similarity before and after" if two_sides else "The least similar modules"
    _write(figure, heading, LEFT, top, size=TEXT, color=INK)
    names = [_plain(line.name, 44) for line in lines]
    left = LEFT + 0.2 + max(_inches(name, TEXT) for name in names)
    right = WIDTH - RIGHT - (1.9 if two_sides else 0.8)
    down = top + 0.75
    height = min(0.47 * len(lines), HEIGHT - down - 0.55)
    axes = _axes(figure, left, down, right - left, height)
    scale = Scale.of(value for line in lines for value in (line.similarity_before, line.similarity_after))
    pad = 0.02 * (scale.high - scale.low)
    axes.set_xlim(scale.low - pad, scale.high + pad)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    ticks = [scale.low + position * (scale.high - scale.low) for position, _ in scale.ticks()]
    axes.set_xticks(ticks, [label for _, label in scale.ticks()], size=TEXT)
    axes.set_yticks(range(len(lines)))
    axes.set_yticklabels(names, parse_math=False, size=TEXT, color=INK)
    axes.grid(axis="x", color=RULE, linewidth=1)
    axes.set_axisbelow(True)
    for index, line in enumerate(lines):
        _change(axes, report, index, line, two_sides)
    if two_sides:
        _key(axes, 2)


def _change(axes: "Axes", report: Report, index: int, line: ModuleLine, two_sides: bool) -> None:
    from matplotlib.transforms import blended_transform_factory

    before, after = line.similarity_before, line.similarity_after
    named = index == 0
    if two_sides:
        axes.plot([before, after], [index, index], color=RULE, linewidth=5, solid_capstyle="round", zorder=1)
    axes.plot(
        [before], [index], marker="o", markersize=10, linestyle="none", color=BEFORE, markerfacecolor="white",
        markeredgewidth=2, label="before" if named else None,
    )  # fmt: skip
    if two_sides:
        axes.plot(
            [after], [index], marker="o", markersize=10, linestyle="none", color=AFTER,
            label="after" if named else None,
        )  # fmt: skip
    text = words.changed(report, line).replace(" times its size", " ×") if two_sides else words.number(before)
    place = blended_transform_factory(axes.transAxes, axes.transData)
    axes.text(1.02, index, text, transform=place, size=TEXT, color=INK, va="center")


def _plain(text: str, limit: int) -> str:
    return _drawable(words.shown(text, limit))


def _drawable(text: str) -> str:
    """Letters that matplotlib's own font holds; others would draw boxes and warn."""
    return "".join(letter if ord(letter) < 0x250 or letter in f"…–·×’{words.MINUS}" else "?" for letter in text)
