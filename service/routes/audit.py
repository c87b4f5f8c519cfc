"""/v1/audit_events: who did what in this tenant."""

from typing import Annotated

from fastapi import APIRouter, Query

from safegraft.contracts.audit import AuditEvent
from safegraft.contracts.listing import PRINTABLE, Page
from service.dependencies import AdminTenant, Here, Limit
from service.paging import page

router = APIRouter(prefix="/v1/audit_events", tags=["audit"])
Wanted = Annotated[str | None, Query(max_length=80, pattern=PRINTABLE)]


@router.get("", operation_id="listAuditEvents", summary="List audit events")
def list_(
    here: Here,
    tenant: AdminTenant,
    limit: Limit = 20,
    after: Annotated[str | None, Query(pattern="^[0-9]{1,18}$", description="The last id of the page before.")] = None,
    action: Wanted = None,
    actor: Wanted = None,
    since: Annotated[int | None, Query(ge=0, le=2**40, description="Unix seconds.")] = None,
) -> Page[AuditEvent]:
    """Newest first: every request that changed something, or was refused to. Needs a key with the scope admin."""
    found = here.audit.page(
        tenant,
        limit=limit,
        after=int(after) if after is not None else None,
        action=action,
        actor=actor,
        since=since,
    )
    return page(*found)
