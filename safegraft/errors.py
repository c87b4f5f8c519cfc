"""Every error that safegraft raises on purpose, as one tree. No HTTP here: `service/errors.py` maps classes to
statuses, and the *class* decides an error's fate:

    SafegraftError
    ├── UserError              the request or the upload is at fault; trying again changes nothing
    │   ├── InvalidAdapter     what was uploaded is not a LoRA adapter that can be treated soundly
    │   │   └── InvalidTensors     … because of the safetensors file
    │   ├── UnsupportedAdapter a sound adapter of a kind that no linear repair can treat (DoRA, …)
    │   ├── Incompatible       adapter, reference and method do not fit together
    │   ├── InvalidArchive     a tar or zip that will not be unpacked
    │   ├── InvalidParameter   a parameter is out of its range
    │   ├── InvalidPrompts     a prompt file cannot be read
    │   ├── NotFound           no such thing (or not yours: both look the same)
    │   ├── Conflict           it exists, but not in a state that allows this
    │   ├── TooLarge           over a stated limit
    │   └── QuotaExceeded      the tenant's share is used up
    └── SystemFault            we are at fault; the job is tried again, then shown as failed
        ├── CorruptReference   a bundle's bytes are not those that were recorded
        ├── OverLimit          it took more memory, processor time or disk than the operator allows
        ├── NoBroker           no Redis or Valkey could be found or started
        ├── StorageFault       disk full, file gone
        └── LostLease          another attempt owns the job now; stop silently

`code` is stable and machine-readable, `param` names the offender, `hint` says what to do.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, ClassVar, Literal


def known_names(name: str, known: Iterable[str]) -> str:
    """What to write instead of a name that nobody knows: the one that is nearly written so, else all; "" of none."""
    names = sorted(known)
    near = get_close_matches(name[:80], names, n=1)
    return f"Did you mean {near[0]}?" if near else f"Known are {', '.join(names)}." if names else ""


class SafegraftError(Exception):
    """Base of all. `code` falls back to the class's own code where a caller names none."""

    default_code: ClassVar[str] = "internal_error"
    fault: ClassVar[Literal["user", "system"]] = "system"

    def __init__(self, message: str, *, code: str = "", param: str | None = None, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.param = param
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".rstrip()


class UserError(SafegraftError):
    default_code = "invalid_request"
    fault = "user"


class InvalidAdapter(UserError):
    default_code = "invalid_adapter"


class InvalidTensors(InvalidAdapter):
    default_code = "invalid_safetensors"


class UnsupportedAdapter(UserError):
    default_code = "unsupported_adapter"


class Incompatible(UserError):
    default_code = "incompatible"


class InvalidArchive(UserError):
    default_code = "invalid_archive"


class InvalidParameter(UserError):
    default_code = "invalid_parameter"


class InvalidPrompts(UserError):
    default_code = "invalid_prompts"


class NotFound(UserError):
    default_code = "not_found"


class Conflict(UserError):
    default_code = "conflict"


class TooLarge(UserError):
    default_code = "too_large"


class QuotaExceeded(UserError):
    default_code = "quota_exceeded"


class SystemFault(SafegraftError):
    default_code = "internal_error"


class CorruptReference(SystemFault):
    default_code = "corrupt_reference"


class OverLimit(SystemFault):
    default_code = "over_limit"


class NoBroker(SystemFault):
    default_code = "no_broker"


class StorageFault(SystemFault):
    default_code = "storage_fault"


class LostLease(SystemFault):
    default_code = "lost_lease"


def told(error: SafegraftError) -> dict[str, Any]:
    """An error as JSON, for the process that asked: with the nearest class that is defined here."""
    kind = next(kind.__name__ for kind in type(error).__mro__ if globals().get(kind.__name__) is kind)
    return {"kind": kind, "message": error.message, "code": error.code, "param": error.param, "hint": error.hint}


def heard(given: dict[str, Any]) -> SafegraftError:
    """What another process `told`."""
    kind: type[SafegraftError] = globals()[given["kind"]]
    return kind(given["message"], code=given["code"], param=given["param"], hint=given["hint"])
