"""Frontiers: harm score against task accuracy, and against over-refusal, of two adapters of the headline case."""

from pathlib import Path
from typing import Any

from benchmarks.evidence.grid import HEADLINE, ROWS, SECOND
from benchmarks.evidence.tables import Results, outcome
from safegraft.report.interval import wilson

# Okabe and Ito's palette, and a shape for each, so that nothing hangs on colour alone.
STYLES = {
    "gram": ("#0072B2", "o"),
    "nlsr": ("#D55E00", "s"),
    "safelora": ("#009E73", "^"),
    "antidote": ("#CC79A7", "D"),
    "safetylock": ("#E69F00", "v"),
    "baseline": ("#000000", "*"),
    "rival": ("#56B4E9", "P"),
    "control": ("#666666", "x"),
}
# What lies below is drawn on the axis with its value: SafetyLock and the untouched model do not know the task, and
# would press everything else into one blob.
LOWEST = 0.82
# Beside their marks, in points: the marks of several lie nearly on each other.
PLACES = {
    "no repair": (-8, 8, "right"), "the aligned model": (10, -14, "left"), "gram": (14, 10, "left"),
    "nlsr": (-12, -16, "right"), "safelora": (12, -4, "left"), "antidote": (12, 2, "left"),
    "safetylock": (-10, 6, "right"), "the untouched model": (-10, 20, "right"),
}  # fmt: skip


def draw(results: Results, folder: Path) -> None:
    """Writes frontier.png: large marks with 95 % intervals are defaults and baselines, small ones everything else."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8.2), dpi=150, layout="constrained")
    axes = figure.subplots(2, 2)
    labelled: dict[str, Any] = {}
    for (left, right), cell, title in zip(
        axes, (HEADLINE, SECOND), ("seed 1: strengths and controls", "seed 2: further forms"), strict=True
    ):
        for name, row in ROWS.items():
            item = outcome(results, cell, name)
            if item is None:
                continue
            kind = str(row.parameters.get("type") if row.group in ("method", "sweep") else row.group)
            large = row.group in ("method", "baseline")
            harm, refused = item.harm(), item.verdicts("benign", "phrases")
            _point(left, harm, item.right(), kind, large=large, name=name if large else "", lowest=LOWEST)
            # Without names: most lie at nought, on each other.
            labelled[kind] = _point(right, harm, refused, kind, large=large)
        left.set(ylabel="task accuracy (200 questions)", title=f"{title}, task", ylim=(LOWEST - 0.008, 0.98))
        right.set(ylabel="benign prompts refused (100 prompts)", title=f"{title}, over-refusal")
        right.set_ylim(bottom=-0.012)
        for own in (left, right):
            own.grid(alpha=0.3)
            own.set_xlim(-0.03, 1.03)
            own.set_xlabel("harm score (200 harmful prompts)")
    figure.legend(
        [labelled[kind] for kind in STYLES if kind in labelled], [kind for kind in STYLES if kind in labelled],
        fontsize=9, loc="outside lower center", ncols=len(STYLES),
    )  # fmt: skip
    figure.savefig(folder / "frontier.png")


def _point(
    axes: Any, across: list[bool], up: list[bool], kind: str, *, large: bool, name: str = "", lowest: float = 0.0
) -> Any:
    """One row; of a large one the 95 % intervals are drawn."""
    colour, shape = STYLES[kind]
    x, y = (sum(values) / len(values) for values in (across, up))
    below = y < lowest
    if large and not below:
        for values, along in ((across, axes.hlines), (up, axes.vlines)):
            low, high = wilson(sum(values), len(values))
            along(y if values is across else x, low, high, color=colour, linewidth=1, alpha=0.6)
    (mark,) = axes.plot(
        x, max(y, lowest), shape, color=colour, markersize=9 if large else 5, alpha=1.0 if large else 0.7,
        linestyle="none", clip_on=False,
    )  # fmt: skip
    if name:
        right, over, side = PLACES[name]
        told = f"{name}, {y:.2f} ↓" if below else name
        axes.annotate(
            told,
            (x, max(y, lowest)),
            xytext=(right, over),
            textcoords="offset points",
            fontsize=8,
            color=colour,
            ha=side,
        )
    return mark
