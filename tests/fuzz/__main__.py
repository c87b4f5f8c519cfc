"""`python -m tests.fuzz`: coverage-guided fuzzing by atheris (libFuzzer) of every parser that a stranger's bytes reach.

    python -m tests.fuzz [--seconds 600] [--jobs 1] [--out FILE] [TARGET …]

Each target runs in a process of its own, from the hostile corpus as seeds, under a cap of memory and a time for every
single input. What is found lies in var/fuzz/TARGET/crash-… (or timeout-…, oom-…); exit status 1 says that something
was. Figures go to FILE.
"""

import argparse
import hashlib
import importlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

TARGETS = ("header", "config", "archive")
# Mebibytes of a whole process, with libFuzzer's own tables; seconds of one input.
RSS_LIMIT, INPUT_SECONDS = 512, 5
ROOT = Path(__file__).parents[2]
VAR = ROOT / "var" / "fuzz"
# The standard library's readers too: what they branch on are our branches.
INSTRUMENTED = ["safegraft", "zipfile", "tarfile", "json"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzzes the parsers of uploads.")
    parser.add_argument(
        "targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; all where none is named"
    )
    parser.add_argument("--seconds", type=int, default=600, help="of each target")
    parser.add_argument("--jobs", type=int, default=1, help="targets at a time")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    given = parser.parse_args()
    if unknown := set(given.targets) - set(TARGETS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    with ThreadPoolExecutor(given.jobs) as pool:
        found = dict(pool.map(lambda name: (name, campaign(name, given.seconds)), given.targets or TARGETS))
    result = {"machine": machine(), "seconds": given.seconds, "rss_limit_mb": RSS_LIMIT, "targets": found}
    text = json.dumps(result, indent=2) + "\n"
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(text)
    sys.stdout.write(text)
    return 1 if any(target["findings"] for target in found.values()) else 0


def table(result: dict[str, Any]) -> str:
    """The figures as docs/fuzzing.md shows them."""
    rows = ["| target | seconds | executions | edges | features | lines run | peak memory | found |", "|---" * 8 + "|"]
    for name, target in result["targets"].items():
        run = ", ".join(f"{lines['run']} of {lines['of']} of `{of}`" for of, lines in target["lines"].items())
        rows.append(
            f"| `{name}` | {target['seconds']} | {target['executions']:,} | {target['coverage_edges']} | "
            f"{target['coverage_features']} | {run} | {target['peak_rss_mb']} MiB | {len(target['findings'])} |"
        )
    return "\n".join(rows)


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {"cpu": name, "cores": os.cpu_count(), "python": platform.python_version(), "system": platform.system()}


def campaign(name: str, seconds: int, *more: str) -> dict[str, Any]:
    """One target, in a process of its own, with more of libFuzzer's options; its figures."""
    folder = VAR / name
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    module = importlib.import_module(f"tests.fuzz.{name}")
    seeds = 0
    for seed in module.seeds():
        (corpus / hashlib.sha1(seed, usedforsecurity=False).hexdigest()).write_bytes(seed)
        seeds += 1
    before = set(folder.glob("*-*"))
    command = [
        sys.executable, "-m", "tests.fuzz.driver", name, str(corpus), f"-max_total_time={seconds}",
        f"-rss_limit_mb={RSS_LIMIT}", f"-timeout={INPUT_SECONDS}", f"-max_len={module.SMALL}",
        f"-artifact_prefix={folder}/", "-print_final_stats=1", *more,
    ]  # fmt: skip
    began = time.monotonic()
    with (folder / "log").open("w") as log:
        status = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=False).returncode
    text = (folder / "log").read_text(errors="replace")
    progress = re.findall(r"cov: (\d+) ft: (\d+)", text)
    executed, rss = _stat(text, "number_of_executed_units"), _stat(text, "peak_rss_mb")
    findings = sorted(path.name for path in set(folder.glob("*-*")) - before)
    if status and not findings:
        findings = [f"exit status {status}; see {folder / 'log'}"]
    return {
        "seconds": round(time.monotonic() - began),
        "seeds": seeds,
        "executions": executed,
        "coverage_edges": int(progress[-1][0]) if progress else None,
        "coverage_features": int(progress[-1][1]) if progress else None,
        "peak_rss_mb": rss,
        "slowest_input_seconds": _stat(text, "slowest_unit_time_sec"),
        "corpus": len(list(corpus.iterdir())),
        "lines": {of: lines(of, module, corpus) for of in module.MODULES},
        "findings": findings,
    }


def _stat(text: str, name: str) -> int | None:
    found = re.search(rf"stat::{name}:\s+(\d+)", text)
    return int(found[1]) if found else None


def lines(of: str, target: Any, corpus: Path) -> dict[str, int]:
    """How many lines of a module's functions the corpus runs, of how many there are."""
    file = importlib.import_module(of).__file__
    assert file is not None
    source = Path(file)
    seen: set[int] = set()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != file:
            return None
        if event == "line":
            seen.add(frame.f_lineno)
        return trace

    sys.settrace(trace)
    try:
        for path in corpus.iterdir():
            target.check(path.read_bytes())
    finally:
        sys.settrace(None)
    every = _lines_of(compile(source.read_text(), file, "exec"), top=True)
    return {"run": len(seen & every), "of": len(every)}


def _lines_of(code: CodeType, *, top: bool) -> set[int]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    # The body of a module or a class runs at its import.
    own = set() if top or "__module__" in code.co_names else {line for _, _, line in code.co_lines() if line}
    own -= {code.co_firstlineno}
    return own.union(*(_lines_of(constant, top=False) for constant in inner))


if __name__ == "__main__":
    sys.exit(main())
