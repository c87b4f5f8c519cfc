"""The API description as generators need it: what FastAPI writes, put right where it says less or more than is true."""

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI

from service.examples import PROBLEM, REQUESTS, RESPONSES

PROBLEM_TYPE = "application/problem+json"
DESCRIPTION = """Repairs the safety of fine-tuned LoRA adapters, after the fine-tuning and without training.

Upload an adapter, start a realignment job, wait for its end (poll it, stream its events, or register a webhook), and
download the patched adapter that its result names. Requests carry `Authorization: Bearer sgk_…`, except for the probes
and this description. Times are Unix seconds. Lists turn pages by `limit` and `after`. Refusals have one shape, with a
stable `error.code`; every answer carries an `x-request-id`.
"""
# In the order in which a reader needs them.
TAGS = [
    {"name": "adapters", "description": "LoRA adapters: what is uploaded, and what jobs make of it."},
    {"name": "realignments", "description": "Jobs that repair one adapter, their events and their reports."},
    {"name": "catalogue", "description": "The references and the methods that this installation offers."},
    {"name": "uploads", "description": "Large files in parts, in the shape of OpenAI's Uploads API."},
    {"name": "files", "description": "Uploaded files and results as files, in the shape of OpenAI's Files API."},
    {"name": "fine_tuning", "description": "The same jobs, in the shape of OpenAI's fine-tuning API."},
    {
        "name": "batches",
        "description": "Many adapters against one reference: a canary first, and a rule that stops it.",
    },
    {"name": "webhooks", "description": "Addresses that hear of the ends of jobs; deliveries and what they carry."},
    {"name": "provenance", "description": "What a result was made from, and the keys that sign it."},
    {"name": "audit", "description": "Who changed what in this tenant."},
    {"name": "health", "description": "Probes and metrics, for operators."},
]


def describe(app: FastAPI) -> None:
    """Makes the application's description go through `corrected`."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = corrected(generate())
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def corrected(document: dict[str, Any]) -> dict[str, Any]:
    for operation in operations(document):
        _errors_are_problems(operation)
        _parameters_are_not_null(operation)
        _has_examples(operation)
    _kinds_are_required(document)
    _unions_have_no_default(document["components"]["schemas"])
    return document


def operations(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for path in document["paths"].values():
        yield from (operation for method, operation in path.items() if method != "parameters")


def _errors_are_problems(operation: dict[str, Any]) -> None:
    """FastAPI documents every body as application/json; errors are sent as application/problem+json."""
    for status in ("4XX", "5XX"):
        content = operation["responses"][status].get("content", {})
        if "application/json" in content:
            content[PROBLEM_TYPE] = content.pop("application/json")


def _has_examples(operation: dict[str, Any]) -> None:
    name = operation["operationId"]
    shown = {key: {"summary": summary, "value": value} for key, (summary, value) in REQUESTS.get(name, {}).items()}
    if shown:
        operation["requestBody"]["content"]["application/json"]["examples"] = shown
    for status, response in operation["responses"].items():
        content = response.get("content", {})
        if status.startswith("2") and name in RESPONSES and "application/json" in content:
            content["application/json"]["example"] = RESPONSES[name]
        if status == "4XX" and PROBLEM_TYPE in content:
            content[PROBLEM_TYPE]["example"] = PROBLEM


def _parameters_are_not_null(operation: dict[str, Any]) -> None:
    """A parameter that may be left out is no parameter that may be null: there is no null in an address or header."""
    for parameter in operation.get("parameters", []):
        schema = parameter["schema"]
        kinds = [kind for kind in schema.pop("anyOf", []) if kind.get("type") != "null"]
        if len(kinds) == 1:
            schema.update(kinds[0])
        elif kinds:
            schema["anyOf"] = kinds


def _kinds_are_required(document: dict[str, Any]) -> None:
    """Where `type` tells which of several shapes a body has, it must be there; pydantic lists it with a default."""
    schemas = document["components"]["schemas"]
    for found in list(_discriminators(document)):
        for reference in found["mapping"].values():
            schema = schemas[reference.rpartition("/")[2]]
            if found["propertyName"] not in schema.get("required", []):
                schema["required"] = [found["propertyName"], *schema.get("required", [])]
                schema["properties"][found["propertyName"]].pop("default", None)


def _unions_have_no_default(node: Any) -> None:
    """An object as the default of a choice of objects: generators stop at it. What holds is in the description."""
    if isinstance(node, dict):
        if ("oneOf" in node or "anyOf" in node) and isinstance(node.get("default"), dict):
            del node["default"]
        for value in node.values():
            _unions_have_no_default(value)
    elif isinstance(node, list):
        for value in node:
            _unions_have_no_default(value)


def _discriminators(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        if isinstance(found := node.get("discriminator"), dict) and "mapping" in found:
            yield found
        for value in node.values():
            yield from _discriminators(value)
    elif isinstance(node, list):
        for value in node:
            yield from _discriminators(value)
