"""benchmarks/results → the tables of docs/performance.md, each between its markers: `make bench-page`."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import markdown
from benchmarks.timing import RESULTS

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"


def read(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return found


def ratio(row: dict[str, Any]) -> str:
    """`7.3 (6.9 to 8.1)`."""
    low, high = row["spread"]
    return f"{row['ratio']:g} ({low:g} to {high:g})"


def copying(found: dict[str, Any]) -> str:
    peak = found["machine_gigaflop_per_second"]
    lines = [
        [
            row["shape"], str(row["rank"]), f"{row['megabytes']:g} MB", row["method"], ratio(row),
            f"{row['gigaflop']:g}", f"{row['gigaflop_per_second'] / peak:.0%}",
            f"{row['ratio'] * row['gigaflop_per_second'] / peak:.2g}",
        ]
        for row in found["rows"]
    ]  # fmt: skip
    return markdown.table(
        [
            "shapes of", "rank", "file", "method", "× copying the file", "GFLOP of products", "of the machine's rate",
            "× copying, products alone at that rate",
        ],
        lines,
    )  # fmt: skip


def memory(found: dict[str, Any]) -> str:
    names = list(found["rows"][0]["settings"])
    lines = []
    for row in found["rows"]:
        own, *others = (row["settings"][name] for name in names)
        told = [f"{item['megabytes_above_interpreter']} MB, {item['times_as_long']:g} ×" for item in others]
        lines.append([row["method"], f"{own['megabytes_above_interpreter']} MB", *told])
    heads = [f"{found['adapter_megabytes']} MB adapter: peak above the interpreter", *names]
    return markdown.table(heads, lines)


def rivals(found: dict[str, Any]) -> str:
    lines = [
        [
            row["what"],
            f"{row['shape']}, rank {row['rank']}, {row['layers']} layers",
            row["against"],
            ratio(row),
            f"{row['operations']:g}" if "operations" in row else "",
        ]
        for row in found["rows"]
    ]
    return markdown.table(["", "on", "against", "takes × as long", "× as many multiplications"], lines)


def threads(found: dict[str, Any]) -> str:
    lines = [[str(row["rank"]), row["method"], ratio(row["one"]), ratio(row["all"])] for row in found["rows"]]
    return markdown.table(["rank", "method", "with one, × as long", "with two, × as long"], lines)


def growth(found: dict[str, Any]) -> str:
    units = {"rank": "rank", "modules": "modules", "megabytes": "MB"}
    unit = {"rank": "rank", "modules": "module", "megabytes": "MB"}
    lines = [
        [
            item["what"],
            ", ".join(f"{point[item['over']]:g}" for point in item["points"]) + f" {units[item['over']]}",
            ", ".join(f"{point['share_of_largest']:.2f}" for point in item["points"]),
            f"{item['slope']:.2%} a {unit[item['over']]}",
            f"{item['r_squared']:.3f}",
            ", ".join(str(point["megabytes_above_interpreter"]) for point in item["points"]),
        ]
        for item in found["lines"]
    ]
    return markdown.table(
        ["over", "points", "time, share of the largest", "slope", "R² of a line", "peak MB above interpreter"], lines
    )


def service(found: dict[str, Any]) -> str:
    lines = [
        ["a job, POST to done, against `realign` alone (median)", f"{found['done_against_realign_alone']:g} ×"],
        ["POST to started, of POST to done (medians)", f"{found['started_ms']['p50'] / found['done_ms']['p50']:.0%}"],
        ["POST to done, p99 against the median", f"{found['done_ms']['p99'] / found['done_ms']['p50']:.2f} ×"],
        ["jobs a second from a full queue, against `realign` alone", f"{found['rate_against_realign_alone']:g} ×"],
        [
            "of the worker's time for a job",
            ", ".join(
                f"`{stage}` {share:.0%}"
                for stage, share in sorted(found["stages_share"].items(), key=lambda item: -item[1])
            ),
        ],
        ["polls a second, against a bare FastAPI route", f"{ratio(found['polls_against_bare_fastapi'])} ×"],
        [
            f"seconds of a {found['part_megabytes']:.0f} MB part, against a uvicorn that drops it",
            f"{ratio(found['upload_against_bare_uvicorn'])} ×",
        ],
        [
            f"gateway's growth while {found['passed_bytes'] / 2**30:g} GiB passes",
            f"{found['gateway_grew_megabytes']:g} MB",
        ],
    ]
    return markdown.table(["", ""], lines)


def measured_on(machine: dict[str, Any]) -> str:
    """Results from before the day was noted say nothing."""
    if "date" not in machine:
        return ""
    return f"{machine['cores']} cores of {machine['processor']}, PyTorch {machine['torch']}, {machine['date']}."


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "realign": copying,
    "memory": memory,
    "rivals": rivals,
    "growth": growth,
    "threads": threads,
    "service": service,
}


def filled(text: str, folder: Path = RESULTS) -> str:
    """The page with every table made anew. Raises ValueError where a marker is missing."""

    def shown(name: str, table: Callable[[dict[str, Any]], str]) -> str:
        if not (folder / f"{name}.json").exists():
            return f"Not measured yet (`benchmarks/results/{name}.json`)."
        found = read(name, folder)
        return f"{table(found)}\n\n{measured_on(found['machine'])}".rstrip()

    return markdown.filled(text, {name: shown(name, table) for name, table in TABLES.items()})


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
