"""Reports for the tests: plausible ones, and ones that nobody would send by accident."""

import hashlib
import math
import statistics
from collections.abc import Sequence
from typing import Any, Literal

from safegraft.contracts.methods import METHOD_PARAMETERS, STRENGTH, AutoParameters, Method, NlsrParameters
from safegraft.contracts.report import (
    Behaviour,
    Digest,
    Distance,
    Environment,
    Evaluation,
    LayerLine,
    MethodRun,
    ModuleLine,
    Probe,
    Recommendation,
    ReferenceUsed,
    Report,
    Share,
    Spread,
    Summary,
    Variant,
    Warning,
)

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
METHODS = ("nlsr", "gram", "safelora", "antidote", "safetylock", "none")
SHARE = "how much of the fine-tuning's effect falls on general inputs rather than on safety prompts"
# By method: what it measures, and what it says that it did.
TEXTS = {
    "nlsr": (
        "cosine between the reference's and the adapter's update, both restricted to the safety-critical output "
        "neurons; 1 means unchanged",
        "The output rows (neurons) that matter most for safe answers were replaced by the amplified aligned adapter's, "
        "and the result brought back to the adapter's rank.",
    ),
    "gram": (SHARE, "What the fine-tuning added on inputs that look like safety prompts was removed."),
    "safelora": (
        "cosine between the update and its projection onto the alignment's subspace",
        "The update was replaced by its projection onto the subspace of the alignment.",
    ),
    "antidote": (SHARE, "The entries of both factors that matter most on harmful prompts were set to zero."),
    "safetylock": (
        "how much of the wanted push towards safe answers an attention output carries",
        "24 attention heads are pushed along their direction from unsafe to safe answers.",
    ),
    "none": (SHARE, "Nothing was done."),
}
RESOLVED = {
    "nlsr": {"form": "neuron", "amplification": "0.9"},
    "safetylock": {"heads": "; ".join(f"model.layers.{layer}.self_attn.o_proj: 1, 5" for layer in range(12))},
}
SIDE_CAR = Warning(code="side_car", message="The adapter is as it was; the repair is in the side-car file.")
BIASES = Warning(code="biases_added", message="12 modules got a bias, which kept and edit do not see.")


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


def parameters_of(method: str | Method) -> Method:
    """Those given, or a method's own defaults (but for NLSR's share, so that it is no half)."""
    if not isinstance(method, str):
        return method
    values = {"type": method} | ({"skip_share": 0.6} if method == "nlsr" else {})
    found = METHOD_PARAMETERS.validate_python(values)
    assert not isinstance(found, AutoParameters)
    return found


def seed_of(parameters: Method) -> int | None:
    if not isinstance(parameters, NlsrParameters):
        return None
    drawn = {parameters.selection, parameters.scorer} & {"bernoulli", "random"}
    return parameters.seed if drawn else None


def spread(median: float) -> Spread:
    return Spread(min=median - 0.1, median=median, max=median + 0.02)


def variant(
    strength: float, kept: float, edit: float, likeness: float = 0.9, *, repaired: int = 14, output: str | None = None
) -> Variant:
    """One strength; its output is the input where it repaired nothing."""
    summary = Summary(
        modules=14,
        repaired=repaired,
        similarity=spread(likeness),
        similarity_before=spread(0.7),
        similarity_after=spread(likeness),
        kept=kept,
        edit=edit,
        truncation_error=0.012 if repaired else 0.0,
    )
    name = output if output is not None else f"output at {strength:g}" if repaired else "input"
    return Variant(strength=strength, output=Digest(sha256=sha(name), bytes=20_277_624), summary=summary)


def sweep(
    *variants: Variant, method: str | Method = "gram", modules: list[ModuleLine] | None = None, **changes: Any
) -> Report:
    """A report of several strengths; `modules` are what the first one did."""
    first = variants[0]
    modules = lines(2, share=1.0 if first.summary.repaired else 0.0) if modules is None else modules
    parameters = parameters_of(method)
    return report(
        modules,
        method=method,
        **{
            "strength_parameter": STRENGTH[parameters.type],
            "variants": list(variants),
            "output": first.output,
            "summary": first.summary,
            **changes,
        },
    )


def five(method: str | Method = "gram", **changes: Any) -> Report:
    """Five strengths, asked for in no order: the stronger the repair, the less is kept."""
    return sweep(
        variant(0.3, 0.52, 0.55, 0.96),
        variant(0.1, 0.37, 0.71, 0.98),
        variant(3, 0.81, 0.26, 0.86),
        variant(0.5, 0.59, 0.47, 0.95),
        variant(1, 0.7, 0.38, 0.92),
        method=method,
        **changes,
    )


def probe(before: float = 1.2345, after: float = 0.1234, *, prompts: int = 32) -> Probe:
    """Divergences from the model on which the adapter sits, before and after."""
    return Probe(
        prompts=prompts,
        prompts_sha256=sha("probe prompts"),
        before_from_base=Distance(divergence=before, same_token=0.5625),
        after_from_base=Distance(divergence=after, same_token=0.9375),
        after_from_before=Distance(divergence=0.9876, same_token=0.59375),
    )


def evaluation(judge: str = "key phrases") -> Evaluation:
    """A repair that helped: the harm score fell from all to none, the other two are as they were or nearly."""

    def share(hits: int, total: int) -> Share:
        return Share(hits=hits, total=total)

    return Evaluation(
        judge=judge,
        before=Behaviour(harm_score=share(24, 24), over_refusal=share(0, 24), task_accuracy=share(87, 96)),
        after=Behaviour(harm_score=share(0, 24), over_refusal=share(0, 24), task_accuracy=share(88, 96)),
    )


def report(
    modules: list[ModuleLine],
    *,
    mode: Literal["patch", "analyze"] = "patch",
    method: str | Method = "nlsr",
    **changes: Any,
) -> Report:
    """A sound report of these modules; `changes` replace fields."""
    repaired = [item for item in modules if item.repaired]
    assert mode == "patch" or not repaired
    groups: dict[int | None, list[ModuleLine]] = {}
    for item in modules:
        groups.setdefault(item.layer, []).append(item)
    parameters = parameters_of(method)
    before = [item.similarity_before for item in modules]
    after = [item.similarity_after for item in modules]
    output = None if mode == "analyze" else Digest(sha256=sha("output" if repaired else "input"), bytes=20_277_624)
    values: dict[str, Any] = {
        "mode": mode,
        "method": MethodRun(
            type=parameters.type,
            parameters=parameters,
            resolved=RESOLVED.get(parameters.type, {}),
            seed=seed_of(parameters),
            similarity=TEXTS[parameters.type][0],
            break_even=0.5**0.5 if parameters.type in ("gram", "antidote") else None,
            explanation=TEXTS[parameters.type][1],
        ),
        "recommendation": Recommendation(method="gram", reason="gram serves a fresh adapter of any rank."),
        "reference": ReferenceUsed(id="ref_01HZX3", name="SmolLM2 support assistant, 2026-05", sha256=sha("reference")),
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "lineage": "fresh",
        "lineage_similarity": 0.0213,
        "output_rank": "customer",
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
