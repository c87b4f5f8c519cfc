"""The gateway: settings, lifespan, routers, error handlers. No logic."""

import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import safegraft
from safegraft import logs, tracing
from safegraft.dsse import load_public_key
from safegraft.stores.adapters import AdapterStore
from safegraft.stores.audit import AuditLog
from safegraft.stores.batches import BatchStore
from safegraft.stores.database import open_database
from safegraft.stores.files import FileStore
from safegraft.stores.garbage import PERIOD, GarbageCollector
from safegraft.stores.jobs import JobStore
from safegraft.stores.keys import KeyStore
from safegraft.stores.objects import open_objects
from safegraft.stores.references import open_references
from safegraft.stores.uploads import UploadStore
from safegraft.stores.webhooks import WebhookStore
from safegraft.stores.workers import WorkerStore
from safegraft.vault import open_vault
from service import errors, openapi
from service.audit import Audit
from service.auth import Gatekeeper
from service.batches import Batches
from service.dependencies import Services
from service.destinations import Destinations
from service.loops import Loop, stop_all
from service.metrics import HttpMetrics
from service.observer import Observer
from service.queue import Dispatcher, Queue
from service.routes import (
    adapters,
    audit,
    batches,
    catalogue,
    console,
    docs,
    files,
    fine_tuning,
    health,
    metrics,
    provenance,
    realignments,
    uploads,
    webhooks,
)
from service.settings import GatewaySettings
from service.shares import Shares
from service.stopping import Running, Stopping
from service.validation import Limits, Validator
from service.webhooks import Sender

log = logging.getLogger("safegraft.gateway")
# For requests that a stop cut short: to clean up, and to say so.
CUT_SHORT_SECONDS = 2.0


def create_app(settings: GatewaySettings) -> FastAPI:
    """The application; it opens database and broker when it starts, not when it is made."""

    running = Running()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if settings.dev:
            log.warning("development mode: no keys are asked for; keep this on loopback")
        app.state.services = here = open_services(settings)
        app.state.metrics.watch(here.database, here.workers, here.upload_slots)
        here.validator.start()
        for loop in here.loops:
            loop.start()
        try:
            yield
        finally:
            await running.ended(CUT_SHORT_SECONDS)
            stop_all(here.loops)
            here.validator.close()
            await here.gatekeeper.close()
            here.queue.close()
            here.database.dispose()
            tracing.stop()

    app = FastAPI(
        title="safegraft",
        version=safegraft.__version__,
        description=openapi.DESCRIPTION,
        openapi_tags=openapi.TAGS,
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,  # FastAPI's own page loads its assets from elsewhere
        redoc_url=None,
        responses={"4XX": {"model": errors.Problem}, "5XX": {"model": errors.Problem}},
    )
    app.state.metrics = HttpMetrics()
    # Routes are tried in this order: the one that is polled is among the first.
    ours = (realignments, adapters, uploads, files, provenance, batches, fine_tuning, webhooks, catalogue, audit)
    for resource in (*ours, health, metrics, docs):
        app.include_router(resource.router)
    if settings.console:
        app.include_router(console.router)
    app.webhooks.include_router(webhooks.messages)
    app.mount(docs.ASSETS, docs.assets)
    errors.install(app)
    app.add_middleware(Audit)
    app.add_middleware(Stopping, running=running)
    app.add_middleware(Observer, metrics=app.state.metrics)
    app.add_middleware(RequestId)
    _trace(app)
    openapi.describe(app)
    return app


def _trace(app: FastAPI) -> None:
    provider = tracing.start("safegraft-gateway")
    if provider is not None:
        from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor

        FastAPIInstrumentor.instrument_app(
            app,
            tracer_provider=provider,
            excluded_urls="/livez$,/readyz$,/metrics$",
            exclude_spans=["receive", "send"],
            server_request_hook=_without_query,
        )


def _without_query(span: Any, scope: Any) -> None:
    """What clients put into query strings is in no log, and so in no trace: now and then it is a key."""
    for name, value in dict(span.attributes or {}).items():
        if name == "url.query":
            span.set_attribute(name, "")
        elif name in ("http.url", "http.target", "url.full"):
            span.set_attribute(name, value.partition("?")[0])


def open_services(settings: GatewaySettings) -> Services:
    settings.data.mkdir(parents=True, exist_ok=True)
    database = open_database(settings.database, upgrade=settings.database_upgrade)
    retention = settings.retention_seconds
    jobs = JobStore(
        database, lease_seconds=settings.lease_seconds, max_attempts=settings.max_attempts, retention=retention
    )
    objects = open_objects(settings)
    queue = Queue(settings.redis_url)
    vault = open_vault(settings)
    keys = KeyStore(database, vault)
    # The lease: long enough for an attempt, and for its outcome to be recorded by a machine that is busy.
    outbox = WebhookStore(database, vault, lease_seconds=4 * settings.webhook_timeout_seconds)
    destinations = Destinations(allow_private=settings.webhook_allow_private)
    sender = Sender(settings, outbox, destinations)
    dispatcher = Loop("dispatcher", Dispatcher(settings, jobs, queue).turn, settings.dispatch_seconds)
    garbage = Loop("garbage collector", GarbageCollector(database, objects).turn, PERIOD)
    here = Services(
        settings=settings,
        database=database,
        adapters=AdapterStore(database, retention=retention),
        jobs=jobs,
        objects=objects,
        workers=WorkerStore(database, lease_seconds=settings.lease_seconds),
        keys=keys,
        gatekeeper=Gatekeeper(settings, keys),
        references=open_references(settings, objects),
        queue=queue,
        dispatcher=dispatcher,
        loops=[dispatcher, sender, garbage],
        upload_slots=Shares("uploads", settings.max_active_uploads),
        event_streams=Shares("streams", settings.max_event_streams),
        files=FileStore(database),
        uploads=UploadStore(database, seconds=settings.upload_expiry_seconds),
        validator=Validator(
            Limits(settings.validation_memory_bytes, settings.validation_seconds, settings.max_upload_bytes),
            settings.max_active_validations,
        ),
        webhooks=outbox,
        destinations=destinations,
        sender=sender,
        audit=AuditLog(database),
        provenance_keys=[load_public_key(path).shown for path in settings.provenance_keys],
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
        given = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"traceparent"), None)
        tracing.arrived(given)
        # Until the request's task ends: also for what is logged outside of all middleware.
        logs.bind(request_id=request_id, trace_id=tracing.trace_id(tracing.current()))

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers.update(scope["state"].get("rate_headers", {}))
            await send(message)

        await self._app(scope, receive, named)
