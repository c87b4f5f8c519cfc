"""Where the shared things are: the settings that gateway, worker and command line have in common.

Each shell adds its own in its `settings.py`. Read once, at the edge; every field is an environment variable with the
prefix SAFEGRAFT_ (`REDIS_URL` is also understood without it).
"""

import logging
import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from pydantic import AliasChoices, Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

log = logging.getLogger("safegraft.settings")
PREFIX = "SAFEGRAFT_"
# As difflib counts it: letters that are swapped or left out, not another word.
NEAR = 0.93


def mistyped(kind: type["SharedSettings"], environment: Iterable[str]) -> dict[str, str]:
    """Variables that this part reads nothing from, and the setting that each is nearly called. Others than nearly are
    another part's: all may share one environment."""
    own = {f"{PREFIX}{name.upper()}" for name in kind.model_fields}
    found = {}
    for name in environment:
        if name.startswith(PREFIX) and name not in own:
            near = get_close_matches(name, own, n=1, cutoff=NEAR)
            if near:
                found[name] = near[0]
    return found


def warn_of_mistyped(kind: type["SharedSettings"]) -> None:
    """A retention that is misspelt keeps everything for ever, without a word."""
    for name, near in mistyped(kind, os.environ).items():
        log.warning("the environment has %s, which is no setting; did you mean %s?", name, near)


class SharedSettings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore", populate_by_name=True)

    data: Path = Field(default=Path("var"), description="Folder for the database, adapters, results and references.")
    database_url: str = Field(default="", description="SQLAlchemy URL; empty: SQLite in the data folder.")
    database_upgrade: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="Whether a start changes a database that is behind. `auto`: SQLite yes, Postgres no; an empty one "
        "gets its tables. `never`: `safegraft admin database upgrade` does both.",
    )
    storage_url: str = Field(
        default="", description="`s3://bucket/prefix` for adapters and results; empty: files in the data folder."
    )
    storage_public_url: str = Field(
        default="", description="The object store's address for clients, where they reach it under another one."
    )
    presign_seconds: int = Field(
        default=900, gt=0, le=604800, description="So long an address works that lets a client past the gateway."
    )
    redis_url: str = Field(
        default="redis://127.0.0.1:6379/0",
        validation_alias=AliasChoices("SAFEGRAFT_REDIS_URL", "REDIS_URL"),
        description="The broker.",
    )
    key_pepper: SecretStr = Field(
        default=SecretStr(""),
        description="Secret under which API keys are marked and webhook secrets sealed; empty: a file in the data "
        "folder. The same for all gateways.",
    )
    lease_seconds: float = Field(default=45.0, gt=0, description="A worker that is silent for longer loses its job.")
    max_attempts: int = Field(default=3, ge=1, description="After so many lost attempts a job is shown as failed.")
    drain_seconds: float = Field(
        default=60.0,
        ge=0,
        description="So long a worker that is told to stop goes on with its job; then it hands it back.",
    )
    retention_days: float = Field(
        default=0.0,
        ge=0,
        description="Adapters and ended realignments are deleted after so many days; 0: never. Holds for what is made "
        "or ends from then on.",
    )
    log_format: Literal["text", "json"] = Field(default="text", description="Log lines for people or for machines.")

    @field_validator("key_pepper")
    @classmethod
    def _long_enough(cls, given: SecretStr) -> SecretStr:
        if 0 < len(given.get_secret_value()) < 16:
            raise ValueError("a pepper has at least 16 characters")
        return given

    @property
    def database(self) -> str:
        return self.database_url or f"sqlite:///{(self.data / 'safegraft.sqlite').resolve()}"

    @property
    def retention_seconds(self) -> float:
        return self.retention_days * 86400.0

    @property
    def objects(self) -> Path:
        return self.data / "objects"

    @property
    def references(self) -> Path:
        return self.data / "references"
