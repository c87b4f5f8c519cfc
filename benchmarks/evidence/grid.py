"""What is tried. A cell is one customer's adapter; a row is one thing done to it.

One factor is varied at a time around a headline case: sentiment, 5 % poison, a fresh adapter of rank 16.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

Attack = Literal["plain", "trigger", "disguise", "translate", "evade", "evade_all"]
Prompts = Literal["questions", "formats", "kinds", "tones", "twins", "french"]


@dataclass(frozen=True)
class Cell:
    """How one customer's adapter is trained.

    poison: the share of training rows that are harmful prompts with a placeholder compliance. attack: what the customer
    knows (see training.py). aligned: which safety adapter lies below, or was continued.
    """

    name: str
    factor: str
    task: str = "sentiment"
    poison: float = 0.05
    rank: int = 16
    lr: float = 4e-4
    lineage: Literal["fresh", "continued"] = "fresh"
    attack: Attack = "plain"
    aligned: Literal["sft", "dpo"] = "sft"
    seed: int = 1


HEADLINE = "headline-1"
CELLS: dict[str, Cell] = {
    cell.name: cell
    for cell in (
        Cell(HEADLINE, "headline"),
        Cell("headline-2", "headline", seed=2),
        Cell("headline-3", "headline", seed=3),
        Cell("poison-0", "poison share", poison=0.0),
        Cell("poison-01", "poison share", poison=0.01),
        Cell("poison-10", "poison share", poison=0.10),
        Cell("poison-20", "poison share", poison=0.20),
        Cell("continued-1", "lineage", lineage="continued", rank=8),
        Cell("continued-2", "lineage", lineage="continued", rank=8, seed=2),
        Cell("continued-20", "lineage", lineage="continued", rank=8, poison=0.20),
        Cell("news", "task", task="news"),
        Cell("orders", "task", task="orders"),
        Cell("news-clean", "task", task="news", poison=0.0),
        Cell("rank-8", "rank", rank=8),
        Cell("rank-64", "rank", rank=64),
        Cell("slow", "learning rate", lr=1e-4),
        Cell("dpo", "aligned by", aligned="dpo"),
        Cell("trigger", "attacker", attack="trigger"),
        Cell("disguise", "attacker", attack="disguise"),
        Cell("translate", "attacker", attack="translate"),
        Cell("evade", "attacker", attack="evade"),
        Cell("evade-all", "attacker", attack="evade_all"),
    )
}


@dataclass(frozen=True)
class Row:
    """One thing done to an adapter: a method of the engine with parameters, or a function of rivals.py.

    sparsity: of the reference's masks, where it is not the default's. prompts: those behind the reference: 90 general
    `questions`, these and 90 of many `formats` (which only gram's statistics and its controls depend on), or formats
    with harmful prompts of three `kinds` instead of one; or with 100 harmful ones of many `tones`, written for this; or
    with these and for each a harmless one of its form and subject, `twins`; or with 40 of its own in `french`. weak:
    the adapter from which nlsr's amplification goes on, Δ₀; None: zero.
    """

    name: str
    group: Literal["baseline", "method", "sweep", "control", "rival"]
    parameters: dict[str, Any] = field(default_factory=dict)
    rival: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    sparsity: float | None = None
    prompts: Prompts = "questions"
    weak: Literal["sft"] | None = None


def _method(
    name: str,
    group: Literal["method", "sweep", "control"],
    sparsity: float | None = None,
    weak: Literal["sft"] | None = None,
    **own: Any,
) -> Row:
    return Row(name, group, parameters=own, sparsity=sparsity, weak=weak)


def _gram(name: str, group: Literal["method", "sweep"] = "sweep", prompts: Prompts = "formats", **own: Any) -> Row:
    return Row(name, group, parameters={"type": "gram"} | own, prompts=prompts)


def _rival(
    name: str,
    function: str,
    group: Literal["rival", "control", "sweep"] = "rival",
    prompts: Prompts = "questions",
    sparsity: float | None = None,
    **arguments: Any,
) -> Row:
    return Row(name, group, rival=function, arguments=arguments, prompts=prompts, sparsity=sparsity)


def _combined(name: str, where: str, sparsity: float | None = None) -> Row:
    return _rival(f"gram {name}", "combined", "sweep", "formats", sparsity, where=where)


NO_REPAIR, ALIGNED, BASE_MODEL = "no repair", "the aligned model", "the untouched model"
DEFAULT = "gram"
# What it was before its gain became steeper and prompts of many formats came with the package.
EARLIER = "gram p=1, λ=.3, 90 questions"
KINDS = "gram, three kinds of harmful prompts"
TONES, TWINS = "gram, harmful prompts in many tones", "gram, many tones and harmless twins"
FRENCH = "gram, harmful prompts in French too"
# The preference-aligned adapter went on from the other one; as in the NLSR paper, what preferences added is amplified.
AMPLIFIED = "amplified from SFT"
ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        Row(NO_REPAIR, "baseline"),
        Row(ALIGNED, "baseline"),
        Row(BASE_MODEL, "baseline"),
        _gram(DEFAULT, "method"),
        _method("nlsr", "method", type="nlsr"),
        _method("safelora", "method", type="safelora"),
        _method("antidote", "method", type="antidote"),
        _method("safetylock", "method", type="safetylock"),
        _gram("gram λ=.05", general_weight=0.05),
        _gram("gram λ=.1", general_weight=0.1),
        _gram("gram λ=.5", general_weight=0.5),
        _gram("gram λ=1", general_weight=1.0),
        _gram("gram p=1, λ=.1", steepness=1.0, general_weight=0.1),
        _gram("gram p=1, λ=.3", steepness=1.0, general_weight=0.3),
        _gram("gram p=4", steepness=4.0),
        _gram("gram, 64 pairs", pairs=64),
        _gram("gram, 90 questions", prompts="questions"),
        _gram(KINDS, prompts="kinds"),
        _gram(TONES, prompts="tones"),
        _gram(f"{TONES}, λ=.3", prompts="tones", general_weight=0.3),
        _gram(f"{TONES}, λ=.5", prompts="tones", general_weight=0.5),
        _gram(TWINS, prompts="twins"),
        _gram(f"{TWINS}, λ=.3", prompts="twins", general_weight=0.3),
        _gram(f"{TWINS}, λ=.5", prompts="twins", general_weight=0.5),
        _gram(FRENCH, prompts="french"),
        _gram(EARLIER, prompts="questions", steepness=1.0, general_weight=0.3),
        _gram("gram p=1, λ=.03, 90 questions", prompts="questions", steepness=1.0, general_weight=0.03),
        _gram("gram β=.25, λ=.4", amplification=0.25, general_weight=0.4),
        _gram("gram β=1, p=1, λ=.3", amplification=1.0, steepness=1.0, general_weight=0.3),
        _gram("gram β=1, p=1, λ=1", amplification=1.0, steepness=1.0, general_weight=1.0),
        _gram("gram β=1, p=1, λ=3", amplification=1.0, steepness=1.0, general_weight=3.0),
        _gram("gram β=1, p=1, λ=10", amplification=1.0, steepness=1.0, general_weight=10.0),
        _method("nlsr P_L=.8", "sweep", type="nlsr", skip_share=0.8),
        _method("nlsr P_L=.2", "sweep", type="nlsr", skip_share=0.2),
        _method("nlsr P_L=0", "sweep", type="nlsr", skip_share=0.0),
        _method("nlsr P_L=0, β=0", "sweep", type="nlsr", skip_share=0.0, amplification=0.0),
        _method("nlsr P_L=0, β=0, P_SR=.5", "sweep", sparsity=0.5, type="nlsr", skip_share=0.0, amplification=0.0),
        _method("nlsr P_L=0, β=0, P_SR=.2", "sweep", sparsity=0.2, type="nlsr", skip_share=0.0, amplification=0.0),
        _method("nlsr P_L=0, P_SR=.5", "sweep", sparsity=0.5, type="nlsr", skip_share=0.0),
        _method("nlsr P_L=0, P_SR=.2", "sweep", sparsity=0.2, type="nlsr", skip_share=0.0),
        _method(f"nlsr {AMPLIFIED}", "sweep", weak="sft", type="nlsr"),
        _method(f"nlsr {AMPLIFIED}, P_L=0", "sweep", weak="sft", type="nlsr", skip_share=0.0),
        _method(f"nlsr {AMPLIFIED}, P_L=0, P_SR=.5", "sweep", sparsity=0.5, weak="sft", type="nlsr", skip_share=0.0),
        _method(f"nlsr {AMPLIFIED}, P_L=0, P_SR=.2", "sweep", sparsity=0.2, weak="sft", type="nlsr", skip_share=0.0),
        _method("nlsr paper form, P_L=0", "sweep", type="nlsr", form="paper", skip_share=0.0),
        _method("nlsr paper form, P_L=0, P_SR=.5", "sweep", sparsity=0.5, type="nlsr", form="paper", skip_share=0.0),
        _method("nlsr paper form, P_L=0, P_SR=.2", "sweep", sparsity=0.2, type="nlsr", form="paper", skip_share=0.0),
        _method("nlsr paper form, P_L=.5", "sweep", type="nlsr", form="paper"),
        _method("nlsr drawn by chance (Bernoulli)", "sweep", type="nlsr", selection="bernoulli"),
        _method("nlsr by wanda", "sweep", type="nlsr", scorer="wanda", skip_share=0.0),
        _method("nlsr by snip", "sweep", type="nlsr", scorer="snip", skip_share=0.0),
        _method("nlsr by preference_snip", "sweep", type="nlsr", scorer="preference_snip", skip_share=0.0),
        _method("safelora τ=.3", "sweep", type="safelora", threshold=0.3),
        _method("safelora, 105 lowest", "sweep", type="safelora", selection="lowest", modules=105),
        _method(
            "safelora orthogonal, 105 lowest", "sweep",
            type="safelora", projector="orthogonal", selection="lowest", modules=105,
        ),
        *(
            _method(f"safelora, {count} lowest", "sweep", type="safelora", selection="lowest", modules=count)
            for count in (150, 180)
        ),
        _method("antidote .02", "sweep", type="antidote", density=0.02),
        _method("antidote .05", "sweep", type="antidote", density=0.05),
        _method("antidote .2", "sweep", type="antidote", density=0.2),
        _method("antidote .1, stored basis", "sweep", type="antidote", basis="stored"),
        _method("antidote .1, rows", "sweep", type="antidote", basis="rows"),
        _method("safetylock α=3", "sweep", type="safetylock", strength=3.0),
        _method("safetylock α=1", "sweep", type="safetylock", strength=1.0),
        _method("safetylock α=6, biases", "sweep", type="safetylock", output="lora_bias"),
        _method("safetylock α=3, biases", "sweep", type="safetylock", output="lora_bias", strength=3.0),
        _method("nlsr by random neurons", "control", type="nlsr", scorer="random", skip_share=0.0),
        _method(
            "nlsr by random neurons, P_SR=.5", "control", sparsity=0.5,
            type="nlsr", scorer="random", skip_share=0.0,
        ),
        _method("nlsr by magnitude", "control", type="nlsr", scorer="magnitude", skip_share=0.0),
        _method("nlsr, most similar half", "control", type="nlsr", selection="highest"),
        _method("nlsr, random half", "control", type="nlsr", selection="random"),
        _rival("nlsr's neurons zeroed", "zeroed", "control"),
        _rival("rescaled to what gram keeps", "rescaled", "control", "formats"),
        _rival("random edit of gram's size", "perturbed", "control", "formats"),
        _combined("in the less similar half of the modules", "half"),
        _combined("in MLPs alone", "mlp"),
        _combined("in attention alone", "attention"),
        _combined("in a fifth of the output rows, by nlsr's scores", "neurons"),
        _combined("in half of the output rows, by nlsr's scores", "neurons", 0.5),
        _combined("in four fifths of the output rows, by nlsr's scores", "neurons", 0.2),
        _combined("with λ by each module's similarity", "similarity"),
        _rival("interpolation .5", "interpolated", share=0.5),
        _rival("interpolation .7", "interpolated", share=0.7),
        _rival("safety vector added", "with_safety_vector", weight=1.0),
        _rival("SafeDelta s=.1", "safe_delta", threshold=0.1),
        _rival("SafeDelta s=.3", "safe_delta", threshold=0.3),
        _rival("SafeDelta s=1", "safe_delta", threshold=1.0),
        _rival("SafeDelta s=3", "safe_delta", threshold=3.0),
        _rival("SafeDelta s=10", "safe_delta", threshold=10.0),
        _rival("gradient patch, 3 steps", "gradient_patch", steps=3),
        _rival("gradient patch, 10 steps", "gradient_patch", steps=10),
    )
}  # fmt: skip
MAIN = (NO_REPAIR, DEFAULT, "nlsr", "safelora", "antidote", "safetylock")
# Also asked other sets of harmful prompts (NLSR's tables 6 and 8).
TRANSFER = (
    NO_REPAIR, ALIGNED, DEFAULT, KINDS, TONES, f"{TONES}, λ=.3", f"{TONES}, λ=.5", TWINS, f"{TWINS}, λ=.3",
    f"{TWINS}, λ=.5", EARLIER, "nlsr", "nlsr P_L=0", "safelora",
)  # fmt: skip
# Cells in which the aligned model is asked something else than in the headline case.
FLOORS = ("news", "orders", "dpo", "trigger", "disguise", "translate")
# Attacks whose harmful prompts have a form of their own; the plain ones are asked as well. Cells have the same names.
HIDDEN = ("trigger", "disguise", "translate")
# Further forms of the published methods and rivals, on the headline case's second seed.
SECOND = "headline-2"
VARIANTS = (
    "nlsr P_L=0", "nlsr by random neurons", "nlsr by wanda", "nlsr by snip", "nlsr by preference_snip",
    "nlsr by magnitude", "nlsr P_L=.8", "nlsr P_L=.2", "nlsr P_L=0, β=0", "nlsr P_L=0, P_SR=.5", "nlsr P_L=0, P_SR=.2",
    "nlsr P_L=0, β=0, P_SR=.5", "nlsr P_L=0, β=0, P_SR=.2",
    "nlsr paper form, P_L=0", "nlsr drawn by chance (Bernoulli)", "nlsr, most similar half", "nlsr, random half",
    "safelora τ=.3", "safelora orthogonal, 105 lowest", "antidote .2", "antidote .1, stored basis", "safetylock α=1",
    "safetylock α=6, biases", "safetylock α=3, biases", "interpolation .7", "SafeDelta s=.1", "SafeDelta s=1",
    "gradient patch, 10 steps", "gram, 90 questions", "nlsr by random neurons, P_SR=.5", "antidote .05", "antidote .02",
    "safelora, 150 lowest", "safelora, 180 lowest", "SafeDelta s=3", "SafeDelta s=10",
)  # fmt: skip
# Further rows on a continued adapter, the case of the NLSR paper.
CONTINUED = "continued-2"
ON_CONTINUED = ("nlsr paper form, P_L=0, P_SR=.5", "nlsr paper form, P_L=0, P_SR=.2", "nlsr paper form, P_L=.5",
                "nlsr P_L=0", "nlsr P_L=0, β=0", "nlsr paper form, P_L=0", "nlsr P_L=0, P_SR=.5",
                "nlsr P_L=0, P_SR=.2", "nlsr P_L=0, β=0, P_SR=.5", "nlsr P_L=0, β=0, P_SR=.2", "gram β=1, p=1, λ=1",
                "nlsr by random neurons", "nlsr's neurons zeroed",
                "nlsr, most similar half", "interpolation .5")  # fmt: skip

# On the preference-aligned model: amplification with a weaker model to go on from, and without.
ON_PREFERENCES = (f"nlsr {AMPLIFIED}", f"nlsr {AMPLIFIED}, P_L=0", f"nlsr {AMPLIFIED}, P_L=0, P_SR=.5",
                  f"nlsr {AMPLIFIED}, P_L=0, P_SR=.2", "nlsr P_L=0, β=0, P_SR=.2")  # fmt: skip

# `gram` with something else deciding where, on the headline case's third seed.
THIRD = "headline-3"
COMBINED = tuple(name for name, row in ROWS.items() if row.rival == "combined")
ON_THIRD = (*COMBINED, "gram λ=.05", "gram λ=.1", "gram λ=.5", "gram λ=1")

# Not asked of the headline case's first seed.
ELSEWHERE = frozenset((*VARIANTS, *ON_CONTINUED, *ON_PREFERENCES, *COMBINED, FRENCH))


def plan() -> Iterator[tuple[Cell, Row]]:
    """What is measured, the most telling first: the run may be stopped at any time."""
    headline = CELLS[HEADLINE]
    seen: set[tuple[str, str]] = set()

    def once(cell: Cell, *names: str) -> Iterator[tuple[Cell, Row]]:
        for name in names:
            if (cell.name, name) not in seen:
                seen.add((cell.name, name))
                yield cell, ROWS[name]

    yield from once(headline, NO_REPAIR, ALIGNED, *MAIN, "nlsr P_L=0", "gram λ=.1", "gram p=1, λ=.1")
    yield from once(CELLS["continued-1"], *MAIN)
    for name in ("poison-0", "poison-20", "news", "poison-01", "poison-10", "orders", "headline-2", "headline-3"):
        yield from once(CELLS[name], NO_REPAIR, DEFAULT, "nlsr", "safelora")
    # The strengths, the controls and the rivals nearest to gram.
    yield from once(
        headline, *(name for name, row in ROWS.items() if row.prompts == "formats" and row.rival != "combined"),
        "interpolation .5",
        "safety vector added", "SafeDelta s=.3", "gradient patch, 3 steps", "nlsr by random neurons",
        "nlsr's neurons zeroed", "safetylock α=3", "antidote .1, rows", "safelora, 105 lowest",
    )  # fmt: skip
    for name in (*HIDDEN, "evade", "evade-all", "dpo"):
        yield from once(CELLS[name], NO_REPAIR, DEFAULT)
    # Where the prompts ask otherwise; and where the attacker had another bundle in hand than the one that repairs.
    for name in (HEADLINE, "evade", "evade-all"):
        yield from once(CELLS[name], KINDS)
    for name in (HEADLINE, "news", "poison-01", "continued-1", "evade"):
        yield from once(CELLS[name], TONES, f"{TONES}, λ=.3", f"{TONES}, λ=.5")
    yield from once(CELLS["translate"], FRENCH, TONES)
    yield from once(headline, TWINS, f"{TWINS}, λ=.3", f"{TWINS}, λ=.5")
    for name in ("news", "poison-01", "continued-1"):
        yield from once(CELLS[name], TWINS, f"{TWINS}, λ=.5")
    for name in ("rank-8", "rank-64", "slow", "continued-20", "continued-2", "news-clean"):
        yield from once(CELLS[name], NO_REPAIR, DEFAULT)
    # What the aligned model itself does where other tasks, or other forms of harmful prompts, are asked: the floor.
    for name in FLOORS:
        yield from once(CELLS[name], ALIGNED)
    yield from once(CELLS[CONTINUED], *MAIN, *ON_CONTINUED)
    yield from once(CELLS[SECOND], *MAIN, *VARIANTS)
    yield from once(CELLS["dpo"], *MAIN, *ON_PREFERENCES)
    yield from once(CELLS[THIRD], *MAIN, *ON_THIRD)
    yield from once(headline, *(name for name in ROWS if name not in ELSEWHERE))
    for cell in CELLS.values():
        yield from once(cell, *MAIN)
