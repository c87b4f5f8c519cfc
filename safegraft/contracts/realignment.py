"""A realignment job as the API shows it, and the request that creates one."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from safegraft.contracts.base import NO_NUL, Asked, Shown
from safegraft.contracts.listing import PRINTABLE
from safegraft.contracts.methods import AutoParameters, MethodParameters
from safegraft.contracts.report import Summary

Status = Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled"]
Metadata = Annotated[
    dict[
        Annotated[str, Field(min_length=1, max_length=64, pattern=NO_NUL)],
        Annotated[str, Field(max_length=512, pattern=NO_NUL)],
    ],
    Field(max_length=16),
]


def printable(text: str) -> str:
    if not text.isprintable():
        raise PydanticCustomError("printable", "only printable characters are accepted")
    return text


Name = Annotated[str, Field(max_length=200), AfterValidator(printable)]


class RealignmentCreate(Asked):
    adapter_id: str = Field(max_length=80, pattern=PRINTABLE)
    reference_id: str | None = Field(
        default=None,
        max_length=80,
        pattern=PRINTABLE,
        description="Left out: the installed reference that fits the adapter; an error if several do.",
    )
    method: MethodParameters = Field(
        default=AutoParameters(), description="Left out: the method that is recommended for this adapter and reference."
    )
    mode: Literal["patch", "analyze"] = "patch"
    strengths: list[Annotated[float, Field(allow_inf_nan=False)]] = Field(
        default=[],
        max_length=16,
        description="Several values of the method's strength parameter (see `GET /v1/methods`) at once: one patched "
        "adapter each, and one report with the curve.",
    )
    output_rank: Literal["customer", "exact"] = Field(
        default="customer",
        description="`customer`: the adapter's own rank and configuration; `exact`: the rank that the repair needs.",
    )
    name: Name | None = Field(
        default=None, description="The patched adapter's; left out: the adapter's own name and what was done to it."
    )
    metadata: Metadata = {}
    webhook_url: str | None = Field(
        default=None,
        max_length=2000,
        pattern=PRINTABLE,
        description="The address of a registered webhook endpoint; it hears of this job's end, whatever it subscribes "
        "to.",
    )


class Progress(Shown):
    """`stage`: waiting, fetch, compare, score (where modules are chosen by it), patch, publish, done; `done` of `total`
    modules within it."""

    stage: str
    done: int
    total: int


class StrengthResult(Shown):
    strength: float
    adapter_id: str
    summary: Summary | None = None


class MeasuredShare(Shown):
    """`hits` of `total`; low and high: Wilson's 95 % interval of the share."""

    hits: int
    total: int
    share: float
    low: float
    high: float


class MeasuredBehaviour(Shown):
    """null: not measured, or only on one side."""

    harm_score: MeasuredShare | None = None
    over_refusal: MeasuredShare | None = None
    task_accuracy: MeasuredShare | None = None


class ResultEvaluation(Shown):
    """What the tenant measured with the adapter that came and with the one that came out. summary: in words. caution:
    what of it speaks against serving the adapter, null where nothing does."""

    summary: str
    caution: str | None = None
    judge: str
    before: MeasuredBehaviour
    after: MeasuredBehaviour
    input_sha256: str | None
    output_sha256: str | None
    created_at: int


class Result(Shown):
    """`adapter_id` is null for `analyze`; with several strengths it is that of the first. method: the one that ran,
    also where `auto` was asked for; null of jobs that ended before this was kept. side_car_urls: files that a method
    delivers beside the adapter. summary: that of the report. evaluation: what was measured of its behaviour and sent
    here afterwards."""

    adapter_id: str | None
    method: str | None = None
    summary: Summary | None = None
    variants: list[StrengthResult] = []
    side_car_urls: list[str] = []
    report_url: str
    evaluation: ResultEvaluation | None = None


class Failure(Shown):
    """`class` tells whose move it is: `user` (another request is needed) or `system` (the operator's)."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, serialize_by_alias=True)

    code: str
    message: str
    fault: Literal["user", "system"] = Field(alias="class")


class Realignment(Shown):
    id: str
    object: Literal["realignment"] = "realignment"
    status: Status
    progress: Progress
    attempt: int
    mode: Literal["patch", "analyze"]
    method: MethodParameters
    strengths: list[float]
    output_rank: Literal["customer", "exact"]
    reference_id: str
    adapter_id: str
    training_file: str | None = Field(
        default=None, description="The uploaded file that its adapter was made from, where the job was made with one."
    )
    batch_id: str | None = None
    metadata: dict[str, str]
    result: Result | None
    error: Failure | None
    created_at: int
    started_at: int | None
    finished_at: int | None
    estimated_finish: int | None = Field(
        default=None, description="While it runs: when it will have ended, extrapolated from its progress."
    )
    expires_at: int | None = Field(default=None, description="When its record, report and bytes are deleted.")


class RealignmentDeleted(Shown):
    id: str
    object: Literal["realignment"] = "realignment"
    deleted: bool = True


class Event(Shown):
    id: str
    object: Literal["realignment.event"] = "realignment.event"
    type: str
    message: str
    data: dict[str, Any]
    created_at: int
