"""Errors as answers: one table from class to status, one body for all of them.

The body is RFC 9457 problem+json and OpenAI's envelope at once, so that generic clients and OpenAI's own both show the
code and the sentence.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import iter_route_contexts
from pydantic import BaseModel
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.routing import Match

from safegraft import errors
from safegraft.contracts.base import told
from safegraft.contracts.methods import DEFAULT_METHOD, MODELS
from safegraft.header import shown
from safegraft.stores.database import disk_is_full

log = logging.getLogger("safegraft.gateway")

STATUS: dict[type[errors.SafegraftError], int] = {
    errors.InvalidAdapter: 422,
    errors.UnsupportedAdapter: 422,
    errors.Incompatible: 422,
    errors.InvalidArchive: 422,
    errors.InvalidParameter: 422,
    errors.InvalidPrompts: 422,
    errors.NotFound: 404,
    errors.Conflict: 409,
    errors.TooLarge: 413,
    errors.QuotaExceeded: 429,
    errors.UserError: 400,
    errors.NoBroker: 503,
    errors.StorageFault: 507,
    errors.SystemFault: 500,
    errors.SafegraftError: 500,
}
# Codes whose status their class does not tell.
STATUS_BY_CODE = {
    "unauthorized": 401,
    "too_many_uploads": 429,
    "too_many_streams": 429,
    "idempotency_key_reused": 422,
    "unsupported_media_type": 415,
    "upload_stalled": 408,
    "insufficient_scope": 403,
    "storage_quota_exceeded": 403,
    "storage_unavailable": 503,
}
# Codes of what the framework itself refuses.
HTTP_CODES = {
    404: "route_not_found",
    405: "method_not_allowed",
    412: "precondition_failed",
    413: "request_too_large",
    416: "range_not_satisfiable",
}


class Unauthorized(errors.UserError):
    default_code = "unauthorized"


class Forbidden(errors.UserError):
    default_code = "insufficient_scope"


class RateLimited(errors.QuotaExceeded):
    default_code = "rate_limit_exceeded"


# Methods of what is mounted.
FILES = {"GET", "HEAD"}
METHODS = {DEFAULT_METHOD, *MODELS}
# So many of a request's faults are told.
MAX_ERRORS = 20
# What pydantic calls the branches of a union, where it tells the place of an error.
BRANCH = re.compile(r"(literal|list|set|tuple|union|nullable|function-\w+)\[")
# Seconds after which it is worth to try again; never above the 120 that clients accept.
RETRY_AFTER = {"rate_limit_exceeded": 1, "too_many_uploads": 5, "too_many_streams": 5, "too_many_jobs": 30}
# OpenAI's client chooses its exception by status; its users read this.
KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class Problem(BaseModel):
    """The body of every answer that is not a success."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[dict[str, Any]] = []
    error: ErrorBody


def status_of(error: errors.SafegraftError) -> int:
    if error.code in STATUS_BY_CODE:
        return STATUS_BY_CODE[error.code]
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def problem(
    status: int, code: str, detail: str, *, param: str | None = None, found: list[dict[str, Any]] | None = None
) -> JSONResponse:
    body = Problem(
        type=f"urn:safegraft:error:{code}",
        title=code.replace("_", " ").capitalize(),
        status=status,
        detail=detail,
        errors=found or [],
        error=ErrorBody(
            message=detail,
            type="server_error" if status >= 500 else KINDS.get(status, "invalid_request_error"),
            param=param,
            code=code,
        ),
    )
    headers = {}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    elif status in (429, 503):
        headers["retry-after"] = str(RETRY_AFTER.get(code, 5))
    return JSONResponse(body.model_dump(), status_code=status, media_type="application/problem+json", headers=headers)


def install(app: FastAPI) -> None:
    """Registers the handlers."""

    @app.exception_handler(errors.SafegraftError)
    async def known(request: Request, error: errors.SafegraftError) -> JSONResponse:
        status = status_of(error)
        if status >= 500:
            log.error("%s: %s", _named(request), error, exc_info=error)
            if not isinstance(error, errors.StorageFault | errors.NoBroker):
                return problem(status, error.code, "Something failed on our side; the request id names it in our log.")
        return problem(status, error.code, str(error), param=error.param)

    @app.exception_handler(OperationalError)
    @app.exception_handler(InterfaceError)
    @app.exception_handler(PoolTimeout)
    async def away(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, OperationalError) and disk_is_full(error):
            full = errors.StorageFault("The disk is full; nothing was kept.", code="disk_full")
            full.__cause__ = error  # for the log
            return await known(request, full)
        log.error("%s: the database did not answer", _named(request), exc_info=error)
        return problem(503, "database_unavailable", "The database did not answer. Try again in a few seconds.")

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        faults = error.errors()[:MAX_ERRORS]
        found = [{"loc": _place(item["loc"]), "message": told(item), "type": item["type"]} for item in faults]
        first = found[0]
        where = ".".join(first["loc"][1:]) or first["loc"][0]
        if first["loc"][0] == "header":
            where = where.title()
        detail = f"{where}: {first['message']}. {_advice(request, faults[0])}".rstrip()
        return problem(422, "invalid_request", detail, param=where, found=found)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        code = HTTP_CODES.get(error.status_code, "http_error")
        detail = f"{request.method} {request.url.path}: {error.detail}."
        allowed = ", ".join(sorted(_methods(app, request))) if error.status_code == 405 else ""
        if allowed:
            detail += f" This path takes {allowed}."
        elif code == "route_not_found":
            detail += " GET /openapi.json has all paths: the API's begin with /v1/, and none ends with a slash."
        answer = problem(error.status_code, code, detail)
        answer.headers.update(error.headers or {})
        if allowed:
            answer.headers["allow"] = allowed
        return answer

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> JSONResponse:
        log.error("%s failed", _named(request), exc_info=error)
        answer = problem(500, "internal_error", "Something failed on our side; the request id names it in our log.")
        # This handler answers outside of all middleware.
        answer.headers["x-request-id"] = request.state.request_id
        return answer


def _place(loc: Sequence[int | str]) -> list[str]:
    """Where in what was sent: without the branches that pydantic names, and without what a method is called, which is
    no key. Names of fields are the client's where they are wrong: of any length, and any letters."""
    parts = [str(part) for part in loc]
    kept = [
        part
        for index, part in enumerate(parts)
        if not BRANCH.match(part) and not (index and parts[index - 1] == "method" and part in METHODS)
    ]
    return [shown(part) for part in kept]


def _advice(request: Request, fault: Mapping[str, Any]) -> str:
    """What to write instead, where that is known."""
    loc, kind = fault["loc"], fault["type"]
    if loc[-1] == "method" and kind in ("model_attributes_type", "union_tag_not_found"):
        return 'Write {"type": "gram"}, and parameters beside the type; GET /v1/methods tells of all.'
    if kind != "extra_forbidden":
        return ""
    names: Iterable[str] = ()
    body = getattr(request.scope.get("route"), "body_field", None)
    model = body.field_info.annotation if body is not None else None
    if len(loc) == 2 and isinstance(model, type) and issubclass(model, BaseModel):
        names = model.model_fields
    elif len(loc) == 4 and loc[1] == "method" and loc[2] in MODELS:
        names = MODELS[loc[2]].model_fields
    return errors.known_names(str(loc[-1]), names)


def _methods(app: FastAPI, request: Request) -> set[str]:
    """All methods of the request's path. Starlette names those of one route, and each method here is a route."""
    found: set[str] = set()
    for route in iter_route_contexts(app.routes):  # those of included routers, too, which have no methods themselves
        matched, _ = route.matches(request.scope)
        if matched is not Match.NONE:
            found |= route.methods or set()
    return found or FILES  # where it is mounted, the path was shortened by the time that it was refused


def _named(request: Request) -> str:
    return f"{request.state.request_id} {request.method} {request.url.path}"
