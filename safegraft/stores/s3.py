"""Bytes in an S3 bucket, for several machines. AWS, SeaweedFS, Garage, Ceph: whatever speaks S3.

Credentials, region and endpoint come from the usual AWS_* variables. Nothing here relies on conditional writes, which
some servers ignore: prefixes are new ones, and the record in the database is what makes a result.
"""

import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, cast
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from safegraft import failpoints
from safegraft.errors import InvalidParameter, NotFound, StorageFault
from safegraft.files import CHUNK
from safegraft.settings import SharedSettings
from safegraft.stores.objects import NAME, checked_name, checked_prefix, not_stored, sweep_folder

if TYPE_CHECKING:
    from obstore import Attributes
    from obstore.store import ClientConfig, RetryConfig

# One request's bytes: a request that fails is sent again whole. S3 takes 10 000 parts, so that files end at 80 GB.
PIECE = 8 * 2**20
# Requests at a time for one file, and so PIECE times as much memory.
TOGETHER = 4
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
# A request of the gateway waits for these; what fails after them is told to the client, who may try again.
PATIENT: "RetryConfig" = {"max_retries": 5, "retry_timeout": timedelta(seconds=60)}
IMPATIENT: "RetryConfig" = {"max_retries": 1, "retry_timeout": timedelta(seconds=5)}


class S3Objects:
    """Objects in a bucket, below a key prefix."""

    def __init__(self, settings: SharedSettings) -> None:
        bucket, below = _place(settings.storage_url)
        endpoint = next((os.environ[name] for name in ENDPOINTS if os.environ.get(name)), "")
        self._store = _open(bucket, below, endpoint, PATIENT)
        self._probe = _open(bucket, below, endpoint, IMPATIENT)
        public = settings.storage_public_url
        # Only signs; it never connects.
        self._public = _open(bucket, below, public, PATIENT) if public else self._store
        self._lifetime = timedelta(seconds=settings.presign_seconds)
        self.scratch = settings.objects.resolve() / "scratch"

    def publish(self, folder: Path, prefix: str) -> None:
        """Uploads all files of a folder, which stays. A leftover of an earlier try is removed first."""
        checked_prefix(prefix)
        try:
            failpoints.hit("store.publish")
            paths = sorted(path for path in folder.rglob("*") if path.is_file())
            if not paths:
                raise FileNotFoundError(2, "the folder holds no files")
            self.remove(prefix)
            for path in paths:
                parents = path.parent.relative_to(folder).parts
                with path.open("rb") as source:
                    self.put("/".join([prefix, *parents]), path.name, source)
        except OSError as error:
            raise not_stored(prefix, error) from error

    def put(self, prefix: str, name: str, source: BinaryIO) -> None:
        """In one request where it is small, else in parts; S3 shows an object only when its last part has arrived."""
        key = _key(prefix, checked_name(name))
        # Told to whoever comes with a presigned address, since that names neither.
        attributes: Attributes = {
            "Content-Type": "application/octet-stream",
            "Content-Disposition": f'attachment; filename="{name}"',
        }
        try:
            first = _piece(source)
            if len(first) < PIECE:
                with _answering():
                    obstore.put(self._store, key, first, attributes=attributes, use_multipart=False)
            else:
                with _answering():
                    obstore.put(
                        self._store,
                        key,
                        _pieces(first, source),
                        attributes=attributes,
                        chunk_size=PIECE,
                        max_concurrency=TOGETHER,
                    )
        except NotFound as error:  # the bucket
            raise StorageFault("The object store's bucket does not exist.", code="storage_unavailable") from error
        except OSError as error:
            raise not_stored(prefix, error) from error

    def fetch(self, prefix: str, folder: Path) -> None:
        found = self._sizes(prefix)
        if not found:
            raise StorageFault(f"The files of {prefix} are gone.", code="object_missing")
        try:
            folder.mkdir(parents=True)
            for name, size in found.items():
                self._download(_key(prefix, name), size, folder / name)
        except NotFound as error:
            raise StorageFault(f"The files of {prefix} are gone.", code="object_missing") from error
        except OSError as error:
            raise not_stored(str(folder.name), error) from error

    def open(self, prefix: str, name: str) -> BinaryIO:
        key = _key(prefix, name)
        raw = _Ranges(self._store, key, self.size(prefix, name))
        return cast(BinaryIO, io.BufferedReader(raw, CHUNK))

    def local(self, prefix: str, name: str) -> Path | None:
        self.size(prefix, name)
        return None

    def url(self, prefix: str, name: str, *, filename: str, media_type: str) -> str | None:
        """Presigned. What is sent there carries the stored name and `application/octet-stream`: see `put`."""
        return self._sign("GET", _key(prefix, name))

    def put_url(self, prefix: str, name: str) -> str | None:
        return self._sign("PUT", _key(prefix, checked_name(name)))

    def size(self, prefix: str, name: str) -> int:
        key = _key(prefix, name)
        with _answering():
            return int(obstore.head(self._store, key)["size"])

    def names(self, prefix: str) -> list[str]:
        return sorted(self._sizes(prefix))

    def prefixes(self, root: str) -> Iterator[tuple[str, float]]:
        checked_prefix(root)
        newest: dict[str, float] = {}
        with _answering():
            for chunk in obstore.list(self._store, prefix=root):
                for item in chunk:
                    name, slash, _ = item["path"].removeprefix(f"{root}/").partition("/")
                    if slash:
                        changed = item["last_modified"].timestamp()
                        newest[name] = max(changed, newest.get(name, changed))
        for name in sorted(newest):
            yield f"{root}/{name}", newest[name]

    def remove(self, prefix: str) -> None:
        checked_prefix(prefix)
        with _answering():
            for chunk in obstore.list(self._store, prefix=prefix, chunk_size=1000):
                obstore.delete(self._store, [item["path"] for item in chunk])

    def sweep(self, *, dry_run: bool = False) -> list[int]:
        return sweep_folder(self.scratch, dry_run=dry_run)

    def ping(self) -> bool:
        try:
            self.scratch.mkdir(parents=True, exist_ok=True)
            obstore.put(self._probe, "ping", b"", use_multipart=False)
        except (BaseError, OSError):
            return False
        return os.access(self.scratch, os.W_OK)

    def _sizes(self, prefix: str) -> dict[str, int]:
        """The files directly below a prefix: name → bytes."""
        checked_prefix(prefix)
        with _answering():
            found = obstore.list_with_delimiter(self._store, prefix=prefix)["objects"]
        names = {item["path"].removeprefix(f"{prefix}/"): int(item["size"]) for item in found}
        return {name: size for name, size in names.items() if NAME.fullmatch(name)}

    def _download(self, key: str, size: int, path: Path) -> None:
        """Several ranges at a time, each written where it belongs."""
        with path.open("xb") as file, ThreadPoolExecutor(TOGETHER) as pool:
            handle = file.fileno()

            def bring(start: int) -> None:
                data = _range(self._store, key, start, min(PIECE, size - start))
                if os.pwrite(handle, data, start) != len(data):
                    raise StorageFault("The disk is full; nothing was kept.", code="disk_full")

            for _ in pool.map(bring, range(0, size, PIECE)):
                pass

    def _sign(self, method: Literal["GET", "PUT"], key: str) -> str:
        with _answering():
            return obstore.sign(self._public, method, key, self._lifetime)


class _Ranges(io.RawIOBase):
    """An object of known size for reading and seeking: each read is one request for a range."""

    def __init__(self, store: S3Store, key: str, size: int) -> None:
        self._store, self._key, self._size = store, key, size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError("before the file's first byte")
        self._at = start + offset
        return self._at

    def readinto(self, buffer: "memoryview | bytearray") -> int:  # type: ignore[override]
        length = max(0, min(len(buffer), self._size - self._at))
        if length:
            buffer[:length] = _range(self._store, self._key, self._at, length)
            self._at += length
        return length

    def readall(self) -> bytes:
        """Otherwise in Python's own pieces of 8 KiB, each a request."""
        parts: list[memoryview] = []
        while length := max(0, min(PIECE, self._size - self._at)):
            parts.append(_range(self._store, self._key, self._at, length))
            self._at += length
        return b"".join(parts)


def _range(store: S3Store, key: str, start: int, length: int) -> memoryview:
    with _answering():
        data = obstore.get_range(store, key, start=start, length=length)
    if len(data) != length:
        raise StorageFault("The object store sent less than was asked for.", code="storage_unavailable")
    return memoryview(data)


def _place(url: str) -> tuple[str, str]:
    """`s3://bucket/prefix` → bucket and prefix. Raises InvalidParameter."""
    parts = urlsplit(url)
    below = parts.path.strip("/")
    if parts.scheme != "s3" or not parts.netloc or parts.query or parts.fragment or "//" in below:
        raise InvalidParameter(
            f"{url!r} is no place for bytes.",
            code="bad_storage_url",
            param="SAFEGRAFT_STORAGE_URL",
            hint="Give it as s3://bucket/prefix; the endpoint is AWS_ENDPOINT_URL.",
        )
    return parts.netloc, below


def _open(bucket: str, below: str, endpoint: str, retries: "RetryConfig") -> S3Store:
    client: ClientConfig = {"timeout": "120s", "connect_timeout": "5s", "allow_http": endpoint.startswith("http://")}
    given = {"aws_endpoint_url_s3": endpoint} if endpoint else {}
    try:
        return S3Store(bucket, prefix=below or None, client_options=client, retry_config=retries, **given)  # type: ignore[arg-type]
    except BaseError as error:
        raise InvalidParameter(
            f"The object store cannot be used: {str(error).splitlines()[0]}",
            code="bad_storage_url",
            param="SAFEGRAFT_STORAGE_URL",
            hint="See the AWS_* variables.",
        ) from error


def _key(prefix: str, name: str) -> str:
    """Raises NotFound for names that no stored file has."""
    checked_prefix(prefix)
    if not NAME.fullmatch(name):
        raise NotFound(f"There is no file {name[:80]!r}.", code="file_not_found", param="name")
    return f"{prefix}/{name}"


@contextmanager
def _answering() -> Iterator[None]:
    """The store's errors as ours. What it says goes to the log alone: it names our addresses."""
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound("There is no such file.", code="file_not_found", param="name") from error
    except BaseError as error:
        raise StorageFault("The object store does not answer as it should.", code="storage_unavailable") from error


def _piece(source: BinaryIO) -> bytes:
    """PIECE bytes, fewer at the end: sources may give less than they are asked for."""
    parts: list[bytes] = []
    left = PIECE
    while left and (part := source.read(left)):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _pieces(first: bytes, source: BinaryIO) -> Iterator[bytes]:
    piece = first
    while piece:
        yield piece
        piece = _piece(source)
