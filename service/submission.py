"""From a request to a queued job: what both job APIs and batches do, once."""

import logging
import re
from collections.abc import Collection
from dataclasses import replace

from starlette.requests import Request

from safegraft import logs, tracing
from safegraft.compatibility import check_compatible
from safegraft.contracts.methods import parameters_by_strength
from safegraft.contracts.realignment import RealignmentCreate
from safegraft.errors import InvalidParameter
from safegraft.stores import options, quotas
from safegraft.stores.jobs import Created, Origins, hash_of
from safegraft.stores.objects import describe_stored
from service.auth import Principal
from service.dependencies import Services

log = logging.getLogger("safegraft.gateway")
METADATA = re.compile(r"metadata\[(?P<key>.{1,64})\]", re.DOTALL)
MAX_METADATA = 16


def submit(
    here: Services,
    asking: Principal,
    request: RealignmentCreate,
    *,
    idempotency_key: str | None = None,
    retried: bool = False,
    origins: Origins = Origins(),  # noqa: B008 - frozen
) -> Created:
    """Checks adapter, reference and method against each other and queues the job. Runs in a thread.

    Raises NotFound, Incompatible, InvalidParameter, Conflict, QuotaExceeded.
    """
    tenant = asking.tenant
    sent = origins.request_hash or hash_of(request)
    first = here.jobs.replay(tenant, sent, idempotency_key) if idempotency_key else None
    if first is not None:
        # Before anything is judged: what was true of the first request may have changed since.
        return Created(first, replayed=True)
    description = describe_stored(here.objects, here.adapters.prefix(tenant, request.adapter_id))
    if request.reference_id is None:
        preferred = options.get(here.database, options.DEFAULT_REFERENCE)
        reference = here.references.choose(description, preferred)
    else:
        reference = here.references.get(request.reference_id)
    check_compatible(description, reference.manifest, request.method)
    _check_strengths(request)
    if request.webhook_url is not None:
        origins = replace(origins, webhook_endpoint_id=here.webhooks.registered(tenant, request.webhook_url))
    _check_room(here, asking, request)
    own = asking.limits.max_jobs
    created = here.jobs.create(
        tenant,
        reference.id,
        request,
        idempotency_key,
        origins=replace(origins, traceparent=origins.traceparent or tracing.current()),
        retried=retried,
        max_open=here.settings.max_jobs_per_tenant if own is None else own,
        of_stored=True,
    )
    with logs.bound(job_id=created.job.id):
        log.info("replayed" if created.replayed else "queued")
    here.dispatcher.wake()
    return created


def _check_room(here: Services, asking: Principal, request: RealignmentCreate) -> None:
    """A job makes adapters too, each about as large as the one that it is of: who has no room for them makes none.
    Those of other jobs that have not ended count when they are made. Raises NotFound, QuotaExceeded."""
    quota = here.settings.max_bytes_per_tenant if asking.limits.max_bytes is None else asking.limits.max_bytes
    left = quotas.room(here.database, asking.tenant, quota)
    if left is None:
        return
    made = 0 if request.mode == "analyze" else max(1, len(request.strengths))
    added = max(1, made * here.adapters.get(asking.tenant, request.adapter_id).bytes)
    if added > left:
        raise quotas.no_room(added, left, quota)


def _check_strengths(request: RealignmentCreate) -> None:
    """Raises InvalidParameter before a job is queued that could only fail."""
    if not request.strengths:
        return
    if request.method.type == "auto":
        raise InvalidParameter(
            "strengths needs a method: which one runs by itself is only known when the adapter has been read.",
            code="bad_strengths",
            param="method",
            hint='Add "method": {"type": "gram"}, or another one of GET /v1/methods.',
        )
    parameters_by_strength(request.method, request.strengths)


def metadata_filters(request: Request, besides: Collection[str] = ()) -> dict[str, str]:
    """`?metadata[team]=a&metadata[run]=7` as a mapping; besides: names that mean something else.

    Raises InvalidParameter.
    """
    found: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if not name.startswith("metadata") or name in besides:
            continue
        match = METADATA.fullmatch(name)
        if match is None:
            # Ignored, it would answer with everything.
            raise InvalidParameter(
                f"{name[:80]!r} is no filter.", code="bad_filter", param="metadata", hint="Write metadata[key]=value."
            )
        if match["key"] in found:
            raise InvalidParameter(f"{name} is given twice.", code="duplicate_filter", param=name)
        found[match["key"]] = value
    if any("\0" in key + value for key, value in found.items()):
        raise InvalidParameter("A filter holds a NUL character.", code="bad_filter", param="metadata")
    if len(found) > MAX_METADATA:
        raise InvalidParameter(f"A job has at most {MAX_METADATA} metadata.", code="bad_filter", param="metadata")
    return found
