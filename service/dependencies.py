"""What routes ask for, as annotated aliases."""

from dataclasses import dataclass
from threading import BoundedSemaphore
from typing import Annotated

from fastapi import Depends, Header, Query, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy.engine import Engine

from safegraft.contracts.listing import PRINTABLE
from safegraft.stores.adapters import AdapterStore
from safegraft.stores.jobs import JobStore
from safegraft.stores.objects import LocalObjects
from safegraft.stores.references import ReferenceRegistry
from service.auth import tenant_of
from service.queue import Dispatcher, Queue
from service.settings import GatewaySettings


@dataclass
class Services:
    """Everything that lives as long as the gateway; made in its lifespan, kept on `app.state`."""

    settings: GatewaySettings
    database: Engine
    adapters: AdapterStore
    jobs: JobStore
    objects: LocalObjects
    references: ReferenceRegistry
    queue: Queue
    dispatcher: Dispatcher
    upload_slots: BoundedSemaphore


def services(request: Request) -> Services:
    found: Services = request.app.state.services
    return found


# Only for the API description; `tenant_of` reads the header itself and answers in the shape of all errors.
bearer = HTTPBearer(auto_error=False, description="An API key. Not asked for in development mode.")


def tenant(request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)]) -> str:
    """The tenant that the request's key belongs to."""
    return tenant_of(services(request).settings, request)


Here = Annotated[Services, Depends(services)]
Tenant = Annotated[str, Depends(tenant)]
Limit = Annotated[int, Query(ge=1, le=100, description="How many at most.")]
After = Annotated[str | None, Query(max_length=80, pattern=PRINTABLE, description="The last id of the page before.")]
IdempotencyKey = Annotated[str | None, Header(max_length=255, description="Repeats with the same key make one job.")]
