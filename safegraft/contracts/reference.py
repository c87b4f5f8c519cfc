"""The manifest of a reference bundle: what the operator built, from what, and what it can serve."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

Lineage = Literal["continued", "fresh", "foreign"]
Source = Literal["adapter", "two_adapters", "checkpoints", "none"]
Scorer = Literal["low_rank", "wanda", "snip", "preference_snip"]
SCHEMA_VERSION = 2


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
    """One module of the aligned update Δ_a = scaling·B·A; `norm` is ‖Δ_e‖_F of the amplified one.

    weak_rank: of the weak adapter there (two adapters only); off_basis: the share of the weak update's norm that does
    not lie in A's rows, which the forms on factors cannot extrapolate; truncation_error: what was cut off when the
    difference of two checkpoints was brought to this rank, relative to its norm.
    """

    rank: int
    scaling: float
    norm: float
    weak_rank: int | None = None
    off_basis: float = 0.0
    truncation_error: float = 0.0


class Origin(Strict):
    """Where the aligned update comes from. adapter: a LoRA on the unaligned base; two_adapters: a weak one beside it,
    to be extrapolated from; checkpoints: the difference of two full models; none: the base model is the aligned model
    itself, and there is no update.

    files: the SHA-256 of every file that was read for it.
    """

    source: Source
    files: dict[str, str]


class PromptSet(Strict):
    """forward_passes: how often the model read the whole set for its statistics. Answering, and the passes
    over pairs that preference_snip takes, are not counted."""

    sha256: str
    conversations: int
    tokens: int
    response_tokens: int
    answered_by_model: bool
    forward_passes: int


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
    max_pairs: int | None
    max_tokens: int
    answer_tokens: int
    batch_size: int
    skipped_prefix: int
    rank: int | None
    dtype: str
    device: str


class GramStatistics(Strict):
    """pairs and energy by site: how many eigenpairs of (C_s, C_g) are kept and which share of Σμ they hold."""

    pairs: dict[str, int]
    energy: dict[str, float]


class HeadLayer(Strict):
    """The attention heads that one output projection reads. accuracy: of a linear probe for each head, on answers that
    it did not see averaged with those it did; separation: of safe from unsafe answers along the head's direction, in
    standard deviations, which decides between equal accuracies; unexplained: the error of a rank-one update in place
    of a bias there."""

    heads: int
    accuracy: list[float]
    separation: list[float]
    unexplained: float


class SafetyLockStatistics(Strict):
    """By output projection. source: `measured`, or the SHA-256 of the .safelock file that directions came from."""

    source: str
    layers: dict[str, HeadLayer]


class ReferenceManifest(Strict):
    schema_version: Literal[2] = 2
    name: str
    created_at: int
    safegraft_version: str
    base_model: BaseModelIdentity
    origin: Origin
    aligned: dict[str, AlignedModule]
    scorers: list[Scorer]
    safety_prompts: PromptSet
    general_prompts: PromptSet | None
    unsafe_prompts: PromptSet | None
    parameters: BuildParameters
    gram: GramStatistics | None
    safetylock: SafetyLockStatistics | None
    methods: list[str]
    lineages: list[Lineage]
    files: dict[str, BundleFile]
