"""The heatmap as data: modules by layer and kind of projection, and the scales of colours that all pictures share.

Mixture-of-experts models have many modules of a kind in a layer: a cell is then their mean. Adapters also hold modules
outside the numbered layers (lm_head): they get a row of their own at the end.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from safegraft.contracts.report import ModuleLine, Report
from safegraft.report.words import number

# The order in which a transformer block uses them; unknown kinds follow in the report's order.
USUAL_KINDS = (
    "q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "o_proj", "out_proj", "dense",
    "gate_proj", "up_proj", "gate_up_proj", "c_fc", "down_proj", "c_proj",
)  # fmt: skip
# A page stays a page whatever the names are: rarer kinds share the last column.
MAX_KINDS = 24
OTHERS = "others"

# ColorBrewer's YlGnBu, reversed and without its palest end (which would vanish on white paper): lightness rises all the
# way, so the order survives any colour blindness and a grey print.
COLOURS = ("#0b1f5c", "#253494", "#225ea8", "#1d91c0", "#41b6c4", "#7fcdbb", "#c7e9b4", "#e9f5b0")
LEVELS = 24
# Between the marks of an axis.
STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
# ColorBrewer's PuOr for differences: orange is less similar than before, purple more. Its two ends stay apart in every
# colour blindness; a grey print tells them by the sign of the number. An odd number of levels, so that 0 has its own.
DIFFERENCES = (
    "#7f3b08", "#b35806", "#e08214", "#fdb863", "#fee0b6", "#f7f7f7",
    "#d8daeb", "#b2abd2", "#8073ac", "#542788", "#2d004b",
)  # fmt: skip
DIFFERENCE_LEVELS = 25
Side = Literal["before", "after", "difference"]
# Nothing softer than black: of it and white one has 4.5 to 1 on every colour, as WCAG 2 asks for at level AA.
DARK_TEXT, LIGHT_TEXT = "#000000", "#ffffff"


@dataclass(frozen=True)
class Cell:
    """The modules of one kind in one layer."""

    before: float
    after: float
    modules: int
    repaired: int

    @property
    def difference(self) -> float:
        return self.after - self.before

    def value(self, side: Side) -> float:
        return self.before if side == "before" else self.after if side == "after" else self.difference


@dataclass(frozen=True)
class Scale:
    """Colours for values from `low` to `high`."""

    low: float
    high: float
    levels: int = LEVELS

    @classmethod
    def of(cls, values: Iterable[float]) -> "Scale":
        """The range of the values in steps of 0.05, at least 0.1 wide: rounding noise must not look like damage."""
        known = [min(1.0, max(-1.0, value)) for value in values if math.isfinite(value)]
        if not known:
            return cls(0.0, 1.0)
        low, high = math.floor(min(known) * 20 + 1e-6) / 20, math.ceil(max(known) * 20 - 1e-6) / 20
        if high - low < 0.1:
            low = round(high - 0.1, 2)
            if low < -1.0:
                low, high = -1.0, -0.9
        return cls(low, high)

    @classmethod
    def around_zero(cls, values: Iterable[float]) -> "Scale":
        """As far below 0 as above it, in steps of 0.05 and at least to 0.1, so that 0 is the middle's colour."""
        largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
        end = max(0.1, math.ceil(min(2.0, largest) * 20 - 1e-6) / 20)
        return cls(-end, end, DIFFERENCE_LEVELS)

    def position(self, value: float) -> float:
        """0 at `low` and below, 1 at `high` and above."""
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))

    def ticks(self, said: Callable[[float, int], str] = number) -> list[tuple[float, str]]:
        """(position, label) of five marks, or three where five would not be round."""
        count = 4 if round((self.high - self.low) * 100) % 4 == 0 else 2
        values = [self.low + (self.high - self.low) * index / count for index in range(count + 1)]
        return [(self.position(value), said(value, 2 if round(value * 1000) % 10 == 0 else 3)) for value in values]

    def round_ticks(self) -> list[tuple[float, str]]:
        """(position, label) of at most six marks at multiples of a round number; the ends need not be among them."""
        step = next((step for step in STEPS if (self.high - self.low) / step <= 5.001), STEPS[-1])
        digits = 2 if step < 0.1 or round(self.low * 100) % 10 else 1
        first, last = math.ceil(self.low / step - 1e-6), math.floor(self.high / step + 1e-6)
        return [(self.position(index * step), number(index * step, digits)) for index in range(first, last + 1)]

    def level(self, value: float) -> int:
        return min(self.levels - 1, int(self.position(value) * self.levels))


@dataclass(frozen=True)
class Grid:
    layers: tuple[int | None, ...]
    kinds: tuple[str, ...]
    cells: dict[tuple[int | None, str], Cell]
    scale: Scale
    differences: Scale

    def scale_of(self, side: Side) -> Scale:
        return self.differences if side == "difference" else self.scale

    @property
    def averaged(self) -> bool:
        return any(cell.modules > 1 for cell in self.cells.values())


def grid_of(report: Report) -> Grid:
    """The report's modules, arranged."""
    kinds = kinds_of([line.kind for line in report.modules])
    groups: dict[tuple[int | None, str], list[ModuleLine]] = {}
    for line in report.modules:
        groups.setdefault((line.layer, line.kind if line.kind in kinds else OTHERS), []).append(line)
    cells = {
        where: Cell(
            before=_mean(line.similarity_before for line in lines),
            after=_mean(line.similarity_after for line in lines),
            modules=len(lines),
            repaired=sum(line.repaired for line in lines),
        )
        for where, lines in groups.items()
    }
    layers = sorted({layer for layer, _ in cells}, key=lambda layer: (layer is None, layer or 0))
    scale = Scale.of(value for cell in cells.values() for value in (cell.before, cell.after))
    return Grid(tuple(layers), kinds, cells, scale, Scale.around_zero(cell.difference for cell in cells.values()))


def has_two_sides(report: Report) -> bool:
    """False where before and after are the same picture."""
    return report.mode == "patch" and report.summary.repaired > 0


def most_notable(line: ModuleLine) -> tuple[float, float, float, str]:
    """The largest change first; where nothing changed, the least similar."""
    moved = abs(line.similarity_after - line.similarity_before)
    return (-line.edit, -moved, line.similarity_before, line.name)


def short_kinds(kinds: tuple[str, ...]) -> tuple[str, ...]:
    """The kinds without a `_proj` that says nothing, where they stay distinct."""
    short = tuple(kind.removesuffix("_proj") or kind for kind in kinds)
    return short if len(set(short)) == len(short) else kinds


def sides_of(report: Report) -> tuple[Side, ...]:
    """Which maps there are to show."""
    return ("before", "after", "difference") if has_two_sides(report) else ("before",)


def colour(position: float, colours: Sequence[str] = COLOURS) -> tuple[int, int, int]:
    """A scale's colour at 0 to 1, as red, green and blue of 0 to 255."""
    place = position * (len(colours) - 1)
    index = min(int(place), len(colours) - 2)
    first, second = (
        [int(code[start : start + 2], 16) for start in (1, 3, 5)] for code in (colours[index], colours[index + 1])
    )
    red, green, blue = (round(a + (b - a) * (place - index)) for a, b in zip(first, second, strict=True))
    return red, green, blue


def level_colours(side: Side = "before", lowest: float = 0.0) -> list[tuple[str, str]]:
    """(background, text) of each level; the text is whichever of dark and light has more contrast. lowest: where on the
    scale of colours the lowest level lies, 0 to 1."""
    levels, colours = (DIFFERENCE_LEVELS, DIFFERENCES) if side == "difference" else (LEVELS, COLOURS)
    found = []
    for level in range(levels):
        rgb = colour(lowest + (1 - lowest) * level / (levels - 1), colours)
        luminance = _luminance(rgb)
        light = 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05
        found.append(("#{:02x}{:02x}{:02x}".format(*rgb), LIGHT_TEXT if light else DARK_TEXT))
    return found


def _luminance(rgb: tuple[int, int, int]) -> float:
    """Relative luminance as WCAG 2 defines it."""
    red, green, blue = (
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in rgb)
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def kinds_of(found: Sequence[str]) -> tuple[str, ...]:
    """The columns: what occurs, in the order of a block; no more than MAX_KINDS, of which the last holds the rest."""
    counts = Counter(found)
    order = sorted(counts, key=lambda kind: USUAL_KINDS.index(kind) if kind in USUAL_KINDS else len(USUAL_KINDS))
    if len(order) <= MAX_KINDS:
        return tuple(order)
    frequent = {kind for kind, _ in counts.most_common(MAX_KINDS - 1)} - {OTHERS}
    return (*(kind for kind in order if kind in frequent), OTHERS)


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    try:
        return math.fsum(known) / len(known) if known else math.nan
    except OverflowError:  # of numbers that no similarity is
        return math.nan
