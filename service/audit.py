"""Notes every request under /v1 that changes something, or was refused to, before its answer is sent.

One place for all routes: what a route is called and what it was asked for is in the request's scope when it answers.
Requests that only read pass through untouched. Nobody is named without a key, so requests without one are not noted,
nor are those over the rate limit, which were not looked at any further.
"""

import asyncio
import logging
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from safegraft.stores.audit import AuditLog, Entry
from service.auth import Principal

log = logging.getLogger("safegraft.gateway")
CHANGING = frozenset({"POST", "PUT", "PATCH", "DELETE"})


class Audit:
    """The target is the first id in the path; else what was made: the last part of `location`, or what the route left
    as `request.state.audit_target`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in CHANGING or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        noted = False

        async def note(status: int, made: str | None = None) -> None:
            nonlocal noted
            if not noted:
                noted = True
                await _note(scope, status, made)

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                location = Headers(raw=message["headers"]).get("location", "")
                await note(message["status"], location.rpartition("/")[2] or None)
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception:
            # Answered with 500 further out.
            await note(500)
            raise


async def _note(scope: Scope, status: int, made: str | None) -> None:
    state: dict[str, Any] = scope.get("state", {})
    principal: Principal | None = state.get("principal")
    if principal is None:
        return
    route = scope.get("route")
    ids = list(scope.get("path_params", {}).values())
    entry = Entry(
        tenant=principal.tenant,
        actor=principal.key_id,
        action=getattr(route, "operation_id", None) or f"{scope['method']} {getattr(route, 'path', '')}",
        target=str(ids[0]) if ids else state.get("audit_target") or made,
        status=status,
        request_id=state.get("request_id"),
    )
    audit: AuditLog = scope["app"].state.services.audit
    try:
        await asyncio.to_thread(audit.add, entry)
    except Exception:
        # What was done is done: the answer must not deny it. The log is then the only place that knows.
        log.exception("not in the audit log: %s", entry)
