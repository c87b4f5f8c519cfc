"""An event of the audit log as the API shows it."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class AuditEvent(BaseModel):
    """Something that was done, or tried. `request_id` is the one that the answer carried; null from a command line."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    object: Literal["audit_event"] = "audit_event"
    actor: str = Field(description="The id of the key that asked, or `cli:` and a user of the operator's machine.")
    action: str = Field(description="The operation's id, such as `deleteAdapter`; of commands such as `keys.create`.")
    target: str | None = Field(description="The id of what was changed or made.")
    status: int = Field(description="The answer's status; of a command its exit status, where 0 is success.")
    request_id: str | None
    created_at: int
