"""The numbers: written by the command as JSON, shown as the table of docs/reliability.md."""

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from tests.chaos.invariants import KINDS
from tests.chaos.rows import Score

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "reliability.json"
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- scoreboard: written by python -m tests.chaos -->", "<!-- end of the scoreboard -->"
HEADS = ("lost", "doubled", "wrong", "another tenant's", "5xx without a code", "left over")


def result_of(score: Score, seconds: float) -> dict[str, Any]:
    found: dict[str, Any] = {"faults": score.faults, "tried": score.tried}
    found |= {str(kind): score.counts[kind] for kind in KINDS}
    found |= {"seconds": round(seconds), "note": score.note, "left_out": score.left_out}
    return found | ({"found": score.found[:20]} if score.found else {})


def line(result: dict[str, Any]) -> str:
    counts = ", ".join(f"{result[kind]} {head}" for kind, head in zip(KINDS, HEADS, strict=True))
    left_out = f"; left out: {result['left_out']}" if result["left_out"] else ""
    tried = f"{result['faults']} faults, {result['tried']} tried"
    return f"{tried}: {counts} ({result['seconds']} s) {result['note']}{left_out}"


def note(number: int, title: str, seed: int, result: dict[str, Any]) -> None:
    """Writes one row down at once: a run that is broken off keeps what it had."""
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"rows": {}}
    known["machine"] = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    row = known["rows"].setdefault(str(number), {"seeds": {}})
    row["title"] = title
    row["seeds"][str(seed)] = result | {"measured": time.strftime("%Y-%m-%d", time.gmtime())}
    known["rows"] = dict(sorted(known["rows"].items(), key=lambda item: int(item[0])))
    RESULTS.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def table(results: dict[str, Any]) -> str:
    """One line a row, its seeds added up."""
    head = ["", "fault", "faults", "tried", *HEADS, "s"]
    lines = [" | ".join(head), " | ".join(["--:", "---", *["--:"] * (len(head) - 2)])]
    for number, row in results["rows"].items():
        runs = row["seeds"]
        sums = [sum(run[name] for run in runs.values()) for name in ("faults", "tried", *KINDS, "seconds")]
        title = row["title"] + (f"; seeds {', '.join(runs)}" if len(runs) > 1 else "")
        lines.append(" | ".join([number, title, *map(str, sums)]))
    notes = [
        f"- Row {number}{f', seed {seed}' if len(row['seeds']) > 1 else ''}: {text}"
        for number, row in results["rows"].items()
        for seed, run in row["seeds"].items()
        if (text := "; ".join(filter(None, (run["note"], run["left_out"] and f"left out: {run['left_out']}"))))
    ]
    table = "\n".join(f"| {line} |" for line in lines)
    return f"On {results['machine']}:\n\n{table}\n\n" + "\n".join(notes) + "\n"


def shown(results: dict[str, Any], page: str) -> str:
    """The page with these numbers."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table(results)}\n{END}{after}"


def write() -> None:
    if PAGE.exists() and RESULTS.exists():
        results = json.loads(RESULTS.read_text(encoding="utf-8"))
        PAGE.write_text(shown(results, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
