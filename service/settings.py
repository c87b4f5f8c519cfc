"""The gateway's settings, on top of the shared ones."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator
from pydantic_settings import NoDecode

from safegraft.dsse import load_public_key
from safegraft.errors import InvalidParameter
from safegraft.settings import SharedSettings


class GatewaySettings(SharedSettings):
    dev: bool = Field(default=False, description="Ask for no keys. Only for loopback addresses.")
    console: bool = Field(default=True, description="Serve the web console at /.")
    key_cache_seconds: float = Field(default=5.0, ge=0, description="So long a revoked key may still be accepted.")
    key_cache_size: int = Field(default=4096, gt=0)
    metrics_tenant: str = Field(
        default="", description="Whose admin keys may read /metrics; empty: every tenant's. It tells of all of them."
    )
    max_upload_bytes: int = Field(default=8 * 2**30, gt=0)
    max_active_uploads: int = Field(
        default=32, gt=0, description="Requests that bring bytes, at a time; one tenant's at most three quarters."
    )
    max_event_streams: int = Field(
        default=256, gt=0, description="Open streams of events, at a time; one tenant's at most three quarters."
    )
    upload_expiry_seconds: float = Field(
        default=24 * 3600.0, gt=0, description="A resumable upload that is not completed by then is given up."
    )
    max_active_validations: int = Field(
        default=3, gt=0, description="Processes that read uploads, at a time; one tenant's at most all but one."
    )
    validation_memory_bytes: int = Field(
        default=2**31, ge=2**28, description="Address space of a process that reads an upload."
    )
    validation_seconds: float = Field(
        default=600.0, gt=0, description="How long an upload may take to read, by the clock and of processor time."
    )
    max_json_bytes: int = Field(default=2**20, gt=0)
    dispatch_seconds: float = Field(default=1.0, gt=0, description="How often due jobs are looked for.")
    announce_limit: int = Field(default=32, gt=0, description="How many jobs may wait in the broker at a time.")
    max_bytes_per_tenant: int = Field(default=2**40, ge=0, description="Bytes a tenant may store; 0: no limit.")
    max_jobs_per_tenant: int = Field(default=1000, ge=0, description="Jobs a tenant may have open; 0: no limit.")
    batch_seconds: float = Field(default=1.0, gt=0, description="How often batches are looked after.")
    batch_open_jobs: int = Field(
        default=16, gt=0, description="Jobs of one batch that are queued or running at a time, at most."
    )
    max_requests_per_second: int = Field(
        default=100,
        ge=0,
        description="Of one tenant, by all gateways together (by each, while the broker does not answer); 0: no limit.",
    )
    webhook_allow_private: bool = Field(
        default=False, description="Send webhooks over http and to private addresses too. For development."
    )
    webhook_seconds: float = Field(default=1.0, gt=0, description="How often due webhooks are looked for.")
    webhook_timeout_seconds: float = Field(default=15.0, gt=0, description="For one attempt, from name to answer.")
    webhook_retry_seconds: list[Annotated[float, Field(ge=0)]] = Field(
        default=[5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400],
        description="Pauses before each further attempt to send a webhook; then it has failed.",
    )
    provenance_keys: Annotated[list[Path], NoDecode] = Field(
        default=[],
        description="PEM files, by commas: public keys that sign provenance, or did; `GET /v1/provenance_keys` shows "
        "them.",
    )

    @field_validator("provenance_keys", mode="before")
    @classmethod
    def _by_commas(cls, given: object) -> object:
        return [part.strip() for part in given.split(",") if part.strip()] if isinstance(given, str) else given

    @field_validator("provenance_keys")
    @classmethod
    def _readable(cls, given: list[Path]) -> list[Path]:
        for path in given:
            try:
                load_public_key(path)
            except InvalidParameter as error:
                raise ValueError(error.message.rstrip(".")) from error
        return given
