"""What all contracts have in common."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

# Postgres holds no NUL, and refuses it as late as when a value is taken out of a JSON column.
NO_NUL = r"^[^\x00]*$"


class Shown(BaseModel):
    """What we answer and what we keep."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def told(fault: Mapping[str, Any]) -> str:
    """One of pydantic's `errors()` in words for whoever wrote the JSON, who does not know pydantic."""
    match fault["type"]:
        case "extra_forbidden":
            return "There is no such field"
        case "dict_type" | "model_type" | "model_attributes_type":
            return "An object is needed"
        case "union_tag_not_found":
            return f"An object that has {fault['ctx']['discriminator']} is needed"
        case "union_tag_invalid":  # pydantic's own words repeat what was sent, of any length
            of = fault["ctx"]
            return f"{of['discriminator']} is {ascii(of['tag'])[:80]}, not one of {of['expected_tags']}"
        case _:
            return str(fault["msg"]).removeprefix("Value error, ")


class Asked(Shown):
    """What clients send. Strict: `false` is no number and `"3"` neither; a mistake is named rather than guessed at."""

    model_config = ConfigDict(strict=True)
