"""An adapter as the API shows it."""

from typing import Literal

from pydantic import Field

from safegraft.contracts.base import Shown


class AdapterFile(Shown):
    name: str
    bytes: int
    sha256: str


class Servable(Shown):
    """Whether a server loads this adapter as it is, and why not."""

    ok: bool
    reason: str | None = None


class Compatibility(Shown):
    peft: Servable
    vllm: Servable
    lorax: Servable
    tgi: Servable


class Origin(Shown):
    """realignment_id: of the job that made it, null where it was uploaded. unchanged: its weights are the input's, byte
    for byte: the job repaired nothing, or its repair is in a side-car."""

    realignment_id: str | None = None
    unchanged: bool = False


class Adapter(Shown):
    """`sha256` is that of adapter_model.safetensors; `base_model` is only the label in its configuration."""

    id: str
    object: Literal["adapter"] = "adapter"
    name: str
    status: Literal["ready"] = "ready"
    base_model: str | None
    rank: int
    alpha: float
    target_modules: list[str]
    modules: int
    parameters: int
    dtype: str
    bytes: int
    sha256: str
    files: list[AdapterFile]
    dropped_files: list[str] = Field(description="Uploaded files that were not kept, such as pickles.")
    compatibility: Compatibility
    origin: Origin
    created_at: int
    expires_at: int | None = None


class AdapterDeleted(Shown):
    id: str
    object: Literal["adapter"] = "adapter"
    deleted: bool = True
