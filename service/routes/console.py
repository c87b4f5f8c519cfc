"""/: the web console, a page that uses this API as any client does; its assets come from this process.

The key that a user types in is the page's own: nothing here reads it, and no route here shows data.
"""

import functools
import gzip
from dataclasses import dataclass
from importlib import resources

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

from service import downloads

ASSETS = "/console"
PAGE = "index.html"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Nothing from elsewhere, no script or style inside of a page, and in browsers that know trusted types no text that
# becomes markup: names and messages come out of strangers' files. `safegraft` is the policy of the one worker.
POLICY = (
    "default-src 'none'; script-src 'self'; worker-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'; "
    "require-trusted-types-for 'script'; trusted-types safegraft"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # Kept, and asked for each time: a new version is seen at once, and costs a 304 until there is one.
    "cache-control": "no-cache",
    "vary": "accept-encoding",
}
router = APIRouter(include_in_schema=False)


@dataclass(frozen=True)
class Asset:
    media_type: str
    plain: bytes
    packed: bytes


@functools.cache
def assets() -> dict[str, Asset]:
    """All files of the console by name, as they are and compressed by gzip."""
    found = {}
    for path in resources.files("service.console").iterdir():
        media_type = TYPES.get(f".{path.name.rpartition('.')[2]}")
        if media_type is not None:
            data = path.read_bytes()
            # Without a time: the same bytes, and so the same ETag, in every process.
            found[path.name] = Asset(media_type, data, gzip.compress(data, mtime=0))
    return found


@router.head("/")
@router.get("/")
def page(request: Request) -> Response:
    """The console's only page; which view it shows is behind the `#` of the address."""
    return _answer(request, PAGE)


@router.head(ASSETS + "/{name}")
@router.get(ASSETS + "/{name}")
def asset(request: Request, name: str) -> Response:
    """A script, a style sheet or a picture of the page."""
    return _answer(request, name)


def _answer(request: Request, name: str) -> Response:
    found = assets().get(name)
    if found is None:
        raise HTTPException(404, "Not Found")
    if accepts_gzip(request.headers.get("accept-encoding", "")):
        data, headers = found.packed, {**HEADERS, "content-encoding": "gzip"}
    else:
        data, headers = found.plain, HEADERS
    return downloads.small_file(request, data, media_type=found.media_type, headers=headers)


def accepts_gzip(header: str) -> bool:
    """Whether an Accept-Encoding (RFC 9110, 12.5.3) names gzip, and not with a weight of 0."""
    for item in header.lower().split(","):
        coding, _, weight = item.partition(";")
        if coding.strip() == "gzip":
            return weight.strip().removeprefix("q=").strip("0. ") != "" if weight else True
    return False
