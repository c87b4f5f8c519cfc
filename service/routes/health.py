"""/livez and /readyz: is the process alive, and can it serve."""

from fastapi import APIRouter, Response
from pydantic import BaseModel
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from safegraft.stores.database import reading
from service.dependencies import Here

router = APIRouter(tags=["health"])


class Health(BaseModel):
    """`checks` names what was looked at; false is what is missing."""

    status: str
    checks: dict[str, bool] = {}


@router.get("/livez", operation_id="livez")
async def livez() -> Health:
    """Answers as long as the process does."""
    return Health(status="ok")


@router.get("/readyz", operation_id="readyz", responses={503: {"model": Health}})
def readyz(here: Here, response: Response) -> Health:
    """503 while the database, the broker or every reference is missing."""
    checks = {"database": _database(here), "broker": here.queue.ping(), "reference": bool(here.references.installed())}
    ready = all(checks.values())
    response.status_code = 200 if ready else 503
    return Health(status="ok" if ready else "not ready", checks=checks)


def _database(here: Here) -> bool:
    try:
        with reading(here.database) as connection:
            connection.execute(text("SELECT 1"))
        return True
    except SQLAlchemyError:
        return False
