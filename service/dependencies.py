"""What routes ask for, as annotated aliases."""

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Header, Query, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy.engine import Engine

from safegraft.contracts.keys import Scope
from safegraft.contracts.provenance import ProvenanceKey
from safegraft.errors import InvalidParameter
from safegraft.stores.adapters import AdapterStore
from safegraft.stores.audit import AuditLog
from safegraft.stores.batches import BatchStore
from safegraft.stores.files import FileStore
from safegraft.stores.jobs import JobStore
from safegraft.stores.keys import KeyStore
from safegraft.stores.objects import Objects
from safegraft.stores.references import ReferenceRegistry
from safegraft.stores.uploads import UploadStore
from safegraft.stores.webhooks import WebhookStore
from safegraft.stores.workers import WorkerStore
from service.auth import Gatekeeper, Principal
from service.destinations import Destinations
from service.loops import Loop
from service.parameters import known_parameters
from service.queue import Queue
from service.settings import GatewaySettings
from service.shares import Shares
from service.validation import Validator


@dataclass
class Services:
    """Everything that lives as long as the gateway; made in its lifespan, kept on `app.state`."""

    settings: GatewaySettings
    database: Engine
    adapters: AdapterStore
    jobs: JobStore
    objects: Objects
    keys: KeyStore
    gatekeeper: Gatekeeper
    references: ReferenceRegistry
    queue: Queue
    dispatcher: Loop
    loops: list[Loop]
    files: FileStore
    uploads: UploadStore
    validator: Validator
    webhooks: WebhookStore
    destinations: Destinations
    sender: Loop
    audit: AuditLog
    provenance_keys: list[ProvenanceKey]
    workers: WorkerStore
    upload_slots: Shares
    event_streams: Shares
    batches: BatchStore


async def here_(request: Request) -> Services:
    # Not in a thread, as FastAPI would do with a plain function: this is asked in every request.
    return services(request)


def services(request: Request) -> Services:
    found: Services = request.app.state.services
    return found


# Only for the API description; `tenant_of` reads the header itself and answers in the shape of all errors.
bearer = HTTPBearer(auto_error=False, description="An API key. Not asked for in development mode.")


async def tenant(request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)]) -> str:
    """The tenant that the request's key belongs to; reading needs the scope `read`, everything else `write`."""
    return (await _admitted(request)).tenant


async def admin(request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)]) -> str:
    """The tenant of a key with the scope `admin`."""
    return (await _admitted(request, "admin")).tenant


async def principal(request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)]) -> Principal:
    """Like `tenant`, with the key's limits."""
    return await _admitted(request)


async def _admitted(request: Request, scope: Scope | None = None) -> Principal:
    found = await services(request).gatekeeper.require(request, scope)
    # Strangers, and those over their limits, are told nothing else first.
    known_parameters(request)
    return found


Here = Annotated[Services, Depends(here_)]
Tenant = Annotated[str, Depends(tenant)]
AdminTenant = Annotated[str, Depends(admin)]
Asking = Annotated[Principal, Depends(principal)]
Limit = Annotated[int, Query(ge=1, le=100, description="How many at most.")]


def _after(prefix: str) -> Any:
    # An id of another kind, or none at all, would give a list that looks like the end of this one.
    return Query(max_length=80, pattern=f"^{prefix}_[!-~]+$", description="The last id of the page before.")


AfterAdapter = Annotated[str | None, _after("adp")]
AfterBatch = Annotated[str | None, _after("rbt")]
AfterFile = Annotated[str | None, _after("file")]
AfterJob = Annotated[str | None, _after("rlg")]
AfterMessage = Annotated[str | None, _after("msg")]
AfterPart = Annotated[str | None, _after("part")]
AfterWebhook = Annotated[str | None, _after("we")]
RetryCount = Annotated[
    int,
    Header(
        alias="x-stainless-retry-count",
        ge=0,
        description="Sent by OpenAI's client: with more than 0, a job that the same request made before is returned.",
    ),
]


async def idempotency_key(
    request: Request,
    idempotency_key: Annotated[
        str | None, Header(min_length=1, max_length=255, description="Repeats with the same key make one job.")
    ] = None,
) -> str | None:
    """Raises InvalidParameter for several keys: whoever sent them means one, and nobody knows which."""
    if len(set(request.headers.getlist("idempotency-key"))) > 1:
        raise InvalidParameter(
            "Idempotency-Key was sent twice, with different values.", code="invalid_request", param="Idempotency-Key"
        )
    return idempotency_key


IdempotencyKey = Annotated[str | None, Depends(idempotency_key)]
