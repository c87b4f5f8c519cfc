"""Where webhooks may go: to public addresses over TLS, and nowhere inside the operator's network.

A name is resolved once for each sending; every address must be public, and the connection is then made to an address
that was checked, not to the name: otherwise the name could resolve to something else a moment later.
"""

import asyncio
import concurrent.futures
import ipaddress
import socket
from collections.abc import Callable
from dataclasses import dataclass

import httpx

from safegraft.errors import InvalidParameter

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], list[str]]

# What is routed on the public IPv6 internet is inside of this; Python's `is_global` also says yes to much outside.
UNICAST = ipaddress.IPv6Network("2000::/3")
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
OLD_6TO4_RELAYS = ipaddress.IPv4Network("192.88.99.0/24")
REGISTERING_SECONDS = 3.0
RESOLVERS = 16


@dataclass(frozen=True)
class Pinned:
    """One address to connect to, with the names that the receiver expects."""

    url: httpx.URL  # with the address in place of the name
    host: str  # for the Host header: with the port, where it is not the scheme's own
    server_name: str  # for TLS


class Destinations:
    """Checks addresses. allow_private: http and private addresses as well, for development."""

    def __init__(self, *, allow_private: bool, resolve: Resolve | None = None) -> None:
        self._allow_private = allow_private
        self._resolve = resolve or look_up
        # Of its own: names that take long to resolve must not hold up anything else.
        self._pool = concurrent.futures.ThreadPoolExecutor(RESOLVERS, thread_name_prefix="webhook-names")

    def check(self, url: str) -> None:
        """The form, and the addresses where the name resolves soon. Raises InvalidParameter.

        A name that does not resolve is accepted: it may do so later, and is looked at again at every sending.
        """
        parsed = self.parse(url)
        looked_up = self._pool.submit(self._resolve, _name(parsed), _port(parsed))
        try:
            found = looked_up.result(timeout=REGISTERING_SECONDS)
        except UnicodeError as error:
            raise _refused_url("Its host is no name.") from error
        except OSError:  # and TimeoutError, which is one
            return
        self._ensure_public(found)

    async def pin(self, url: str) -> list[Pinned]:
        """The addresses to connect to, in the resolver's order.

        Raises InvalidParameter where one of them is not public, OSError where the name does not resolve.
        """
        parsed = self.parse(url)
        name, port = _name(parsed), _port(parsed)
        found = await asyncio.get_running_loop().run_in_executor(self._pool, self._resolve, name, port)
        self._ensure_public(found)
        host = parsed.netloc.decode("ascii")
        return [Pinned(parsed.copy_with(host=address), host, name.rstrip(".")) for address in dict.fromkeys(found)]

    def parse(self, url: str) -> httpx.URL:
        """Raises InvalidParameter (`webhook_url_refused`) for an address that is never sent to."""
        schemes = ("https", "http") if self._allow_private else ("https",)
        try:
            parsed = httpx.URL(url)
            parsed.raw_host.decode("ascii")
            _ = parsed.host  # decodes international names, and fails on those that are none
        except (httpx.InvalidURL, UnicodeError, ValueError) as error:
            raise _refused_url(f"It cannot be read: {error}.") from error
        if parsed.scheme not in schemes:
            raise _refused_url(f"Its scheme must be {' or '.join(schemes)}.")
        if not parsed.host or "%" in parsed.host:
            raise _refused_url("It names no host.")
        if parsed.port is not None and not 0 < parsed.port < 2**16:
            raise _refused_url("Its port is none.")
        authority = url.partition("//")[2].partition("/")[0].partition("?")[0]
        if "@" in authority or parsed.userinfo:
            raise _refused_url("It holds credentials.", "Messages are signed: check the signature instead.")
        if "#" in url:
            raise _refused_url("It has a fragment, which no server gets.")
        if "\\" in url or " " in url:
            raise _refused_url("It holds a character that programs read differently.", "Write it percent-encoded.")
        return parsed

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _ensure_public(self, found: list[str]) -> None:
        if not found:
            raise OSError("the name has no address")
        if not self._allow_private and not all(is_public(address) for address in found):
            # Which one is not told: nobody shall map our network by registering names.
            raise InvalidParameter(
                "The webhook's host has an address that is not public.",
                code="webhook_address_refused",
                param="url",
                hint="Receive webhooks on a public address.",
            )


def is_public(text: str) -> bool:
    """Is this the address of a machine on the public internet? Addresses that wrap an IPv4 address are unwrapped."""
    try:
        address: Address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            return False
        wrapped = address.ipv4_mapped or address.sixtofour
        if wrapped is None and address in NAT64:
            wrapped = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if wrapped is None:
            return address in UNICAST and address.is_global and not address.is_reserved
        address = wrapped
    return address.is_global and not (address.is_multicast or address.is_reserved or address in OLD_6TO4_RELAYS)


def look_up(name: str, port: int) -> list[str]:
    """A name's addresses, by the system's resolver. Raises OSError, and UnicodeError for labels that are too long."""
    found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    return [str(item[4][0]) for item in found]


def _name(url: httpx.URL) -> str:
    return url.raw_host.decode("ascii")  # in the letters of DNS, where it was written in others


def _port(url: httpx.URL) -> int:
    return url.port or {"http": 80, "https": 443}[url.scheme]


def _refused_url(why: str, hint: str = "Give one like https://hooks.example.com/safegraft.") -> InvalidParameter:
    return InvalidParameter(
        f"This address cannot be used for a webhook. {why}", code="webhook_url_refused", param="url", hint=hint
    )
