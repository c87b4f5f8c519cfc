"""The gateway's settings, on top of the shared ones."""

import json
from typing import Annotated, Any

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import NoDecode

from safegraft.settings import SharedSettings


class GatewaySettings(SharedSettings):
    dev: bool = Field(default=False, description="Ask for no keys. Only for loopback addresses.")
    api_keys: Annotated[list[Annotated[SecretStr, Field(min_length=1)]], NoDecode] = Field(
        default=[], description='Accepted keys: one, several with commas between them, or a JSON list ["sgk_…"].'
    )
    max_upload_bytes: int = Field(default=8 * 2**30, gt=0)
    max_active_uploads: int = Field(default=32, gt=0)
    max_json_bytes: int = Field(default=2**20, gt=0)
    dispatch_seconds: float = Field(default=1.0, gt=0, description="How often due jobs are looked for.")
    announce_limit: int = Field(default=32, gt=0, description="How many jobs may wait in the broker at a time.")

    @field_validator("api_keys", mode="before")
    @classmethod
    def _split_keys(cls, given: Any) -> Any:
        if not isinstance(given, str):
            return given
        if given.lstrip().startswith("["):
            return json.loads(given)
        return [key.strip() for key in given.split(",")] if given else []
