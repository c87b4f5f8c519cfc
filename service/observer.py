"""Counts, times and logs every request, by its route and never by its path or query: those may hold anything."""

import asyncio
import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.metrics import HttpMetrics

log = logging.getLogger("safegraft.access")
# Asked every few seconds by machines; only their failures are worth a line.
PROBES = frozenset({"/livez", "/readyz", "/metrics"})


class Observer:
    def __init__(self, app: ASGIApp, metrics: HttpMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        status = 499  # as long as nothing was answered: the client went away

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except asyncio.CancelledError:
            raise
        except Exception:
            status = 500
            raise
        finally:
            self._answered(scope, status, time.perf_counter() - began)

    def _answered(self, scope: Scope, status: int, seconds: float) -> None:
        # Files of /docs, /openapi.json and what matched nothing have no route.
        route = getattr(scope.get("route"), "path", "other")
        method = scope["method"]
        self._metrics.answered(route, method, status, seconds)
        if (route not in PROBES or status >= 400) and log.isEnabledFor(logging.INFO):
            fields = {"route": route, "method": method, "status": status, "duration_seconds": round(seconds, 6)}
            log.info("%s %s %d %.1f ms", method, route, status, seconds * 1000, extra={"fields": fields})
