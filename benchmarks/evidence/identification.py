"""What finding the safety-critical neurons costs, by scorer (NLSR's table 5): `python -m benchmarks.evidence identify`.

A reference is built from the first prompts of examples/data/safety.jsonl, without general ones, in turn with the
scorers that need no gradients (low_rank and wanda come out of one pass), with snip, and with preference_snip. Counted
are statistics of the safe answers, gradients and masks; the first two scorers come with every build. Ratios to the
first build's, medians over turns.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import timing
from benchmarks.evidence.run import BASE, EXAMPLES, RESULTS
from examples.train import BASE_LABEL
from safegraft.engine.build import BuildPrompts, BuildSources, build_reference
from safegraft.engine.bundle import BuildSettings
from safegraft.engine.conversations import read_conversations
from safegraft.engine.models import resolve_base

PROMPTS, TURNS = 24, 3
PATH = RESULTS / "identification.json"
# What the unsafe answers are asked for is safetylock's.
OTHERS = ("unsafe statistics",)
BUILDS = {
    "low_rank, wanda": BuildSettings(),
    "snip": BuildSettings(snip=True),
    "preference_snip": BuildSettings(preference_snip=True),
}


def seconds(base: Path, folder: Path, settings: BuildSettings) -> float:
    """Of the stages that find neurons, without loading models."""
    seen: dict[str, list[float]] = {}
    build_reference(
        folder / "reference",
        sources=BuildSources(aligned=EXAMPLES / "aligned", base=base, labels=[BASE_LABEL]),
        prompts=BuildPrompts(safety=read_conversations(EXAMPLES / "data" / "safety.jsonl")[:PROMPTS]),
        settings=settings,
        progress=lambda stage, done, total: seen.setdefault(stage, []).append(time.perf_counter()),
    )
    # A stage tells when a step is done: what came before its first one is told by the others.
    return sum(
        (times[-1] - times[0]) * len(times) / (len(times) - 1)
        for stage, times in seen.items()
        if stage not in OTHERS and len(times) > 1
    )


def measure(base: str = BASE) -> dict[str, Any]:
    found = resolve_base(base)
    ratios: dict[str, list[float]] = {name: [] for name in BUILDS}
    for _ in range(TURNS):
        took = {}
        for name, settings in BUILDS.items():
            with tempfile.TemporaryDirectory() as folder:
                took[name] = seconds(found, Path(folder), settings)
            print(f"{name}: {took[name] / took['low_rank, wanda']:.2f} times", flush=True)
        for name in BUILDS:
            ratios[name].append(took[name] / took["low_rank, wanda"])
    rows = {
        name: {"ratio": round(statistics.median(all_), 2), "spread": [round(min(all_), 2), round(max(all_), 2)]}
        for name, all_ in ratios.items()
    }
    return {"machine": timing.machine(), "prompts": PROMPTS, "turns": TURNS, "builds": rows}


def run(base: str = BASE) -> None:
    """Measures where it was not yet; delete the file to measure anew."""
    if not PATH.exists():
        PATH.write_text(json.dumps(measure(base), indent=1) + "\n", encoding="utf-8")
