"""/v1/realignments/{id}/provenance and /v1/provenance_keys: where a result comes from, and who says so."""

from typing import Annotated, Any

from fastapi import APIRouter, Path, Response

from safegraft.contracts.listing import PRINTABLE, Page
from safegraft.contracts.provenance import ENVELOPE_MEDIA, STATEMENT_MEDIA, Envelope, ProvenanceKey
from safegraft.errors import Conflict, NotFound
from safegraft.provenance import PROVENANCE, media_type
from safegraft.stores.objects import result_prefix
from service.dependencies import Here, Tenant
from service.paging import page

router = APIRouter(prefix="/v1", tags=["provenance"])


# Inline: FastAPI documents models as application/json alone.
SCHEMA: dict[str, Any] = Envelope.model_json_schema()
SCHEMA["properties"]["signatures"]["items"] = SCHEMA.pop("$defs")["Signature"]
IN_TOTO = {"type": "object", "description": "An in-toto Statement v1 with SLSA provenance v1; see docs/provenance.md."}


@router.head("/realignments/{realignment_id}/provenance", include_in_schema=False)
@router.get(
    "/realignments/{realignment_id}/provenance",
    operation_id="getProvenance",
    summary="Show the provenance of a result",
    response_class=Response,
    responses={
        200: {
            "description": "A DSSE envelope; from an installation without a signing key the in-toto statement alone.",
            "content": {ENVELOPE_MEDIA: {"schema": SCHEMA}, STATEMENT_MEDIA: {"schema": IN_TOTO}},
        }
    },
)
def provenance(
    realignment_id: Annotated[str, Path(max_length=80, pattern=PRINTABLE)], here: Here, tenant: Tenant
) -> Response:
    """What was made from what, with the SHA-256 of every file; `safegraft verify` checks it offline."""
    attempt = here.jobs.result_attempt(tenant, realignment_id)
    if attempt is None:
        job = here.jobs.get(tenant, realignment_id)
        raise Conflict(
            f"{realignment_id} has no provenance: it is {job.status}.", code="no_provenance", param="realignment_id"
        )
    try:
        with here.objects.open(f"{result_prefix(tenant, realignment_id, attempt)}/report", PROVENANCE) as file:
            body = file.read()
    except NotFound as error:
        raise NotFound(
            f"{realignment_id} has no provenance: its result is older than that.",
            code="no_provenance",
            param="realignment_id",
        ) from error
    headers = {"x-content-type-options": "nosniff"}
    return Response(body, media_type=media_type(body), headers=headers)


@router.get("/provenance_keys", operation_id="listProvenanceKeys", summary="List the keys that sign provenance")
def keys(here: Here, tenant: Tenant) -> Page[ProvenanceKey]:
    """The public keys that sign provenance here, or did. Keep a copy: whoever could change a result could change this
    list too."""
    return page(here.provenance_keys, False)
