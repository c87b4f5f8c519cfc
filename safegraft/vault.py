"""The installation's one secret (the pepper) and what is derived from it: marks of API keys, sealed webhook secrets.

Whoever reads the database without the pepper can neither find a key in it nor sign in a tenant's name.
"""

import base64
import contextlib
import hashlib
import hmac
import os
import secrets
from pathlib import Path

from cryptography.fernet import Fernet, InvalidToken

from safegraft.errors import SystemFault
from safegraft.settings import SharedSettings

FILE = "pepper"
MIN_LENGTH = 16


class Vault:
    """Marks and seals. Each use has a key of its own, derived from the pepper by HMAC-SHA-256."""

    def __init__(self, pepper: bytes) -> None:
        self._marking = hmac.digest(pepper, b"safegraft api keys", hashlib.sha256)
        sealing = hmac.digest(pepper, b"safegraft webhook secrets", hashlib.sha256)
        self._fernet = Fernet(base64.urlsafe_b64encode(sealing))

    def mark(self, text: str) -> str:
        """Hex HMAC-SHA-256 of `text`: equal for equal texts, and of no use without the pepper."""
        return hmac.new(self._marking, text.encode(), hashlib.sha256).hexdigest()

    def seal(self, text: str) -> str:
        """Encrypts what must be read again."""
        return self._fernet.encrypt(text.encode()).decode()

    def unseal(self, sealed: str) -> str:
        """Raises SystemFault (`wrong_pepper`)."""
        try:
            return self._fernet.decrypt(sealed.encode()).decode()
        except InvalidToken as error:
            raise SystemFault(
                "A stored secret cannot be read with this pepper.",
                code="wrong_pepper",
                hint="All gateways need the SAFEGRAFT_KEY_PEPPER that the installation began with.",
            ) from error


def open_vault(settings: SharedSettings) -> Vault:
    """From SAFEGRAFT_KEY_PEPPER; without one from a file in the data folder, made the first time."""
    given = settings.key_pepper.get_secret_value()
    if given:
        return Vault(given.encode())
    return Vault(_kept(settings.data / FILE))


def _kept(path: Path) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        # Written beside and linked: of two processes that start together, both use what the first one made.
        beside = path.with_name(f".{FILE}-{secrets.token_hex(8)}")
        handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(secrets.token_hex(32).encode())
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):
                os.link(beside, path)
        finally:
            beside.unlink()
    pepper = path.read_bytes().strip()
    if len(pepper) < MIN_LENGTH:
        raise SystemFault(f"{path} holds no pepper.", code="wrong_pepper", hint="Restore it from a backup.")
    return pepper
