"""/v1/files: uploaded files, in the shape of OpenAI's Files API. Adapters and reports can be read here as files too."""

import asyncio
import tarfile
from collections.abc import Collection
from pathlib import Path as Folder
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import FileResponse

from safegraft.contracts.adapter import Adapter
from safegraft.contracts.files import FileCreate, FileDeleted, FileObject, Purpose
from safegraft.contracts.listing import PRINTABLE, Page
from safegraft.contracts.realignment import Realignment
from safegraft.errors import Conflict, InvalidParameter, NotFound
from safegraft.ids import new_id
from safegraft.stores.files import CONTENT, NewFile, file_not_found
from safegraft.stores.objects import file_prefix, remove_or_leave, result_prefix
from service import downloads, receiving
from service.auth import Principal
from service.body import kind_of, unsupported_kind
from service.dependencies import AfterFile, Asking, Here, Services, Tenant
from service.paging import page
from service.routes import adapters, realignments

router = APIRouter(prefix="/v1/files", tags=["files"])
FileId = Annotated[str, Path(max_length=80, pattern=PRINTABLE)]
RESULT = "fine-tune-results"
FILE_SCHEMA: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": FileCreate.model_json_schema()["properties"]["purpose"],
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer"},
                    },
                }
            }
        },
    }
}


@router.post("", operation_id="createFile", summary="Upload a file", openapi_extra=FILE_SCHEMA)
async def create(request: Request, here: Here, asking: Asking) -> FileObject:
    """Uploads a file. What it is is only looked at when it is used."""
    if kind_of(request) != "multipart/form-data":
        raise unsupported_kind(request, "Send multipart/form-data with the parts `file` and `purpose`.")
    with here.upload_slots.place(asking.tenant):
        allowed = await asyncio.to_thread(receiving.allowance, here, asking, here.settings.max_upload_bytes)
        allowed.announced(request, framing=receiving.FRAMING)
        async with receiving.scratch(here) as folder:
            form = _FileForm(folder, allowed)
            await receiving.receive_form(request, form, allowed.check)
            return await asyncio.to_thread(_keep, here, asking, form)


@router.get("", operation_id="listFiles", summary="List uploaded files")
def list_(
    here: Here,
    tenant: Tenant,
    limit: Annotated[int, Query(ge=1, le=10_000, description="How many at most.")] = 10_000,
    after: AfterFile = None,
    order: Annotated[Literal["asc", "desc"], Query(description="By age; desc: newest first.")] = "desc",
    purpose: Purpose | None = None,
) -> Page[FileObject]:
    """Uploaded files; adapters and reports have lists of their own."""
    return page(*here.files.page(tenant, limit=limit, after=after, order=order, purpose=purpose))


@router.get("/{file_id}", operation_id="getFile", summary="Show a file")
def get(file_id: FileId, here: Here, tenant: Tenant) -> FileObject:
    """A file's record. The id may also be an adapter's (its tar) or a realignment's (its report)."""
    with _as_file(file_id):
        if file_id.startswith("adp_"):
            return _adapter_as_file(here.adapters.get(tenant, file_id))
        if file_id.startswith("rlg_"):
            return _report_as_file(here, tenant, here.jobs.get(tenant, file_id))
    return here.files.get(tenant, file_id).shown


@router.head("/{file_id}/content", include_in_schema=False)
@router.get(
    "/{file_id}/content",
    operation_id="getFileContent",
    summary="Download a file",
    response_class=FileResponse,
    responses=downloads.FILE
    | {
        200: {
            "content": downloads.FILE[200]["content"]
            | downloads.tar_schema()[200]["content"]
            | {"application/json": {"schema": realignments.AS_REPORT}}
        }
    },
)
def content(file_id: FileId, request: Request, here: Here, tenant: Tenant) -> Response:
    """The bytes; understands Range. Of an adapter, which is a fine-tuned model here, a tar of its files, and of a
    fine-tuning job's result the report: these whole."""
    with _as_file(file_id):
        if file_id.startswith("adp_"):
            return adapters.download(file_id, request, here, tenant)
        if file_id.startswith("rlg_"):
            return realignments.report(file_id, request, here, tenant)
    file = here.files.get(tenant, file_id)
    return downloads.stored_file(request, here.objects, file.prefix, CONTENT, file.sha256, filename=file.shown.filename)


@router.delete("/{file_id}", operation_id="deleteFile", summary="Delete a file")
def delete(file_id: FileId, here: Here, tenant: Tenant) -> FileDeleted:
    """Deletes an uploaded file. Adapters that were made from it stay."""
    if file_id.startswith(("adp_", "rlg_")):
        shown = get(file_id, here, tenant)
        raise Conflict(
            f"{shown.id} is no uploaded file.",
            code="not_an_uploaded_file",
            param="file_id",
            hint="An adapter is deleted by DELETE /v1/adapters/{id}.",
        )
    remove_or_leave(here.objects, here.files.delete(tenant, file_id))
    return FileDeleted(id=file_id)


class _FileForm:
    fields: Collection[str] = ("purpose", "expires_after[anchor]", "expires_after[seconds]")
    files: Collection[str] = ("file",)

    def __init__(self, folder: Folder, allowed: receiving.Allowance) -> None:
        self.sink: receiving.Sink | None = None
        self._given: dict[str, str] = {}
        self._filename = ""
        self._folder = folder
        self._allowed = allowed

    def field(self, name: str, value: str) -> None:
        if name in self._given:
            raise InvalidParameter(f"{name} was sent twice.", code="duplicate_field", param=name)
        self._given[name] = value

    def file(self, name: str, filename: str) -> receiving.Sink:
        if self.sink is not None:
            raise InvalidParameter("`file` was sent twice.", code="duplicate_file", param="file")
        self._filename = filename
        self.sink = receiving.Sink(self._folder / CONTENT, self._allowed.check, hashed=True)
        return self.sink

    def request(self) -> FileCreate:
        """What the fields say. Raises RequestValidationError."""
        # As a query writes nested values.
        kept = {key.removeprefix("expires_after[")[:-1]: value for key, value in self._given.items() if "[" in key}
        asked: dict[str, Any] = {"filename": self._filename, "expires_after": kept or None}
        if "purpose" in self._given:
            asked["purpose"] = self._given["purpose"]
        return receiving.validated(FileCreate, asked)


def _keep(here: Services, asking: Principal, form: _FileForm) -> FileObject:
    """Bytes first, then the record that names them."""
    sink, request = form.sink, form.request()
    if sink is None or not sink.size:
        raise InvalidParameter("The part `file` is missing or empty.", code="empty_file", param="file")
    file_id = new_id("file")
    file = NewFile(
        id=file_id,
        prefix=file_prefix(asking.tenant, file_id),
        filename=request.filename,
        purpose=request.purpose,
        bytes=sink.size,
        sha256=sink.digest(),
        seconds=request.expires_after.seconds if request.expires_after else None,
    )
    here.objects.publish(sink.path.parent, file.prefix)
    try:
        return here.files.add(asking.tenant, file, max_bytes=receiving.quota_of(here, asking))
    except BaseException:
        remove_or_leave(here.objects, file.prefix)
        raise


class _as_file:
    """Whatever an id names, one that is not there is a missing file."""

    def __init__(self, file_id: str) -> None:
        self._file_id = file_id

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, NotFound) or (isinstance(error, Conflict) and error.code == "no_report"):
            raise file_not_found(self._file_id) from error


def _adapter_as_file(adapter: Adapter) -> FileObject:
    return FileObject(
        id=adapter.id,
        bytes=_tar_bytes(adapter),
        created_at=adapter.created_at,
        expires_at=adapter.expires_at,
        filename=f"{adapter.id}.tar",
        purpose=RESULT,
    )


def _tar_bytes(adapter: Adapter) -> int:
    """The size of what `downloads.Tar` makes of it."""
    block = tarfile.BLOCKSIZE
    sizes = (
        len(tarfile.TarInfo(f"{adapter.id}/{file.name}").tobuf(tarfile.GNU_FORMAT)) + -(-file.bytes // block) * block
        for file in adapter.files
    )
    return sum(sizes) + len(downloads.END)


def _report_as_file(here: Services, tenant: str, job: Realignment) -> FileObject:
    attempt = here.jobs.result_attempt(tenant, job.id)
    if attempt is None:
        raise file_not_found(job.id)
    return FileObject(
        id=job.id,
        bytes=here.objects.size(f"{result_prefix(tenant, job.id, attempt)}/report", "report.json"),
        created_at=job.finished_at or job.created_at,
        filename=f"{job.id}.report.json",
        purpose=RESULT,
    )
