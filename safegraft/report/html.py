"""The report as one HTML file that loads nothing: readable without script, printable, in light and dark.

Every string of a report is untrusted (module names are a customer's): jinja2 escapes all of them, and the page's own
Content-Security-Policy allows no script but ours, by its hash, and no request at all.
"""

import base64
import hashlib
import json
import math
import shlex
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from safegraft.contracts.methods import STRENGTH
from safegraft.contracts.report import Report
from safegraft.report import words
from safegraft.report.chart import chart_of
from safegraft.report.curve import curve_of
from safegraft.report.grid import grid_of, has_two_sides, level_colours, most_notable, short_kinds, sides_of

if TYPE_CHECKING:
    from jinja2 import Template

# Beyond this the page would weigh megabytes; JSON and CSV hold every module.
MAX_ROWS = 1000
# What a reader takes in at a glance; the others are one click away.
LARGEST = 12


def to_html(report: Report) -> str:
    """The whole page."""
    two_sides = has_two_sides(report)
    grid = grid_of(report)
    lines = sorted(report.modules, key=most_notable)
    return _template().render(
        report=report,
        summary=report.summary,
        words=words,
        against=words.evaluated_against(report.evaluation) if report.evaluation is not None else None,
        headline=words.headline(report),
        sweep=words.is_sweep(report),
        side_car=words.has_side_car(report),
        biased=words.has_biases(report),
        exact=report.output_rank == "exact",
        patched=report.mode == "patch",
        two_sides=two_sides,
        # A mark in every cell would tell nothing.
        marked=two_sides and report.summary.repaired < report.summary.modules,
        untouched=words.is_untouched(report),
        grid=grid,
        columns=list(zip(grid.kinds, short_kinds(grid.kinds), strict=True)),
        finite=math.isfinite,
        sides=sides_of(report),
        ticks=grid.scale.ticks(),
        difference_ticks=grid.differences.ticks(words.signed),
        charts=[
            chart_of(report.layers, width=width, height=height, two_sides=two_sides)
            for width, height in ((1040, 280), (360, 220))
        ],
        curves=[curve_of(report, width=width, height=height) for width, height in ((1040, 360), (360, 320))],
        variants=sorted(report.variants, key=lambda variant: variant.strength),
        lines=lines[:MAX_ROWS],
        top=lines[:LARGEST],
        left_out=len(lines) - min(len(lines), MAX_ROWS),
        lowest=min(report.modules, key=lambda line: line.similarity_before, default=None),
        weakest=min(report.layers, key=lambda line: line.similarity_before, default=None),
        drawn=any(line.selection_probability is not None for line in report.modules),
        method_json=json.dumps(report.method.parameters.model_dump(), indent=2, ensure_ascii=False),
        command=_command(report),
    )


def _command(report: Report) -> str:
    # What is None was left out, and the strength is told by --strengths where there are several.
    varied = STRENGTH.get(report.method.type) if report.variants else None
    parameters = report.method.parameters.model_dump(exclude={"type"}, exclude_none=True)
    parts = [
        "safegraft realign ADAPTER_DIR --reference REFERENCE_DIR --out OUT_DIR",
        f"--method {shlex.quote(report.method.type)}",
        *(f"--set {shlex.quote(f'{name}={value}')}" for name, value in parameters.items() if name != varied),
    ]
    if report.variants:
        parts.append(f"--strengths={','.join(f'{variant.strength!r}' for variant in report.variants)}")
    if report.output_rank != "customer":
        parts.append(f"--output-rank {report.output_rank}")
    if report.mode == "analyze":
        parts.append("--analyze")
    return " ".join(parts)


def _sha256(script: str) -> str:
    """As a Content-Security-Policy names a script."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@cache
def _template() -> "Template":
    # Here: commands that show no page need not wait for it.
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    folder = files("safegraft.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(shown=words.shown, sha256=_sha256)
    environment.globals.update(
        # Ours, not the report's.
        style=Markup((folder / "style.css").read_text(encoding="utf-8").strip()),
        colours=level_colours(),
        difference_colours=level_colours("difference"),
    )
    return environment.from_string((folder / "template.html").read_text(encoding="utf-8"))
