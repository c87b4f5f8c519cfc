"""/docs: the API description as a page, with its assets from this process, for machines that reach nothing else."""

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles

ASSETS = "/docs/assets"
router = APIRouter(include_in_schema=False)
# Swagger UI 5, which the package carries: version 4 does not know OpenAPI 3.1. Of the package nothing is imported.
assets = StaticFiles(packages=[("fastapi_offline", "static")])


@router.get("/docs")
def docs(request: Request) -> HTMLResponse:
    """Swagger UI over this service's own description."""
    return get_swagger_ui_html(
        openapi_url=str(request.app.openapi_url),
        title=str(request.app.title),
        swagger_js_url=f"{ASSETS}/swagger-ui-bundle.js",
        swagger_css_url=f"{ASSETS}/swagger-ui.css",
        swagger_favicon_url=f"{ASSETS}/favicon.png",
    )
