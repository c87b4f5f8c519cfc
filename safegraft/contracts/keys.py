"""API keys, their scopes, and what a tenant may use."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

Scope = Literal["read", "write", "admin"]
# What each scope allows: `write` can also read, `admin` can do both.
ALLOWS: dict[Scope, frozenset[Scope]] = {
    "read": frozenset({"read"}),
    "write": frozenset({"read", "write"}),
    "admin": frozenset({"read", "write", "admin"}),
}
DEFAULT_TENANT = "default"
TENANT = "^[a-z0-9][a-z0-9_-]{0,39}$"


class Key(BaseModel):
    """A key as it is listed: never the key itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    object: Literal["api_key"] = "api_key"
    tenant: str
    name: str
    hint: str
    scopes: list[Scope]
    created_at: int
    expires_at: int | None
    revoked_at: int | None
    last_used_at: int | None


class Limits(BaseModel):
    """What a tenant may use; null is the installation's default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_bytes: int | None = None
    max_jobs: int | None = None
    max_requests_per_second: int | None = None
