"""OpenAI's fine-tuning jobs over the same state machine: what they ask for, and how they are shown."""

from contextlib import suppress

from anyio import from_thread

from safegraft.contracts.fine_tuning import (
    CheckpointMetrics,
    FineTuningCheckpoint,
    FineTuningError,
    FineTuningEvent,
    FineTuningJob,
    FineTuningJobCreate,
)
from safegraft.contracts.methods import AutoParameters
from safegraft.contracts.realignment import Event, Realignment, RealignmentCreate, StrengthResult
from safegraft.errors import Conflict, Incompatible, NotFound, SafegraftError
from safegraft.stores import options
from safegraft.stores.jobs import Created, Origins, hash_of
from safegraft.stores.objects import remove_or_leave
from service.auth import Principal
from service.dependencies import Services
from service.submission import submit
from service.uploads import adapter_from_files

AUTO = "auto"
# How the client named what the core names otherwise, and what it can do about it.
PARAMS = {
    "adapter_id": "training_file",
    "file_ids": "training_file",
    "file_id": "training_file",
    "reference_id": "model",
    "name": "suffix",
}
HINTS = {
    "reference_ambiguous": "Name one as model.",
}
LEVELS = {"failed": "error", "requeued": "warn", "handed_back": "warn", "cancelling": "warn", "cancelled": "warn"}


def start(
    here: Services, asking: Principal, body: FineTuningJobCreate, *, idempotency_key: str | None, retried: bool
) -> Created:
    """Makes the adapter where a file is named, and queues its realignment. Runs in a thread of the event loop's.

    retried: the client says that it sent this before, without a key. Raises what `submit` raises, and NotFound
    (`model_not_found`, `file_not_found`), Incompatible (`reference_ambiguous`).
    """
    try:
        return _start(here, asking, body, idempotency_key, retried)
    except SafegraftError as error:
        error.param = PARAMS.get(error.param or "", error.param)
        error.hint = HINTS.get(error.code, error.hint)
        raise


def _start(
    here: Services, asking: Principal, body: FineTuningJobCreate, idempotency_key: str | None, retried: bool
) -> Created:
    sent = hash_of(body)
    first = None
    # Before an adapter is made: a repeat must not make it again.
    if idempotency_key:
        first = here.jobs.replay(asking.tenant, sent, idempotency_key)
    elif retried:
        first = here.jobs.sent_before(asking.tenant, sent, "fine_tuning")
    if first is not None:
        return Created(first, replayed=True)
    reference_id = _reference(here, body.model)
    if not body.training_file.startswith("file"):
        return _submit(here, asking, body, body.training_file, reference_id, sent, idempotency_key, retried)
    # What receives files lives on the event loop; this runs in one of its threads.
    # The suffix is the patched adapter's name: under it nobody is to find the one that came.
    made = from_thread.run(adapter_from_files, here, asking, [body.training_file], "").id
    used = None
    try:
        created = _submit(here, asking, body, made, reference_id, sent, idempotency_key, retried)
        used = created.job.adapter_id
        return created
    finally:
        if used != made:
            # Refused, or a repeat that came in at the same time was faster: nobody knows of this adapter.
            with suppress(Conflict):
                remove_or_leave(here.objects, here.adapters.delete(asking.tenant, made))


def _submit(
    here: Services,
    asking: Principal,
    body: FineTuningJobCreate,
    adapter_id: str,
    reference_id: str | None,
    sent: str,
    idempotency_key: str | None,
    retried: bool,
) -> Created:
    request = RealignmentCreate(
        adapter_id=adapter_id,
        reference_id=reference_id,
        method=body.method or AutoParameters(),
        strengths=body.strengths,
        output_rank=body.output_rank,
        name=body.suffix or None,
        metadata=body.metadata or {},
        webhook_url=body.webhook_url,
    )
    origins = Origins(api="fine_tuning", training_file=body.training_file, request_hash=sent)
    return submit(
        here,
        asking,
        request,
        idempotency_key=idempotency_key,
        retried=retried and not idempotency_key,
        origins=origins,
    )


def _reference(here: Services, model: str) -> str | None:
    """The reference that is meant, of several the operator's preferred one; None where the adapter decides."""
    if model == AUTO:
        return None
    installed = here.references.installed()
    found = [item.id for item in installed if model == item.id or model in item.manifest.base_model.labels]
    preferred = options.get(here.database, options.DEFAULT_REFERENCE)
    if preferred in found:
        return str(preferred)
    if len(found) > 1:
        raise Incompatible(
            f"{len(found)} installed references know this model: {', '.join(found)}.",
            code="reference_ambiguous",
            param="model",
        )
    if not found:
        known = sorted({label for item in installed for label in item.manifest.base_model.labels})
        raise NotFound(
            f"No installed reference knows the model {model[:200]!r}.",
            code="model_not_found",
            param="model",
            hint=f"Known: {', '.join(['auto', *known])[:1000]}; or the id of a reference, see GET /v1/references.",
        )
    return found[0]


def job_of(job: Realignment, tenant: str) -> FineTuningJob:
    """A realignment, however it was made, as a fine-tuning job."""
    error = job.error and FineTuningError(code=job.error.code, message=job.error.message)
    return FineTuningJob(
        id=job.id,
        created_at=job.created_at,
        finished_at=job.finished_at,
        estimated_finish=job.estimated_finish,
        status="running" if job.status == "cancelling" else job.status,
        model=job.reference_id,
        fine_tuned_model=job.result.adapter_id if job.result else None,
        organization_id=tenant,
        training_file=job.training_file or job.adapter_id,
        result_files=[*(item.adapter_id for item in _patched(job)), job.id] if job.result else [],
        error=error,
        method=job.method,
        metadata=job.metadata,
        seed=getattr(job.method, "seed", 0),
    )


def event_of(event: Event) -> FineTuningEvent:
    return FineTuningEvent.model_validate(
        {
            "id": event.id,
            "created_at": event.created_at,
            "level": LEVELS.get(event.type, "info"),
            "message": event.message,
            "data": {"event": event.type} | event.data,
        }
    )


def checkpoints_of(job: Realignment) -> list[FineTuningCheckpoint]:
    """The job's patched adapters, the last one first; none before it has succeeded."""
    found = []
    for step, item in enumerate(_patched(job), start=1):
        metrics = CheckpointMetrics(
            step=step,
            strength=item.strength if job.strengths else None,
            similarity=item.summary and item.summary.similarity.median,
            kept=item.summary and item.summary.kept,
            edit=item.summary and item.summary.edit,
            truncation_error=item.summary and item.summary.truncation_error,
        )
        found.append(
            FineTuningCheckpoint(
                id=item.adapter_id,
                created_at=job.finished_at or job.created_at,
                fine_tuned_model_checkpoint=item.adapter_id,
                fine_tuning_job_id=job.id,
                metrics=metrics,
                step_number=step,
            )
        )
    return found[::-1]


def _patched(job: Realignment) -> list[StrengthResult]:
    """One a strength; without strengths the one there is, or none (`analyze`)."""
    if job.result is None:
        return []
    if job.result.variants or job.result.adapter_id is None:
        return job.result.variants
    return [StrengthResult(strength=0.0, adapter_id=job.result.adapter_id, summary=job.result.summary)]
