"""A batch: a tenant's adapters, realigned against one reference, a canary of them first."""

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from safegraft.contracts.base import Asked, Shown
from safegraft.contracts.listing import PRINTABLE
from safegraft.contracts.methods import AutoParameters, MethodParameters
from safegraft.contracts.realignment import Failure, Metadata

BatchStatus = Literal["canary", "running", "succeeded", "stopped", "cancelled"]
MemberStatus = Literal["waiting", "queued", "running", "succeeded", "failed", "cancelled"]
MAX_ADAPTERS = 10_000
# A share of fewer ended jobs says little; only a canary is judged on as few as it has.
MIN_JUDGED = 10
Id = Annotated[str, Field(max_length=80, pattern=PRINTABLE)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class BatchSelect(Asked):
    """The tenant's uploaded adapters whose last succeeded patch used another reference than the batch's."""

    previous_reference_id: Id | None = Field(default=None, description="Only those that it was this one.")
    metadata: Metadata = Field(
        default={}, description="Only those of which a succeeded realignment carried all of these values."
    )


class Canary(Asked):
    """A share of the adapters, drawn by chance, at least one. They come first; the rest waits for how they end."""

    share: Finite = Field(default=0.1, gt=0.0, le=1.0)


class StopRule(Asked):
    """When a batch stops by itself. Judged when the canary has ended, then over all that have ended so far as soon as
    these are 10, and when all have ended. Cancelled jobs do not count."""

    max_failed_share: Finite | None = Field(
        default=0.1, ge=0.0, le=1.0, description="Failed jobs and refused adapters, of all that have ended."
    )
    min_similarity: Finite | None = Field(
        default=None, description="The mean over the adapters of their report's `summary.similarity.median`."
    )
    max_edit: Finite | None = Field(
        default=None, ge=0.0, description="The mean over the adapters of their report's `summary.edit`."
    )


class BatchPlan(Asked):
    """What is done to each adapter, and how fast."""

    reference_id: Id
    select: BatchSelect | None = Field(default=None, description="Instead of `adapter_ids`.")
    method: MethodParameters = AutoParameters()
    mode: Literal["patch", "analyze"] = "patch"
    output_rank: Literal["customer", "exact"] = "customer"
    canary: Canary | None = None
    stop_rule: StopRule | None = Field(
        default=StopRule(), description="Left out: more than a tenth of failures stop it; null: nothing does."
    )
    metadata: Metadata = Field(default={}, description="Of the batch and of each of its jobs.")
    webhook_url: str | None = Field(
        default=None,
        max_length=2000,
        pattern=PRINTABLE,
        description="The address of a registered webhook endpoint; it hears of this batch's end, whatever it "
        "subscribes to.",
    )


class BatchCreate(BatchPlan):
    adapter_ids: list[Id] | None = Field(default=None, min_length=1, max_length=MAX_ADAPTERS)

    @model_validator(mode="after")
    def _one_selection(self) -> "BatchCreate":
        if (self.adapter_ids is None) == (self.select is None):
            raise PydanticCustomError("one_selection", "name either adapter_ids or select")
        if self.adapter_ids is not None and len(set(self.adapter_ids)) != len(self.adapter_ids):
            raise PydanticCustomError("twice", "an adapter is named twice in adapter_ids")
        return self


class BatchCounts(Shown):
    """Adapters by what became of them; the others add up to `total`. waiting: no job was made yet; failed: the job
    failed, or none could be made; cancelled: also those that a stopped batch never came to."""

    total: int
    waiting: int = 0
    queued: int = 0
    running: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0


class RealignmentBatch(Shown):
    """canary → running → succeeded: all have ended within the stop rule; stopped: by the rule, with the `reason` in
    words; cancelled: by a request."""

    id: str
    object: Literal["realignment_batch"] = "realignment_batch"
    status: BatchStatus
    counts: BatchCounts
    reason: str | None
    reference_id: str
    select: BatchSelect | None
    method: MethodParameters
    mode: Literal["patch", "analyze"]
    output_rank: Literal["customer", "exact"]
    canary: Canary | None
    stop_rule: StopRule | None
    metadata: dict[str, str]
    created_at: int
    finished_at: int | None


class BatchAdapter(Shown):
    """One adapter of a batch; `id` is the adapter's. realignment_id: null where no job was made."""

    id: str
    object: Literal["realignment_batch.adapter"] = "realignment_batch.adapter"
    status: MemberStatus
    canary: bool
    realignment_id: str | None
    error: Failure | None
