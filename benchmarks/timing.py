"""Timing side by side: the same turn measures both, so that whatever else the machine does meets both."""

import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Ratio:
    """Of seconds: the median over turns, the smallest and the largest."""

    median: float
    low: float
    high: float

    def shown(self) -> dict[str, Any]:
        return {"ratio": _short(self.median), "spread": [_short(self.low), _short(self.high)]}

    def __str__(self) -> str:
        return f"{_short(self.median)} (from {_short(self.low)} to {_short(self.high)})"


def _short(value: float) -> float:
    """Two to three digits."""
    return round(value, 2) if value < 10 else round(value, 1) if value < 100 else round(value)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def ratio(
    work: Callable[[], object],
    beside: Callable[[], object],
    *,
    turns: int,
    inner: int = 1,
    after: Callable[[], object] = lambda: None,
) -> Ratio:
    """Seconds of `work` / seconds of `beside`, one after the other in every turn; the first turn only warms up.

    inner: of `beside`, where one alone takes milliseconds and would be noise: its median. after: tidies up, untimed.
    """
    found = []
    for turn in range(turns + 1):
        own = seconds(work)
        other = statistics.median(seconds(beside) for _ in range(inner))
        after()
        if turn:
            found.append(own / other)
    return Ratio(statistics.median(found), min(found), max(found))


def machine() -> dict[str, Any]:
    """What was measured on, and on which day: ratios of two days or of two processors do not compare."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


# What products of matrices are fast by, the widest first, as Linux names them.
WIDTHS = {"amx_bf16": "AMX", "avx512f": "AVX-512", "avx2": "AVX2"}


def processor(described: Path = Path("/proc/cpuinfo")) -> str:
    """`Intel(R) Xeon(R) Processor, family 6, model 143 (AMX, AVX-512, AVX2)`; else the architecture."""
    try:
        text = described.read_text(encoding="utf-8")
    except OSError:
        return platform.machine()
    found = dict(re.findall(r"^(model name|cpu family|model|flags)[ \t]*: (.*)$", text, re.MULTILINE))
    if "model name" not in found:
        return platform.machine()
    known = set(found.get("flags", "").split())
    widths = ", ".join(name for flag, name in WIDTHS.items() if flag in known)
    numbers = f", family {found['cpu family']}, model {found['model']}" if {"cpu family", "model"} <= set(found) else ""
    return f"{found['model name'].strip()}{numbers}" + (f" ({widths})" if widths else "")


def store(name: str, **content: Any) -> None:
    """benchmarks/results/<name>.json, with the machine."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"machine": machine(), **content}, indent=1, ensure_ascii=False)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def peak_gflops(size: int = 2048) -> float:
    """10⁹ operations a second of this machine's own float32 product of two square matrices, the best of five."""
    one, other = torch.randn(size, size), torch.randn(size, size)
    best = min(seconds(lambda: one @ other) for _ in range(5))
    return 2.0 * size**3 / best / 1e9
