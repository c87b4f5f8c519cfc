"""Does provenance hold for the files that are here? Offline: from digests and a public key, and nothing else."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from safegraft.adapter import WEIGHTS
from safegraft.bundle import MANIFEST, read_manifest, verify_bundle
from safegraft.contracts.provenance import (
    BUILD_TYPE,
    ENVELOPE_MEDIA,
    STATEMENT_MEDIA,
    Envelope,
    Resource,
    Statement,
)
from safegraft.dsse import PublicKey, payload_of
from safegraft.errors import CorruptReference
from safegraft.files import sha256_file
from safegraft.provenance import INPUT, REFERENCE, REPORT, SIDE_CAR, SOURCE, folder_digests, media_type

# A statement or report of hundreds of modules and a dozen strengths has some megabytes. Whatever else is looked at is
# hashed as it is read, however large.
MAX_DOCUMENT_BYTES = 2**26


@dataclass(frozen=True)
class Evidence:
    """What is here to be compared; None is not looked at. adapter: the patched one, or the folder that holds one a
    strength; given: the one that was sent; reference: a bundle's folder; report: a report.json."""

    adapter: Path | None = None
    side_cars: Path | None = None
    report: Path | None = None
    given: Path | None = None
    reference: Path | None = None
    key: PublicKey | None = None


@dataclass
class Checked:
    """problems: what is not as the statement says; unchecked: what it says and nobody compared."""

    signature: Literal["valid", "invalid", "unsigned", "not checked"] = "unsigned"
    checked: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def compare(self, expected: Mapping[str, str], found: Mapping[str, str], prefix: str = "") -> None:
        """Digests by name; `prefix` is only shown."""
        for name, digest in expected.items():
            if name not in found:
                self.problems.append(f"{prefix}{name} is missing.")
            elif found[name] != digest:
                self.problems.append(f"{prefix}{name} has the SHA-256 {found[name]}, the statement says {digest}.")
            else:
                self.checked.append(f"{prefix}{name}")

    def only(self, expected: Mapping[str, str], found: Mapping[str, str], prefix: str = "") -> None:
        """Like `compare`; what nobody attested is a problem too, because whoever loads the folder may read it."""
        self.compare(expected, found, prefix)
        self.problems += [f"{prefix}{name} is not attested." for name in found if name not in expected]

    def leave(self, names: Iterable[str], why: str = "") -> None:
        self.unchecked += [f"{name} ({why})" if why else name for name in names]


def check_provenance(body: bytes, evidence: Evidence) -> Checked:
    """Checks a statement or envelope against what is given. Whatever is wrong is in the answer; nothing is raised."""
    found = Checked()
    statement = _opened(body, evidence.key, found)
    if statement is None:
        return found
    subjects = _digests(statement.subject, found)
    dependencies = _digests(statement.predicate.build_definition.resolved_dependencies, found)
    outputs = {name: digest for name, digest in subjects.items() if name != REPORT and not name.startswith(SIDE_CAR)}
    _check_outputs(outputs, evidence.adapter, found)
    side_cars = _below(SIDE_CAR, subjects)
    if evidence.side_cars is not None:
        found.only(side_cars, folder_digests(evidence.side_cars), SIDE_CAR)
    else:
        found.leave(f"{SIDE_CAR}{name}" for name in side_cars)
    reports = {REPORT: subjects[REPORT]} if REPORT in subjects else {}
    if evidence.report is not None:
        found.only(reports, {REPORT: sha256_file(evidence.report)})
    else:
        found.leave(reports)
    sent = _below(INPUT, dependencies)
    if evidence.given is not None:
        found.compare(sent, folder_digests(evidence.given), INPUT)
    else:
        found.leave((f"{INPUT}{name}" for name in sent), "what was sent; given with --input")
    _check_reference(dependencies, evidence.reference, found)
    return found


def _opened(body: bytes, key: PublicKey | None, found: Checked) -> Statement | None:
    payload = body
    if media_type(body) == ENVELOPE_MEDIA:
        found.signature = "not checked"
        try:
            envelope = Envelope.model_validate_json(body)
            payload = payload_of(envelope)
        except ValueError:  # pydantic's is one
            found.problems.append("The envelope cannot be read.")
            return None
        if key is not None:
            found.signature = "valid" if key.signed(envelope) else "invalid"
            if found.signature == "invalid":
                found.problems.append(f"No signature of the envelope is one of the key {key.keyid}.")
                # What nobody vouches for is not read any further.
                return None
        if envelope.payload_type != STATEMENT_MEDIA:
            found.problems.append(f"The payload is {envelope.payload_type[:80]!r}, not {STATEMENT_MEDIA}.")
            return None
    elif key is not None:
        found.problems.append("A public key was given, and the statement is not signed.")
    try:
        statement = Statement.model_validate_json(payload)
    except ValidationError:
        found.problems.append("This is no in-toto statement of SLSA provenance v1 as safegraft makes it.")
        return None
    kind = statement.predicate.build_definition.build_type
    if kind != BUILD_TYPE:
        found.problems.append(f"The statement's buildType is {kind[:80]!r}; known is {BUILD_TYPE}.")
        return None
    return statement


def _digests(resources: list[Resource], found: Checked) -> dict[str, str]:
    digests: dict[str, str] = {}
    for resource in resources:
        if "sha256" not in resource.digest or resource.name in digests:
            found.problems.append(f"The statement names {resource.name[:200]!r} twice, or without its SHA-256.")
        else:
            digests[resource.name] = resource.digest["sha256"]
    return digests


def _check_outputs(outputs: dict[str, str], folder: Path | None, found: Checked) -> None:
    if folder is None:
        found.leave(outputs)
        return
    if not outputs:
        found.problems.append("The statement attests no adapter: its job only measured one.")
        return
    here = folder_digests(folder)
    variants = {name.partition("/")[0] for name in outputs if "/" in name}
    if not variants or WEIGHTS not in here:
        found.only(outputs, here)
        return
    # One of several strengths, as a service hands them out: which one, its weights tell.
    for variant in sorted(variants):
        own = _below(f"{variant}/", outputs)
        if own.get(WEIGHTS) == here[WEIGHTS]:
            found.only(own, here, f"{variant}/")
            found.leave((name for name in outputs if not name.startswith(f"{variant}/")), "another strength")
            return
    found.problems.append(f"{WEIGHTS} is that of none of the strengths {', '.join(sorted(variants))}.")


def _check_reference(dependencies: dict[str, str], folder: Path | None, found: Checked) -> None:
    manifest = _below(REFERENCE, dependencies)
    sources = _below(SOURCE, dependencies)
    if folder is None:
        found.leave(f"{name}" for name in dependencies if name.startswith((REFERENCE, SOURCE)))
        return
    try:
        built, digest = read_manifest(folder)
        found.compare(manifest, {MANIFEST: digest}, REFERENCE)
        verify_bundle(folder)
        found.checked += [f"{REFERENCE}{name}" for name in built.files]
    except CorruptReference as error:
        found.problems.append(error.message)
        return
    for name, digest in sources.items():
        if built.origin.files.get(name) != digest:
            found.problems.append(f"{SOURCE}{name} is not what the reference's manifest names.")
        else:
            found.leave([f"{SOURCE}{name}"], "the reference's manifest agrees; the file itself was not read")


def _below(prefix: str, digests: Mapping[str, str]) -> dict[str, str]:
    return {name.removeprefix(prefix): digest for name, digest in digests.items() if name.startswith(prefix)}
