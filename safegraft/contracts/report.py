"""The report of one realignment: what was measured, what was changed, and with what. A stable schema."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from safegraft.contracts.methods import MethodParameters
from safegraft.contracts.reference import Lineage


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MethodRun(Part):
    """`parameters` as they ran (with `auto` replaced by the recommended method); `resolved`: what else was `auto`."""

    type: str
    parameters: MethodParameters
    resolved: dict[str, str] = {}
    seed: int | None
    similarity: str = Field(description="In words: what `similarity_before` and `similarity_after` measure here.")
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
    bytes: int
    config_sha256: str | None = None


class Spread(Part):
    min: float
    median: float
    max: float


class Summary(Part):
    """kept = ⟨ΔW_out, ΔW_in⟩/‖ΔW_in‖², edit = ‖ΔW_out − ΔW_in‖/‖ΔW_in‖, over all modules together, relative to the
    aligned model. similarity: of the adapter that comes out (`similarity_after`, or what was measured in `analyze`).
    truncation_error: the largest of any module."""

    modules: int
    repaired: int
    similarity: Spread
    similarity_before: Spread
    similarity_after: Spread
    kept: float
    edit: float
    truncation_error: float


class LayerLine(Part):
    layer: int | None
    similarity_before: float
    similarity_after: float
    modules: int
    repaired: int


class ModuleLine(Part):
    """`rank` is the customer's."""

    name: str
    layer: int | None
    kind: str
    rank: int
    similarity_before: float
    similarity_after: float
    repaired: bool
    selection_probability: float | None = None
    kept: float
    edit: float
    truncation_error: float


class Variant(Part):
    """One of several strengths that were asked for at once."""

    strength: float
    output: Digest | None
    summary: Summary


class Distance(Part):
    """Next-token distributions at the answers' first tokens, over all probe prompts: mean Kullback-Leibler divergence
    in nats, and the share of prompts on which the likeliest token is the same."""

    divergence: float
    same_token: float


class Probe(Part):
    """base: the model that the adapter sits on; before, after: with the customer's and with the patched adapter."""

    prompts: int
    prompts_sha256: str
    before_from_base: Distance
    after_from_base: Distance
    after_from_before: Distance


class Warning(Part):
    code: str
    message: str


class Environment(Part):
    versions: dict[str, str]
    device: str
    dtype: str


class Report(Part):
    """With several strengths, `output`, `summary`, `layers` and `modules` are those of the first, which is the one in
    `method.parameters`; `variants` hold the curve."""

    schema_version: Literal[2] = 2
    mode: Literal["patch", "analyze"]
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
    modules: list[ModuleLine]
    side_cars: dict[str, str] = Field(default={}, description="SHA-256 by name of the files delivered beside it.")
    strength_parameter: str | None = None
    variants: list[Variant] = []
    probe: Probe | None = None
    dropped_files: list[str]
    warnings: list[Warning]
    environment: Environment
    timings: dict[str, float]
