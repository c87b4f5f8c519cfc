"""The provenance of a result: what came out, from what, how, and by whom, with the SHA-256 of every file.

No torch: versions are those that the report names.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from safegraft.adapter import CONFIG, WEIGHTS
from safegraft.bundle import MANIFEST
from safegraft.contracts.adapter import AdapterFile
from safegraft.contracts.provenance import (
    BUILD_TYPE,
    ENVELOPE_MEDIA,
    STATEMENT_MEDIA,
    BuildDefinition,
    Builder,
    BuildMetadata,
    ExternalParameters,
    InternalParameters,
    Predicate,
    Resource,
    RunDetails,
    Statement,
)
from safegraft.contracts.reference import ReferenceManifest
from safegraft.contracts.report import Report
from safegraft.dsse import SigningKey
from safegraft.files import sha256_file, write_atomic
from safegraft.ingest import companions_of

PROVENANCE, REPORT = "provenance.json", "report.json"
INPUT, REFERENCE, SOURCE, SIDE_CAR = "adapter/", "reference/", "reference_source/", "side_car/"


@dataclass(frozen=True)
class Invocation:
    """One run of a builder. started: Unix seconds."""

    id: str
    builder: str
    started: float


def make_statement(
    report: Report,
    manifest: ReferenceManifest,
    *,
    invocation: Invocation,
    outputs: Mapping[str, str],
    inputs: Mapping[str, str],
    report_sha256: str,
) -> Statement:
    """outputs, inputs: SHA-256 by name of the patched files (`<strength>/<file>` where there are several strengths) and
    of those that were sent. Ends now."""
    subjects = {**outputs, **_under(SIDE_CAR, report.side_cars), REPORT: report_sha256}
    definition = BuildDefinition(
        build_type=BUILD_TYPE,
        external_parameters=ExternalParameters(
            method=report.method.parameters.model_dump(mode="json"),
            mode=report.mode,
            strengths=[variant.strength for variant in report.variants],
            output_rank=report.output_rank,
            reference=report.reference.id,
        ),
        internal_parameters=InternalParameters(
            seed=report.method.seed,
            dtype=report.environment.dtype,
            device=report.environment.device,
            resolved=report.method.resolved,
        ),
        resolved_dependencies=[
            *_resources(_under(INPUT, inputs)),
            Resource(
                name=f"{REFERENCE}{MANIFEST}",
                uri=f"urn:safegraft:reference:{report.reference.id}",
                digest={"sha256": report.reference.sha256},
                annotations={"name": manifest.name, "base_model": manifest.base_model.labels[0]},
            ),
            *_resources(_under(SOURCE, manifest.origin.files)),
        ],
    )
    run = RunDetails(
        builder=Builder(id=invocation.builder, version=report.environment.versions),
        metadata=BuildMetadata(
            invocation_id=invocation.id,
            started_on=datetime.fromtimestamp(invocation.started, UTC),
            finished_on=datetime.now(UTC),
        ),
    )
    return Statement(subject=_resources(subjects), predicate=Predicate(build_definition=definition, run_details=run))


def write_provenance(statement: Statement, path: Path, key: SigningKey | None) -> None:
    """As a DSSE envelope signed by `key`, or the bare statement."""
    body = statement.model_dump_json(indent=2, exclude_none=True).encode()
    if key is not None:
        body = key.sign(STATEMENT_MEDIA, body).model_dump_json(indent=2).encode()
    write_atomic(path, body + b"\n")


def media_type(body: bytes) -> str | None:
    """What a file holds: an envelope, a bare statement, or (None) neither."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    if "payload" in found and "signatures" in found:
        return ENVELOPE_MEDIA
    return STATEMENT_MEDIA if "predicateType" in found else None


def input_digests(folder: Path, report: Report) -> dict[str, str]:
    """SHA-256 by name of the files that a realignment reads: not of pickles and checkpoints beside them.

    Weights and configuration are those that the report names: the folder may have changed since.
    """
    known = {WEIGHTS: report.input.sha256, CONFIG: report.input.config_sha256}
    return {name: known.get(name) or sha256_file(folder / name) for name in sorted([*known, *companions_of(folder)])}


def folder_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its path in it."""
    return {
        path.relative_to(folder).as_posix(): sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }


def record_digests(files: Iterable[AdapterFile], strength: str = "") -> dict[str, str]:
    """Those that a stored adapter's record names. strength: the name of its variant."""
    return {f"{strength}/{file.name}" if strength else file.name: file.sha256 for file in files}


def _under(prefix: str, digests: Mapping[str, str]) -> dict[str, str]:
    return {f"{prefix}{name}": digest for name, digest in digests.items()}


def _resources(digests: Mapping[str, str]) -> list[Resource]:
    return [Resource(name=name, digest={"sha256": digest}) for name, digest in digests.items()]
