"""A realignment in the shapes of OpenAI's fine-tuning API, so that its official client can ask for one.

Fields that mean training are refused unless they ask for nothing: none is ignored without a word.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from safegraft.contracts.base import NO_NUL, Asked, Shown
from safegraft.contracts.listing import PRINTABLE
from safegraft.contracts.methods import MODELS, MethodParameters
from safegraft.contracts.realignment import Metadata, printable

TRAINING_METHODS = ("supervised", "dpo", "reinforcement")


def _unless(accepted: tuple[Any, ...], hint: str) -> BeforeValidator:
    """Refuses every other value, and says what to do instead."""

    def check(value: Any) -> Any:
        if value not in accepted:
            raise PydanticCustomError("not_offered", hint)
        return value

    return BeforeValidator(check)


def _no_training_method(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind in TRAINING_METHODS:
        raise PydanticCustomError(
            "not_offered",
            "{kind} is a way of training, and nothing is trained here; leave method out or use one of {known}",
            {"kind": kind, "known": ", ".join(["auto", *MODELS])},
        )
    return value


NO_TRAINING = "nothing is trained here; the parameters of a repair belong into method, see GET /v1/methods"
Auto = Annotated[Literal["auto"] | None, _unless(("auto", None), NO_TRAINING)]


class Hyperparameters(Asked):
    """Accepted as clients send them by default: `auto`, which asks for nothing."""

    batch_size: Auto = None
    learning_rate_multiplier: Auto = None
    n_epochs: Auto = None


class FineTuningJobCreate(Asked):
    model: str = Field(
        min_length=1,
        max_length=500,
        pattern=NO_NUL,
        description="A reference (`ref_…`), a label of its base model, or `auto`: the reference that fits the adapter.",
    )
    training_file: str = Field(
        max_length=80,
        pattern=PRINTABLE,
        description="The adapter (`adp_…`), or an uploaded file (`file_…`): a .tar or .zip of its folder.",
    )
    suffix: Annotated[str, Field(max_length=64), AfterValidator(printable)] | None = Field(
        default=None, description="The patched adapter's name."
    )
    method: Annotated[MethodParameters | None, BeforeValidator(_no_training_method)] = Field(
        default=None, description="As of a realignment; left out: the recommended one."
    )
    metadata: Metadata | None = None
    strengths: list[Annotated[float, Field(allow_inf_nan=False)]] = Field(
        default=[], max_length=16, description="As of a realignment; each becomes a checkpoint."
    )
    output_rank: Literal["customer", "exact"] = "customer"
    webhook_url: str | None = Field(default=None, max_length=2000, pattern=PRINTABLE)
    hyperparameters: Hyperparameters | None = None
    integrations: Annotated[
        list[Any] | None, Field(max_length=0), _unless((None, []), "integrations are not offered; leave them out")
    ] = None
    seed: Annotated[None, _unless((None,), "a method that draws has a seed of its own; send it as method.seed")] = None
    validation_file: Annotated[None, _unless((None,), NO_TRAINING)] = None


class FineTuningError(Shown):
    code: str
    message: str
    param: str | None = None


class FineTuningJob(Shown):
    """The same job as `GET /v1/realignments/{id}` shows, in OpenAI's words.

    model: the reference; training_file: what was named; fine_tuned_model: the patched adapter; result_files: the
    patched adapters, then the job itself, whose file is the report.
    """

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    model: str
    fine_tuned_model: str | None
    organization_id: str
    training_file: str
    validation_file: None = None
    result_files: list[str]
    trained_tokens: None = None
    error: FineTuningError | None
    hyperparameters: Hyperparameters = Hyperparameters()
    integrations: list[Any] = []
    method: MethodParameters
    metadata: dict[str, str]
    seed: int


class FineTuningEvent(Shown):
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message"] = "message"
    data: dict[str, Any]


class CheckpointMetrics(Shown):
    """From the report's summary: see there. similarity: the median over the modules."""

    step: int
    strength: float | None
    similarity: float | None
    kept: float | None
    edit: float | None
    truncation_error: float | None


class FineTuningCheckpoint(Shown):
    """One patched adapter of a job: one a strength. `id` is the adapter's; step_number counts from 1."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: CheckpointMetrics
    step_number: int
