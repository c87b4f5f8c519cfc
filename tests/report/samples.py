"""Reports for the tests: plausible ones, and ones that nobody would send by accident."""

import hashlib
import math
import statistics
from collections.abc import Sequence
from typing import Any, Literal

from safegraft.contracts.methods import GramParameters, NlsrParameters
from safegraft.contracts.report import (
    Digest,
    Environment,
    LayerLine,
    MethodRun,
    ModuleLine,
    ReferenceUsed,
    Report,
    Spread,
    Summary,
    Warning,
)

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def line(name: str, layer: int | None, before: float, after: float | None = None, **changes: Any) -> ModuleLine:
    """A module; repaired where `after` is given."""
    repaired = after is not None
    values: dict[str, Any] = {
        "name": name,
        "layer": layer,
        "kind": name.rpartition(".")[2],
        "rank": 16,
        "similarity_before": before,
        "similarity_after": before if after is None else after,
        "repaired": repaired,
        "kept": 0.84 if repaired else 1.0,
        "edit": 0.41 if repaired else 0.0,
        "truncation_error": 0.03 if repaired else 0.0,
    }
    return ModuleLine(**{**values, **changes})


def block(layer: int, kind: str) -> str:
    return f"model.layers.{layer}.{'self_attn' if kind in KINDS[:4] else 'mlp'}.{kind}"


def lines(layers: int, kinds: Sequence[str] = KINDS, share: float = 0.4) -> list[ModuleLine]:
    """Similarity sags in the middle layers, most in the MLPs; the lowest `share` are repaired."""
    found = {}
    for layer in range(layers):
        for column, kind in enumerate(kinds):
            depth = (layer + 0.5) / layers
            sag = 0.42 * math.exp(-(((depth - 0.55) / 0.24) ** 2)) * (0.72 + 0.09 * column)
            wobble = 0.045 * math.sin(5.1 * layer + 2.3 * column) + 0.03 * math.sin(1.7 * layer * (column + 1))
            found[layer, kind] = round(min(0.995, 0.93 - sag + wobble), 6)
    order = sorted(found, key=lambda where: found[where])
    repaired = set(order[: round(share * len(order))])
    made = []
    for (layer, kind), before in found.items():
        if (layer, kind) not in repaired:
            made.append(line(block(layer, kind), layer, before))
            continue
        gain = 0.72 + 0.08 * math.sin(layer + len(kind))
        made.append(
            line(
                block(layer, kind),
                layer,
                before,
                round(before + (1 - before) * gain, 6),
                kept=round(1 - 0.5 * (1 - before), 6),
                edit=round(0.18 + 0.6 * (1 - before), 6),
                truncation_error=round(0.01 + 0.05 * (1 - before), 6),
            )
        )
    return made


def report(
    modules: list[ModuleLine], *, mode: Literal["patch", "analyze"] = "patch", method: str = "nlsr", **changes: Any
) -> Report:
    """A sound report of these modules; `changes` replace fields."""
    repaired = [item for item in modules if item.repaired]
    assert mode == "patch" or not repaired
    groups: dict[int | None, list[ModuleLine]] = {}
    for item in modules:
        groups.setdefault(item.layer, []).append(item)
    parameters = NlsrParameters(skip_share=0.6) if method == "nlsr" else GramParameters()
    before = [item.similarity_before for item in modules]
    after = [item.similarity_after for item in modules]
    output = None if mode == "analyze" else Digest(sha256=sha("output" if repaired else "input"), bytes=20_277_624)
    values: dict[str, Any] = {
        "mode": mode,
        "method": MethodRun(
            type=method,
            parameters=parameters,
            resolved={"form": "neuron"} if method == "nlsr" else {},
            seed=None,
            similarity="cosine between the reference's and the adapter's update, both restricted to the "
            "safety-critical output neurons; 1 means unchanged",
            explanation="The output rows (neurons) that matter most for safe answers were replaced by the amplified "
            "aligned adapter's, and the result brought back to the adapter's rank.",
        ),
        "reference": ReferenceUsed(id="ref_01HZX3", name="SmolLM2 support assistant, 2026-05", sha256=sha("reference")),
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "lineage": "fresh",
        "lineage_similarity": 0.0213,
        "input": Digest(sha256=sha("input"), bytes=20_277_624),
        "output": output,
        "summary": Summary(
            modules=len(modules),
            repaired=len(repaired),
            similarity=Spread(min=min(after), median=statistics.median(after), max=max(after)),
            similarity_before=Spread(min=min(before), median=statistics.median(before), max=max(before)),
            similarity_after=Spread(min=min(after), median=statistics.median(after), max=max(after)),
            kept=0.9312 if repaired else 1.0,
            edit=0.2687 if repaired else 0.0,
            truncation_error=max(item.truncation_error for item in modules),
        ),
        "layers": [
            LayerLine(
                layer=layer,
                similarity_before=statistics.fmean(item.similarity_before for item in group),
                similarity_after=statistics.fmean(item.similarity_after for item in group),
                modules=len(group),
                repaired=sum(item.repaired for item in group),
            )
            for layer, group in sorted(groups.items(), key=lambda item: (item[0] is None, item[0] or 0))
        ],
        "modules": modules,
        "dropped_files": ["optimizer.pt", "training_args.bin"],
        "warnings": [
            Warning(
                code="truncated",
                message="Bringing the result back to the adapter's rank lost more than 10 % of the update's norm in "
                "3 modules (most in model.layers.17.mlp.down_proj: 12%).",
            )
        ],
        "environment": Environment(
            versions={"safegraft": "0.1.0", "torch": "2.8.0", "python": "3.11.9"}, device="cpu", dtype="BF16"
        ),
        "timings": {"open": 0.0312, "score": 1.204, "patch": 2.871, "check": 0.118, "total": 4.224},
    }
    return Report(**{**values, **changes})
