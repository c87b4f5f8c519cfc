"""JSON bodies: small, and read after the key was looked at. FastAPI reads a body before any dependency runs."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import Message

from service.dependencies import services

# Every key has one. A body of a hundred thousand keys would keep its judge busy for seconds.
MAX_COLONS = 4096


class JsonRoute(APIRoute):
    """A route whose body has at most `max_json_bytes`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            here = services(request)
            await here.gatekeeper.require(request)
            read = colons = 0

            async def receive() -> Message:
                nonlocal read, colons
                message = await request.receive()
                piece = message.get("body", b"")
                read += len(piece)
                colons += piece.count(b":")
                if colons > MAX_COLONS:
                    raise HTTPException(413, f"at most {MAX_COLONS} keys are accepted")
                if read > here.settings.max_json_bytes:
                    # Of this class, because FastAPI hides all others behind "error parsing the body".
                    raise HTTPException(413, f"at most {here.settings.max_json_bytes} bytes are accepted")
                return message

            return await handle(Request(request.scope, receive))

        return guarded
