"""Signatures in DSSE envelopes (https://github.com/secure-systems-lab/dsse, protocol 1.0) with Ed25519.

What is signed is the payload's bytes as they are, so that no form of JSON has to be canonical.
"""

import base64
import binascii
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from safegraft.contracts.provenance import Envelope, ProvenanceKey, Signature
from safegraft.errors import Conflict, InvalidParameter
from safegraft.files import sync_folder

PRIVATE, PUBLIC = "signing_key.pem", "signing_key.pub.pem"
HOW = "Make one with: safegraft provenance keygen --out DIR."
# Of whoever only checks: a new key never fits.
WHICH = f"Take {PUBLIC} of whoever signed, which safegraft provenance keygen made beside the private key."
# A PEM of Ed25519 has some 120 characters; whatever is far beyond that is another file.
MAX_PEM_BYTES = 2**16


def pae(payload_type: str, payload: bytes) -> bytes:
    """What is signed: DSSE's pre-authentication encoding of type and payload."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


@dataclass(frozen=True)
class SigningKey:
    private: Ed25519PrivateKey
    keyid: str

    def sign(self, payload_type: str, payload: bytes) -> Envelope:
        signature = self.private.sign(pae(payload_type, payload))
        return Envelope(
            payload=base64.b64encode(payload).decode(),
            payload_type=payload_type,
            signatures=[Signature(keyid=self.keyid, sig=base64.b64encode(signature).decode())],
        )


@dataclass(frozen=True)
class PublicKey:
    public: Ed25519PublicKey
    keyid: str

    @property
    def shown(self) -> ProvenanceKey:
        return ProvenanceKey(id=self.keyid, pem=_public_pem(self.public).decode())

    def signed(self, envelope: Envelope) -> bool:
        """Did this key sign? Every signature is tried, because a keyid proves nothing. Raises ValueError (base64)."""
        message = pae(envelope.payload_type, payload_of(envelope))
        for signature in envelope.signatures:
            try:
                self.public.verify(_decoded(signature.sig), message)
                return True
            except (InvalidSignature, ValueError):
                continue
        return False


def payload_of(envelope: Envelope) -> bytes:
    """Raises ValueError where it is not base64."""
    return _decoded(envelope.payload)


def _decoded(text: str) -> bytes:
    """Of standard or URL-safe base64; other texts for the same bytes are refused, so that no character is free."""
    plain = text.replace("-", "+").replace("_", "/")
    try:
        data = base64.b64decode(plain, validate=True)
    except binascii.Error as error:
        raise ValueError("not base64") from error
    if base64.b64encode(data).decode() != plain:
        raise ValueError("not base64")
    return data


def load_signing_key(path: Path) -> SigningKey:
    """The key in a PEM file (PKCS8, not encrypted). Raises InvalidParameter (`bad_signing_key`)."""
    try:
        key = serialization.load_pem_private_key(_read(path, "bad_signing_key"), password=None)
    except TypeError as error:
        raise _refused(path, "bad_signing_key", "it is encrypted, and nobody is there to type a password") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _refused(path, "bad_signing_key", "it holds no private key in PEM form") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise _refused(path, "bad_signing_key", "its key is not one of Ed25519")
    return SigningKey(key, keyid_of(key.public_key()))


def load_public_key(path: Path) -> PublicKey:
    """The public key in a PEM file. Raises InvalidParameter (`bad_public_key`)."""
    try:
        key = serialization.load_pem_public_key(_read(path, "bad_public_key"))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _refused(path, "bad_public_key", "it holds no public key in PEM form") from error
    if not isinstance(key, Ed25519PublicKey):
        raise _refused(path, "bad_public_key", "its key is not one of Ed25519")
    return PublicKey(key, keyid_of(key))


def make_keys(folder: Path) -> tuple[Path, Path, str]:
    """Writes a new private key, which only its owner can read, and its public key; returns both paths and the keyid.

    Raises Conflict (`key_exists`): a key is never replaced, because what it signed could not be checked any more.
    """
    folder.mkdir(parents=True, exist_ok=True)
    private, public = folder / PRIVATE, folder / PUBLIC
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    for path in (private, public):
        if path.exists():
            raise Conflict(f"{path} exists already.", code="key_exists", param="--out")
    _create(private, pem, 0o600)
    _create(public, _public_pem(key.public_key()), 0o644)
    sync_folder(folder)
    return private, public, keyid_of(key.public_key())


def keyid_of(key: Ed25519PublicKey) -> str:
    """Hex SHA-256 of the key's DER form (SubjectPublicKeyInfo): `openssl pkey -pubin -outform DER | sha256sum`."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def _public_pem(key: Ed25519PublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _create(path: Path, data: bytes, mode: int) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(handle, "wb") as file:
        os.fchmod(file.fileno(), mode)  # whatever the umask says
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path, code: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_PEM_BYTES)
    except OSError as error:
        raise _refused(path, code, f"it cannot be read ({error.strerror})") from error


def _refused(path: Path, code: str, why: str) -> InvalidParameter:
    hint = WHICH if code == "bad_public_key" else HOW
    return InvalidParameter(f"{path} is no key that can be used: {why}.", code=code, param=str(path), hint=hint)
