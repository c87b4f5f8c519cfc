"""/v1/realignments: create, list, show, cancel, events, report, evaluation."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from enum import StrEnum
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import ValidationError

from safegraft.contracts.listing import PRINTABLE, Page
from safegraft.contracts.realignment import Event, Realignment, RealignmentCreate, RealignmentDeleted, Status
from safegraft.contracts.report import Evaluation, Report
from safegraft.errors import NotFound
from safegraft.report import check_evaluation, evaluation_csv, to_html
from safegraft.stores import garbage
from safegraft.stores.jobs import Filters, no_report
from safegraft.stores.objects import result_prefix
from service import downloads
from service.body import JsonRoute
from service.dependencies import AfterJob, Asking, Here, IdempotencyKey, Limit, RetryCount, Services, Tenant
from service.evaluations import evaluation_of, measured
from service.paging import page
from service.submission import metadata_filters, submit

log = logging.getLogger("safegraft.gateway")
router = APIRouter(prefix="/v1/realignments", tags=["realignments"], route_class=JsonRoute)
RealignmentId = Annotated[str, Path(max_length=80, pattern=PRINTABLE)]
Wanted = Annotated[str | None, Query(max_length=80, pattern=PRINTABLE)]
# A comment in a stream that has nothing to say, every so many half seconds: proxies cut what is silent for a minute.
KEEP_ALIVE = 30
ENDED = ("succeeded", "failed", "cancelled")


class ReportForm(StrEnum):
    json = "json"
    html = "html"
    csv = "csv"
    png = "png"
    layers = "layers.png"
    changes = "changes.png"
    strengths = "strengths.png"
    strength_table = "strengths.csv"
    evaluation_table = "evaluation.csv"


AS_TEXT, AS_BYTES = {"type": "string"}, {"type": "string", "format": "binary"}
AS_REPORT = {"$ref": "#/components/schemas/Report"}
MEDIA = {
    ReportForm.json: "application/json",
    ReportForm.html: "text/html; charset=utf-8",
    ReportForm.csv: "text/csv; charset=utf-8",
    ReportForm.png: "image/png",
    ReportForm.layers: "image/png",
    ReportForm.changes: "image/png",
    ReportForm.strengths: "image/png",
    ReportForm.strength_table: "text/csv; charset=utf-8",
    ReportForm.evaluation_table: "text/csv; charset=utf-8",
}
# Of which there are none where there is nothing to draw or to list.
FIGURES = (
    ReportForm.layers,
    ReportForm.changes,
    ReportForm.strengths,
    ReportForm.strength_table,
    ReportForm.evaluation_table,
)

BY_METADATA = {
    "name": "metadata",
    "in": "query",
    "required": False,
    "style": "deepObject",
    "explode": True,
    "description": "`metadata[key]=value`: jobs with that metadata.",
    "schema": {"type": "object", "additionalProperties": {"type": "string"}, "maxProperties": 16},
}


def _schema(media: str) -> dict[str, str]:
    if media == MEDIA[ReportForm.json]:
        return AS_REPORT
    return AS_BYTES if media == "image/png" else AS_TEXT


@router.post("", status_code=202, operation_id="createRealignment", summary="Start a realignment job")
def create(
    request: RealignmentCreate,
    response: Response,
    here: Here,
    asking: Asking,
    idempotency_key: IdempotencyKey,
    retry_count: RetryCount = 0,
) -> Realignment:
    """Queues a realignment. Adapter, reference and method are checked against each other before the answer."""
    created = submit(here, asking, request, idempotency_key=idempotency_key, retried=retry_count > 0)
    response.headers["location"] = f"/v1/realignments/{created.job.id}"
    if created.replayed:
        response.headers["idempotent-replayed"] = "true"
    return created.job


@router.get(
    "", operation_id="listRealignments", summary="List realignment jobs", openapi_extra={"parameters": [BY_METADATA]}
)
def list_(
    request: Request,
    here: Here,
    tenant: Tenant,
    limit: Limit = 20,
    after: AfterJob = None,
    status: Status | None = None,
    adapter_id: Wanted = None,
    reference_id: Wanted = None,
    batch_id: Wanted = None,
) -> Page[Realignment]:
    """Newest first. `metadata[key]=value` narrows to jobs with that metadata."""
    filters = Filters(
        status=status,
        adapter_id=adapter_id,
        reference_id=reference_id,
        batch_id=batch_id,
        metadata=metadata_filters(request),
    )
    return page(*here.jobs.page(tenant, limit=limit, after=after, filters=filters))


@router.get(
    "/{realignment_id}", operation_id="getRealignment", summary="Show a realignment job", response_model=Realignment
)
def get(realignment_id: RealignmentId, here: Here, tenant: Tenant) -> Response:
    """The job's state, progress, result or error."""
    # The one that is polled: written once, and not checked a second time against its own model.
    job = here.jobs.get(tenant, realignment_id)
    return Response(job.model_dump_json(), media_type="application/json")


@router.delete("/{realignment_id}", operation_id="deleteRealignment", summary="Delete a realignment job")
def delete(
    realignment_id: RealignmentId,
    here: Here,
    tenant: Tenant,
    adapters: Annotated[bool, Query(description="Delete the adapters that it made, too.")] = False,
) -> RealignmentDeleted:
    """Deletes an ended job: its record, events, report and side-cars. The adapters it made stay unless asked for."""
    garbage.clear(here.objects, here.jobs.delete(tenant, realignment_id, with_adapters=adapters))
    return RealignmentDeleted(id=realignment_id)


@router.post("/{realignment_id}/cancel", operation_id="cancelRealignment", summary="Cancel a realignment job")
def cancel(realignment_id: RealignmentId, here: Here, tenant: Tenant) -> Realignment:
    """Stops a job that has not ended. Cancelling an ended one changes nothing."""
    return here.jobs.cancel(tenant, realignment_id)


async def streaming_(request: Request, here: Here, tenant: Tenant) -> AsyncIterator[bool]:
    """Whether a stream is asked for. Its place is held until the answer has ended, however it did."""
    if "text/event-stream" not in request.headers.get("accept", ""):
        yield False
        return
    with here.event_streams.place(tenant):
        yield True


Streaming = Annotated[bool, Depends(streaming_)]


@router.get(
    "/{realignment_id}/events",
    operation_id="listRealignmentEvents",
    summary="List or stream the events of a realignment job",
    response_model=Page[Event],
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def events(
    realignment_id: RealignmentId,
    request: Request,
    here: Here,
    tenant: Tenant,
    streaming: Streaming,
    limit: Limit = 100,
    after: Annotated[str | None, Query(pattern="^[0-9]{1,18}$")] = None,
    last_event_id: Annotated[str | None, Header(pattern="^[0-9]{1,18}$")] = None,
) -> Response | Page[Event]:
    """What happened, oldest first; as a stream of events with `Accept: text/event-stream`, until the job has ended."""
    seen = int(last_event_id or after or 0)
    first = await asyncio.to_thread(here.jobs.events, tenant, realignment_id, after=seen, limit=limit + 1)
    if not streaming:
        return page(first[:limit], len(first) > limit)
    stream = _stream(here, tenant, realignment_id, seen, request)
    return StreamingResponse(stream, media_type="text/event-stream", headers={"cache-control": "no-store"})


async def _stream(here: Services, tenant: str, job_id: str, seen: int, request: Request) -> AsyncIterator[str]:
    """Events with their numbers as ids, and progress in between (without ids: it is not kept)."""
    shown, quiet = None, 0
    while not await request.is_disconnected():
        try:
            # The job first: an end that is seen here has its event in the list that is read after it.
            job = await asyncio.to_thread(here.jobs.get, tenant, job_id)
            events = await asyncio.to_thread(here.jobs.events, tenant, job_id, after=seen)
        except NotFound:  # deleted: there is nothing more to tell
            return
        for event in events:
            seen = int(event.id)
            yield f"id: {event.id}\nevent: {event.type}\ndata: {event.model_dump_json()}\n\n"
        state = (job.status, job.progress)
        quiet += 1
        if state == shown and quiet >= KEEP_ALIVE:
            yield ": still here\n\n"
            quiet = 0
        if state != shown:
            quiet = 0
            body = {"status": job.status, "progress": job.progress.model_dump()}
            yield f"event: progress\ndata: {json.dumps(body)}\n\n"
            shown = state
        if job.status in ENDED:
            return
        await asyncio.sleep(0.5)


@router.head("/{realignment_id}/report", include_in_schema=False)
@router.get(
    "/{realignment_id}/report",
    operation_id="getReport",
    summary="Show the report of a realignment job",
    response_model=Report,
    responses=downloads.CONDITIONS,
)
def report(realignment_id: RealignmentId, request: Request, here: Here, tenant: Tenant) -> Response:
    """What was measured and changed, module by module."""
    return _report(here, request, tenant, realignment_id, ReportForm.json)


@router.head("/{realignment_id}/report.{form}", include_in_schema=False)
@router.get(
    "/{realignment_id}/report.{form}",
    operation_id="getReportAs",
    summary="Download the report as JSON, HTML, CSV or PNG pictures",
    response_class=Response,
    responses={
        200: {"content": {media: {"schema": _schema(media)} for media in MEDIA.values()}},
        **downloads.CONDITIONS,
    },
)
def report_as(
    realignment_id: RealignmentId, form: ReportForm, request: Request, here: Here, tenant: Tenant
) -> Response:
    """The report as JSON, as one self-contained HTML page, as CSV, or a picture of it for slides: `png` has the maps,
    `layers.png` similarity by layer, `changes.png` the largest changes, `strengths.png` and `strengths.csv` the curve
    of several strengths, `evaluation.csv` what an evaluation counted. Of these the page alone has the evaluation, too:
    the JSON stays as it was attested.
    """
    return _report(here, request, tenant, realignment_id, form)


@router.put(
    "/{realignment_id}/evaluation",
    operation_id="putEvaluation",
    summary="Add an evaluation to the report of a realignment job",
)
def put_evaluation(realignment_id: RealignmentId, evaluation: Evaluation, here: Here, tenant: Tenant) -> Realignment:
    """What was measured of the behaviour with the adapter that came and with the one that came out, as
    `safegraft evaluate` writes it; it is shown in the job's result and in `report.html`. What was counted on one side
    only is left out. Replaces what was there."""
    attempt = here.jobs.result_attempt(tenant, realignment_id)
    if attempt is None:
        raise no_report(realignment_id, here.jobs.get(tenant, realignment_id).status)
    # No more of it than is asked: a report may be another version's.
    report = json.loads(_read_report(here, tenant, realignment_id, attempt, ReportForm.json))
    made = report["output"]["sha256"] if report["output"] is not None else None
    others = {item["output"]["sha256"]: item["strength"] for item in report["variants"] if item["output"] is not None}
    check_evaluation(evaluation, report["input"]["sha256"], made, others)
    return here.jobs.evaluate(tenant, realignment_id, measured(evaluation, int(time.time())))


@router.delete(
    "/{realignment_id}/evaluation",
    operation_id="deleteEvaluation",
    summary="Take an evaluation out of the report of a realignment job",
)
def delete_evaluation(realignment_id: RealignmentId, here: Here, tenant: Tenant) -> Realignment:
    """Nothing happens where there is none."""
    return here.jobs.evaluate(tenant, realignment_id, None)


@router.head("/{realignment_id}/side_car/{name}", include_in_schema=False)
@router.get(
    "/{realignment_id}/side_car/{name}",
    operation_id="getSideCar",
    summary="Download a side-car of a result",
    response_class=FileResponse,
    responses=downloads.FILE,
)
def side_car(
    realignment_id: RealignmentId,
    name: Annotated[str, Path(pattern=r"^[0-9a-z_.+-]{1,60}\.safetensors$")],
    request: Request,
    here: Here,
    tenant: Tenant,
) -> Response:
    """What a method delivers beside the adapter, as one safetensors file a strength."""
    attempt = here.jobs.result_attempt(tenant, realignment_id)
    digests: dict[str, str] = {}
    if attempt is not None:
        digests = json.loads(_read_report(here, tenant, realignment_id, attempt, ReportForm.json))["side_cars"]
    if name not in digests:
        raise NotFound(f"{realignment_id} has no side-car {name!r}.", code="no_side_car", param="name")
    prefix = f"{result_prefix(tenant, realignment_id, attempt or 0)}/side_car"
    return downloads.stored_file(request, here.objects, prefix, name, digests[name])


def _report(here: Services, request: Request, tenant: str, job_id: str, form: ReportForm) -> Response:
    attempt = here.jobs.result_attempt(tenant, job_id)
    if attempt is None:
        job = here.jobs.get(tenant, job_id)
        raise no_report(job_id, job.status)
    # A report shows names out of a customer's file; should escaping ever fail, nothing in it may run or load.
    inline = "style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    policy = f"default-src 'none'; {inline}; img-src data:; sandbox allow-scripts"
    headers = {"content-security-policy": policy, "x-content-type-options": "nosniff"}
    try:
        data = _evaluated(here, tenant, job_id, attempt, form) or _read_report(here, tenant, job_id, attempt, form)
    except NotFound as error:
        if form not in FIGURES:
            raise
        raise NotFound(
            f"The report of {job_id} has no {form}: there is nothing to show in it.",
            code="no_such_figure",
            param="form",
            hint="Several layers make layers.png, several strengths strengths.png and strengths.csv, an evaluation "
            "evaluation.csv; report.png and report.csv are always there.",
        ) from error
    return downloads.small_file(request, data, media_type=MEDIA[form], headers=headers)


def _evaluated(here: Services, tenant: str, job_id: str, attempt: int, form: ReportForm) -> bytes | None:
    """What an evaluation that was added afterwards is shown in, written when it is asked for; None where it is not."""
    if form not in (ReportForm.html, ReportForm.evaluation_table):
        return None
    result = here.jobs.get(tenant, job_id).result
    if result is None or result.evaluation is None:
        return None
    evaluation = evaluation_of(result.evaluation)
    if form is ReportForm.evaluation_table:
        return evaluation_csv(evaluation).encode()
    try:
        report = Report.model_validate_json(_read_report(here, tenant, job_id, attempt, ReportForm.json))
    except ValidationError:
        # Another version's report, or one that measured what is no number: its page is there as it was written.
        log.warning("the report of %s cannot be read back; its page is sent without the evaluation", job_id)
        return None
    return to_html(report.model_copy(update={"evaluation": evaluation})).encode()


def _read_report(here: Services, tenant: str, job_id: str, attempt: int, form: ReportForm) -> bytes:
    return downloads.read(here.objects, f"{result_prefix(tenant, job_id, attempt)}/report", f"report.{form}")
