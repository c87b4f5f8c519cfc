"""The worker's settings, on top of the shared ones."""

from pydantic import Field

from safegraft.settings import SharedSettings


class WorkerSettings(SharedSettings):
    device: str = Field(default="cpu", description="cpu, cuda, cuda:1, …")
    loaded_references: int = Field(default=2, ge=1, description="How many references stay in memory between jobs.")
    job_seconds: int = Field(default=1800, ge=1, description="A job that runs for longer is stopped.")
    jobs_per_process: int = Field(default=1000, ge=1, description="Then the process is replaced by a new one.")
