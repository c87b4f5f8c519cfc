"""The heatmap as data: modules by layer and kind of projection, and the scale of colours that both pictures share.

Mixture-of-experts models have many modules of a kind in a layer: a cell is then their mean. Adapters also hold modules
outside the numbered layers (lm_head): they get a row of their own at the end.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

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
DARK_TEXT, LIGHT_TEXT = "#0b1220", "#ffffff"


@dataclass(frozen=True)
class Cell:
    """The modules of one kind in one layer."""

    before: float
    after: float
    modules: int
    repaired: int

    @property
    def mark(self) -> str:
        """● all repaired, ◐ some of several, nothing otherwise."""
        if not self.repaired:
            return ""
        return "●" if self.repaired == self.modules else "◐"


@dataclass(frozen=True)
class Scale:
    """Colours for values from `low` to `high`."""

    low: float
    high: float

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

    def position(self, value: float) -> float:
        """0 at `low` and below, 1 at `high` and above."""
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))

    def ticks(self) -> list[tuple[float, str]]:
        """(position, label) of five marks, or three where five would not be round."""
        count = 4 if round((self.high - self.low) * 100) % 4 == 0 else 2
        values = [self.low + (self.high - self.low) * index / count for index in range(count + 1)]
        return [(self.position(value), number(value, 2 if round(value * 1000) % 10 == 0 else 3)) for value in values]

    def level(self, value: float) -> int:
        return min(LEVELS - 1, int(self.position(value) * LEVELS))


@dataclass(frozen=True)
class Grid:
    layers: tuple[int | None, ...]
    kinds: tuple[str, ...]
    cells: dict[tuple[int | None, str], Cell]
    scale: Scale

    @property
    def averaged(self) -> bool:
        return any(cell.modules > 1 for cell in self.cells.values())


def grid_of(report: Report) -> Grid:
    """The report's modules, arranged."""
    kinds = _kinds(report.modules)
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
    return Grid(tuple(layers), kinds, cells, scale)


def has_two_sides(report: Report) -> bool:
    """False where before and after are the same picture."""
    return report.mode == "patch" and report.summary.repaired > 0


def short_kinds(kinds: tuple[str, ...]) -> tuple[str, ...]:
    """The kinds without a `_proj` that says nothing, where they stay distinct."""
    short = tuple(kind.removesuffix("_proj") or kind for kind in kinds)
    return short if len(set(short)) == len(short) else kinds


def colour(position: float) -> tuple[int, int, int]:
    """The scale's colour at 0 to 1, as red, green and blue of 0 to 255."""
    place = position * (len(COLOURS) - 1)
    index = min(int(place), len(COLOURS) - 2)
    first, second = (
        [int(code[start : start + 2], 16) for start in (1, 3, 5)] for code in (COLOURS[index], COLOURS[index + 1])
    )
    red, green, blue = (round(a + (b - a) * (place - index)) for a, b in zip(first, second, strict=True))
    return red, green, blue


def level_colours() -> list[tuple[str, str]]:
    """(background, text) of each level; the text is whichever of dark and light has more contrast."""
    found = []
    for level in range(LEVELS):
        rgb = colour(level / (LEVELS - 1))
        luminance = _luminance(rgb)
        light = 1.05 / (luminance + 0.05) > (luminance + 0.05) / (_luminance((11, 18, 32)) + 0.05)
        found.append(("#{:02x}{:02x}{:02x}".format(*rgb), LIGHT_TEXT if light else DARK_TEXT))
    return found


def _luminance(rgb: tuple[int, int, int]) -> float:
    """Relative luminance as WCAG 2 defines it."""
    red, green, blue = (
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in rgb)
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _kinds(modules: list[ModuleLine]) -> tuple[str, ...]:
    counts = Counter(line.kind for line in modules)
    order = sorted(counts, key=lambda kind: USUAL_KINDS.index(kind) if kind in USUAL_KINDS else len(USUAL_KINDS))
    if len(order) <= MAX_KINDS:
        return tuple(order)
    frequent = {kind for kind, _ in counts.most_common(MAX_KINDS - 1)} - {OTHERS}
    return (*(kind for kind in order if kind in frequent), OTHERS)


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return math.fsum(known) / len(known) if known else math.nan
