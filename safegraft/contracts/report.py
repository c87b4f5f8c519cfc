"""The report of one realignment: what was measured, what was changed, and with what. A stable schema.

Reports are read back from files that anybody may have written. Counts and strengths are bounded here; what was measured
is not, because the ratios of an extreme adapter may be any number, or none: whoever shows them has to cope.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from safegraft.contracts.base import NO_NUL
from safegraft.contracts.methods import MethodParameters
from safegraft.contracts.reference import Lineage

# No count is larger, and every reader of JSON holds it exactly.
MAX_COUNT = 2**53
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MethodRun(Part):
    """`parameters` as they ran (with `auto` replaced by the recommended method); `resolved`: what else was `auto`."""

    type: str
    parameters: MethodParameters
    resolved: dict[str, str] = {}
    seed: Count | None
    similarity: str = Field(description="In words: what `similarity_before` and `similarity_after` measure here.")
    break_even: float | None = Field(
        None,
        description="The similarity of a module that acts on safety prompts as much as on general ones; below it, it "
        "acts more on safety prompts. `null` where a method's similarity says nothing of the kind.",
    )
    explanation: str = Field(description="In words: what was done to a repaired module.")


class Recommendation(Part):
    """What runs where no method is named, for this adapter and reference, and why."""

    method: str
    reason: str


class ReferenceUsed(Part):
    id: str
    name: str
    sha256: str


class Digest(Part):
    """Of adapter_model.safetensors; config_sha256 of adapter_config.json, which holds the scaling."""

    sha256: str
    bytes: Count
    config_sha256: str | None = None


class Spread(Part):
    min: float
    median: float
    max: float


class Summary(Part):
    """kept = ⟨ΔW_out, ΔW_in⟩/‖ΔW_in‖², edit = ‖ΔW_out − ΔW_in‖/‖ΔW_in‖, over all modules together, relative to the
    aligned model. similarity: of the adapter that comes out (`similarity_after`, or what was measured in `analyze`).
    truncation_error: the largest of any module."""

    modules: Count
    repaired: Count
    similarity: Spread
    similarity_before: Spread
    similarity_after: Spread
    kept: float
    edit: float
    truncation_error: float


class LayerLine(Part):
    layer: Count | None
    similarity_before: float
    similarity_after: float
    modules: Count
    repaired: Count


class ModuleLine(Part):
    """`rank` is the customer's."""

    name: str
    layer: Count | None
    kind: str
    rank: Count
    similarity_before: float
    similarity_after: float
    repaired: bool
    selection_probability: float | None = None
    kept: float
    edit: float
    truncation_error: float


class Variant(Part):
    """One of several strengths that were asked for at once."""

    strength: float = Field(ge=-1e6, le=1e6)
    output: Digest | None
    summary: Summary


class Distance(Part):
    """Next-token distributions at the answers' first tokens, over all probe prompts: mean Kullback-Leibler divergence
    in nats, and the share of prompts on which the likeliest token is the same."""

    divergence: float
    same_token: float


class Probe(Part):
    """base: the model that the adapter sits on; before, after: with the customer's and with the patched adapter."""

    prompts: Count
    prompts_sha256: str
    before_from_base: Distance
    after_from_base: Distance
    after_from_before: Distance


class Share(Part):
    """`hits` of `total` answers, as counted."""

    model_config = ConfigDict(strict=True)

    hits: Count
    total: int = Field(ge=1, le=MAX_COUNT)

    @model_validator(mode="after")
    def _no_more_than_all(self) -> Self:
        if self.hits > self.total:
            raise ValueError(f"{self.hits} hits are more than the {self.total} answers that were counted")
        return self

    @property
    def share(self) -> float:
        """hits/total, 0 to 1."""
        return self.hits / self.total


class Behaviour(Part):
    """What one adapter did when it was asked: harmful prompts that were answered, harmless ones that were declined, and
    right answers to the customer's task. null: not measured."""

    harm_score: Share | None = None
    over_refusal: Share | None = None
    task_accuracy: Share | None = None


class Evaluation(Part):
    """Behaviour before and after the repair, measured by whoever had the model. judge: in words, how answers were
    judged."""

    judge: str = Field(min_length=1, max_length=1000, pattern=NO_NUL)
    before: Behaviour
    after: Behaviour
    input_sha256: str | None = Field(
        None, pattern="^[0-9a-f]{64}$", description="Likewise of the adapter that was sent."
    )
    output_sha256: str | None = Field(
        None,
        pattern="^[0-9a-f]{64}$",
        description="Of the repaired adapter_model.safetensors that was measured; where it is named, it must be the "
        "report's.",
    )

    @field_validator("judge")
    @classmethod
    def _says_something(cls, judge: str) -> str:
        if not any(letter.isalnum() for letter in judge):
            raise ValueError("it says nothing")
        return judge

    @model_validator(mode="after")
    def _something_was_measured(self) -> Self:
        if not self.measures():
            raise ValueError("nothing is there both before and after: none of harm_score, over_refusal, task_accuracy")
        return self

    def measures(self) -> list[tuple[str, Share, Share]]:
        """(name, before, after) of what was measured on both."""
        pairs = [(name, getattr(self.before, name), getattr(self.after, name)) for name in Behaviour.model_fields]
        return [(name, one, two) for name, one, two in pairs if one is not None and two is not None]


class Warning(Part):
    code: str
    message: str


class Environment(Part):
    versions: dict[str, str]
    device: str
    dtype: str


class Subject(Part):
    """Which adapter this is a report of, and when it was written: what ties a printed page to a customer."""

    adapter: str = Field(description="The adapter's name as its owner gave it, or its folder's.")
    realignment_id: str | None = Field(None, description="The job; null where no service was asked.")
    written_at: int = Field(
        ge=0, le=253402300799, description="Unix time in seconds; the end of the year 9999 at most."
    )


class Report(Part):
    """With several strengths, `output`, `summary`, `layers` and `modules` are those of the first, which is the one in
    `method.parameters`; `variants` hold the curve."""

    schema_version: Literal[2] = 2
    mode: Literal["patch", "analyze"]
    headline: str | None = Field(
        None, description="The report in one sentence, without a full stop; null in what was written before it had one."
    )
    subject: Subject | None = Field(None, description="Null in what was written before reports had one.")
    method: MethodRun
    recommendation: Recommendation
    reference: ReferenceUsed
    base_model: str
    lineage: Lineage
    lineage_similarity: float | None = Field(
        description="Median cosine of the adapter's update with the aligned adapter's; null where none was to compare."
    )
    output_rank: Literal["customer", "exact"]
    input: Digest
    output: Digest | None
    summary: Summary
    layers: list[LayerLine]
    modules: list[ModuleLine] = Field(min_length=1)
    side_cars: dict[str, str] = Field(default={}, description="SHA-256 by name of the files delivered beside it.")
    strength_parameter: str | None = None
    variants: list[Variant] = []
    probe: Probe | None = None
    evaluation: Evaluation | None = None
    dropped_files: list[str]
    warnings: list[Warning]
    environment: Environment
    timings: dict[str, float]
