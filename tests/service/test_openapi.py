"""The API description: what generators and readers need of it."""

from typing import Any

import pytest
from jsonschema import Draft202012Validator

from service.app import create_app
from service.examples import REQUESTS, RESPONSES
from service.openapi import operations
from service.settings import GatewaySettings


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return create_app(GatewaySettings(dev=True)).openapi()


def media(document: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(operation, media type object) of every body that is described."""
    found = []
    for operation in operations(document):
        bodies = [operation.get("requestBody", {}), *operation["responses"].values()]
        found += [(operation["operationId"], kind) for body in bodies for kind in body.get("content", {}).values()]
    return found


def test_examples_are_what_their_schemas_allow(document: dict[str, Any]) -> None:
    checked = set()
    for operation, kind in media(document):
        examples = [item["value"] for item in kind.get("examples", {}).values()]
        examples += [kind["example"]] if "example" in kind else []
        for example in examples:
            schema = {**kind["schema"], "components": document["components"]}
            errors = [error.message for error in Draft202012Validator(schema).iter_errors(example)]
            assert errors == [], operation
            checked.add(operation)
    assert checked >= set(REQUESTS) | set(RESPONSES)


def test_every_body_has_a_schema(document: dict[str, Any]) -> None:
    for operation, kind in media(document):
        assert kind.get("schema"), operation


def test_every_json_request_has_an_example(document: dict[str, Any]) -> None:
    for operation in operations(document):
        body = operation.get("requestBody", {}).get("content", {}).get("application/json")
        if body is not None:
            assert body.get("examples"), operation["operationId"]


def test_operation_ids_are_unique_and_described(document: dict[str, Any]) -> None:
    found = [operation["operationId"] for operation in operations(document)]
    assert len(set(found)) == len(found)
    for operation in operations(document):
        assert operation["description"], operation["operationId"]
        assert "application/problem+json" in operation["responses"]["4XX"]["content"]


def test_summaries_stand_alone(document: dict[str, Any]) -> None:
    webhooks = [operation for path in document["webhooks"].values() for operation in path.values()]
    found = [operation["summary"] for operation in [*operations(document), *webhooks]]
    assert len(found) >= 60
    for summary in found:
        assert len(summary.split()) >= 2, summary
        assert found.count(summary) == 1, summary


def test_every_tag_has_its_line_and_its_place(document: dict[str, Any]) -> None:
    tags = [tag["name"] for tag in document["tags"]]
    used = [tag for operation in operations(document) for tag in operation["tags"]]
    assert sorted(set(used)) == sorted(tags)
    assert tags[:2] == ["adapters", "realignments"]  # what everybody needs
    assert tags[-1] == "health"
    for tag in document["tags"]:
        assert tag["description"].endswith(".")
        assert "\n" not in tag["description"]


def test_no_parameter_may_be_null(document: dict[str, Any]) -> None:
    for operation in operations(document):
        for parameter in operation.get("parameters", []):
            assert "anyOf" not in parameter["schema"], (operation["operationId"], parameter["name"])
