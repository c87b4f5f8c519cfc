"""/v1/references and /v1/methods: what this installation offers."""

from functools import cache
from typing import Annotated

from fastapi import APIRouter, Path, Response

from safegraft.compatibility import RECOMMENDED
from safegraft.contracts.listing import Method, Page, Reference
from safegraft.contracts.methods import MODELS, STRENGTH
from safegraft.stores.references import Installed
from service.dependencies import Here, Tenant
from service.paging import page

router = APIRouter(prefix="/v1", tags=["catalogue"])


@router.get("/references", operation_id="listReferences", summary="List references")
def references(here: Here, tenant: Tenant) -> Page[Reference]:
    """The installed references, newest first."""
    return page([_shown(item) for item in here.references.installed()], False)


@router.get("/references/{reference_id}", operation_id="getReference", summary="Show a reference")
def reference(reference_id: Annotated[str, Path(max_length=80)], here: Here, tenant: Tenant) -> Reference:
    """What a reference was built from and what it serves."""
    return _shown(here.references.get(reference_id))


@router.get("/methods", operation_id="listMethods", summary="List repair methods", response_model=Page[Method])
def methods(here: Here, tenant: Tenant) -> Response:
    """The repair methods with the JSON Schema of their parameters."""
    return Response(_methods(), media_type="application/json")


@cache
def _methods() -> bytes:
    # The same for everybody until there is another version; schemas take milliseconds to make.
    found = [
        Method(
            id=name,
            description=(model.__doc__ or "").strip(),
            default=name == RECOMMENDED[0],
            strength_parameter=STRENGTH.get(name),
            parameters=model.model_json_schema(),
        )
        for name, model in MODELS.items()
    ]
    return page(found, False).model_dump_json().encode()


def _shown(item: Installed) -> Reference:
    manifest = item.manifest
    return Reference(
        id=item.id,
        name=manifest.name,
        sha256=item.sha256,
        base_model=manifest.base_model.labels[0],
        labels=manifest.base_model.labels,
        architecture=manifest.base_model.architecture,
        methods=manifest.methods,
        lineages=manifest.lineages,
        modules=len(manifest.base_model.modules),
        parameters=manifest.parameters.model_dump(),
        bytes=sum(file.bytes for file in manifest.files.values()),
        created_at=manifest.created_at,
    )
