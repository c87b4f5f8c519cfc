"""What uvicorn loads: `uvicorn --factory service.main:app`. Reads the environment once."""

from fastapi import FastAPI
from pydantic import ValidationError

from safegraft import failpoints, logs
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
    failpoints.arm()
    return create_app(settings)
