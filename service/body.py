"""JSON bodies: small, and read after the key was looked at. FastAPI reads a body before any dependency runs."""

import json
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
from starlette.types import Message

from safegraft.errors import InvalidParameter, TooLarge
from service.dependencies import services

# Every key has one. A body of a hundred thousand keys would keep its judge busy for seconds.
MAX_COLONS = 4096
AS_JSON = "Send one JSON object, with the header `Content-Type: application/json`."
NAMES = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}


class JsonRoute(APIRoute):
    """A route whose body, if it has one, is a JSON object of at most `max_json_bytes`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        field = self.body_field

        async def guarded(request: Request) -> Response:
            here = services(request)
            await here.gatekeeper.require(request)
            receive = _limited(request, here.settings.max_json_bytes)
            if field is None:
                return await handle(Request(request.scope, receive))
            read = _Read(request.scope, receive)
            await read.judge(required=field.field_info.is_required())
            return await handle(read)

        return guarded


class _Read(Request):
    """Its body is judged before FastAPI sees it, which says of most faults that there was one, and not where."""

    _object: dict[str, Any]

    async def judge(self, *, required: bool) -> None:
        """Raises InvalidParameter, TooLarge."""
        try:
            raw = await self.body()
        except ClientDisconnect as error:
            raise cut_off() from error
        if raw:
            if not _is_json(kind_of(self)):
                raise unsupported_kind(self, AS_JSON)
            self._object = object_of(raw)
        elif required:
            raise InvalidParameter("The request has no body.", code="invalid_request", param="body", hint=AS_JSON)

    async def json(self) -> Any:
        return self._object


def object_of(raw: bytes | bytearray) -> dict[str, Any]:
    """The JSON object that a body holds. Raises InvalidParameter, which says where it stops to be one."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _no_json(f"byte {error.start + 1} is not UTF-8") from error
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at")
        raise _no_json(f"line {error.lineno}, column {error.colno}: {what[:1].lower()}{what[1:]}") from error
    except RecursionError as error:
        raise _no_json("its values are nested too deeply") from error
    except ValueError as error:  # Python reads no number of more than some thousand digits
        raise _no_json("a number has too many digits") from error
    if not isinstance(value, dict):
        found = NAMES.get(type(value), "a number")
        raise InvalidParameter(
            f"The body is {found}, not an object.", code="invalid_request", param="body", hint=AS_JSON
        )
    return value


def kind_of(request: Request) -> str:
    """The body's media type in lower case, without parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def unsupported_kind(request: Request, hint: str) -> InvalidParameter:
    kind = kind_of(request)
    found = f"The Content-Type {kind[:80]!r} is not accepted here." if kind else "The request has no Content-Type."
    return InvalidParameter(found, code="unsupported_media_type", param="Content-Type", hint=hint)


def cut_off() -> InvalidParameter:
    return InvalidParameter("The body was cut off.", code="upload_interrupted", hint="Send the request again.")


def _limited(request: Request, most: int) -> Callable[[], Coroutine[Any, Any, Message]]:
    """The request's `receive`, which raises TooLarge."""
    read = colons = 0

    async def receive() -> Message:
        nonlocal read, colons
        message = await request.receive()
        piece = message.get("body", b"")
        read += len(piece)
        colons += piece.count(b":")
        if colons > MAX_COLONS:
            raise TooLarge(f"At most {MAX_COLONS} keys are accepted in a body.", code="request_too_large")
        if read > most:
            raise TooLarge(f"At most {most} bytes of JSON are accepted.", code="request_too_large")
        return message

    return receive


def _is_json(kind: str) -> bool:
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _no_json(where: str) -> InvalidParameter:
    return InvalidParameter(f"The body is not JSON: {where}.", code="invalid_json", param="body", hint=AS_JSON)


def _no_constant(name: str) -> NoReturn:
    raise _no_json(f"{name} is no number there")
