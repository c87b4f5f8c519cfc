"""A reference bundle as a folder of files: its manifest, its identity, and whether its bytes are still those that were
built. No torch: the gateway lists references with it; `engine/reference.py` builds and loads them.
"""

import hashlib
import json
from pathlib import Path

from pydantic import ValidationError

from safegraft.contracts.reference import SCHEMA_VERSION, ReferenceManifest
from safegraft.errors import CorruptReference, TooLarge
from safegraft.files import read_bounded, sha256_file

MANIFEST = "manifest.json"
# One of a model with hundreds of layers has some hundred kilobytes.
MAX_MANIFEST_BYTES = 2**24
RESTORE = "Restore it from a copy, or build the reference again and install it in its place."
NLSR, GRAM, SAFETYLOCK = "nlsr.safetensors", "gram.safetensors", "safetylock.safetensors"


def read_manifest(folder: Path) -> tuple[ReferenceManifest, str]:
    """The manifest and its SHA-256, which is the bundle's identity. Raises CorruptReference."""
    path = folder / MANIFEST
    try:
        raw = read_bounded(path, MAX_MANIFEST_BYTES)
    except TooLarge as error:
        raise CorruptReference(error.message, code="manifest_too_large", param=str(path)) from error
    except OSError as error:
        raise _unreadable(str(path), error) from error
    return parse_manifest(raw, str(path))


def parse_manifest(raw: bytes, where: str) -> tuple[ReferenceManifest, str]:
    """Like `read_manifest`, of bytes that lie anywhere; `where` names the place in errors."""
    version = _version(raw)
    if version != SCHEMA_VERSION:
        raise CorruptReference(
            f"{where} was written by another version of safegraft (form {version}; known is {SCHEMA_VERSION}).",
            code="reference_version",
            param=where,
            hint="Build the reference again.",
        )
    try:
        return ReferenceManifest.model_validate_json(raw), hashlib.sha256(raw).hexdigest()
    except ValidationError as error:
        raise _unreadable(where, error) from error


def _unreadable(where: str, error: Exception) -> CorruptReference:
    return CorruptReference(f"{where}: not a readable manifest ({type(error).__name__}).", param=where)


def _version(raw: bytes) -> object:
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        return SCHEMA_VERSION  # the validation after this says what is wrong
    return found.get("schema_version") if isinstance(found, dict) else SCHEMA_VERSION


def verify_bundle(folder: Path, *, alone: bool = False) -> ReferenceManifest:
    """Re-hashes every file of the bundle. alone: nothing else may lie in the folder.

    Raises CorruptReference with the first file that differs.
    """
    manifest, _ = read_manifest(folder)
    for name, recorded in manifest.files.items():
        path = folder / name
        if path.name != name:
            raise CorruptReference(f"{folder / MANIFEST} names a file outside the bundle.", param=name)
        if not path.is_file():
            raise CorruptReference(
                f"{path} is missing: a file with the SHA-256 {recorded.sha256} was built.",
                param=str(path),
                hint=RESTORE,
            )
        found = sha256_file(path)
        if found != recorded.sha256 or path.stat().st_size != recorded.bytes:
            raise CorruptReference(
                f"{path} is not the file that was built: its SHA-256 is {found}, that of what was built is "
                f"{recorded.sha256}.",
                param=str(path),
                hint=RESTORE,
            )
    known = {MANIFEST, *manifest.files}
    if alone and (others := sorted(path.name for path in folder.iterdir() if path.name not in known)):
        raise CorruptReference(
            f"{folder / others[0]} is no file of this bundle.", param=str(folder / others[0]), hint="Remove it."
        )
    return manifest


def reference_id(sha256: str) -> str:
    """A bundle's public id: the same bytes have the same id everywhere."""
    return f"ref_{sha256[:24]}"
