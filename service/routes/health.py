"""/livez and /readyz: is the process alive, and can it serve."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from safegraft.files import has_room
from safegraft.stores.database import reading
from service.dependencies import Here, Services
from service.parameters import known_parameters

router = APIRouter(tags=["health"])


class Health(BaseModel):
    """`checks` names what was looked at; false is what is missing."""

    status: str
    checks: dict[str, bool] = {}


@router.head("/livez", include_in_schema=False)
@router.get("/livez", operation_id="livez", summary="Check that the process is alive")
async def livez() -> Health:
    """Answers as long as the process does."""
    return Health(status="ok")


@router.head("/readyz", include_in_schema=False)
@router.get(
    "/readyz", operation_id="readyz", summary="Check that the service can serve", responses={503: {"model": Health}}
)
def readyz(
    request: Request,
    here: Here,
    response: Response,
    ignore: Annotated[Literal["worker"] | None, Query(description="What may be missing all the same.")] = None,
) -> Health:
    """503 while database, broker, storage, space on the disk, every reference or every worker is missing; `checks` says
    which.

    A balancer in front of gateways asks with `?ignore=worker`: without workers they still take jobs, which wait.
    """
    known_parameters(request)
    checks = {
        "database": _database(here),
        "broker": here.queue.ping(),
        "storage": here.objects.ping(),
        "space": _space(here),
        "reference": bool(here.references.installed()),
        "worker": _worker(here),
    }
    ready = all(found for name, found in checks.items() if name != ignore)
    response.status_code = 200 if ready else 503
    return Health(status="ok" if ready else "not ready", checks=checks)


def _worker(here: Services) -> bool:
    try:
        return here.workers.any_alive()
    except SQLAlchemyError:
        return False


def _space(here: Services) -> bool:
    """Whether this machine's disks have room: SQLite's, and the uploads', which pass through it wherever bytes lie."""
    try:
        return has_room(here.settings.data, here.objects.scratch)
    except OSError:
        return False


def _database(here: Services) -> bool:
    try:
        with reading(here.database) as connection:
            connection.execute(text("SELECT 1"))
        return True
    except SQLAlchemyError:
        return False
