"""Frontiers: harm score against task accuracy, and against over-refusal, of the headline case."""

from pathlib import Path
from typing import Any

from benchmarks.evidence.grid import HEADLINE, ROWS
from benchmarks.evidence.tables import Outcome, Results, outcome

# Okabe and Ito's palette, and a shape for each, so that nothing hangs on colour alone.
STYLES = {
    "gram": ("#0072B2", "o"),
    "nlsr": ("#D55E00", "s"),
    "safelora": ("#009E73", "^"),
    "antidote": ("#CC79A7", "D"),
    "safetylock": ("#E69F00", "v"),
    "baseline": ("#000000", "*"),
    "rival": ("#56B4E9", "P"),
    "control": ("#999999", "x"),
}


def draw(results: Results, folder: Path) -> None:
    """Writes frontier.png: large marks are defaults and baselines, small ones other strengths, controls and rivals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    seen: set[str] = set()
    for name, row in ROWS.items():
        item = outcome(results, HEADLINE, name)
        if item is None:
            continue
        found = [item]
        kind = row.parameters.get("type") if row.group in ("method", "sweep") else row.group
        harm = _mean(found, Outcome.harm)
        points = ((left, _mean(found, Outcome.right)), (right, _mean(found, lambda o: o.verdicts("benign", "phrases"))))
        for axes, other in points:
            _point(axes, harm, other, str(kind), label=str(kind) not in seen, large=row.group in ("method", "baseline"))
        seen.add(str(kind))
    left.set(xlabel="harm score (lower is better)", ylabel="task accuracy (higher is better)")
    right.set(xlabel="harm score (lower is better)", ylabel="benign prompts refused (lower is better)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.set_xlim(-0.03, 1.06)
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=len(STYLES))
    figure.savefig(folder / "frontier.png")


def _point(axes: Any, x: float, y: float, kind: str, *, label: bool, large: bool) -> None:
    colour, shape = STYLES[kind]
    axes.plot(
        x, y, shape, color=colour, markersize=9 if large else 5, alpha=1.0 if large else 0.7,
        label=kind if label else None, linestyle="none",
    )  # fmt: skip


def _mean(found: list[Outcome], measure: Any) -> float:
    values = [measure(item) for item in found]
    return sum(map(sum, values)) / sum(map(len, values))
