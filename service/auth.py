"""Who is asking. Every record carries a tenant; until tenants have keys of their own there is one, `default`."""

import hmac

from service.errors import Unauthorized
from service.settings import GatewaySettings

DEFAULT_TENANT = "default"


def tenant_of(settings: GatewaySettings, authorization: str | None) -> str:
    """The tenant that a request's `Authorization: Bearer …` belongs to. Raises Unauthorized."""
    if settings.dev:
        return DEFAULT_TENANT
    scheme, _, given = (authorization or "").partition(" ")
    accepted = [key.get_secret_value().encode() for key in settings.api_keys]
    # All keys are compared, each in constant time, so that the time tells nothing.
    if scheme.lower() == "bearer" and sum(hmac.compare_digest(given.strip().encode(), key) for key in accepted):
        return DEFAULT_TENANT
    raise Unauthorized("A valid API key is needed.", hint="Send `Authorization: Bearer <key>`.", param="Authorization")
