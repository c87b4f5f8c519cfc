"""/v1/adapters: upload, list, show, delete, download."""

import asyncio
import shutil
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import FileResponse, StreamingResponse

from safegraft.adapter import CONFIG, WEIGHTS
from safegraft.contracts.adapter import Adapter, AdapterDeleted
from safegraft.contracts.listing import PRINTABLE, Page
from safegraft.errors import UserError
from safegraft.stores.objects import adapter_prefix
from service import downloads, uploads
from service.dependencies import After, Here, Limit, Tenant
from service.paging import page

router = APIRouter(prefix="/v1/adapters", tags=["adapters"])
AdapterId = Annotated[str, Path(max_length=80, pattern=PRINTABLE)]
UPLOAD_SCHEMA: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["files"],
                    "properties": {
                        "files": {
                            "type": "array",
                            "items": {"type": "string", "format": "binary"},
                            "description": f"{CONFIG}, {WEIGHTS} and companions, or one .tar or .zip of the folder.",
                        },
                        "name": {"type": "string", "maxLength": 200},
                        "sha256": {"type": "string", "description": f"SHA-256 of {WEIGHTS}, checked on arrival."},
                    },
                }
            }
        },
    }
}


@router.post("", status_code=201, operation_id="createAdapter", openapi_extra=UPLOAD_SCHEMA)
async def create(request: Request, response: Response, here: Here, tenant: Tenant) -> Adapter:
    """Uploads a LoRA adapter. It is checked before the answer: 201 means that it can be treated."""
    if not here.upload_slots.acquire(blocking=False):
        raise UserError("Too many uploads at once.", code="too_many_uploads", hint="Try again in a few seconds.")
    try:
        limit = here.settings.max_upload_bytes
        received = await uploads.receive(request, here.objects.scratch, limit)
        try:
            adapter, folder = await asyncio.to_thread(uploads.check, received, limit)
            prefix = adapter_prefix(tenant, adapter.id)
            await asyncio.to_thread(here.objects.publish, folder, prefix)
            try:
                adapter = await asyncio.to_thread(here.adapters.add, adapter, tenant, prefix)
            except BaseException:
                # No record names these files, and none will.
                await asyncio.to_thread(here.objects.remove, prefix)
                raise
        finally:
            await asyncio.to_thread(shutil.rmtree, received.folder.parent, True)
    finally:
        here.upload_slots.release()
    response.headers["location"] = f"/v1/adapters/{adapter.id}"
    return adapter


@router.get("", operation_id="listAdapters")
def list_(here: Here, tenant: Tenant, limit: Limit = 20, after: After = None) -> Page[Adapter]:
    """Newest first."""
    return page(*here.adapters.page(tenant, limit=limit, after=after))


@router.get("/{adapter_id}", operation_id="getAdapter")
def get(adapter_id: AdapterId, here: Here, tenant: Tenant) -> Adapter:
    """What the adapter's files say about it."""
    return here.adapters.get(tenant, adapter_id)


@router.delete("/{adapter_id}", operation_id="deleteAdapter")
def delete(adapter_id: AdapterId, here: Here, tenant: Tenant) -> AdapterDeleted:
    """Deletes the record and its bytes."""
    here.objects.remove(here.adapters.delete(tenant, adapter_id))
    return AdapterDeleted(id=adapter_id)


@router.head("/{adapter_id}/files/{name}", include_in_schema=False)
@router.get(
    "/{adapter_id}/files/{name}", operation_id="getAdapterFile", response_class=FileResponse, responses=downloads.BINARY
)
def file(adapter_id: AdapterId, name: Annotated[str, Path(max_length=200)], here: Here, tenant: Tenant) -> Response:
    """The bytes of one file; understands Range."""
    adapter = here.adapters.get(tenant, adapter_id)
    path = downloads.local_path(here.objects, here.adapters.prefix(tenant, adapter_id), name)
    digest = next(item.sha256 for item in adapter.files if item.name == name)
    return downloads.file_response(path, digest)


@router.head("/{adapter_id}/download", include_in_schema=False)
@router.get(
    "/{adapter_id}/download",
    operation_id="downloadAdapter",
    response_class=StreamingResponse,
    responses=downloads.tar_schema(),
)
def download(adapter_id: AdapterId, request: Request, here: Here, tenant: Tenant) -> Response:
    """The whole folder as an uncompressed tar."""
    adapter = here.adapters.get(tenant, adapter_id)
    prefix = here.adapters.prefix(tenant, adapter_id)
    paths = [downloads.local_path(here.objects, prefix, item.name) for item in adapter.files]
    tar = downloads.Tar(paths, adapter.id, adapter.created_at)
    headers = {
        "content-disposition": f'attachment; filename="{adapter.id}.tar"',
        "content-length": str(tar.size),
    }
    if request.method == "HEAD":
        tar.close()
        return Response(media_type="application/x-tar", headers=headers)
    return StreamingResponse(tar.stream(), media_type="application/x-tar", headers=headers)
