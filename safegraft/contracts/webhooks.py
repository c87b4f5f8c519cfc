"""Webhook endpoints, the messages they get, and the deliveries of those messages.

Fields that OpenAI's API has too are named as there, so that its client's `webhooks.create`, `.update`, `.list`,
`.retrieve`, `.delete` and `.rotate_secret` work here.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from safegraft.contracts.base import Asked, Shown
from safegraft.contracts.listing import PRINTABLE

EventType = Literal[
    "realignment.succeeded",
    "realignment.failed",
    "realignment.cancelled",
    "fine_tuning.job.succeeded",
    "fine_tuning.job.failed",
    "fine_tuning.job.cancelled",
    "realignment_batch.succeeded",
    "realignment_batch.stopped",
    "realignment_batch.cancelled",
]
PING = "ping"
DeliveryState = Literal["pending", "delivered", "failed"]
DAY = 24 * 3600

Url = Annotated[
    str,
    Field(
        min_length=1,
        max_length=2000,
        pattern=PRINTABLE,
        description="https, on any port, without credentials and without a fragment. Its host must resolve to public "
        "addresses only, now and at every delivery; redirects are not followed.",
    ),
]
Name = Annotated[str, Field(max_length=100, pattern=PRINTABLE)]
EventTypes = Annotated[
    list[EventType | Literal["*"]],
    Field(min_length=1, max_length=20, description="The types that it hears of; `*`: all, also those to come."),
]


class WebhookEndpointCreate(Asked):
    url: Url
    name: Name = ""
    event_types: EventTypes = ["*"]


class WebhookEndpointUpdate(Asked):
    """What is left out stays."""

    url: Url | None = None
    name: Name | None = None
    event_types: EventTypes | None = None
    enabled: bool | None = Field(
        default=None, description="`false`: nothing is sent any more; `true` also ends a disabling by the service."
    )


class RotateSecret(Asked):
    """How long the old secret goes on signing beside the new one; 24 hours where nothing is said."""

    overlap_seconds: int | None = Field(default=None, ge=0, le=7 * DAY)
    keep_old_secret_active_for_24_hours: bool | None = Field(default=None, description="OpenAI's way to say it.")

    @model_validator(mode="after")
    def _one_of_them(self) -> "RotateSecret":
        if self.overlap_seconds is not None and self.keep_old_secret_active_for_24_hours is not None:
            raise ValueError("give overlap_seconds or keep_old_secret_active_for_24_hours, not both")
        return self

    @property
    def overlap(self) -> int:
        if self.overlap_seconds is not None:
            return self.overlap_seconds
        return 0 if self.keep_old_secret_active_for_24_hours is False else DAY


class WebhookEndpoint(Shown):
    """An endpoint without its secret."""

    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    name: str
    url: str
    event_types: list[str]
    enabled: bool
    disabled_at: int | None = None
    disabled_reason: str | None = None
    failing_since: int | None = Field(
        default=None, description="The first failure after which nothing was delivered; after 5 days it is disabled."
    )
    previous_secret_until: int | None = Field(
        default=None, description="After a rotation: until then messages are signed with both secrets."
    )
    created_at: int


class WebhookEndpointWithSecret(WebhookEndpoint):
    signing_secret: str = Field(
        repr=False, description="`whsec_` and the base64 of 32 bytes. Shown here, and never again."
    )


class WebhookEndpointDeleted(Shown):
    id: str
    object: Literal["webhook_endpoint.deleted"] = "webhook_endpoint.deleted"
    deleted: bool = True


class WebhookMessageData(Shown):
    id: str = Field(description="The id of what the message is about: `GET` it to know more.")


class WebhookMessage(Shown):
    """What an endpoint receives. The same message may arrive more than once: its `id` is the same then."""

    id: str
    object: Literal["event"] = "event"
    type: str
    created_at: int
    data: WebhookMessageData


class WebhookAttempt(Shown):
    at: int
    seconds: float
    status: int | None = Field(description="The status that the endpoint answered with; null: it did not answer.")
    error: str | None = Field(description="Why this was no delivery; null: it was one.")


class WebhookDelivery(Shown):
    """One message to one endpoint. `id` is the message's id, the same in every attempt."""

    id: str
    object: Literal["webhook_delivery"] = "webhook_delivery"
    endpoint_id: str
    type: str
    state: DeliveryState
    attempts: int
    next_attempt_at: int | None
    last_status: int | None
    last_error: str | None
    created_at: int
    finished_at: int | None


class WebhookDeliveryDetail(WebhookDelivery):
    """With its message, and its last 20 attempts, oldest first."""

    payload: WebhookMessage
    history: list[WebhookAttempt]
