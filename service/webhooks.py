"""Sends the outbox's messages as the Standard Webhooks specification says: https://www.standardwebhooks.com."""

import asyncio
import concurrent.futures
import contextlib
import email.utils
import functools
import logging
import math
import random
import threading
import time
from collections import Counter
from datetime import UTC, datetime

import httpx
from standardwebhooks.webhooks import Webhook

import safegraft
from safegraft.contracts.webhooks import WebhookAttempt
from safegraft.errors import InvalidParameter, SafegraftError
from safegraft.stores.webhooks import PER_TENANT, Sending, WebhookStore
from service.destinations import Destinations, Pinned
from service.loops import Loop
from service.settings import GatewaySettings

log = logging.getLogger("safegraft.webhooks")
CONCURRENT = 64
# Retries of many messages that failed together do not come back together.
JITTER = 0.1
STOP_SECONDS = 5.0
GONE = 410
UNCONNECTED = (httpx.ConnectError, httpx.ConnectTimeout)
# Of a host with more, the first that answers counts.
MAX_ADDRESSES = 3


class Sender(Loop):
    """A loop that claims due deliveries, and an event loop beside it on which they are sent.

    A turn never waits for a receiver: what is in flight when the next turn comes only takes its own places.
    """

    def __init__(self, settings: GatewaySettings, store: WebhookStore, destinations: Destinations) -> None:
        super().__init__("webhooks", self._claim, settings.webhook_seconds)
        self._settings = settings
        self._store = store
        self._destinations = destinations
        self._in_flight: dict[str, tuple[Sending, concurrent.futures.Future[None]]] = {}
        self._events: asyncio.AbstractEventLoop | None = None
        self._trusted = httpx.create_ssl_context()  # honours SSL_CERT_FILE, like the rest of Python

    def start(self) -> None:
        if self._settings.webhook_allow_private:
            log.warning(
                "webhooks may go to private addresses and over http; never set this where tenants are strangers"
            )
        self._events = asyncio.new_event_loop()
        threading.Thread(target=_run, args=(self._events,), name="webhook-sending", daemon=True).start()
        super().start()

    def stop(self) -> None:
        """Claims no more, waits a moment for what is in flight, and gives back the rest."""
        super().stop()
        left = list(self._in_flight.values())
        _, waiting = concurrent.futures.wait([future for _, future in left], timeout=STOP_SECONDS)
        for future in waiting:
            future.cancel()
        if self._events is not None:
            with contextlib.suppress(TimeoutError):
                asyncio.run_coroutine_threadsafe(_settled(), self._events).result(STOP_SECONDS)
            self._events.call_soon_threadsafe(self._events.stop)
        self._destinations.close()
        if waiting:
            self._store.give_back([sending for sending, future in left if future in waiting])

    def _claim(self) -> None:
        assert self._events is not None
        flying = [sending for sending, _ in list(self._in_flight.values())]
        if len(flying) >= CONCURRENT:
            return
        by_tenant = Counter(sending.tenant for sending in flying)
        claimed = self._store.claim(
            CONCURRENT - len(flying),
            busy={sending.endpoint_id for sending in flying},
            full={tenant for tenant, count in by_tenant.items() if count >= PER_TENANT},
        )
        for sending in claimed:
            future = asyncio.run_coroutine_threadsafe(self._deliver(sending), self._events)
            self._in_flight[sending.id] = (sending, future)
            future.add_done_callback(functools.partial(self._landed, sending.id))

    def _landed(self, delivery_id: str, _: concurrent.futures.Future[None]) -> None:
        self._in_flight.pop(delivery_id, None)
        self.wake()  # there is room again

    async def _deliver(self, sending: Sending) -> None:
        try:
            attempt, wanted = await self._attempt(sending)
            retry_in, disable = None, None
            if attempt.status == GONE:
                disable = "It answered 410 Gone."
            elif attempt.error is not None:
                retry_in = pause(self._settings.webhook_retry_seconds, sending.step, wanted)
            await asyncio.to_thread(self._store.record, sending, attempt, retry_in=retry_in, disable=disable)
        except Exception:
            # Nothing is lost: its lease ends, and somebody sends it again.
            log.exception("%s: the outcome could not be recorded", sending.id)

    async def _attempt(self, sending: Sending) -> tuple[WebhookAttempt, float | None]:
        """How one sending went, and the seconds that the receiver wants to be left alone."""
        started, at = time.monotonic(), int(time.time())
        status, wanted, error = None, None, None
        try:
            # Over all: a receiver that sends one byte a second must not hold a place for ever.
            async with asyncio.timeout(self._settings.webhook_timeout_seconds):
                response = await self._post(sending)
            status, wanted = response.status_code, retry_after(response.headers.get("retry-after"))
            error = None if response.is_success else _said(response)
        except TimeoutError:
            error = f"No answer within {self._settings.webhook_timeout_seconds:g} seconds."
        except InvalidParameter as refused:
            error = refused.message
        except httpx.HTTPError as failed:
            error = f"No connection: {failed}." if isinstance(failed, UNCONNECTED) else f"No answer: {failed!r}."
        except (OSError, UnicodeError):
            error = "The host's name cannot be resolved."
        except SafegraftError as fault:
            log.error("%s: %s", sending.id, fault)
            error = "It could not be signed; this is a fault of ours."
        except Exception:
            log.exception("%s could not be sent", sending.id)
            error = "It could not be sent; this is a fault of ours."
        seconds = round(time.monotonic() - started, 3)
        return WebhookAttempt(at=at, seconds=seconds, status=status, error=_short(error)), wanted

    async def _post(self, sending: Sending) -> httpx.Response:
        """The answer's status and headers; its body is not read. Tries the host's addresses in turn."""
        headers = sign(sending, self._store.secrets(sending), datetime.now(UTC))
        pinned = (await self._destinations.pin(sending.url))[:MAX_ADDRESSES]
        seconds = self._settings.webhook_timeout_seconds
        timeout = httpx.Timeout(seconds, connect=seconds / len(pinned))
        for place in pinned[:-1]:
            try:
                return await self._post_to(place, sending.body, headers, timeout)
            except UNCONNECTED:
                continue
        return await self._post_to(pinned[-1], sending.body, headers, timeout)

    async def _post_to(
        self, place: Pinned, body: bytes, headers: dict[str, str], timeout: httpx.Timeout
    ) -> httpx.Response:
        # A client for this one sending: a kept connection was made for one name, and two names may share an address.
        async with httpx.AsyncClient(
            verify=self._trusted, trust_env=False, follow_redirects=False, timeout=timeout
        ) as client:
            request = client.build_request(
                "POST",
                place.url,
                content=body,
                headers=headers | {"host": place.host},
                extensions={"sni_hostname": place.server_name},
            )
            response = await client.send(request, stream=True)
            await response.aclose()
            return response


def sign(sending: Sending, secrets: list[str], at: datetime) -> dict[str, str]:
    """The headers of a message. During a rotation one signature a secret, separated by spaces."""
    body = sending.body.decode()
    return {
        "content-type": "application/json",
        "user-agent": f"safegraft/{safegraft.__version__} (webhooks)",
        "webhook-id": sending.id,
        "webhook-timestamp": str(math.floor(at.timestamp())),
        "webhook-signature": " ".join(Webhook(secret).sign(sending.id, at, body) for secret in secrets),
        "connection": "close",
    }


def pause(table: list[float], step: int, wanted: float | None) -> float | None:
    """Seconds until the next attempt after `step` failures before this one; None: there is none.

    wanted: what the receiver asked for; it may stretch a pause up to the length of the next one.
    """
    if step >= len(table):
        return None
    longest = table[min(step + 1, len(table) - 1)]
    seconds = max(table[step], min(wanted or 0.0, longest))
    return seconds * (1 + random.uniform(0, JITTER))


def retry_after(given: str | None) -> float | None:
    """The seconds that a Retry-After header asks for, as a number or a date; None where it says nothing."""
    if given is None:
        return None
    if given.strip().isascii() and given.strip().isdigit():
        return float(given.strip()[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(given).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _said(response: httpx.Response) -> str:
    if response.is_redirect:
        return f"It answered {response.status_code}; redirects are not followed."
    return f"It answered {response.status_code}."


def _short(error: str | None) -> str | None:
    """What a database can hold, and no more than one line of it."""
    return None if error is None else "".join(c if c.isprintable() else " " for c in error)[:300]


def _run(events: asyncio.AbstractEventLoop) -> None:
    try:
        events.run_forever()
    finally:
        events.close()


async def _settled() -> None:
    """Lets cancelled tasks, and what they wrote to the database, run to their end."""
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_default_executor()
