"""A picture of 16:9 and what is drawn on it: texts, lines, dots, areas and fields of colour, in inches from the upper
left corner.

matplotlib's artists on the figure itself. Its axes make tick marks, labels and spines as objects of their own: a
report's pictures took longer than the repair that they show.
"""

import io
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

# Inches: PowerPoint's own 16:9, so that a point here is a point there. 1920 × 1080 pixels.
WIDTH, HEIGHT, DPI = 40 / 3, 7.5, 144
# Of zlib: two thirds of the usual one's time, for pictures that are a tenth larger.
COMPRESSION = 2


class Slide:
    """One picture. Everything is drawn in the order of kinds: colours, areas, lines and dots, texts."""

    def __init__(self) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.transforms import Affine2D

        self._figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, facecolor="white")
        self._canvas = FigureCanvasAgg(self._figure)
        self._place = Affine2D().scale(DPI, -DPI).translate(0, HEIGHT * DPI)

    def write(self, text: str, left: float, down: float, **style: Any) -> None:
        """A text whose upper left corner is there, where `ha` and `va` do not say otherwise."""
        # parse_math: a `$` in a customer's name is no formula.
        self._figure.text(left / WIDTH, 1 - down / HEIGHT, text, parse_math=False, **{"va": "top"} | style)

    def line(self, x: Sequence[float], y: Sequence[float], **style: Any) -> None:
        """A line through the points, or, as matplotlib has it, their markers, or both."""
        from matplotlib.lines import Line2D

        self._figure.add_artist(Line2D(x, y, transform=self._place, **style))

    def rules(self, ends: Sequence[tuple[float, float, float, float]], **style: Any) -> None:
        """Straight lines from (x, y) to (x, y), below all others."""
        from matplotlib.collections import LineCollection

        pairs = [((x, y), (other_x, other_y)) for x, y, other_x, other_y in ends]
        self._figure.add_artist(LineCollection(pairs, transform=self._place, zorder=0.5, **style))

    def area(self, x: Sequence[float], y: Sequence[float], **style: Any) -> None:
        """What lies within the corners."""
        from matplotlib.patches import Polygon

        corners = list(zip(x, y, strict=True))
        self._figure.add_artist(Polygon(corners, closed=True, transform=self._place, linewidth=0, **style))

    def field(
        self, colours: Sequence[Sequence[str]], left: float, down: float, width: float, height: float, gap: float = 0.0
    ) -> None:
        """Rows of cells of these colours that fill the rectangle, `gap` inches of white between them."""
        from matplotlib.collections import PolyCollection

        rows, columns = _pixels(len(colours), down, height, gap), _pixels(len(colours[0]), left, width, gap)
        # To whole pixels: edges of several shades would make a map of many cells look blurred.
        corners = [((x, y), (end, y), (end, bottom), (x, bottom)) for y, bottom in rows for x, end in columns]
        flat = [code for row in colours for code in row]
        cells = PolyCollection(corners, facecolors=flat, antialiaseds=False, linewidths=0, zorder=0)
        cells.set_transform(self._place)
        self._figure.add_artist(cells)

    def png(self) -> bytes:
        """The picture's file; equal slides give equal bytes."""
        from PIL import Image

        self._canvas.draw()  # type: ignore[no-untyped-call]
        drawn = self._canvas.buffer_rgba()  # type: ignore[no-untyped-call]
        # Without transparency, which there is none of, and without the version of matplotlib.
        opaque = Image.frombuffer("RGBA", self._canvas.get_width_height(), drawn).convert("RGB")
        data = io.BytesIO()
        opaque.save(data, format="png", compress_level=COMPRESSION, dpi=(DPI, DPI))
        return data.getvalue()


@lru_cache(maxsize=1024)  # all pictures of a report have one headline
def inches(text: str, size: float, weight: str = "normal") -> float:
    """How wide a text is as it is drawn: a W has three times the width of an l."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties

    font = FontProperties(size=size, weight=weight)
    renderer: Any = RendererAgg(1, 1, DPI)  # type: ignore[no-untyped-call]
    return float(renderer.get_text_width_height_descent(text, font, False)[0]) / DPI


def advance(text: str, size: float, weight: str = "normal") -> float:
    """How much longer a line gets by a text: words that are measured once make lines of any length."""
    return inches(f"|{text}|", size, weight) - inches("||", size, weight)


def _pixels(count: int, start: float, length: float, gap: float) -> list[tuple[float, float]]:
    """Where each of so many cells in a row begins and ends, in inches that are whole pixels."""
    edges = [round((start + length * index / count) * DPI) for index in range(count + 1)]
    before = round(gap * DPI) // 2
    after = round(gap * DPI) - before
    # A cell is seen however narrow it is.
    return [((one + before) / DPI, max(one + before + 1, two - after) / DPI) for one, two in pairwise(edges)]
