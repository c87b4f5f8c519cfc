"""The report on a terminal: the headline, the maps as characters, the largest changes.

Layers run from left to right, one to three columns each, and go on in a second block where the terminal is too narrow
for all of them. Where 256 colours are to be had a cell is a coloured space, otherwise a shade; where the encoding is
not UTF-8, a letter of ASCII. Says nothing that the other forms do not say.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from rich.console import Console
from rich.text import Text

from safegraft.adapter import AdapterDescription, kind_of, layer_of
from safegraft.contracts.report import ModuleLine, Report
from safegraft.report import words
from safegraft.report.grid import (
    LEVELS,
    OTHERS,
    Side,
    grid_of,
    has_two_sides,
    kinds_of,
    level_colours,
    most_notable,
    short_kinds,
    sides_of,
)

# From the least ink to the most; no blank, which would look like a cell that is missing.
SHADES, ASCII_SHADES = "░▒▓█", ".:-=+*#%@"
LARGEST = 3
# Names of projections longer than this would leave no room for the layers.
LABEL = 10
# What a terminal that does not speak UTF-8 shows instead of our typography.
PLAIN = str.maketrans(
    {words.MINUS: "-", words.SPACE: " ", "–": "-", "’": "'", "“": '"', "”": '"', "→": "->", "…": "...", "·": "-"}
)


# Where the scale of colours begins: its darkest part a black terminal would swallow.
DARKEST = 0.18


@dataclass(frozen=True)
class Look:
    """What a terminal can show. width: in columns."""

    width: int
    colours: bool
    unicode: bool

    @classmethod
    def of(cls, console: Console) -> "Look":
        """Colours only where there are at least 256: a scale of sixteen would not be in order."""
        many = console.color_system in ("256", "truecolor") and not console.no_color
        return cls(console.width, many, console.encoding.lower().startswith("utf"))

    def text(self, text: str) -> str:
        """Our sentences; a stranger's letters are the console's to replace."""
        return text if self.unicode else text.translate(PLAIN)


@dataclass(frozen=True)
class Map:
    """Cells by (layer, kind): where on the scale they lie, 0 to 1; None and what is left out are shown as missing.

    ink_high: where there are no colours, more ink is a higher value. marked: the cells that get a dot.
    """

    layers: Sequence[int | None]
    kinds: Sequence[str]
    cells: Mapping[tuple[int | None, str], float | None]
    ink_high: bool
    marked: frozenset[tuple[int | None, str]] = frozenset()


def story(report: Report, look: Look) -> Text:
    """The headline, what an evaluation found, one or two maps with their scale, and the largest changes."""
    body = Text()
    body.append(look.text(words.headline(report)) + "\n", style="bold")
    if report.evaluation is not None:
        body.append(look.text(words.evaluation(report.evaluation)) + "\n")
        if (against := words.evaluated_against(report.evaluation)) is not None:
            body.append(look.text(against) + "\n", style="bold")
    elif report.mode == "patch":
        body.append(_wrapped(look.text(words.ONLY_WEIGHTS), look))
    if words.is_sweep(report) and report.mode == "patch":
        for strength in words.compared(report):
            body.append(_wrapped(look.text(strength), look, indent="  "))
    grid = grid_of(report)
    names = dict(zip(grid.kinds, short_kinds(grid.kinds), strict=True))
    two_sides = has_two_sides(report)
    for side in sides_of(report):
        if side == "difference":
            continue
        body.append("\n")
        body.append(_caption(report, side, look, two_sides), style="bold")
        body.append("\n")
        cells = {
            where: grid.scale.position(cell.value(side)) if math.isfinite(cell.value(side)) else None
            for where, cell in grid.cells.items()
        }
        repaired = frozenset(where for where, cell in grid.cells.items() if cell.repaired)
        marked = repaired if side == "after" and report.summary.repaired < report.summary.modules else frozenset()
        body.append_text(draw(Map(grid.layers, grid.kinds, cells, False, marked), names, look))
    if grid.cells:
        low, high = words.number(grid.scale.low), words.number(grid.scale.high)
        notes = ["similarity"]
        if two_sides:
            every = report.summary.repaired == report.summary.modules
            notes.append("every module was repaired" if every else "• repaired" if look.colours else "")
        body.append_text(legend(low, high, [note for note in notes if note], look, ink_high=False))
    if two_sides:
        body.append("\n")
        body.append(
            "Largest changes" + (f" at {words.first_strength(report)}" if words.is_sweep(report) else ""), "bold"
        )
        body.append("\n")
        for line in sorted(report.modules, key=most_notable)[:LARGEST]:
            body.append(_folded(look.text(_change(report, line)), look))
    return body


def inspection(description: AdapterDescription, sizes: Mapping[str, float], look: Look) -> Text:
    """An adapter that was measured against nothing: its headline, and how large the update is where."""
    kinds = kinds_of([kind_of(name) for name in sizes])
    placed: dict[tuple[int | None, str], list[float]] = {}
    for name, size in sizes.items():
        kind = kind_of(name)
        placed.setdefault((layer_of(name), kind if kind in kinds else OTHERS), []).append(size)
    layers = sorted({layer for layer, _ in placed}, key=lambda layer: (layer is None, layer or 0))
    largest = max(sizes.values())
    cells = {where: max(values) / largest if largest > 0 else 0.0 for where, values in placed.items()}
    headline = words.inspected(sizes, sum(layer is not None for layer in layers), description.config.r)
    text = Text()
    text.append(look.text(headline) + "\n\nSize of the update, root mean square of its entries\n", style="bold")
    names = dict(zip(kinds, short_kinds(kinds), strict=True))
    text.append_text(draw(Map(layers, kinds, cells, True), names, look))
    text.append_text(legend("0", f"{largest:.2g}", [], look, ink_high=True))
    return text


def draw(found: Map, names: Mapping[str, str], look: Look) -> Text:
    """One line a projection and one with the numbers of the layers, in as many blocks as the width asks for."""
    labels = {kind: look.text(words.shown(names[kind], LABEL)) for kind in found.kinds}
    margin = max(map(len, labels.values()), default=0) + 1
    room = max(10, look.width - margin - 1)
    columns = next((wide for wide in (3, 2) if wide * len(found.layers) <= room), 1)
    block = len(found.layers) if len(found.layers) * columns <= room else max(10, room // 10 * 10)
    text = Text()
    for start in range(0, len(found.layers), block):
        layers = found.layers[start : start + block]
        text.append(" " * margin + _axis(layers, columns) + "\n", style="dim")
        for kind in found.kinds:
            text.append(labels[kind].rjust(margin - 1) + " ")
            for layer in layers:
                where = (layer, kind)
                _cell(text, found.cells.get(where), where in found.marked, columns, look, found.ink_high)
            text.append("\n")
    return text


def legend(low: str, high: str, notes: Sequence[str], look: Look, *, ink_high: bool) -> Text:
    """The scale from its lowest to its highest value, and what else is to be known."""
    text = Text(look.text(f"{low} "))
    steps = LEVELS // 2 if look.colours else len(SHADES if look.unicode else ASCII_SHADES)
    for step in range(steps):
        _cell(text, step / (steps - 1), False, 1, look, ink_high)
    text.append(look.text(f" {high}"))
    for note in notes:
        # A note that has no room beside the scale gets a line of its own.
        last = text.plain.rpartition("\n")[2]
        text.append("\n" if len(last) + 2 + len(note) > look.width else "  ")
        text.append(look.text(note))
    text.append("\n")
    return text


def _caption(report: Report, side: Side, look: Look, two_sides: bool) -> str:
    summary = report.summary
    spread = summary.similarity_before if side == "before" else summary.similarity_after
    return look.text(f"{side.capitalize() if two_sides else 'Similarity'}: {words.spread(spread)}")


def _change(report: Report, line: ModuleLine) -> str:
    before, after = words.number(line.similarity_before), words.number(line.similarity_after)
    return f"{words.shown(line.name, 60)}: {before} → {after}, {words.changed(report, line)}"


def _wrapped(text: str, look: Look, indent: str = "") -> str:
    return textwrap.fill(text, look.width, initial_indent=indent, subsequent_indent=2 * indent) + "\n"


def _folded(text: str, look: Look) -> str:
    """In one line where it fits, otherwise broken before the figures."""
    if len(text) + 2 <= look.width:
        return f"  {text}\n"
    name, _, figures = text.rpartition(": ")
    return f"  {name}:\n    {figures}\n"


def _axis(layers: Sequence[int | None], columns: int) -> str:
    """The numbers of the layers where they have room: every fifth or tenth, or all; + is what is in no layer."""
    every = {1: 10, 2: 5, 3: 1}[columns]
    line = [" "] * (len(layers) * columns + 4)
    free = 0
    for index, layer in enumerate(layers):
        label = "+" if layer is None else str(layer)
        at = index * columns
        if at >= free and (layer is None or layer % every == 0):
            line[at : at + len(label)] = label
            free = at + len(label) + 1
    return "".join(line).rstrip()


def _cell(text: Text, position: float | None, mark: bool, columns: int, look: Look, ink_high: bool) -> None:
    if position is None:
        text.append(("·" if look.unicode else "_") * columns, style="dim")
    elif look.colours:
        back, ink = _colours()[min(LEVELS - 1, int(position * LEVELS))]
        text.append(("•" if mark else " ").center(columns), style=f"{ink} on {back}")
    else:
        shades = SHADES if look.unicode else ASCII_SHADES
        step = min(len(shades) - 1, int(position * len(shades)))
        text.append(shades[step if ink_high else len(shades) - 1 - step] * columns)


@cache
def _colours() -> list[tuple[str, str]]:
    """(background, ink) of each level."""
    return level_colours(lowest=DARKEST)
