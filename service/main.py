"""What uvicorn loads: `uvicorn --factory service.main:app`. Reads the environment once."""

from fastapi import FastAPI
from pydantic import ValidationError

from safegraft import failpoints, logs
from safegraft.errors import SafegraftError
from safegraft.settings import warn_of_mistyped
from safegraft.stores.database import open_database
from service.app import create_app
from service.settings import GatewaySettings


def app() -> FastAPI:
    try:
        settings = GatewaySettings()
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise SystemExit(f"The setting {where} cannot be used: {first['msg']}.") from None
    logs.setup(settings.log_format)
    warn_of_mistyped(GatewaySettings)
    failpoints.arm()
    try:
        # Also opened when the app starts; but what is raised there comes as a page of traceback.
        open_database(settings.database, upgrade=settings.database_upgrade).dispose()
    except SafegraftError as error:
        raise SystemExit(f"{error.code}: {error}") from None
    return create_app(settings)
