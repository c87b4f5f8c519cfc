"""The heatmaps as one picture for slides and tickets.

matplotlib's objects only: pyplot keeps figures and settings per process, and a worker runs many jobs. Imported inside
the function, because a gateway that only serves JSON has no matplotlib.
"""

import io
import math
import textwrap
from typing import TYPE_CHECKING, Any

from safegraft.contracts.report import Report
from safegraft.report import words
from safegraft.report.grid import LEVELS, Grid, grid_of, has_two_sides, level_colours, short_kinds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 144
INK, SOFT, EMPTY = "#17202b", "#566272", "#eef0f2"
# All in inches. Beyond TALLEST the rows shrink instead: a picture must still open in a mail.
CELL_WIDTH, ROW_HEIGHT, TALLEST = 0.62, 0.235, 20.0
LEFT, RIGHT, GAP, BELOW = 0.75, 0.35, 0.75, 0.95
TOP, TITLE_LINE, ORIGIN_LINE, UNDER_TITLE = 0.3, 0.25, 0.18, 0.85
# A panel is at least as wide as its own title.
NARROWEST, PANEL = 7.2, 2.6
# Of the bold title; a little under what fits.
LETTERS_PER_INCH = 8.4
# Rows lower than this hold no readable number.
READABLE = 0.17


def to_png(report: Report) -> bytes:
    """Before and after side by side, or one map where nothing was changed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    grid = grid_of(report)
    sides = ("before", "after") if has_two_sides(report) else ("before",)
    rows, columns = _row_height(grid) * len(grid.layers), len(grid.kinds) * CELL_WIDTH
    pitch = max(columns, PANEL) + GAP
    width = max(NARROWEST, LEFT + RIGHT + len(sides) * pitch - GAP)
    title = _balanced(_drawable(words.headline(report)), int(width * LETTERS_PER_INCH))
    origin = _origin(report, int(width * LETTERS_PER_INCH * 1.6))
    below_title = TOP + TITLE_LINE * len(title) + 0.06
    height = below_title + ORIGIN_LINE * len(origin) + UNDER_TITLE + rows + BELOW
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)

    def write(text: str, down: float, **style: Any) -> None:
        figure.text(LEFT / width, 1 - down / height, text, va="top", parse_math=False, **style)

    write("\n".join(title), TOP, size=13, weight="bold", color=INK, linespacing=1.25)
    write("\n".join(origin), below_title, size=9, color=SOFT, linespacing=1.4)
    # A single small map keeps its size: stretched over the page it would look like a result.
    for index, side in enumerate(sides):
        left = LEFT + index * pitch
        axes = figure.add_axes((left / width, BELOW / height, columns / width, rows / height))
        _draw(axes, report, grid, side, compared=len(sides) > 1)
    legend = figure.add_axes((LEFT / width, 0.48 / height, 2.6 / width, 0.13 / height))
    _legend(legend, grid, compared=len(sides) > 1)
    data = io.BytesIO()
    # Without the version of matplotlib in it, equal reports give equal bytes.
    figure.savefig(data, format="png", dpi=DPI, metadata={"Software": None})
    return data.getvalue()


def _balanced(text: str, letters: int) -> list[str]:
    """As few lines as possible, and these of about one length: a last line of one word looks like an accident."""
    lines = textwrap.wrap(text, letters)
    while letters > 20 and len(narrower := textwrap.wrap(text, letters - 1)) == len(lines):
        lines, letters = narrower, letters - 1
    return lines


def _origin(report: Report, letters: int) -> list[str]:
    """What was compared with what, and how, in as many lines as it needs."""
    model, name = _plain(report.base_model, 60), _plain(report.reference.name, 60)
    method = _plain(report.method.type, 60)
    if words.is_sweep(report):
        # The title is about all strengths, the maps are of one.
        method += f", shown at {_plain(words.first_strength(report), 80)}"
    lines = [model]
    for part in (f"reference {name}", method):
        longer = f"{lines[-1]}  ·  {part}"
        if len(longer) <= letters:
            lines[-1] = longer
        else:
            lines.append(part)
    return lines


def _row_height(grid: Grid) -> float:
    return min(ROW_HEIGHT, TALLEST / max(1, len(grid.layers)))


def _draw(axes: "Axes", report: Report, grid: Grid, side: str, *, compared: bool) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    colours = level_colours()
    height = _row_height(grid)
    boxes, faces = [], []
    for row, layer in enumerate(grid.layers):
        for column, kind in enumerate(grid.kinds):
            cell = grid.cells.get((layer, kind))
            value = math.nan if cell is None else (cell.before if side == "before" else cell.after)
            boxes.append(Rectangle((column, row), 1, 1))
            if cell is None or not math.isfinite(value):
                faces.append(EMPTY)
                continue
            back, text = colours[grid.scale.level(value)]
            faces.append(back)
            if height >= READABLE:
                axes.text(column + 0.5, row + 0.53, words.number(value), size=7, color=text, ha="center", va="center")
            if compared and cell.mark:
                # Half-filled where only some of the cell's modules were repaired.
                axes.plot(
                    [column + 0.9],
                    [row + 0.28],
                    marker="o",
                    markersize=min(3.0, height * 12),
                    fillstyle="full" if cell.repaired == cell.modules else "left",
                    color=text,
                    markerfacecoloralt="none",
                    markeredgewidth=0.4,
                )
    axes.add_collection(
        PatchCollection(boxes, facecolors=faces, edgecolors="white", linewidths=1.2 if height > 0.1 else 0.3)
    )
    axes.set_xlim(0, len(grid.kinds))
    axes.set_ylim(len(grid.layers), 0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, colors=SOFT, labelsize=8, pad=4)
    axes.xaxis.tick_top()
    axes.set_xticks([index + 0.5 for index in range(len(grid.kinds))])
    # parse_math: a `$` in a customer's name is no formula.
    axes.set_xticklabels([_plain(kind, 9) for kind in short_kinds(grid.kinds)], parse_math=False)
    every = max(1, math.ceil(0.13 / height))
    shown = range(0, len(grid.layers), every)
    axes.set_yticks([index + 0.5 for index in shown])
    axes.set_yticklabels(["other" if grid.layers[index] is None else str(grid.layers[index]) for index in shown])
    spread = report.summary.similarity_before if side == "before" else report.summary.similarity_after
    axes.set_title(
        f"{side.capitalize() if compared else 'Similarity'}: median {words.number(spread.median)}, "
        f"lowest {words.number(spread.min)}",
        size=10,
        color=INK,
        loc="left",
        pad=10,
    )


def _legend(axes: "Axes", grid: Grid, *, compared: bool) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    boxes = [Rectangle((level, 0), 1, 1) for level in range(LEVELS)]
    axes.add_collection(PatchCollection(boxes, facecolors=[back for back, _ in level_colours()], edgecolors="face"))
    axes.set_xlim(0, LEVELS)
    axes.set_ylim(0, 1)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, colors=SOFT, labelsize=8, pad=3)
    axes.set_yticks([])
    ticks = grid.scale.ticks()
    axes.set_xticks([position * LEVELS for position, _ in ticks])
    axes.set_xticklabels([label for _, label in ticks])
    explained = "similarity by layer and projection" + (";  ●  repaired" if compared else "")
    if grid.averaged:
        explained += ";  cells are means" + (", half-filled: some repaired" if compared else "")
    axes.text(LEVELS * 1.07, 0.5, explained, size=8.5, color=SOFT, va="center")


def _plain(text: str, limit: int) -> str:
    return _drawable(words.shown(text, limit))


def _drawable(text: str) -> str:
    """Letters that matplotlib's own font holds; others would draw boxes and warn."""
    return "".join(letter if ord(letter) < 0x250 or letter in f"…–·{words.MINUS}" else "?" for letter in text)
