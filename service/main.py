"""What uvicorn loads: `uvicorn --factory service.main:app`. Reads the environment once."""

from fastapi import FastAPI

from service.app import create_app
from service.settings import GatewaySettings


def app() -> FastAPI:
    settings = GatewaySettings()
    if not settings.dev and not settings.api_keys:
        raise SystemExit("No keys: set SAFEGRAFT_API_KEYS='[\"…\"]', or SAFEGRAFT_DEV=1 on a loopback address.")
    return create_app(settings)
