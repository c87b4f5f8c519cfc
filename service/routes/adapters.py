"""/v1/adapters: upload, list, show, delete, download."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import FileResponse, StreamingResponse

from safegraft.adapter import CONFIG, WEIGHTS
from safegraft.contracts.adapter import Adapter, AdapterDeleted
from safegraft.contracts.base import NO_NUL
from safegraft.contracts.files import ANNOUNCED_SHA256, AdapterFromFiles
from safegraft.contracts.listing import PRINTABLE, Page
from safegraft.errors import NotFound
from safegraft.stores.adapters import AdapterFilters
from safegraft.stores.objects import remove_or_leave
from service import downloads, uploads
from service.dependencies import AfterAdapter, Asking, Here, Limit, Tenant
from service.paging import page

router = APIRouter(prefix="/v1/adapters", tags=["adapters"])
AdapterId = Annotated[str, Path(max_length=80, pattern=PRINTABLE)]
ARCHIVE = {"schema": {"type": "string", "format": "binary", "description": "The adapter's folder as one archive."}}
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
            },
            "application/x-tar": ARCHIVE,
            "application/zip": ARCHIVE,
            "application/json": {"schema": AdapterFromFiles.model_json_schema()},
        },
    }
}


@router.post(
    "", status_code=201, operation_id="createAdapter", summary="Upload an adapter", openapi_extra=UPLOAD_SCHEMA
)
async def create(
    request: Request,
    response: Response,
    here: Here,
    asking: Asking,
    name: Annotated[str, Query(max_length=200, description="For an archive, which has no fields.")] = "",
    sha256: Annotated[
        str | None, Query(pattern=ANNOUNCED_SHA256, description=f"For an archive: SHA-256 of its {WEIGHTS}, in hex.")
    ] = None,
) -> Adapter:
    """Uploads a LoRA adapter. It is checked before the answer: 201 means that it can be treated.

    As a form, as one archive (`curl --data-binary @adapter.tar -H 'content-type: application/x-tar'`), or as JSON that
    names files which were uploaded before: an archive, or the configuration, the weights and companions.
    """
    adapter = await uploads.create_adapter(request, here, asking, name=name, sha256=sha256 or "")
    response.headers["location"] = f"/v1/adapters/{adapter.id}"
    return adapter


@router.get("", operation_id="listAdapters", summary="List adapters")
def list_(
    here: Here,
    tenant: Tenant,
    limit: Limit = 20,
    after: AfterAdapter = None,
    name: Annotated[str | None, Query(max_length=200, pattern=NO_NUL, description="A part of the name.")] = None,
    base_model: Annotated[str | None, Query(max_length=4096, pattern=NO_NUL, description="The label, exactly.")] = None,
    sha256: Annotated[str | None, Query(pattern="^[0-9a-f]{64}$", description=f"Of {WEIGHTS}.")] = None,
    origin: Annotated[
        Literal["uploaded", "realigned"] | None, Query(description="Uploaded, or the result of a realignment.")
    ] = None,
) -> Page[Adapter]:
    """Newest first."""
    filters = AdapterFilters(name=name, base_model=base_model, sha256=sha256, origin=origin)
    return page(*here.adapters.page(tenant, limit=limit, after=after, filters=filters))


@router.get("/{adapter_id}", operation_id="getAdapter", summary="Show an adapter")
def get(adapter_id: AdapterId, here: Here, tenant: Tenant) -> Adapter:
    """What the adapter's files say about it."""
    return here.adapters.get(tenant, adapter_id)


@router.delete("/{adapter_id}", operation_id="deleteAdapter", summary="Delete an adapter")
def delete(adapter_id: AdapterId, here: Here, tenant: Tenant) -> AdapterDeleted:
    """Deletes the record and its bytes."""
    remove_or_leave(here.objects, here.adapters.delete(tenant, adapter_id))
    return AdapterDeleted(id=adapter_id)


@router.head("/{adapter_id}/files/{name}", include_in_schema=False)
@router.get(
    "/{adapter_id}/files/{name}",
    operation_id="getAdapterFile",
    summary="Download one file of an adapter",
    response_class=FileResponse,
    responses=downloads.FILE,
)
def file(
    adapter_id: AdapterId, name: Annotated[str, Path(max_length=200)], request: Request, here: Here, tenant: Tenant
) -> Response:
    """The bytes of one file; understands Range, If-Range, If-Match and If-None-Match."""
    adapter = here.adapters.get(tenant, adapter_id)
    digest = next((item.sha256 for item in adapter.files if item.name == name), None)
    if digest is None:
        raise NotFound(f"There is no file {name[:80]!r}.", code="file_not_found", param="name")
    return downloads.stored_file(request, here.objects, here.adapters.prefix(tenant, adapter_id), name, digest)


@router.head("/{adapter_id}/download", include_in_schema=False)
@router.get(
    "/{adapter_id}/download",
    operation_id="downloadAdapter",
    summary="Download an adapter as a tar",
    response_class=StreamingResponse,
    responses=downloads.tar_schema(),
)
def download(adapter_id: AdapterId, request: Request, here: Here, tenant: Tenant) -> Response:
    """The whole folder as an uncompressed tar."""
    adapter = here.adapters.get(tenant, adapter_id)
    prefix = here.adapters.prefix(tenant, adapter_id)
    return downloads.tar_file(request, here.objects, prefix, adapter.files, adapter.id, adapter.created_at)
