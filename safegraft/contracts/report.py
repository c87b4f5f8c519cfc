"""The report of one realignment: what was measured, what was changed, and with what. A stable schema."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from safegraft.contracts.methods import MethodParameters


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MethodRun(Part):
    """`parameters` as asked for; `resolved` is what `auto` values became."""

    type: str
    parameters: MethodParameters
    resolved: dict[str, str] = {}
    seed: int | None
    similarity: str = Field(description="In words: what `similarity_before` and `similarity_after` measure here.")
    explanation: str = Field(description="In words: what was done to a repaired module.")


class ReferenceUsed(Part):
    id: str
    name: str
    sha256: str


class Digest(Part):
    sha256: str
    bytes: int


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


class Warning(Part):
    code: str
    message: str


class Environment(Part):
    versions: dict[str, str]
    device: str
    dtype: str


class Report(Part):
    schema_version: Literal[1] = 1
    mode: Literal["patch", "analyze"]
    method: MethodRun
    reference: ReferenceUsed
    base_model: str
    lineage: Literal["continued", "fresh"]
    lineage_similarity: float = Field(description="Median cosine of the adapter's update with the aligned adapter's.")
    input: Digest
    output: Digest | None
    summary: Summary
    layers: list[LayerLine]
    modules: list[ModuleLine]
    dropped_files: list[str]
    warnings: list[Warning]
    environment: Environment
    timings: dict[str, float]
