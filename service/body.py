"""JSON bodies: small, and read after the key was looked at. FastAPI reads a body before any dependency runs."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
from starlette.types import Message

from safegraft.errors import InvalidParameter, TooLarge
from safegraft.header import shown
from service.dependencies import services

# Every key has a colon. A body of a hundred thousand keys would keep its judge busy for seconds.
MAX_COLONS = 4096
# Every list and object has a bracket, and three hundred thousand would keep its reader busy for half a second. More of
# them than colons, because names in long lists may hold some.
MAX_BRACKETS = 2**15
# A client that keeps its connection open, or all but, would keep one of the few upload slots as well.
IDLE_SECONDS, MIN_RATE = 60.0, 2**13
AS_JSON = "Send one JSON object, with the header `Content-Type: application/json`."
Receive = Callable[[], Coroutine[Any, Any, Message]]
NAMES = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}


class JsonRoute(APIRoute):
    """A route whose body, if it has one, is a JSON object of at most `max_json_bytes`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        field = self.body_field

        async def guarded(request: Request) -> Response:
            here = services(request)
            await here.gatekeeper.require(request)
            receive = limited(request, here.settings.max_json_bytes)
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


def paced(request: Request) -> Receive:
    """The request's `receive`, which raises InvalidParameter where the body does not come (`upload_stalled`), or comes
    in a coding that nobody here takes off again (`unsupported_media_type`)."""
    read, began, ended = 0, 0.0, False

    async def receive() -> Message:
        nonlocal read, began, ended
        if ended:  # what comes now is the client's going away, after however long
            return await request.receive()
        began = began or time.monotonic()
        try:
            async with asyncio.timeout(IDLE_SECONDS):
                message = await request.receive()
        except TimeoutError as error:
            raise InvalidParameter(f"Nothing arrived for {IDLE_SECONDS:g} s.", code="upload_stalled") from error
        ended = not message.get("more_body", False)
        if message.get("body"):
            _refuse_coding(request)
        read += len(message.get("body", b""))
        elapsed = time.monotonic() - began
        if not ended and elapsed > IDLE_SECONDS and read < MIN_RATE * elapsed:
            raise InvalidParameter(f"Less than {MIN_RATE} bytes/s arrived.", code="upload_stalled")
        return message

    return receive


def _refuse_coding(request: Request) -> None:
    coding = request.headers.get("content-encoding", "").strip().lower()
    if coding not in ("", "identity"):
        raise InvalidParameter(
            f"The Content-Encoding {coding[:80]!r} is not accepted here.",
            code="unsupported_media_type",
            param="Content-Encoding",
            hint="Send the body as it is.",
        )


def limited(request: Request, most: int) -> Receive:
    """`paced`, for a body of JSON: it raises TooLarge (`request_too_large`), too."""
    came = paced(request)
    read = colons = brackets = 0

    async def receive() -> Message:
        nonlocal read, colons, brackets
        message = await came()
        piece = message.get("body", b"")
        read += len(piece)
        colons += piece.count(b":")
        brackets += piece.count(b"[") + piece.count(b"{")
        if colons > MAX_COLONS:
            raise TooLarge(
                f"At most {MAX_COLONS} colons (every key has one) are accepted in a body.", code="request_too_large"
            )
        if brackets > MAX_BRACKETS:
            raise TooLarge(f"At most {MAX_BRACKETS} lists and objects are accepted.", code="request_too_large")
        if read > most:
            raise TooLarge(f"At most {most} bytes of JSON are accepted.", code="request_too_large")
        return message

    return receive


def object_of(raw: bytes | bytearray) -> dict[str, Any]:
    """The JSON object that a body holds. Raises InvalidParameter, which says where it stops to be one."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _no_json(f"byte {error.start + 1} is not UTF-8") from error
    try:
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique)
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


def _is_json(kind: str) -> bool:
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _no_json(where: str) -> InvalidParameter:
    return InvalidParameter(f"The body is not JSON: {where}.", code="invalid_json", param="body", hint=AS_JSON)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """One JSON object. Readers differ on which of two equal keys counts: what a proxy judged need not be what we do."""
    found = dict(pairs)
    if len(found) != len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise InvalidParameter(f"'{shown(twice)}' stands twice.", code="duplicate_field", param=shown(twice))
    return found


def _no_constant(name: str) -> NoReturn:
    raise _no_json(f"{name} is no number there")
