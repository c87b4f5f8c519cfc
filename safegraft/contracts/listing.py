"""Lists, references and methods as the API shows them."""

from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from safegraft.contracts.reference import Lineage

Item = TypeVar("Item")
# What an id may look like: no NUL, which Postgres refuses, and no half surrogates, which no encoding can hold.
PRINTABLE = "^[ -~]*$"


class Page(BaseModel, Generic[Item]):
    """Newest first; `after=last_id` asks for the next page."""

    object: Literal["list"] = "list"
    data: list[Item]
    has_more: bool
    first_id: str | None
    last_id: str | None


class Reference(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    object: Literal["reference"] = "reference"
    name: str
    sha256: str
    base_model: str
    labels: list[str]
    architecture: str
    methods: list[str]
    lineages: list[Lineage]
    modules: int
    parameters: dict[str, Any]
    bytes: int
    created_at: int


class Method(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    object: Literal["method"] = "method"
    description: str
    default: bool = Field(description="Whether it is the first that is recommended, where a reference offers it.")
    strength_parameter: str | None = Field(description="The parameter that `strengths` of a realignment varies.")
    parameters: dict[str, Any]
