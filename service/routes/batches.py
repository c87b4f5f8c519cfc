"""/v1/realignment_batches: create, list, show, cancel, adapters."""

from typing import Annotated

from fastapi import APIRouter, Path, Response

from safegraft.contracts.batch import BatchAdapter, BatchCreate, MemberStatus, RealignmentBatch
from safegraft.contracts.listing import PRINTABLE, Page
from service.batches import cancel_batch, open_batch
from service.body import JsonRoute
from service.dependencies import AfterAdapter, AfterBatch, Here, IdempotencyKey, Limit, Tenant
from service.paging import page

router = APIRouter(prefix="/v1/realignment_batches", tags=["batches"], route_class=JsonRoute)
BatchId = Annotated[str, Path(max_length=80, pattern=PRINTABLE)]


@router.post("", status_code=202, operation_id="createRealignmentBatch", summary="Start a batch of realignments")
def create(
    request: BatchCreate, response: Response, here: Here, tenant: Tenant, idempotency_key: IdempotencyKey
) -> RealignmentBatch:
    """Realigns many adapters against one reference: a canary first, the rest if the stop rule holds.

    Adapters are named, or selected: those whose last patch used another reference. Its jobs are listed by
    `GET /v1/realignments?batch_id=`. An adapter that does not fit the reference counts as failed.
    """
    batch = open_batch(here, tenant, request, idempotency_key)
    response.headers["location"] = f"/v1/realignment_batches/{batch.id}"
    return batch


@router.get("", operation_id="listRealignmentBatches", summary="List batches")
def list_(here: Here, tenant: Tenant, limit: Limit = 20, after: AfterBatch = None) -> Page[RealignmentBatch]:
    """Newest first."""
    return page(*here.batches.page(tenant, limit=limit, after=after))


@router.get("/{batch_id}", operation_id="getRealignmentBatch", summary="Show a batch")
def get(batch_id: BatchId, here: Here, tenant: Tenant) -> RealignmentBatch:
    """The batch's state, with its adapters counted by what became of them."""
    return here.batches.get(tenant, batch_id)


@router.post("/{batch_id}/cancel", operation_id="cancelRealignmentBatch", summary="Cancel a batch")
def cancel(batch_id: BatchId, here: Here, tenant: Tenant) -> RealignmentBatch:
    """Stops a batch that has not ended, and its open jobs. Cancelling an ended one changes nothing."""
    return cancel_batch(here, tenant, batch_id)


@router.get("/{batch_id}/adapters", operation_id="listRealignmentBatchAdapters", summary="List the adapters of a batch")
def adapters(
    batch_id: BatchId,
    here: Here,
    tenant: Tenant,
    limit: Limit = 20,
    after: AfterAdapter = None,
    status: MemberStatus | None = None,
) -> Page[BatchAdapter]:
    """What became of each adapter, in the order in which they come; `status=failed` finds those to look after."""
    return page(*here.batches.adapters(tenant, batch_id, limit=limit, after=after, status=status))
