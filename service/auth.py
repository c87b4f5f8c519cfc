"""Who is asking, and may they. One answer a request, given before its body is read."""

import asyncio
import hashlib
import ipaddress
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.requests import Request

from safegraft.contracts.keys import ALLOWS, DEFAULT_TENANT, Limits, Scope
from safegraft.stores.keys import Holder, KeyStore, well_formed
from service.errors import Forbidden, RateLimited, Unauthorized
from service.limiter import Limiter
from service.settings import GatewaySettings

DEVELOPMENT = "development"
# Threads that look keys up. Of their own: whoever sends wrong keys must not keep uploads waiting for a thread.
LOOKUPS = 4


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
        # By the hash of a key, so that the keys themselves do not lie in memory.
        self._known: OrderedDict[bytes, tuple[float, Holder]] = OrderedDict()
        self._asked: dict[bytes, asyncio.Task[Holder | None]] = {}
        self._threads = ThreadPoolExecutor(LOOKUPS, thread_name_prefix="keys")
        self._limiter = Limiter(settings.redis_url)

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        await self._limiter.close()

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
        holder = await self._holder(_key(request))
        if holder is None:
            raise Unauthorized(
                "A valid API key is needed.", hint="Send `Authorization: Bearer <key>`.", param="Authorization"
            )
        return Principal(holder.tenant, holder.key_id, holder.scopes, holder.limits)

    async def _holder(self, key: str) -> Holder | None:
        if not well_formed(key):  # also what is too long, or no ASCII: it costs nobody a question
            return None
        digest = hashlib.sha256(key.encode()).digest()
        kept = self._known.get(digest)
        if kept is not None and kept[0] > time.monotonic():
            return kept[1]
        if digest not in self._asked:
            # One question for all requests that wait for the same answer, and not cut short by the first that gives up.
            self._asked[digest] = asyncio.create_task(self._look_up(key, digest))
        return await asyncio.shield(self._asked[digest])

    async def _look_up(self, key: str, digest: bytes) -> Holder | None:
        # Counted from before the question: what is revoked after the answer was made must not live for longer.
        asked = time.monotonic()
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._threads, self._keys.find, key)
            self._known.pop(digest, None)
            if found is not None:
                # Only right keys are remembered: guesses must not fill the memory.
                kept = self._settings.key_cache_seconds
                if found.seconds_left is not None:
                    kept = min(kept, found.seconds_left)
                self._known[digest] = (asked + kept, found)
                while len(self._known) > self._settings.key_cache_size:
                    self._known.popitem(last=False)
            return found
        finally:
            del self._asked[digest]

    async def _count(self, request: Request, principal: Principal) -> None:
        own = principal.limits.max_requests_per_second
        allowed = self._settings.max_requests_per_second if own is None else own
        if principal.key_id == DEVELOPMENT or not allowed:
            return
        counted = await self._limiter.hit(principal.tenant, allowed)
        # OpenAI's header names, and the IETF's (draft-ietf-httpapi-ratelimit-headers).
        request.state.rate_headers = {
            "x-ratelimit-limit-requests": str(allowed),
            "x-ratelimit-remaining-requests": str(counted.left),
            "x-ratelimit-reset-requests": f"{round(counted.seconds * 1000)}ms",
            "ratelimit-policy": f'"requests";q={allowed};w=1',
            "ratelimit": f'"requests";r={counted.left};t={max(1, round(counted.seconds))}',
        }
        if not counted.within:
            raise RateLimited(f"More than {allowed} requests in a second.", hint="Wait a second and try again.")


def _key(request: Request) -> str:
    """What follows `Bearer`; empty where there is no such header, or more than one: a proxy may have looked at the
    other."""
    given = request.headers.getlist("authorization")
    scheme, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
    return key.strip(" ") if scheme.lower() == "bearer" else ""


def is_loopback(request: Request) -> bool:
    """Does the request come from this machine, to this machine, and from no web page of another host?

    Asked of every request: a server that was started by hand may listen on any address, and a page that the operator
    has open could send requests here.
    """
    hosts = [request.client.host] if request.client else []
    hosts += [request.url.hostname or ""]
    if origin := request.headers.get("origin"):
        hosts.append(_host_of(origin))
    return all(host == "localhost" or _is_loopback_address(host) for host in hosts)


def _host_of(origin: str) -> str:
    try:
        return urlsplit(origin).hostname or ""
    except ValueError:
        return ""


def _is_loopback_address(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
