"""/docs: the API description as a page, with its assets from this process, for machines that reach nothing else."""

import base64
import hashlib
import re

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
    page = get_swagger_ui_html(
        openapi_url=str(request.app.openapi_url),
        title=str(request.app.title),
        swagger_js_url=f"{ASSETS}/swagger-ui-bundle.js",
        swagger_css_url=f"{ASSETS}/swagger-ui.css",
        swagger_favicon_url=f"{ASSETS}/favicon.png",
    )
    page.headers["content-security-policy"] = policy(bytes(page.body))
    page.headers["x-content-type-options"] = "nosniff"
    page.headers["referrer-policy"] = "no-referrer"
    return page


def policy(page: bytes) -> str:
    """Nothing from elsewhere, and of scripts inside of the page those that it was made with: they start Swagger UI."""
    scripts = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode()}'"
        for script in re.findall(rb"<script>(.*?)</script>", page, re.DOTALL)
    )
    return (
        f"default-src 'none'; script-src 'self' {scripts}; style-src 'self' 'unsafe-inline'; connect-src 'self'; "
        "img-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )
