"""Lists in OpenAI's shape."""

from typing import Protocol, TypeVar

from safegraft.contracts.listing import Page


class Identified(Protocol):
    @property
    def id(self) -> str: ...


Item = TypeVar("Item", bound=Identified)


# The type is quoted: at run time pydantic would want a schema of Identified.
def page(data: list[Item], has_more: bool) -> "Page[Item]":
    """One page of items that are in the list's order already."""
    return Page(
        data=data,
        has_more=has_more,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
    )
