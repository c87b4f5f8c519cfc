"""The gateway: settings, lifespan, routers, error handlers. No logic."""

import logging
import secrets
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import safegraft
from safegraft.stores.adapters import AdapterStore
from safegraft.stores.batches import BatchStore
from safegraft.stores.database import open_database
from safegraft.stores.jobs import JobStore
from safegraft.stores.keys import KeyStore
from safegraft.stores.objects import open_objects
from safegraft.stores.references import ReferenceRegistry
from safegraft.vault import open_vault
from service import errors
from service.auth import Gatekeeper
from service.batches import Batches
from service.dependencies import Services
from service.loops import Loop
from service.queue import Dispatcher, Queue
from service.routes import adapters, batches, catalogue, docs, fine_tuning, health, realignments
from service.settings import GatewaySettings

log = logging.getLogger("safegraft.gateway")
# Longer than any upload or job may take.
SCRATCH_SECONDS = 24 * 3600.0


def create_app(settings: GatewaySettings) -> FastAPI:
    """The application; it opens database and broker when it starts, not when it is made."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if settings.dev:
            log.warning("development mode: no keys are asked for; keep this on loopback")
        app.state.services = here = open_services(settings)
        here.objects.sweep(SCRATCH_SECONDS)
        for loop in here.loops:
            loop.start()
        try:
            yield
        finally:
            for loop in here.loops:
                loop.stop()
            here.queue.close()
            here.database.dispose()

    app = FastAPI(
        title="safegraft",
        version=safegraft.__version__,
        description="Repairs the safety of fine-tuned LoRA adapters, after the fine-tuning and without training.",
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,  # FastAPI's own page loads its assets from elsewhere
        redoc_url=None,
        responses={"4XX": {"model": errors.Problem}, "5XX": {"model": errors.Problem}},
    )
    for resource in (adapters, realignments, batches, fine_tuning, catalogue, health, docs):
        app.include_router(resource.router)
    app.mount(docs.ASSETS, docs.assets)
    errors.install(app)
    app.add_middleware(RequestId)
    _describe_errors(app)
    return app


def _describe_errors(app: FastAPI) -> None:
    """FastAPI documents every body as application/json; errors are sent as application/problem+json."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        for path in document["paths"].values():
            for operation in path.values():
                for status in ("4XX", "5XX"):
                    content = operation["responses"][status].get("content", {})
                    if "application/json" in content:
                        content["application/problem+json"] = content.pop("application/json")
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def open_services(settings: GatewaySettings) -> Services:
    settings.data.mkdir(parents=True, exist_ok=True)
    database = open_database(settings.database)
    jobs = JobStore(database, lease_seconds=settings.lease_seconds, max_attempts=settings.max_attempts)
    queue = Queue(settings.redis_url)
    keys = KeyStore(database, open_vault(settings))
    dispatcher = Loop("dispatcher", Dispatcher(settings, jobs, queue).turn, settings.dispatch_seconds)
    here = Services(
        settings=settings,
        database=database,
        adapters=AdapterStore(database),
        jobs=jobs,
        objects=open_objects(settings),
        keys=keys,
        gatekeeper=Gatekeeper(settings, keys),
        references=ReferenceRegistry(settings.references),
        queue=queue,
        dispatcher=dispatcher,
        loops=[dispatcher],
        upload_slots=threading.BoundedSemaphore(settings.max_active_uploads),
        batches=BatchStore(database),
    )
    here.loops.append(Loop("batches", Batches(here).turn, settings.batch_seconds))
    return here


class RequestId:
    """Gives every answer an `x-request-id`; error handlers find it as `request.state.request_id`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = request_id

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers.update(scope["state"].get("rate_headers", {}))
            await send(message)

        await self._app(scope, receive, named)
