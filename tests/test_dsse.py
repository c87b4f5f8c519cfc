"""Envelopes and keys: the specification's own example, and that no byte of what is signed can be changed."""

import base64
import hashlib
import os
import stat
import string
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from safegraft.contracts.provenance import Envelope, Signature
from safegraft.dsse import PublicKey, SigningKey, load_public_key, load_signing_key, make_keys, pae, payload_of
from safegraft.errors import Conflict, InvalidParameter

KIND = "application/vnd.in-toto+json"


@pytest.fixture
def keys(tmp_path: Path) -> tuple[SigningKey, PublicKey]:
    private, public, _ = make_keys(tmp_path / "keys")
    return load_signing_key(private), load_public_key(public)


def test_what_is_signed_is_the_specifications_example() -> None:
    """protocol.md of DSSE 1.0, with its key, its envelope, and the signature by the specification's own program."""
    x = 46950820868899156662930047687818585632848591499744589407958293238635476079160
    y = 5640078356564379163099075877009565129882514886557779369047442380624545832820
    envelope = Envelope.model_validate_json(
        """{"payload": "aGVsbG8gd29ybGQ=", "payloadType": "http://example.com/HelloWorld", "signatures": [{"sig":
        "A3JqsQGtVsJ2O2xqrI5IcnXip5GToJ3F+FnZ+O88SjtR6rDAajabZKciJTfUiHqJPcIAriEGAHTVeCUjW2JIZA=="}]}"""
    )
    message = pae(envelope.payload_type, payload_of(envelope))
    assert message == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    raw = base64.b64decode(envelope.signatures[0].sig)
    signature = encode_dss_signature(int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big"))
    ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key().verify(
        signature, message, ec.ECDSA(hashes.SHA256())
    )


@pytest.mark.parametrize(
    ("kind", "body", "signed"),
    [("", b"", b"DSSEv1 0  0 "), ("ü", b"\xff\n ", b"DSSEv1 2 \xc3\xbc 3 \xff\n "), ("a 1", b"b", b"DSSEv1 3 a 1 1 b")],
)
def test_lengths_are_of_bytes(kind: str, body: bytes, signed: bytes) -> None:
    assert pae(kind, body) == signed


def test_an_envelope_is_what_others_read(keys: tuple[SigningKey, PublicKey]) -> None:
    """Verified by hand, from the specification alone."""
    signing, public = keys
    envelope = signing.sign(KIND, b'{"a": 1}').model_dump(mode="json")
    assert set(envelope) == {"payload", "payloadType", "signatures"}
    assert [set(item) for item in envelope["signatures"]] == [{"keyid", "sig"}]
    body = base64.b64decode(envelope["payload"])
    message = b"DSSEv1 28 application/vnd.in-toto+json " + str(len(body)).encode() + b" " + body
    key = serialization.load_pem_public_key(public.shown.pem.encode())
    assert isinstance(key, Ed25519PublicKey)
    key.verify(base64.b64decode(envelope["signatures"][0]["sig"]), message)
    assert envelope["signatures"][0]["keyid"] == public.keyid == public.shown.id


def test_no_character_of_payload_type_or_signature_is_free(keys: tuple[SigningKey, PublicKey]) -> None:
    signing, public = keys
    # A length whose base64 ends in a digit that carries bits which mean nothing.
    envelope = signing.sign(KIND, b'{"ab": 1}!')
    assert public.signed(envelope)
    sig = envelope.signatures[0].sig

    def accepted(changed: Envelope) -> bool:
        try:
            return public.signed(changed)
        except ValueError:
            return False

    def payload(new: str) -> Envelope:
        return envelope.model_copy(update={"payload": new})

    def kind(new: str) -> Envelope:
        return envelope.model_copy(update={"payload_type": new})

    def signature(new: str) -> Envelope:
        return envelope.model_copy(update={"signatures": [Signature(sig=new)]})

    for text, put in ((envelope.payload, payload), (envelope.payload_type, kind), (sig, signature)):
        for at in range(len(text)):
            for other in {chr(ord(text[at]) ^ 1), "A", "B", "=", " "} - {text[at]}:
                assert not accepted(put(text[:at] + other + text[at + 1 :])), (text, at, other)
            assert not accepted(put(text[:at] + text[at + 1 :]))
            assert not accepted(put(text[:at] + "\n" + text[at:]))
    # The last digits carry bits that mean nothing to a lenient decoder.
    for text, put in ((envelope.payload, payload), (sig, signature)):
        at = len(text.rstrip("=")) - 1
        assert at < len(text) - 2
        for digit in set(string.ascii_letters + string.digits + "+/") - {text[at]}:
            assert not accepted(put(text[:at] + digit + text[at + 1 :]))


def test_url_safe_base64_is_read_too(keys: tuple[SigningKey, PublicKey]) -> None:
    """The specification: verifiers must accept either."""
    signing, public = keys
    for number in range(50):  # until there were some with - and _
        envelope = signing.sign(KIND, b"\xff\xfb\xf0%d" % number)

        def safe(text: str) -> str:
            return text.replace("+", "-").replace("/", "_")

        other = Envelope(
            payload=safe(envelope.payload),
            payload_type=KIND,
            signatures=[Signature(keyid="", sig=safe(envelope.signatures[0].sig))],
        )
        assert public.signed(other)


def test_one_right_signature_of_several_is_enough_and_keyids_prove_nothing(
    keys: tuple[SigningKey, PublicKey], tmp_path: Path
) -> None:
    signing, public = keys
    stranger = load_signing_key(make_keys(tmp_path / "other")[0])
    envelope, theirs = signing.sign(KIND, b"x"), stranger.sign(KIND, b"x")
    both = envelope.model_copy(update={"signatures": [*theirs.signatures, *envelope.signatures]})
    assert public.signed(both)
    assert not public.signed(theirs)
    posing = Signature(keyid=public.keyid, sig=theirs.signatures[0].sig)
    assert not public.signed(theirs.model_copy(update={"signatures": [posing]}))
    assert not public.signed(envelope.model_copy(update={"signatures": []}))
    unnamed = Signature(keyid="whatever", sig=envelope.signatures[0].sig)
    assert public.signed(envelope.model_copy(update={"signatures": [unnamed]}))


def test_new_keys_are_their_owners_alone_and_replace_none(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        private, public, keyid = make_keys(tmp_path / "new" / "keys")
    finally:
        os.umask(before)
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert b"PRIVATE" not in public.read_bytes()
    assert load_signing_key(private).keyid == load_public_key(public).keyid == keyid
    kept = private.read_bytes()
    with pytest.raises(Conflict, match="exists already"):
        make_keys(tmp_path / "new" / "keys")
    assert private.read_bytes() == kept
    private.unlink()
    with pytest.raises(Conflict, match=public.name):
        make_keys(tmp_path / "new" / "keys")
    assert not private.exists()  # no pair of strangers


def test_openssl_reads_the_keys_and_names_them_alike(tmp_path: Path) -> None:
    private, _, keyid = make_keys(tmp_path)
    command = ["openssl", "pkey", "-in", str(private), "-pubout", "-outform", "DER"]
    try:
        der = subprocess.run(command, capture_output=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    assert hashlib.sha256(der).hexdigest() == keyid


def encrypted(folder: Path) -> bytes:
    key = load_signing_key(make_keys(folder)[0]).private
    how = serialization.BestAvailableEncryption(b"word")
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)


def elliptic(folder: Path) -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    how = serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda folder: None, "No such file"),
        (lambda folder: b"", "no private key"),
        (lambda folder: b"\xff" * 100, "no private key"),
        (lambda folder: make_keys(folder)[1].read_bytes(), "no private key"),
        (lambda folder: make_keys(folder)[0].read_bytes()[:60], "no private key"),
        (encrypted, "encrypted"),
        (elliptic, "not one of Ed25519"),
    ],
)
def test_what_is_no_private_key_is_refused_in_one_line(
    tmp_path: Path, make: Callable[[Path], bytes | None], why: str
) -> None:
    path, body = tmp_path / "key.pem", make(tmp_path / "made")
    if body is not None:
        path.write_bytes(body)
    with pytest.raises(InvalidParameter, match=why) as raised:
        load_signing_key(path)
    assert raised.value.code == "bad_signing_key"
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    with pytest.raises(InvalidParameter) as public:
        load_public_key(tmp_path / "made" / "signing_key.pem" if why == "encrypted" else tmp_path / "nothing")
    assert public.value.code == "bad_public_key"
    with pytest.raises(InvalidParameter, match="cannot be read"):
        load_signing_key(tmp_path)  # a folder
