"""/v1/webhook_endpoints and /v1/webhook_deliveries, and the description of what endpoints receive.

All of it needs the scope `admin`, reading too: where a tenant's messages go, and with which secrets they are signed, is
the tenant's configuration, and an endpoint's address often is a secret of its own.
"""

import re
from typing import Annotated

from fastapi import APIRouter, Path, Query, Response

from safegraft.contracts.listing import PRINTABLE, Page
from safegraft.contracts.webhooks import (
    PING,
    DeliveryState,
    EventType,
    RotateSecret,
    WebhookDelivery,
    WebhookDeliveryDetail,
    WebhookEndpoint,
    WebhookEndpointCreate,
    WebhookEndpointDeleted,
    WebhookEndpointUpdate,
    WebhookEndpointWithSecret,
    WebhookMessage,
)
from service.body import JsonRoute
from service.dependencies import AdminTenant, AfterMessage, AfterWebhook, Here, Limit
from service.paging import page

router = APIRouter(prefix="/v1", tags=["webhooks"], route_class=JsonRoute)
EndpointId = Annotated[str, Path(max_length=80, pattern=PRINTABLE)]
DeliveryId = Annotated[str, Path(max_length=80, pattern=PRINTABLE)]


@router.post(
    "/webhook_endpoints", status_code=201, operation_id="createWebhookEndpoint", summary="Register a webhook endpoint"
)
def create(
    request: WebhookEndpointCreate, response: Response, here: Here, tenant: AdminTenant
) -> WebhookEndpointWithSecret:
    """Registers an address, and shows the secret that signs its messages, this once. At most 20 a tenant."""
    here.destinations.check(request.url)
    created, secret = here.webhooks.create(tenant, request)
    response.headers["location"] = f"/v1/webhook_endpoints/{created.id}"
    return WebhookEndpointWithSecret(**created.model_dump(), signing_secret=secret)


@router.get("/webhook_endpoints", operation_id="listWebhookEndpoints", summary="List webhook endpoints")
def list_(here: Here, tenant: AdminTenant, limit: Limit = 20, after: AfterWebhook = None) -> Page[WebhookEndpoint]:
    """Newest first, without secrets."""
    return page(*here.webhooks.page(tenant, limit=limit, after=after))


@router.get("/webhook_endpoints/{endpoint_id}", operation_id="getWebhookEndpoint", summary="Show a webhook endpoint")
def get(endpoint_id: EndpointId, here: Here, tenant: AdminTenant) -> WebhookEndpoint:
    """Where it goes, what it hears of, and whether it works."""
    return here.webhooks.get(tenant, endpoint_id)


@router.post(
    "/webhook_endpoints/{endpoint_id}", operation_id="updateWebhookEndpoint", summary="Change a webhook endpoint"
)
def update(endpoint_id: EndpointId, request: WebhookEndpointUpdate, here: Here, tenant: AdminTenant) -> WebhookEndpoint:
    """Changes address, name or types, disables, or enables again. Pending deliveries go to the new address."""
    if request.url is not None:
        here.destinations.check(request.url)
    return here.webhooks.update(tenant, endpoint_id, request)


@router.delete(
    "/webhook_endpoints/{endpoint_id}", operation_id="deleteWebhookEndpoint", summary="Delete a webhook endpoint"
)
def delete(endpoint_id: EndpointId, here: Here, tenant: AdminTenant) -> WebhookEndpointDeleted:
    """Deletes the endpoint and its secret; what is still pending for it is not sent."""
    here.webhooks.delete(tenant, endpoint_id)
    return WebhookEndpointDeleted(id=endpoint_id)


@router.post(
    "/webhook_endpoints/{endpoint_id}/rotate_secret",
    operation_id="rotateWebhookSecret",
    summary="Rotate the secret of a webhook endpoint",
)
def rotate_secret(
    endpoint_id: EndpointId,
    here: Here,
    tenant: AdminTenant,
    request: RotateSecret = RotateSecret(),  # noqa: B008 - frozen
) -> WebhookEndpointWithSecret:
    """Makes a new secret and shows it, this once. Both sign until the overlap ends: 24 hours if nothing is said."""
    rotated, secret = here.webhooks.rotate(tenant, endpoint_id, request.overlap)
    return WebhookEndpointWithSecret(**rotated.model_dump(), signing_secret=secret)


@router.post(
    "/webhook_endpoints/{endpoint_id}/test",
    status_code=202,
    operation_id="testWebhookEndpoint",
    summary="Send a test message to a webhook endpoint",
)
def test(endpoint_id: EndpointId, here: Here, tenant: AdminTenant) -> WebhookDelivery:
    """Sends a message of the type `ping`, the way all messages go. How it went is in the delivery."""
    sent = here.webhooks.ping(tenant, endpoint_id)
    here.sender.wake()
    return sent


@router.get("/webhook_deliveries", operation_id="listWebhookDeliveries", summary="List webhook deliveries")
def deliveries(
    here: Here,
    tenant: AdminTenant,
    limit: Limit = 20,
    after: AfterMessage = None,
    endpoint_id: Annotated[str | None, Query(max_length=80, pattern=PRINTABLE)] = None,
    state: DeliveryState | None = None,
) -> Page[WebhookDelivery]:
    """Newest first. Ended ones are kept for 30 days."""
    found = here.webhooks.deliveries(tenant, limit=limit, after=after, endpoint_id=endpoint_id, state=state)
    return page(*found)


@router.get("/webhook_deliveries/{delivery_id}", operation_id="getWebhookDelivery", summary="Show a webhook delivery")
def delivery(delivery_id: DeliveryId, here: Here, tenant: AdminTenant) -> WebhookDeliveryDetail:
    """The message, and how each attempt to deliver it went."""
    return here.webhooks.delivery(tenant, delivery_id)


@router.post(
    "/webhook_deliveries/{delivery_id}/replay",
    status_code=202,
    operation_id="replayWebhookDelivery",
    summary="Send a webhook delivery again",
)
def replay(delivery_id: DeliveryId, here: Here, tenant: AdminTenant) -> WebhookDelivery:
    """Sends it again now, whatever its state, with the same message id. One that is being sent stays as it is."""
    replayed = here.webhooks.replay(tenant, delivery_id)
    here.sender.wake()
    return replayed


# What endpoints receive: OpenAPI's `webhooks`. These routes describe; nobody can call them.
messages = APIRouter(tags=["webhooks"])
MEANINGS: dict[EventType, str] = {
    "realignment.succeeded": "A realignment has its result. `data.id` is the realignment.",
    "realignment.failed": "A realignment ended without a result; its `error` says why. `data.id` is the realignment.",
    "realignment.cancelled": "A realignment was cancelled. `data.id` is the realignment.",
    "fine_tuning.job.succeeded": "A job of the fine-tuning API has its result. `data.id` is the job.",
    "fine_tuning.job.failed": "A job of the fine-tuning API ended without a result. `data.id` is the job.",
    "fine_tuning.job.cancelled": "A job of the fine-tuning API was cancelled. `data.id` is the job.",
    "realignment_batch.succeeded": "All of a batch has ended, within its rule. `data.id` is the batch.",
    "realignment_batch.stopped": "A batch's rule has stopped it; its `reason` says why. `data.id` is the batch.",
    "realignment_batch.cancelled": "A batch was cancelled. `data.id` is the batch.",
}
SIGNED = (
    " Signed as the Standard Webhooks specification says, in the headers `webhook-id`, `webhook-timestamp` and "
    "`webhook-signature`. Answer with 2xx within 15 seconds; 410 disables the endpoint; everything else is tried again."
)


def _receive(message: WebhookMessage) -> None:
    """Only described."""


for _type, _meaning in (*MEANINGS.items(), (PING, "A test that was asked for. `data.id` is the endpoint.")):
    messages.add_api_route(
        _type,
        _receive,
        methods=["POST"],
        operation_id="on" + "".join(part.capitalize() for part in _type.replace("_", ".").split(".")),
        summary=re.split("[.;]", _meaning)[0],
        description=_meaning + SIGNED,
        responses={
            200: {"description": "Delivered, like any other 2xx.", "content": None},
            410: {"description": "The endpoint is disabled."},
            "4XX": {"description": "Tried again later."},
            "5XX": {"description": "Tried again later."},
        },
    )
