"""What a request is told that a planned stop cut short, once the time for graceful stops has passed."""

import asyncio
import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import problem

log = logging.getLogger("safegraft.gateway")


class Running:
    """How many requests are being answered."""

    def __init__(self) -> None:
        self.count = 0

    async def ended(self, seconds: float) -> None:
        """Waits until there is none, but no longer than this: uvicorn does not wait for those that it cancelled."""
        until = time.monotonic() + seconds
        while self.count and time.monotonic() < until:
            await asyncio.sleep(0.01)


class Stopping:
    """Uvicorn cancels what still runs then, and would itself say 500 and log a stack trace."""

    def __init__(self, app: ASGIApp, running: Running) -> None:
        self._app = app
        self._running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def noted(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        self._running.count += 1
        try:
            await self._app(scope, receive, noted)
        except asyncio.CancelledError:
            # The request's id is bound to the line. What had begun to be answered breaks off, and the client sees it.
            log.warning("this gateway stops: %s %s was cut short", scope["method"], scope["path"])
            if not started:
                detail = "This gateway stops before it could answer. Send the request again: another one takes it."
                await problem(503, "shutting_down", detail)(scope, receive, send)
        finally:
            self._running.count -= 1
