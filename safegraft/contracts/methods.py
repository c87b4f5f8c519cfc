"""Parameters of the repair methods: one model a method, and their union, told apart by `type`.

`STRENGTH` names the parameter that `strengths` varies: a job may ask for several values of it at once.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from safegraft.contracts.base import Asked
from safegraft.errors import InvalidParameter

Seed = Annotated[int, Field(ge=0, lt=2**32, description="Of what is drawn; only used where something is.")]


class Parameters(Asked):
    """Of a method."""


class AutoParameters(Parameters):
    """The method that is recommended for this adapter and reference; the report says which, and why."""

    type: Literal["auto"] = "auto"


class NlsrParameters(Parameters):
    """Neuron-level safety realignment (arXiv 2412.12497): transplant safety-critical neurons into damaged modules."""

    type: Literal["nlsr"] = "nlsr"
    form: Literal["auto", "factor", "paper", "neuron"] = Field(
        default="auto",
        description="What is transplanted. `factor`: masked entries of A and of B (as published code does). `paper`: "
        "the masked product without cross terms, recompressed to the adapter's rank. `neuron`: whole output rows; the "
        "only form for adapters that were not continued from the aligned adapter. `auto`: `factor` for continued "
        "adapters, `neuron` for the others.",
    )
    scorer: Literal["low_rank", "wanda", "snip", "preference_snip", "magnitude", "random"] = Field(
        default="low_rank",
        description="What makes an entry (or a row) safety-critical. `low_rank`: the paper's; `wanda`: weight times "
        "input norm; `snip`, `preference_snip`: weight times gradient, of the safe answers' loss or of a preference "
        "loss, where the reference was built with them; `magnitude`, `random`: controls.",
    )
    selection: Literal["lowest", "bernoulli", "highest", "random"] = Field(
        default="lowest",
        description="Which modules are repaired: those with the lowest similarity, or a seeded draw that favours them; "
        "`highest` and `random` are controls.",
    )
    skip_share: float = Field(default=0.5, ge=0.0, le=1.0, description="P_L: the share of modules left alone.")
    spread: float = Field(
        default=0.4,
        ge=0.0,
        le=1.0,
        description="Only for `bernoulli`: how far the probability of being skipped rises from the least to the most "
        "similar module, centred on `skip_share`.",
    )
    amplification: float | None = Field(
        default=None,
        ge=0.0,
        le=10.0,
        description="β of the weak-to-strong extrapolation; left out: the one that the reference was built with.",
    )
    seed: Seed = 0


class GramParameters(Parameters):
    """Activation-weighted transplant: like the reference on safety prompts' inputs, like the customer elsewhere."""

    type: Literal["gram"] = "gram"
    general_weight: float = Field(
        default=0.2,
        ge=1e-2,
        le=1e3,
        description="λ: how much the customer's behaviour on general inputs counts against the reference's on safety "
        "inputs. Smaller repairs more and costs more of the fine-tuning.",
    )
    steepness: float = Field(
        default=2.0,
        ge=1.0,
        le=8.0,
        description="p in the gain μᵖ/(μᵖ + λᵖ) with which a direction of inputs is taken over, μ being how much more "
        "energy safety prompts have there than general ones. 1 is K = C_s(C_s + λC_g)⁻¹; larger spares what both do.",
    )
    amplification: float = Field(
        default=0.0,
        ge=0.0,
        le=10.0,
        description="β: how far beyond the aligned adapter the transplanted behaviour lies. Above 0 it needs an "
        "aligned adapter, refuses more, cuts answers short, and is recompressed to the adapter's rank.",
    )
    pairs: int | None = Field(
        default=None, ge=1, le=2**20, description="Use only so many leading eigenpairs; left out: all that are kept."
    )


class SafeLoraParameters(Parameters):
    """SafeLoRA (arXiv 2405.16833): project updates that left the subspace of the alignment back into it."""

    type: Literal["safelora"] = "safelora"
    projector: Literal["paper", "orthogonal"] = Field(
        default="paper",
        description="`paper`: C = V·Vᵀ/‖V‖, which mostly shrinks; `orthogonal`: the projector onto V's column space.",
    )
    selection: Literal["threshold", "lowest"] = Field(
        default="threshold",
        description="Which modules are projected: those whose cosine with their projection is at most `threshold`, or "
        "the `modules` with the lowest.",
    )
    threshold: float = Field(default=0.5, ge=-1.0, le=1.0, description="τ; only for `threshold`.")
    modules: int = Field(default=10, ge=0, le=100_000, description="K; only for `lowest`.")


class AntidoteParameters(Parameters):
    """Antidote (arXiv 2408.09600): zero the entries that matter most on harmful prompts."""

    type: Literal["antidote"] = "antidote"
    density: float = Field(
        default=0.1, ge=0.0, le=1.0, description="The share that is pruned: of each row's entries, or of the rows."
    )
    basis: Literal["canonical", "stored", "rows"] = Field(
        default="canonical",
        description="What is pruned. `canonical`: entries of the factors in the basis of their SVD; `stored`: in the "
        "basis in which they were saved, as published code does, which depends on how training began; `rows`: output "
        "rows, which no basis changes.",
    )
    spare: Literal["none", "general", "safety"] = Field(
        default="none",
        description="What is not pruned although harmful prompts need it: nothing; what general prompts need as much; "
        "the reference's safety-critical neurons (only with the basis `rows`).",
    )


class SafetyLockParameters(Parameters):
    """SafetyLock (arXiv 2410.10343): push attention heads along their direction from unsafe to safe answers."""

    type: Literal["safetylock"] = "safetylock"
    strength: float = Field(default=6.0, ge=0.0, le=100.0, description="α: the push in standard deviations.")
    heads: int = Field(default=24, ge=1, le=100_000, description="K: how many heads, those that tell answers apart.")
    output: Literal["rank_one", "lora_bias", "side_car"] = Field(
        default="rank_one",
        description="How it is delivered. `rank_one`: inside of the factors, approximate, loads everywhere; "
        "`lora_bias`: as biases of lora_B, exact, loads in PEFT alone; `side_car`: the adapter stays as it is, the "
        "biases come in a file of their own.",
    )


class NoneParameters(Parameters):
    """No repair, as a control: returns the input's bytes."""

    type: Literal["none"] = "none"


Method = (
    NlsrParameters | GramParameters | SafeLoraParameters | AntidoteParameters | SafetyLockParameters | NoneParameters
)
MethodParameters = Annotated[AutoParameters | Method, Field(discriminator="type")]
METHOD_PARAMETERS: TypeAdapter[AutoParameters | Method] = TypeAdapter(MethodParameters)
MODELS: dict[str, type[Parameters]] = {
    "nlsr": NlsrParameters,
    "gram": GramParameters,
    "safelora": SafeLoraParameters,
    "antidote": AntidoteParameters,
    "safetylock": SafetyLockParameters,
    "none": NoneParameters,
}
DEFAULT_METHOD = "auto"
STRENGTH = {
    "nlsr": "skip_share",
    "gram": "general_weight",
    "safelora": "threshold",
    "antidote": "density",
    "safetylock": "strength",
}
MAX_STRENGTHS = 16


def strength_of(parameters: "AutoParameters | Method") -> float | None:
    """The value of the parameter that `strengths` varies; None where the method has none."""
    found: float | None = getattr(parameters, STRENGTH.get(parameters.type, ""), None)
    return found


def strength_name(strength: float) -> str:
    """A strength as people write it, and as its folder is named: 0.3, 1, 0.05."""
    return f"{strength:g}"


def _bounds(parameters: Method, name: str) -> str:
    schema = type(parameters).model_json_schema()["properties"][name]
    return f"{schema['minimum']:g} to {schema['maximum']:g}"


def parameters_by_strength(parameters: Method, strengths: Sequence[float]) -> dict[float | None, Any]:
    """One set of parameters a strength; with none, the parameters as they are, under None. Raises InvalidParameter."""
    if not strengths:
        return {None: parameters}
    strengths = [strength + 0.0 for strength in strengths]  # -0 is 0
    name = STRENGTH.get(parameters.type)
    if name is None:
        raise InvalidParameter(f"{parameters.type} has no strength.", code="bad_strengths", param="strengths")
    if isinstance(parameters, SafeLoraParameters) and parameters.selection == "lowest":
        raise InvalidParameter(
            "safelora's strength is its threshold, which the selection `lowest` does not use.",
            code="bad_strengths",
            param="strengths",
        )
    if len(set(map(strength_name, strengths))) != len(strengths) or len(strengths) > MAX_STRENGTHS:
        raise InvalidParameter(
            f"strengths: at most {MAX_STRENGTHS} values, each of them once.", code="bad_strengths", param="strengths"
        )
    found: dict[float | None, Any] = {}
    for strength in strengths:
        try:
            found[strength] = type(parameters).model_validate(parameters.model_dump() | {name: strength})
        except ValueError as error:
            raise InvalidParameter(
                f"{strength:g} is no {name} of {parameters.type}: that goes from {_bounds(parameters, name)}.",
                code="bad_strengths",
                param="strengths",
            ) from error
    return found
