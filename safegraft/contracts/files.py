"""Files and resumable uploads, in the shapes of OpenAI's Files and Uploads API."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from safegraft.contracts.base import Asked, Shown
from safegraft.contracts.listing import PRINTABLE

# Labels that OpenAI's client knows; nothing here depends on which one it is.
Purpose = Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]
UploadStatus = Literal["pending", "completed", "cancelled", "expired"]
MAX_PART_BYTES = 2**26
MAX_PARTS = 10_000
# So many times an upload's announced bytes may be sent: answers are lost, and parts are sent again.
MAX_SENT = 4
# What a client writes as `expires_after.seconds`: an hour to 30 days.
MIN_KEPT, MAX_KEPT = 3600, 30 * 24 * 3600


def _printable(text: str) -> str:
    # Neither NUL, which Postgres refuses, nor half surrogates, which no answer can hold, nor what changes a line.
    if not text.isprintable():
        raise ValueError("it must be printable")
    return text


FileName = Annotated[str, Field(min_length=1, max_length=255), AfterValidator(_printable)]
Kept = Annotated[int, Field(ge=MIN_KEPT, le=MAX_KEPT)]
# An empty one is refused, too: a script whose hashing failed sends it.
ANNOUNCED_SHA256 = "^(sha256-)?[0-9a-fA-F]{64}$"
Sha256 = Annotated[str, Field(pattern=ANNOUNCED_SHA256, description="In hex.")]


class ExpiresAfter(Asked):
    anchor: Literal["created_at"]
    seconds: Kept


class FileCreate(Asked):
    purpose: Purpose
    filename: FileName
    expires_after: ExpiresAfter | None = None


class UploadCreate(Asked):
    """`bytes`: how many the whole file has. `expires_after` is about the file, not about the upload."""

    purpose: Purpose
    filename: FileName
    bytes: Annotated[int, Field(ge=1, le=2**62)]
    mime_type: Annotated[str, Field(max_length=200), AfterValidator(_printable)]
    expires_after: ExpiresAfter | None = None


class PartCreate(Asked):
    """Asks for an address to which the bytes of a part go directly."""

    bytes: Annotated[int, Field(ge=1, le=MAX_PART_BYTES)]
    sha256: Sha256 | None = None


class UploadComplete(Asked):
    """The parts in their order, and what the whole file must hash to."""

    part_ids: Annotated[
        list[Annotated[str, Field(max_length=80, pattern=PRINTABLE)]], Field(min_length=1, max_length=MAX_PARTS)
    ]
    md5: Annotated[str, Field(pattern="^[0-9a-fA-F]{32}$", description="In hex.")] | None = None
    sha256: Sha256 | None = None


class AdapterFromFiles(Asked):
    """Files that were uploaded before; each one's filename decides what it is."""

    file_ids: Annotated[
        list[Annotated[str, Field(max_length=80, pattern=PRINTABLE)]], Field(min_length=1, max_length=64)
    ]
    name: str = ""
    sha256: Annotated[str, Field(pattern=ANNOUNCED_SHA256, description="Of its weights, in hex.")] | None = None


class FileObject(Shown):
    """`purpose` is one of those that files are uploaded with, or `fine-tune-results`."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"


class FileDeleted(Shown):
    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class Upload(Shown):
    """`bytes` as they were announced; `file` once it is completed."""

    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: UploadStatus
    file: FileObject | None = None


class UploadPart(Shown):
    """`sha256` is null for a part that was sent to an address without one being announced."""

    id: str
    object: Literal["upload.part"] = "upload.part"
    upload_id: str
    bytes: int
    sha256: str | None
    created_at: int
    upload_url: str | None = Field(default=None, description="PUT the part's bytes here; only in the first answer.")
