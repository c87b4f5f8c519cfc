"""Receiving an adapter: by a form, as one archive, or from files that were uploaded before."""

import asyncio
import os
import re
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path

from starlette.requests import Request

from safegraft import failpoints
from safegraft.adapter import WEIGHTS
from safegraft.contracts.adapter import Adapter
from safegraft.contracts.files import ANNOUNCED_SHA256, AdapterFromFiles
from safegraft.errors import InvalidParameter, StorageFault
from safegraft.ids import new_id
from safegraft.ingest import Delivery, check_companion
from safegraft.stores.files import CONTENT
from safegraft.stores.objects import adapter_prefix, remove_or_leave
from service.auth import Principal
from service.body import kind_of, unsupported_kind
from service.dependencies import Services
from service.receiving import (
    FRAMING,
    Allowance,
    Sink,
    allowance,
    quota_of,
    receive_form,
    receive_json,
    receive_raw,
    scratch,
    storage_fault,
)

RAW = {
    "application/x-tar": "adapter.tar",
    "application/tar": "adapter.tar",
    "application/zip": "adapter.zip",
    "application/x-zip-compressed": "adapter.zip",
}
KINDS = (
    "Send multipart/form-data with parts named `files`, an archive as application/x-tar or application/zip, or "
    "application/json with `file_ids`."
)


async def create_adapter(request: Request, here: Services, asking: Principal, *, name: str, sha256: str) -> Adapter:
    """Receives, judges and stores an adapter. name, sha256: from the query; what the body says goes first.

    Raises InvalidAdapter and its like, InvalidParameter, TooLarge, QuotaExceeded, StorageFault.
    """

    async def receive(delivery: Delivery, allowed: Allowance) -> None:
        await _receive(request, here, asking, delivery, allowed)

    return await _create(here, asking, receive, name=name, sha256=sha256)


async def adapter_from_files(here: Services, asking: Principal, file_ids: list[str], name: str) -> Adapter:
    """Makes an adapter from files that were uploaded before. Raises like `create_adapter`, and NotFound."""

    async def collect(delivery: Delivery, allowed: Allowance) -> None:
        await asyncio.to_thread(_collect, here, asking.tenant, file_ids, delivery, allowed)

    return await _create(here, asking, collect, name=name, sha256="")


async def _create(
    here: Services,
    asking: Principal,
    fill: Callable[[Delivery, Allowance], Awaitable[None]],
    *,
    name: str,
    sha256: str,
) -> Adapter:
    with here.upload_slots.place(asking.tenant):
        allowed = await asyncio.to_thread(allowance, here, asking, here.settings.max_upload_bytes)
        async with scratch(here) as folder:
            delivery = Delivery(folder / "adapter", name=name, sha256=sha256)
            try:
                delivery.folder.mkdir()
            except OSError as error:
                raise storage_fault(error) from error
            await fill(delivery, allowed)
            adapter = await here.validator.judge(asking.tenant, new_id("adp"), delivery)
            return await asyncio.to_thread(_keep, here, asking, adapter, delivery.folder)


async def _receive(request: Request, here: Services, asking: Principal, delivery: Delivery, allowed: Allowance) -> None:
    kind = kind_of(request)
    if kind == "multipart/form-data":
        allowed.announced(request, framing=FRAMING)
        await receive_form(request, _AdapterForm(delivery, allowed), allowed.check)
    elif kind in RAW:
        allowed.announced(request)
        path = delivery.place(RAW[kind])
        assert path is not None
        await receive_raw(request, _opened(path, allowed))
    elif kind == "application/json":
        wanted = await receive_json(request, AdapterFromFiles, here.settings.max_json_bytes)
        delivery.name = wanted.name or delivery.name
        delivery.sha256 = wanted.sha256 or delivery.sha256
        await asyncio.to_thread(_collect, here, asking.tenant, wanted.file_ids, delivery, allowed)
    else:
        raise unsupported_kind(request, KINDS)


def _keep(here: Services, asking: Principal, adapter: Adapter, folder: Path) -> Adapter:
    """Bytes first, then the record that names them."""
    prefix = adapter_prefix(asking.tenant, adapter.id)
    here.objects.publish(folder, prefix)
    failpoints.hit("gateway.stored")
    try:
        return here.adapters.add(adapter, asking.tenant, prefix, max_bytes=quota_of(here, asking))
    except BaseException:
        # No record names these files, and none will.
        remove_or_leave(here.objects, prefix)
        raise


class _AdapterForm:
    fields: Collection[str] = ("name", "sha256")
    files: Collection[str] = ("files", "files[]", "file")

    def __init__(self, delivery: Delivery, allowed: Allowance) -> None:
        self._delivery = delivery
        self._allowed = allowed
        self._given: set[str] = set()

    def field(self, name: str, value: str) -> None:
        if name in self._given:
            raise InvalidParameter(f"{name} was sent twice.", code="duplicate_field", param=name)
        self._given.add(name)
        if name == "name":
            self._delivery.name = value
        elif re.fullmatch(ANNOUNCED_SHA256, value) is None:
            raise InvalidParameter("A SHA-256 is 64 hex digits.", code="invalid_field", param=name)
        else:
            self._delivery.sha256 = value

    def file(self, name: str, filename: str) -> Sink | None:
        path = self._delivery.place(filename)
        if path is None:
            return None
        return Sink(path, self._allowed.check if _may_be_large(path, self._delivery) else check_companion)


def _may_be_large(path: Path, delivery: Delivery) -> bool:
    return path == delivery.archive or path.name == WEIGHTS


def _opened(path: Path, allowed: Allowance) -> Sink:
    try:
        return Sink(path, allowed.check)
    except OSError as error:
        raise storage_fault(error) from error


def _collect(here: Services, tenant: str, file_ids: list[str], delivery: Delivery, allowed: Allowance) -> None:
    """Brings uploaded files to where a form would have put them."""
    found = [here.files.get(tenant, file_id) for file_id in file_ids]
    allowed.check(sum(file.shown.bytes for file in found))
    for number, file in enumerate(found):
        path = delivery.place(file.shown.filename)
        if path is None:
            continue
        if not _may_be_large(path, delivery):
            check_companion(file.shown.bytes)
        beside = delivery.folder.parent / f"file-{number}"
        try:
            here.objects.fetch(file.prefix, beside)
            os.rename(beside / CONTENT, path)
        except (StorageFault, OSError) as error:
            here.files.get(tenant, file.shown.id)  # deleted in the meantime: that is what is wrong
            if isinstance(error, StorageFault):
                raise
            raise storage_fault(error) from error
