"""Where the shared things are: the settings that gateway, worker and command line have in common.

Each shell adds its own in its `settings.py`. Read once, at the edge; every field is an environment variable with the
prefix SAFEGRAFT_ (`REDIS_URL` is also understood without it).
"""

from pathlib import Path

from pydantic import AliasChoices, Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class SharedSettings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="SAFEGRAFT_", extra="ignore", populate_by_name=True)

    data: Path = Field(default=Path("var"), description="Folder for the database, adapters, results and references.")
    database_url: str = Field(default="", description="SQLAlchemy URL; empty: SQLite in the data folder.")
    redis_url: str = Field(
        default="redis://127.0.0.1:6379/0",
        validation_alias=AliasChoices("SAFEGRAFT_REDIS_URL", "REDIS_URL"),
        description="The broker.",
    )
    lease_seconds: float = Field(default=45.0, gt=0, description="A worker that is silent for longer loses its job.")
    max_attempts: int = Field(default=3, ge=1, description="After so many lost attempts a job is shown as failed.")

    @property
    def database(self) -> str:
        return self.database_url or f"sqlite:///{(self.data / 'safegraft.sqlite').resolve()}"

    @property
    def objects(self) -> Path:
        return self.data / "objects"

    @property
    def references(self) -> Path:
        return self.data / "references"
