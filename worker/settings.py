"""The worker's settings, on top of the shared ones."""

from pathlib import Path

from pydantic import Field, field_validator

from safegraft.settings import SharedSettings


class WorkerSettings(SharedSettings):
    device: str = Field(default="cpu", description="cpu, cuda, cuda:1, …")
    loaded_references: int = Field(default=2, ge=1, description="How many references stay in memory between jobs.")
    job_seconds: int = Field(default=1800, ge=1, description="A job that runs for longer is stopped.")
    job_memory_bytes: int = Field(
        default=0,
        ge=0,
        description="Memory that one job may need, beside the engine's own; 0: three quarters of the machine's.",
    )
    job_cpu_seconds: float = Field(
        default=0.0, ge=0, description="Processor time of one job; 0: job_seconds on each processor."
    )
    job_file_bytes: int = Field(default=2**36, ge=2**20, description="The largest file that a job may write.")
    jobs_per_process: int = Field(default=1000, ge=1, description="Then the process is replaced by a new one.")
    signing_key: Path | None = Field(
        default=None, description="PEM of the Ed25519 key that signs provenance; without one it is not signed."
    )
    builder_id: str = Field(
        default="urn:safegraft:worker",
        pattern=r"^[A-Za-z][A-Za-z0-9+.-]*:[!-~]+$",
        description="A URI that names this installation in its provenance.",
    )

    @field_validator("signing_key", mode="before")
    @classmethod
    def _none(cls, given: object) -> object:
        return given or None  # an empty variable is one that is not set; as a path it would be this folder
