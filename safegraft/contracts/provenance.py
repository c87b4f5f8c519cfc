"""Where a result comes from: an in-toto Statement v1 with SLSA's build provenance v1, and the DSSE envelope around it.

The names are those of the specifications (https://in-toto.io/Statement/v1, https://slsa.dev/provenance/v1,
https://github.com/secure-systems-lab/dsse). Fields that are not known here are read over, because all three demand it
of a reader: a later version may say more.
"""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

# What the parameters and the names of subjects and dependencies mean; another meaning gets another number.
BUILD_TYPE = "urn:safegraft:realignment:v1"
STATEMENT_MEDIA = "application/vnd.in-toto+json"
ENVELOPE_MEDIA = "application/vnd.dsse.envelope.v1+json"


class Part(BaseModel):
    model_config = ConfigDict(
        extra="ignore", frozen=True, alias_generator=to_camel, populate_by_name=True, serialize_by_alias=True
    )


class Resource(Part):
    """A file by its name, or what else is known by a digest. digest: lower-case hex by algorithm."""

    name: str
    uri: str | None = None
    digest: dict[str, str]
    annotations: dict[str, str] | None = None


class ExternalParameters(BaseModel):
    """What was asked for, as it ran: `method` with all its parameters (`auto` replaced by what was recommended)."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    method: dict[str, Any]
    mode: Literal["patch", "analyze"]
    strengths: list[float]
    output_rank: Literal["customer", "exact"]
    reference: str = Field(description="The reference's id; its digest is among the dependencies.")


class InternalParameters(BaseModel):
    """What the builder decided. seed: left out where nothing is drawn. resolved: by name, what ran for parameters that
    were asked for as `auto`."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    seed: int | None = None
    dtype: str
    device: str
    resolved: dict[str, str]


class BuildDefinition(Part):
    build_type: str
    external_parameters: ExternalParameters
    internal_parameters: InternalParameters
    resolved_dependencies: list[Resource]


class Builder(Part):
    id: str
    version: dict[str, str]


class BuildMetadata(Part):
    """invocation_id: `<job>/<attempt>` of a service."""

    invocation_id: str
    started_on: datetime
    finished_on: datetime


class RunDetails(Part):
    builder: Builder
    metadata: BuildMetadata


class Predicate(Part):
    build_definition: BuildDefinition
    run_details: RunDetails


class Statement(Part):
    """Subjects: the files of the patched adapter (with several strengths `<strength>/<file>`), `side_car/<file>` and
    `report.json`. Dependencies: `adapter/<file>` of the adapter that was sent, `reference/manifest.json`, and
    `reference_source/<file>` of what the reference was built from, as its manifest knows it."""

    type_: Literal["https://in-toto.io/Statement/v1"] = Field(default="https://in-toto.io/Statement/v1", alias="_type")
    subject: list[Resource]
    predicate_type: Literal["https://slsa.dev/provenance/v1"] = "https://slsa.dev/provenance/v1"
    predicate: Predicate


class Signature(BaseModel):
    """keyid: SHA-256 of the public key's DER form, in hex; a hint, which nothing protects. sig: base64."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    keyid: str = ""
    sig: str


class Envelope(Part):
    """A DSSE envelope. payload: the signed bytes, in base64."""

    payload: str
    payload_type: str
    signatures: list[Signature]


class ProvenanceKey(BaseModel):
    """A public key that signs, or signed, this installation's provenance. `id` is the `keyid` of its signatures."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    object: Literal["provenance_key"] = "provenance_key"
    algorithm: Literal["ed25519"] = "ed25519"
    pem: str
