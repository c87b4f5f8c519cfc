"""Who is asking, and may they. One answer a request, given before its body is read."""

import asyncio
import ipaddress
import time
from collections import OrderedDict
from dataclasses import dataclass
from urllib.parse import urlsplit

from limits import RateLimitItemPerSecond
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from starlette.requests import Request

from safegraft.contracts.keys import ALLOWS, DEFAULT_TENANT, Limits, Scope
from safegraft.stores.keys import Holder, KeyStore
from service.errors import Forbidden, RateLimited, Unauthorized
from service.settings import GatewaySettings

DEVELOPMENT = "development"


@dataclass(frozen=True)
class Principal:
    """Whom a request comes from. `key_id` is `development` where no key was asked for."""

    tenant: str
    key_id: str
    scopes: frozenset[Scope]
    limits: Limits


class Gatekeeper:
    """Looks keys up, remembers them for a moment, and counts requests. Lives on the event loop."""

    def __init__(self, settings: GatewaySettings, keys: KeyStore) -> None:
        self._settings = settings
        self._keys = keys
        self._known: OrderedDict[str, tuple[float, Holder]] = OrderedDict()
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())

    async def admit(self, request: Request) -> Principal:
        """The principal of a request, found once. Raises Unauthorized or RateLimited."""
        known: Principal | None = getattr(request.state, "principal", None)
        if known is None:
            known = await self._identify(request)
            await self._count(request, known)
            request.state.principal = known
        return known

    async def require(self, request: Request, scope: Scope | None = None) -> Principal:
        """Like `admit`; without `scope`, reading needs `read` and everything else `write`. Raises Forbidden."""
        principal = await self.admit(request)
        needed = scope or ("read" if request.method in ("GET", "HEAD") else "write")
        if needed not in principal.scopes:
            raise Forbidden(
                f"This key's scopes do not allow that; it needs {needed}.",
                hint="Use another key, or ask the operator for one: safegraft keys create.",
                param="Authorization",
            )
        return principal

    async def _identify(self, request: Request) -> Principal:
        if self._settings.dev:
            if not is_loopback(request):
                raise Unauthorized(
                    "Development mode answers this machine alone.",
                    hint="Serve without --dev, and make a key with: safegraft keys create.",
                )
            return Principal(DEFAULT_TENANT, DEVELOPMENT, ALLOWS["admin"], Limits())
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        holder = await self._holder(given.strip()) if scheme.lower() == "bearer" else None
        if holder is None:
            raise Unauthorized(
                "A valid API key is needed.", hint="Send `Authorization: Bearer <key>`.", param="Authorization"
            )
        return Principal(holder.tenant, holder.key_id, holder.scopes, holder.limits)

    async def _holder(self, key: str) -> Holder | None:
        kept = self._known.get(key)
        if kept is not None and kept[0] > time.monotonic():
            holder = kept[1]
            return holder if holder.expires_at is None or holder.expires_at > time.time() else None
        found = await asyncio.to_thread(self._keys.find, key)
        self._known.pop(key, None)
        if found is not None:
            # Only right keys are remembered: guesses must not fill the memory.
            self._known[key] = (time.monotonic() + self._settings.key_cache_seconds, found)
            while len(self._known) > self._settings.key_cache_size:
                self._known.popitem(last=False)
        return found

    async def _count(self, request: Request, principal: Principal) -> None:
        allowed = principal.limits.max_requests_per_second or self._settings.max_requests_per_second
        if principal.key_id == DEVELOPMENT or not allowed:
            return
        rate = RateLimitItemPerSecond(allowed)
        within = await self._limiter.hit(rate, principal.tenant)
        reset, left = await self._limiter.get_window_stats(rate, principal.tenant)
        seconds = max(0.0, reset - time.time())
        # OpenAI's header names, and the IETF's (draft-ietf-httpapi-ratelimit-headers).
        request.state.rate_headers = {
            "x-ratelimit-limit-requests": str(allowed),
            "x-ratelimit-remaining-requests": str(left),
            "x-ratelimit-reset-requests": f"{round(seconds * 1000)}ms",
            "ratelimit-policy": f'"requests";q={allowed};w=1',
            "ratelimit": f'"requests";r={left};t={max(1, round(seconds))}',
        }
        if not within:
            raise RateLimited(f"More than {allowed} requests in a second.", hint="Wait a second and try again.")


def is_loopback(request: Request) -> bool:
    """Does the request come from this machine, to this machine, and from no web page of another host?

    Asked of every request: a server that was started by hand may listen on any address, and a page that the operator
    has open could send requests here.
    """
    hosts = [request.client.host] if request.client else []
    hosts += [request.url.hostname or ""]
    if origin := request.headers.get("origin"):
        hosts.append(urlsplit(origin).hostname or "")
    return all(host == "localhost" or _is_loopback_address(host) for host in hosts)


def _is_loopback_address(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
