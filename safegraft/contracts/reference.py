"""The manifest of a reference bundle: what the operator built, from what, and what it can serve."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

Lineage = Literal["continued", "fresh"]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BundleFile(Strict):
    sha256: str
    bytes: int


class BaseModule(Strict):
    """One linear layer of the base model. `site` names the input it shares with others (q, k and v, say)."""

    outputs: int
    inputs: int
    site: str


class BaseModelIdentity(Strict):
    """`labels`: the names under which adapters may know this model; only labels, never fetched."""

    labels: list[str]
    config_sha256: str
    architecture: str
    modules: dict[str, BaseModule]


class AlignedModule(Strict):
    """One module of the aligned adapter; `norm` is ‖ΔW_e‖_F of the amplified update."""

    rank: int
    norm: float


class AlignedAdapter(Strict):
    """sha256 of the weights, config_sha256 of adapter_config.json, which holds their scaling."""

    sha256: str
    config_sha256: str
    modules: dict[str, AlignedModule]


class PromptSet(Strict):
    sha256: str
    conversations: int
    tokens: int
    response_tokens: int
    answered_by_model: bool


class BuildParameters(Strict):
    """amplification β; sparsity P_SR; mask_scope: the share is taken per row or over the whole factor.

    max_tokens, answer_tokens: where conversations and the model's own answers were cut; skipped_prefix: how many
    leading tokens, common to all conversations, the input moments leave out.
    """

    amplification: float
    sparsity: float
    mask_scope: Literal["row", "factor"]
    ridge: float
    smallest_pair: float
    max_tokens: int
    answer_tokens: int
    batch_size: int
    skipped_prefix: int
    dtype: str
    device: str


class GramStatistics(Strict):
    """pairs and energy by site: how many eigenpairs of (C_s, C_g) are kept and which share of Σμ they hold."""

    pairs: dict[str, int]
    energy: dict[str, float]


class ReferenceManifest(Strict):
    schema_version: Literal[1] = 1
    name: str
    created_at: int
    safegraft_version: str
    base_model: BaseModelIdentity
    aligned: AlignedAdapter | None
    safety_prompts: PromptSet
    general_prompts: PromptSet | None
    parameters: BuildParameters
    gram: GramStatistics | None
    methods: list[str]
    lineages: list[Lineage]
    files: dict[str, BundleFile]
