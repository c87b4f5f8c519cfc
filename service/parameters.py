"""Query strings: a parameter that a route does not know is refused, as an unknown field of a body is. Ignored, a
mistyped `?limt=5` would answer with something else than was asked for."""

from collections import Counter
from typing import Any
from urllib.parse import unquote_to_bytes

from fastapi import Request
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from safegraft.errors import InvalidParameter, known_names
from safegraft.header import shown

# Written metadata[key]=value; `submission.metadata_filters` judges what stands in the brackets.
METADATA = "metadata"


def known_parameters(request: Request) -> None:
    """Raises InvalidParameter (`unknown_parameter`, `duplicate_parameter`, `invalid_request`)."""
    query: bytes = request.scope["query_string"]
    if not query:
        return
    try:
        unquote_to_bytes(query).decode()
    except UnicodeDecodeError as error:
        raise InvalidParameter(
            "The query string is not UTF-8.", code="invalid_request", param="query", hint="Percent-encode UTF-8."
        ) from error
    names = _names(request.scope["route"])
    for name, count in Counter(name for name, _ in request.query_params.multi_items()).items():
        if METADATA in names and name.startswith(METADATA):
            continue
        if name in names:
            if count > 1:
                raise InvalidParameter(f"{name} is given twice.", code="duplicate_parameter", param=name)
            continue
        raise InvalidParameter(
            f"{shown(name)} is no parameter of this route.",
            code="unknown_parameter",
            param=shown(name),
            hint=known_names(name, names) or "It has none.",
        )


def _names(route: APIRoute) -> frozenset[str]:
    extra: dict[str, Any] = route.openapi_extra or {}
    described = {item["name"] for item in extra.get("parameters", []) if item["in"] == "query"}
    return frozenset(described | set(_asked(route.dependant)))


def _asked(dependant: Dependant) -> list[str]:
    own = [field.alias for field in dependant.query_params]
    return own + [name for inner in dependant.dependencies for name in _asked(inner)]
