"""Lists in OpenAI's shape."""

from typing import TypeVar

from safegraft.contracts.adapter import Adapter
from safegraft.contracts.batch import BatchAdapter, RealignmentBatch
from safegraft.contracts.fine_tuning import FineTuningCheckpoint, FineTuningEvent, FineTuningJob
from safegraft.contracts.listing import Method, Page, Reference
from safegraft.contracts.realignment import Event, Realignment

Item = TypeVar(
    "Item",
    Adapter,
    Realignment,
    Event,
    Reference,
    Method,
    RealignmentBatch,
    BatchAdapter,
    FineTuningJob,
    FineTuningEvent,
    FineTuningCheckpoint,
)


def page(data: list[Item], has_more: bool) -> Page[Item]:
    """One page of items that are in the list's order already."""
    return Page(
        data=data,
        has_more=has_more,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
    )
