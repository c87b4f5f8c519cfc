"""/v1/uploads: large files in parts, in any order and at the same time, in the shape of OpenAI's Uploads API."""

import asyncio
from collections.abc import Collection
from pathlib import Path as Folder
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request

from safegraft.contracts.files import MAX_PART_BYTES, PartCreate, Upload, UploadComplete, UploadCreate, UploadPart
from safegraft.contracts.listing import PRINTABLE, Page
from safegraft.errors import InvalidParameter, StorageFault
from safegraft.ids import new_id
from safegraft.stores import stitching
from safegraft.stores.objects import remove_or_leave
from safegraft.stores.uploads import PART, part_prefix
from service import receiving
from service.auth import Principal
from service.body import JsonRoute, kind_of, unsupported_kind
from service.dependencies import AfterPart, Asking, Here, Services, Tenant
from service.paging import page

router = APIRouter(prefix="/v1/uploads", tags=["uploads"], route_class=JsonRoute)
# Apart, because its bodies are streams: this one reads none before its function does.
streams = APIRouter()
UploadId = Annotated[str, Path(max_length=80, pattern=PRINTABLE)]
BYTES = {"type": "string", "format": "binary", "description": f"At most {MAX_PART_BYTES} bytes."}
PART_SCHEMA: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {"type": "object", "required": ["data"], "properties": {"data": BYTES}},
            },
            "application/octet-stream": {"schema": BYTES},
            "application/json": {"schema": PartCreate.model_json_schema()},
        },
    }
}


@router.post("", operation_id="createUpload", summary="Begin an upload in parts")
def create(request: UploadCreate, here: Here, asking: Asking) -> Upload:
    """Begins an upload of a file in parts. It expires by itself if it is not completed."""
    receiving.allowance(here, asking, here.settings.max_upload_bytes).check(request.bytes)
    return here.uploads.create(asking.tenant, request)


@router.get("/{upload_id}", operation_id="getUpload", summary="Show an upload")
def get(upload_id: UploadId, here: Here, tenant: Tenant) -> Upload:
    """The upload's state, and its file once it is completed."""
    return here.uploads.get(tenant, upload_id)


@router.get("/{upload_id}/parts", operation_id="listUploadParts", summary="List the parts that have arrived")
def parts(
    upload_id: UploadId,
    here: Here,
    tenant: Tenant,
    limit: Annotated[int, Query(ge=1, le=1000, description="How many at most.")] = 1000,
    after: AfterPart = None,
) -> Page[UploadPart]:
    """What has arrived, oldest first: what a client needs that goes on after a break."""
    return page(*here.uploads.parts(tenant, upload_id, limit=limit, after=after))


@streams.post(
    "/{upload_id}/parts", operation_id="createUploadPart", summary="Add a part to an upload", openapi_extra=PART_SCHEMA
)
async def create_part(upload_id: UploadId, request: Request, here: Here, asking: Asking) -> UploadPart:
    """Adds a part: as the form field `data`, as a stream of bytes, or as JSON `{"bytes": n}`, which is answered with an
    `upload_url` for the bytes where the storage has such addresses.
    """
    upload = await asyncio.to_thread(here.uploads.require_pending, asking.tenant, upload_id)
    with here.upload_slots.place(asking.tenant):
        if kind_of(request) == "application/json":
            wanted = await receiving.receive_json(request, PartCreate, here.settings.max_json_bytes)
            return await asyncio.to_thread(_promise, here, asking, upload_id, wanted)
        allowed = await asyncio.to_thread(receiving.allowance, here, asking, MAX_PART_BYTES)
        allowed.whole = upload.bytes
        async with receiving.scratch(here) as folder:
            sink = await _receive(request, folder, allowed)
            return await asyncio.to_thread(_keep, here, asking, upload_id, sink)


@router.post("/{upload_id}/complete", operation_id="completeUpload", summary="Complete an upload")
def complete(upload_id: UploadId, request: UploadComplete, here: Here, tenant: Tenant) -> Upload:
    """Makes the file of the parts in this order. Can be repeated, with the same answer."""
    with here.upload_slots.place(tenant):
        return stitching.complete(here.uploads, here.objects, tenant, upload_id, request)


@router.post("/{upload_id}/cancel", operation_id="cancelUpload", summary="Cancel an upload")
def cancel(upload_id: UploadId, here: Here, tenant: Tenant) -> Upload:
    """Gives an upload up and deletes its parts. Can be repeated."""
    cancelled = here.uploads.cancel(tenant, upload_id)
    stitching.discard(here.objects, tenant, upload_id)
    return cancelled


router.include_router(streams)


class _PartForm:
    fields: Collection[str] = ()
    files: Collection[str] = ("data",)

    def __init__(self, folder: Folder, allowed: receiving.Allowance) -> None:
        self.sink: receiving.Sink | None = None
        self._folder = folder
        self._allowed = allowed

    def field(self, name: str, value: str) -> None:
        raise AssertionError(name)

    def file(self, name: str, filename: str) -> receiving.Sink:
        if self.sink is not None:
            raise InvalidParameter("`data` was sent twice.", code="duplicate_file", param="data")
        self.sink = receiving.Sink(self._folder / PART, self._allowed.check, hashed=True)
        return self.sink


async def _receive(request: Request, folder: Folder, allowed: receiving.Allowance) -> receiving.Sink:
    kind = kind_of(request)
    form = _PartForm(folder, allowed)
    if kind == "multipart/form-data":
        allowed.announced(request, framing=receiving.FRAMING)
        await receiving.receive_form(request, form, allowed.check)
    elif kind == "application/octet-stream":
        allowed.announced(request)
        await receiving.receive_raw(request, form.file("data", ""))
    else:
        raise unsupported_kind(request, "Send multipart/form-data with the field `data`, or application/octet-stream.")
    if form.sink is None or not form.sink.size:
        raise InvalidParameter("The part has no bytes.", code="empty_part", param="data")
    return form.sink


def _keep(here: Services, asking: Principal, upload_id: str, sink: receiving.Sink) -> UploadPart:
    """Bytes first, then the record that names them."""
    part_id = new_id("part")
    prefix = part_prefix(asking.tenant, upload_id, part_id)
    try:
        here.objects.publish(sink.path.parent, prefix)
    except StorageFault:
        # Whoever cancels the upload takes the place away into which the part was just being put.
        here.uploads.require_pending(asking.tenant, upload_id)
        raise
    try:
        return here.uploads.add_part(
            asking.tenant,
            upload_id,
            part_id,
            sink.size,
            sink.digest(),
            max_bytes=receiving.quota_of(here, asking),
        )
    except BaseException:
        remove_or_leave(here.objects, prefix)
        raise


def _promise(here: Services, asking: Principal, upload_id: str, wanted: PartCreate) -> UploadPart:
    """A part whose bytes go past us."""
    part_id = new_id("part")
    url = here.objects.put_url(part_prefix(asking.tenant, upload_id, part_id), PART)
    if url is None:
        raise InvalidParameter(
            "This installation's storage has no addresses to send bytes to.",
            code="direct_upload_unavailable",
            hint="Send the part's bytes here: as the form field `data`, or as application/octet-stream.",
        )
    sha256 = wanted.sha256.lower().removeprefix("sha256-") if wanted.sha256 else None
    quota = receiving.quota_of(here, asking)
    part = here.uploads.add_part(asking.tenant, upload_id, part_id, wanted.bytes, sha256, max_bytes=quota)
    return part.model_copy(update={"upload_url": url})
