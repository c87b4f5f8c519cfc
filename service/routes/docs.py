"""/docs: the API description as a page, with its assets from this process, for machines that reach nothing else."""

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles
from swagger_ui_bundle import swagger_ui_path

ASSETS = "/docs/assets"
router = APIRouter(include_in_schema=False)
assets = StaticFiles(directory=swagger_ui_path)


@router.get("/docs")
def docs(request: Request) -> HTMLResponse:
    """Swagger UI over this service's own description."""
    return get_swagger_ui_html(
        openapi_url=str(request.app.openapi_url),
        title=str(request.app.title),
        swagger_js_url=f"{ASSETS}/swagger-ui-bundle.js",
        swagger_css_url=f"{ASSETS}/swagger-ui.css",
        swagger_favicon_url=f"{ASSETS}/favicon-32x32.png",
    )
