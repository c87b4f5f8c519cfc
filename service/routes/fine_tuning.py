"""/v1/fine_tuning/jobs: realignments in the shapes of OpenAI's fine-tuning API."""

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response

from safegraft.contracts.fine_tuning import FineTuningCheckpoint, FineTuningEvent, FineTuningJob, FineTuningJobCreate
from safegraft.contracts.listing import PRINTABLE, Page
from safegraft.errors import InvalidParameter
from safegraft.stores.jobs import Filters
from service import fine_tuning
from service.body import JsonRoute
from service.dependencies import AfterAdapter, AfterJob, Asking, Here, IdempotencyKey, Limit, RetryCount, Tenant
from service.paging import page
from service.submission import metadata_filters

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine_tuning"], route_class=JsonRoute)
JobId = Annotated[str, Path(max_length=80, pattern=PRINTABLE)]


@router.post("", operation_id="createFineTuningJob", summary="Start a fine-tuning job")
def create(
    body: FineTuningJobCreate,
    response: Response,
    here: Here,
    asking: Asking,
    idempotency_key: IdempotencyKey,
    retry_count: RetryCount = 0,
) -> FineTuningJob:
    """Queues a realignment, asked for as OpenAI's client asks for a fine-tuning: the training file is the adapter.

    Nothing is trained: `hyperparameters`, `validation_file`, `integrations` and `seed` are refused unless they ask for
    nothing, and `method` is one of `GET /v1/methods`.
    """
    created = fine_tuning.start(here, asking, body, idempotency_key=idempotency_key, retried=retry_count > 0)
    if created.replayed:
        response.headers["idempotent-replayed"] = "true"
    return fine_tuning.job_of(created.job, asking.tenant)


@router.get("", operation_id="listFineTuningJobs", summary="List fine-tuning jobs")
def list_(
    request: Request,
    here: Here,
    tenant: Tenant,
    limit: Limit = 20,
    after: AfterJob = None,
    metadata: Annotated[str | None, Query(max_length=10, description="`null`: jobs without metadata.")] = None,
) -> Page[FineTuningJob]:
    """Those that were made here, newest first. `metadata[key]=value` narrows to jobs with that metadata."""
    wanted = metadata_filters(request, besides=("metadata",))
    if metadata is not None and (metadata != "null" or wanted):
        raise InvalidParameter("Send either metadata[key]=value or metadata=null.", code="bad_filter", param="metadata")
    filters = Filters(api="fine_tuning", metadata=wanted, without_metadata=metadata is not None)
    jobs, more = here.jobs.page(tenant, limit=limit, after=after, filters=filters)
    return page([fine_tuning.job_of(job, tenant) for job in jobs], more)


@router.get("/{job_id}", operation_id="getFineTuningJob", summary="Show a fine-tuning job")
def get(job_id: JobId, here: Here, tenant: Tenant) -> FineTuningJob:
    """The job; also one that `POST /v1/realignments` made."""
    return fine_tuning.job_of(here.jobs.get(tenant, job_id), tenant)


@router.post("/{job_id}/cancel", operation_id="cancelFineTuningJob", summary="Cancel a fine-tuning job")
def cancel(job_id: JobId, here: Here, tenant: Tenant) -> FineTuningJob:
    """Stops a job that has not ended; a running one is shown as running until its worker has stopped."""
    return fine_tuning.job_of(here.jobs.cancel(tenant, job_id), tenant)


@router.get("/{job_id}/events", operation_id="listFineTuningEvents", summary="List the events of a fine-tuning job")
def events(
    job_id: JobId,
    here: Here,
    tenant: Tenant,
    limit: Limit = 20,
    after: Annotated[str | None, Query(pattern="^[0-9]{1,18}$", description="The last id of the page before.")] = None,
) -> Page[FineTuningEvent]:
    """What happened, newest first. `data.event` names it: created, started, requeued, succeeded, …"""
    found = here.jobs.latest_events(tenant, job_id, before=int(after) if after else None, limit=limit + 1)
    return page([fine_tuning.event_of(event) for event in found[:limit]], len(found) > limit)


@router.get(
    "/{job_id}/checkpoints",
    operation_id="listFineTuningCheckpoints",
    summary="List the checkpoints of a fine-tuning job",
)
def checkpoints(
    job_id: JobId, here: Here, tenant: Tenant, limit: Limit = 10, after: AfterAdapter = None
) -> Page[FineTuningCheckpoint]:
    """The patched adapters of a job that has succeeded, one a strength, the last one first."""
    found = fine_tuning.checkpoints_of(here.jobs.get(tenant, job_id))
    ids = [item.id for item in found]
    begin = 0 if after is None else ids.index(after) + 1 if after in ids else len(ids)
    return page(found[begin : begin + limit], len(found) > begin + limit)
