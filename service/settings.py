"""The gateway's settings, on top of the shared ones."""

from pydantic import Field

from safegraft.settings import SharedSettings


class GatewaySettings(SharedSettings):
    dev: bool = Field(default=False, description="Ask for no keys. Only for loopback addresses.")
    key_cache_seconds: float = Field(default=5.0, ge=0, description="So long a revoked key may still be accepted.")
    key_cache_size: int = Field(default=4096, gt=0)
    max_upload_bytes: int = Field(default=8 * 2**30, gt=0)
    max_active_uploads: int = Field(default=32, gt=0)
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
        default=100, ge=0, description="Of one tenant, in each gateway process; 0: no limit."
    )
