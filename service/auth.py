"""Who is asking. Every record carries a tenant; until tenants have keys of their own there is one, `default`."""

import hmac
import ipaddress
from urllib.parse import urlsplit

from starlette.requests import Request

from service.errors import Unauthorized
from service.settings import GatewaySettings

DEFAULT_TENANT = "default"


def tenant_of(settings: GatewaySettings, request: Request) -> str:
    """The tenant that a request's `Authorization: Bearer …` belongs to. Raises Unauthorized."""
    if settings.dev:
        if not _is_loopback(request):
            raise Unauthorized("Development mode answers this machine alone.", hint="Set SAFEGRAFT_API_KEYS instead.")
        return DEFAULT_TENANT
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    accepted = [key.get_secret_value().encode() for key in settings.api_keys]
    # All keys are compared, each in constant time, so that the time tells nothing.
    if scheme.lower() == "bearer" and sum(hmac.compare_digest(given.strip().encode(), key) for key in accepted):
        return DEFAULT_TENANT
    raise Unauthorized("A valid API key is needed.", hint="Send `Authorization: Bearer <key>`.", param="Authorization")


def _is_loopback(request: Request) -> bool:
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
