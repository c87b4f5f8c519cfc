"""Hostile and broken uploads over real HTTP: each is refused by its own code and leaves nothing behind."""

import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from safegraft.adapter import CONFIG, WEIGHTS
from tests import tiny
from tests.service.answers import refused
from tests.service.conftest import Running, files_of, upload

MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
LIMIT = 8 * 2**30
FRAMING = 2**16  # what a form may have beside its files


@pytest.fixture(scope="module", autouse=True)
def _nothing_unexpected(service: Running) -> Iterator[None]:
    """The gateway's log gains no stack trace from anything in this file."""
    log = service.data / "logs" / "gateway.log"
    before = log.stat().st_size
    yield
    with log.open("rb") as file:
        file.seek(before)
        assert b"Traceback" not in file.read()


@pytest.fixture(autouse=True)
def _unharmed(service: Running) -> Iterator[None]:
    """After every test: no leftovers, and the service lives."""
    yield
    await_scratch(service, 0)
    assert httpx.get(f"{service.url}/livez", trust_env=False).status_code == 200


@pytest.fixture
def folder(fresh: Path, tmp_path: Path) -> Path:
    """A sound adapter to be spoiled."""
    return shutil.copytree(fresh, tmp_path / "adapter")


def await_scratch(service: Running, wanted: int) -> None:
    """Waits until so many uploads lie in the scratch folder (where killed workers of other tests leave theirs)."""
    scratch = service.data / "objects" / "scratch"
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        found = list(scratch.glob("upload-*"))
        if len(found) == wanted:
            return
        time.sleep(0.02)
    raise AssertionError(f"{wanted} uploads expected in scratch: {found}")


def post(client: httpx.Client, parts: list[Any], **fields: str) -> httpx.Response:
    return client.post("/v1/adapters", files=parts, data=fields)


def header_of(entries: str) -> bytes:
    raw = entries.encode()
    return struct.pack("<Q", len(raw)) + raw


# What is wrong with a folder.


def weights(make: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return _bytes(WEIGHTS, make)


def config(make: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return _bytes(CONFIG, make)


def _bytes(name: str, make: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(make((folder / name).read_bytes()))

    return spoil


def settings(**values: Any) -> Callable[[Path], None]:
    return lambda folder: tiny.change_config(folder, **values)


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    return lambda folder: tiny.change_tensors(folder, change)


def torch_file(folder: Path) -> None:
    torch.save({"a": torch.zeros(3)}, folder / WEIGHTS)


def many_tensors(count: int) -> Callable[[bytes], bytes]:
    entry = '{"dtype":"F16","shape":[0],"data_offsets":[0,0]}'
    return lambda _: header_of("{" + ",".join(f'"t{i}":{entry}' for i in range(count)) + "}")


def tensor_twice(raw: bytes) -> bytes:
    length = struct.unpack("<Q", raw[:8])[0]
    header = raw[8 : 8 + length].decode().rstrip()
    name, entry = next((n, e) for n, e in json.loads(header).items() if n != "__metadata__")
    return header_of(header[:-1] + f",{json.dumps(name)}:{json.dumps(entry)}}}") + raw[8 + length :]


BAD: list[tuple[str, Callable[[Path], None], str]] = [
    ("an empty file", weights(lambda raw: b""), "empty_file"),
    ("seven bytes", weights(lambda raw: raw[:7]), "truncated_file"),
    ("cut off in the header", weights(lambda raw: raw[:100]), "truncated_file"),
    ("cut off in the data", weights(lambda raw: raw[:-1]), "truncated_file"),
    ("more data than tensors", weights(lambda raw: raw + b"\0"), "bad_offsets"),
    ("a header without end", weights(lambda raw: b"\xff" * 8 + raw[8:]), "header_too_large"),
    ("a header of noise", weights(lambda raw: header_of("{" * 5000)), "header_not_json"),
    ("an old pickle", weights(lambda raw: pickle.dumps({"a": 1}, protocol=2)), "pickle_file"),
    ("a pickle", weights(lambda raw: pickle.dumps({"a": 1}, protocol=5)), "pickle_file"),
    ("a torch zip", torch_file, "pickle_file"),
    ("100,000 tensors", weights(many_tensors(100_000)), "header_too_large"),
    ("60,000 tensors", weights(many_tensors(60_000)), "too_many_tensors"),
    ("a tensor twice", weights(tensor_twice), "duplicate_tensor"),
    ("a path as a name", tensors(lambda t: {**t, "../../etc/passwd": torch.zeros(1)}), "bad_tensor_name"),
    ("a foreign key", tensors(lambda t: {**t, "model.embed.weight": torch.zeros(1)}), "unexpected_key"),
    ("integers", tensors(lambda t: {n: v.to(torch.int32) for n, v in t.items()}), "dtype_unsupported"),
    ("empty tensors", tensors(lambda t: {n: v[:0] for n, v in t.items()}), "empty_tensor"),
    ("half a pair", tensors(lambda t: {n: v for n, v in t.items() if "0.self_attn.q_proj.lora_B" not in n}),
     "missing_factor"),
    ("no tensors", tensors(lambda t: {}), "no_factors"),
    ("another rank", settings(r=5), "rank_disagrees"),
    ("an absurd rank", settings(r=10**9), "bad_rank"),
    ("no configuration", lambda folder: (folder / CONFIG).unlink(), "missing_config"),
    ("no weights", lambda folder: (folder / WEIGHTS).unlink(), "missing_weights"),
    ("a configuration that is no JSON", config(lambda raw: b"r: 4"), "config_not_json"),
    ("an empty configuration", config(lambda raw: b""), "config_not_json"),
    ("a list as configuration", config(lambda raw: b"[]"), "config_not_json"),
    ("a deep configuration", config(lambda raw: b"[" * 10**5), "config_not_json"),
    ("half a surrogate", settings(base_model_name_or_path="\ud800"), "config_not_json"),
    ("a huge configuration", config(lambda raw: raw + b" " * 2**20), "config_too_large"),
    ("a rank in words", settings(r="four"), "config_invalid"),
    ("another kind of adapter", settings(peft_type="IA3"), "peft_type_unsupported"),
    ("PiSSA", settings(init_lora_weights="pissa"), "init_unsupported"),
    ("biases", settings(bias="all"), "bias_unsupported"),
    ("saved modules", settings(modules_to_save=["lm_head"]), "modules_to_save_unsupported"),
    ("a variant of the future", settings(use_magic=True), "variant_unsupported"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "spoil", "code"), BAD, ids=[what for what, _, _ in BAD])
def test_a_bad_adapter_is_refused_by_its_own_code(
    client: httpx.Client, fresh: Path, folder: Path, what: str, spoil: Callable[[Path], None], code: str
) -> None:
    spoil(folder)
    refused(post(client, files_of(folder)), 422, code)
    upload(client, fresh)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_one_value_that_is_not_finite_is_refused_with_its_tensors_name(
    client: httpx.Client, folder: Path, dtype: torch.dtype, value: float
) -> None:
    tiny.change_tensors(folder, lambda t: {n: v.to(dtype) for n, v in t.items()})
    upload(client, folder)
    name = f"{MODULE}.lora_B.weight"

    def spoil(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found[name][-1, -1] = value
        return found

    tiny.change_tensors(folder, spoil)
    assert refused(post(client, files_of(folder)), 422, "non_finite")["param"] == name


def test_a_dora_adapter_made_by_peft_is_refused(client: httpx.Client, base: Path, tmp_path: Path) -> None:
    folder = tiny.save_adapter(base, tmp_path / "dora", use_dora=True)
    refused(post(client, files_of(folder)), 422, "dora_unsupported")
    # Nor does it pass with a configuration that conceals it.
    tiny.change_config(folder, use_dora=False)
    refused(post(client, files_of(folder)), 422, "dora_unsupported")


# Archives.


def tar_of(folder: Path, prefix: str = "", *extra: tuple[tarfile.TarInfo, bytes], mode: str = "w") -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode=mode) as tar:  # type: ignore[call-overload]
        for path in sorted(folder.iterdir()):
            tar.add(path, prefix + path.name)
        for info, data in extra:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return raw.getvalue()


def zip_of(folder: Path, prefix: str = "", *extra: tuple[str, bytes]) -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, prefix + path.name)
        for name, data in extra:
            archive.writestr(name, data)
    return raw.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info, b""


@pytest.mark.parametrize("prefix", ["", "adapter/", "./", "a/b/"])
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_an_archive_is_taken_like_its_files(client: httpx.Client, folder: Path, kind: str, prefix: str) -> None:
    (folder / "tokenizer.json").write_bytes(b"{}")
    (folder / "optimizer.pt").write_bytes(b"\x80\x02.")
    raw = tar_of(folder, prefix) if kind == "tar" else zip_of(folder, prefix)
    answer = post(client, [("files", (f"Adapter.{kind.upper()}", raw))])
    assert answer.status_code == 201, answer.text
    plain = upload(client, folder)
    found = answer.json()
    for key in ("sha256", "files", "bytes", "rank", "modules", "parameters"):
        assert found[key] == plain[key]
    assert [file["name"] for file in found["files"]] == [CONFIG, WEIGHTS, "tokenizer.json"]
    assert [Path(name).name for name in found["dropped_files"]] == plain["dropped_files"] == ["optimizer.pt"]


BAD_ARCHIVES: list[tuple[str, Callable[[Path], bytes], str, str]] = [
    ("climbing", lambda f: tar_of(f, "", member("../x")), "a.tar", "archive_unsafe_path"),
    ("absolute", lambda f: tar_of(f, "", member("/etc/passwd")), "a.tar", "archive_unsafe_path"),
    ("climbing zip", lambda f: zip_of(f, "", ("../x", b"")), "a.zip", "archive_unsafe_path"),
    ("symlink", lambda f: tar_of(f, "", member("l", tarfile.SYMTYPE, "/etc/passwd")), "a.tar", "archive_unsafe_member"),
    ("hard link", lambda f: tar_of(f, "", member("l", tarfile.LNKTYPE, CONFIG)), "a.tar", "archive_unsafe_member"),
    ("device", lambda f: tar_of(f, "", member("d", tarfile.CHRTYPE)), "a.tar", "archive_unsafe_member"),
    ("two folders", lambda f: tar_of(f, "a/", member(f"b/{CONFIG}")), "a.tar", "archive_ambiguous"),
    ("a file twice", lambda f: tar_of(f, "", member(CONFIG)), "a.tar", "archive_duplicate"),
    ("2,000 members", lambda f: tar_of(f, "", *map(member, map(str, range(2000)))), "a.tar",
     "archive_too_many_members"),
    ("compressed", lambda f: gzip.compress(tar_of(f)), "a.tar", "archive_unreadable"),
    ("compressed and named so", lambda f: tar_of(f, mode="w:gz"), "a.tar.gz", "archive_unreadable"),
    ("cut off", lambda f: tar_of(f)[:6000], "a.tar", "archive_unreadable"),
    ("cut off zip", lambda f: zip_of(f)[:-40], "a.zip", "archive_unreadable"),
    ("noise", lambda f: b"\xa5" * 5000, "a.zip", "archive_unreadable"),
    ("empty", lambda f: b"", "a.tar", "archive_unreadable"),
    ("without an adapter", lambda f: zip_of(f / "..", ""), "a.zip", "missing_config"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "name", "code"), [case[1:] for case in BAD_ARCHIVES], ids=[case[0] for case in BAD_ARCHIVES]
)
def test_a_bad_archive_is_refused(
    client: httpx.Client, fresh: Path, folder: Path, make: Callable[[Path], bytes], name: str, code: str
) -> None:
    refused(post(client, [("files", (name, make(folder)))]), 422, code)
    upload(client, fresh)


def test_a_zip_bomb_is_refused_before_it_fills_the_disk(client: httpx.Client, tmp_path: Path) -> None:
    """A zip of 200 kB that unpacks to 200 MB, far below the limit of what may be uploaded."""
    raw = io.BytesIO()
    with (
        zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open(WEIGHTS, "w") as out,
    ):
        for _ in range(200):
            out.write(bytes(2**20))
    refused(post(client, [("files", ("a.zip", raw.getvalue()))]), 413, "archive_too_large")


def test_archives_and_files_do_not_mix(client: httpx.Client, fresh: Path) -> None:
    packed = ("files", ("a.tar", tar_of(fresh)))
    refused(post(client, [packed, ("files", ("b.zip", zip_of(fresh)))]), 422, "two_archives")
    refused(post(client, [packed, *files_of(fresh)]), 422, "archive_and_files")
    refused(post(client, [*files_of(fresh), packed]), 422, "archive_and_files")


# The request around the files.


def test_parts_that_are_not_known_are_refused(client: httpx.Client, fresh: Path) -> None:
    good = files_of(fresh)
    assert refused(post(client, [*good, good[0]]), 422, "duplicate_file")["param"] == good[0][1][0]
    assert refused(post(client, good, nmae="x"), 422, "unknown_field")["param"] == "nmae"
    refused(post(client, [*good, ("upload", ("x", b""))]), 422, "unknown_field")
    # A part `files` without a file name, as `curl -F files=...` without its `@` sends it.
    refused(post(client, good, files="adapter_config.json"), 422, "missing_filename")
    refused(post(client, [*good, *(("files", (f"{i}", b"")) for i in range(70))]), 422, "invalid_multipart")


def test_other_kinds_of_bodies_are_refused(client: httpx.Client) -> None:
    for kind in (
        "application/octet-stream",
        "application/x-www-form-urlencoded",  # what curl sends unless it is told otherwise
        "application/gzip",
        "multipart/mixed; boundary=b",
        "multipart/form-data",
        "",
    ):
        refused(
            client.post("/v1/adapters", content=b"{}", headers={"content-type": kind}), 415, "unsupported_media_type"
        )


BROKEN = {
    "nothing": b"",
    "noise": b"\xa5" * 1000,
    "no end": b'--b\r\nContent-Disposition: form-data; name="files"; filename="x"\r\n\r\ndata',
    "no disposition": b"--b\r\n\r\ndata\r\n--b--\r\n",
    "a disposition of its own": b'--b\r\nContent-Disposition: attachment; filename="x"\r\n\r\n\r\n--b--\r\n',
    "an endless header": b"--b\r\nX: " + b"x" * 20000 + b"\r\n\r\n\r\n--b--\r\n",
    "a name that is no text": b'--b\r\nContent-Disposition: form-data; name="\xff"\r\n\r\n\r\n--b--\r\n',
    "a wrong length": b'--b\r\nContent-Disposition: form-data; name="name"\r\nContent-Length: 9\r\n\r\nx\r\n--b--\r\n',
}  # fmt: skip


@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN)
def test_a_broken_body_is_refused(client: httpx.Client, body: bytes) -> None:
    kind = {"content-type": "multipart/form-data; boundary=b"}
    refused(client.post("/v1/adapters", content=body, headers=kind), 422, "invalid_multipart")


def test_a_file_name_that_is_no_text_is_named_in_plain_words(client: httpx.Client) -> None:
    body = b'--b\r\nContent-Disposition: form-data; name="file"; filename="\xff\xfe"\r\n\r\nx\r\n--b--\r\n'
    for path in ("/v1/adapters", "/v1/files"):
        answer = client.post(path, content=body, headers={"content-type": "multipart/form-data; boundary=b"})
        error = refused(answer, 422, "invalid_multipart")
        assert error["message"] == "The multipart body is broken (a part's header is not UTF-8)."


def test_names_are_short_and_printable(client: httpx.Client, fresh: Path) -> None:
    good = files_of(fresh)
    for name in ("x" * 201, "a\nb", "a\x00b", "\x1b[31mred", "\u202egnp.exe"):
        refused(post(client, good, name=name), 422, "invalid_name")
    refused(post(client, good, name="x" * 1025), 422, "field_too_long")
    refused(post(client, [*good, ("name", (None, b"\xff"))]), 422, "invalid_field")
    for name in ("ü" * 200, "<script>alert(1)</script>", "'; DROP TABLE adapters; --"):
        assert upload(client, fresh, name=name)["name"] == name
    unnamed = upload(client, fresh, name="   ")
    assert unnamed["name"] == unnamed["id"]


def test_a_files_name_decides_nothing_but_whether_it_is_kept(
    service: Running, client: httpx.Client, fresh: Path
) -> None:
    kind = {"content-type": "multipart/form-data; boundary=b"}
    names = {CONFIG: f"../../../{CONFIG}", WEIGHTS: f"C:\\models\\{WEIGHTS}"}
    parts = [(names[name], (fresh / name).read_bytes()) for name in names]
    parts += [("..", b"x"), ("../..", b"x"), ("/etc/passwd", b"x"), ("a\x07\x1b[31m.txt", b"x"), ("ü.txt", b"x")]
    body = b"".join(
        f'--b\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode() + data + b"\r\n"
        for name, data in parts
    )
    answer = client.post("/v1/adapters", content=body + b"--b--\r\n", headers=kind)
    assert answer.status_code == 201, answer.text
    assert {file["name"] for file in answer.json()["files"]} == {CONFIG, WEIGHTS}
    assert answer.json()["dropped_files"] == sorted(["..", "passwd", "a\\x07\\x1b[31m.txt", "ü.txt"])
    assert not list(service.data.rglob("passwd"))


def test_a_checksum_is_compared(client: httpx.Client, fresh: Path) -> None:
    digest = hashlib.sha256((fresh / WEIGHTS).read_bytes()).hexdigest()
    for given in (digest, digest.upper(), f"sha256-{digest}"):
        assert upload(client, fresh, sha256=given)["sha256"] == digest
    assert refused(post(client, files_of(fresh), sha256="0" * 64), 422, "checksum_mismatch")["param"] == "sha256"
    # What no file can have: sending the adapter once more would not help.
    for given in ("nonsense", digest[:-1], f"{digest}0", ""):  # empty: whoever's hashing failed sends it
        assert refused(post(client, files_of(fresh), sha256=given), 422, "invalid_field")["param"] == "sha256"
        tar = {"content-type": "application/x-tar"}
        answer = client.post("/v1/adapters", params={"sha256": given}, content=tar_of(fresh), headers=tar)
        refused(answer, 422, "invalid_request")
        refused(client.post("/v1/adapters", json={"file_ids": ["file_1"], "sha256": given}), 422, "invalid_request")


# Connections.


def connect(service: Running, headers: str) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2])), timeout=10)
    connection.sendall(f"POST /v1/adapters HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n".encode())
    return connection


def answer_of(connection: socket.socket) -> httpx.Response:
    """Reads one whole answer."""
    with connection.makefile("rb") as file:
        status = int(file.readline().split()[1])
        headers = {}
        while line := file.readline().strip():
            key, _, value = line.decode().partition(": ")
            headers[key] = value
        return httpx.Response(status, headers=headers, content=file.read(int(headers["content-length"])))


FORM = "Content-Type: multipart/form-data; boundary=b\r\n"
OPENING = f'--b\r\nContent-Disposition: form-data; name="files"; filename="{WEIGHTS}"\r\n\r\n'.encode()


@pytest.mark.parametrize("expect", ["", "Expect: 100-continue\r\n"])
def test_a_length_over_the_limit_is_refused_before_a_byte_is_sent(service: Running, expect: str) -> None:
    with connect(service, f"{FORM}{expect}Content-Length: {LIMIT + FRAMING + 1}\r\n") as connection:
        refused(answer_of(connection), 413, "upload_too_large")


def test_an_upload_that_is_cut_off_leaves_nothing(service: Running, client: httpx.Client, fresh: Path) -> None:
    with connect(service, f"{FORM}Content-Length: {2**24}\r\n") as connection:
        connection.sendall(OPENING + bytes(2**21))
        await_scratch(service, 1)
    await_scratch(service, 0)
    # More often than there are slots: each gives its slot back.
    for _ in range(40):
        with connect(service, f"{FORM}Transfer-Encoding: chunked\r\n") as connection:
            connection.sendall(b"%x\r\n%s\r\n" % (len(OPENING), OPENING))
    deadline = time.monotonic() + 30
    while (answer := post(client, files_of(fresh))).status_code == 429 and time.monotonic() < deadline:
        time.sleep(0.1)  # the last of them are not noticed yet
    assert answer.status_code == 201, answer.text


def test_there_is_a_limit_of_uploads_at_once(service: Running, client: httpx.Client, fresh: Path) -> None:
    with ExitStack() as stack:
        # Three quarters of all slots: this tenant's share.
        for _ in range(24):
            stack.enter_context(connect(service, f"{FORM}Content-Length: {2**24}\r\n"))
        await_scratch(service, 24)
        answer = post(client, files_of(fresh))
        refused(answer, 429, "too_many_uploads")
        assert int(answer.headers["retry-after"]) > 0
        # Other requests are not held up.
        assert client.get("/v1/adapters").status_code == 200
    await_scratch(service, 0)
    upload(client, fresh)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_upload_costs_disk_and_no_memory(service: Running, client: httpx.Client, tmp_path: Path) -> None:
    """200 MB of weights, and as much again in a file that is not kept."""
    entries, end = {}, 0
    for layer in range(200):
        for side, shape in (("A", [32, 4096]), ("B", [4096, 32])):
            size = 4 * 32 * 4096
            name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{side}.weight"
            entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
            end += size
    large = tmp_path / "large"
    large.mkdir()
    (large / CONFIG).write_text(
        json.dumps({"peft_type": "LORA", "r": 32, "lora_alpha": 32, "target_modules": ["q_proj"]})
    )
    header = header_of(json.dumps(entries))
    (large / WEIGHTS).write_bytes(header)
    os.truncate(large / WEIGHTS, len(header) + end)
    gateway = subprocess.run(
        ["pgrep", "-P", str(service.process.pid), "-f", "uvicorn"], capture_output=True, text=True, check=True
    ).stdout.strip()

    def status(field: str) -> int:
        lines = Path(f"/proc/{gateway}/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith(f"{field}:"))) * 1024

    with suppress(OSError):
        Path(f"/proc/{gateway}/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmHWM")
    with (
        (large / CONFIG).open("rb") as first,
        (large / WEIGHTS).open("rb") as second,
        large.joinpath(WEIGHTS).open("rb") as third,
    ):
        parts = [("files", (CONFIG, first)), ("files", (WEIGHTS, second)), ("files", ("optimizer.pt", third))]
        answer = client.post("/v1/adapters", files=parts)
    assert answer.status_code == 201, answer.text
    assert end > 200 * 10**6
    assert status("VmHWM") - before < 100 * 10**6
    assert answer.json()["modules"] == 200
    assert client.delete(f"/v1/adapters/{answer.json()['id']}").status_code == 200
