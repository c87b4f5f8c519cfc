"""Bytes on their way out: parts, digests, tars, names that are not files, deletion."""

import base64
import email
import hashlib
import io
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from safegraft.adapter import CONFIG, WEIGHTS
from safegraft.stores.references import open_references
from service.app import create_app
from service.settings import GatewaySettings
from tests.scaled import SCALED
from tests.service.answers import refused
from tests.service.conftest import Running, files_of, free_port, objects_of, realign, upload

local_only = pytest.mark.skipif(SCALED, reason="of files on this machine's disk")


@pytest.fixture
def adapter(client: httpx.Client, fresh: Path) -> dict[str, Any]:
    return upload(client, fresh)


@pytest.fixture
def url(adapter: dict[str, Any]) -> str:
    return f"/v1/adapters/{adapter['id']}/files/{WEIGHTS}"


@pytest.fixture(scope="session")
def raw(fresh: Path) -> bytes:
    return (fresh / WEIGHTS).read_bytes()


def get(client: httpx.Client, url: str, **headers: str) -> httpx.Response:
    """With object storage the bytes are one step further; what is asked for is sent there too."""
    return client.get(
        url, headers={key.replace("_", "-"): value for key, value in headers.items()}, follow_redirects=True
    )


def test_a_file_carries_its_digest(client: httpx.Client, adapter: dict[str, Any], fresh: Path) -> None:
    for file in adapter["files"]:
        url = f"/v1/adapters/{adapter['id']}/files/{file['name']}"
        answer = get(client, url)
        assert answer.status_code == 200
        assert answer.content == (fresh / file["name"]).read_bytes()
        for told in [client.head(url)] if SCALED else [client.head(url), answer]:
            assert int(told.headers["content-length"]) == file["bytes"] == len(answer.content)
            assert told.headers["etag"] == f'"sha256-{file["sha256"]}"'
            digest = base64.b64encode(hashlib.sha256(answer.content).digest()).decode()
            assert told.headers["repr-digest"] == f"sha-256=:{digest}:"
            assert told.headers["accept-ranges"] == "bytes"
        assert answer.headers["content-disposition"] == f'attachment; filename="{file["name"]}"'
        assert answer.headers["content-type"] == "application/octet-stream"


@pytest.mark.parametrize(
    ("asked", "part"),
    [("0-0", slice(0, 1)), ("10-19", slice(10, 20)), ("100-", slice(100, None)), ("-7", slice(-7, None))],
)
def test_a_range_is_a_part(client: httpx.Client, url: str, raw: bytes, asked: str, part: slice) -> None:
    answer = get(client, url, range=f"bytes={asked}")
    assert answer.status_code == 206
    assert answer.content == raw[part]
    first = range(len(raw))[part][0]
    assert answer.headers["content-range"] == f"bytes {first}-{first + len(answer.content) - 1}/{len(raw)}"
    if not SCALED:
        # The digest is the whole's, as RFC 9530 wants it: a download in parts is checked at its end.
        assert answer.headers["repr-digest"] == client.head(url).headers["repr-digest"]


@local_only
def test_several_ranges_are_several_parts(client: httpx.Client, url: str, raw: bytes) -> None:
    answer = get(client, url, range="bytes=0-9, 20-29, -5")
    assert answer.status_code == 206
    kind, _, boundary = answer.headers["content-type"].partition("; boundary=")
    assert kind == "multipart/byteranges"
    assert int(answer.headers["content-length"]) == len(answer.content)
    message = email.message_from_bytes(
        b"content-type: multipart/byteranges; boundary=" + boundary.encode() + b"\r\n\r\n" + answer.content
    )
    parts = [part for part in message.walk() if not part.is_multipart()]
    assert [part["content-range"] for part in parts] == [
        f"bytes {first}-{last}/{len(raw)}" for first, last in ((0, 9), (20, 29), (len(raw) - 5, len(raw) - 1))
    ]
    # Their bytes, as they stand in the body: the mail parser may change line ends.
    for part in (raw[:10], raw[20:30], raw[-5:]):
        assert b"\r\n\r\n" + part + b"\r\n--" in answer.content


def test_a_download_that_broke_off_goes_on_while_the_file_is_the_same(
    client: httpx.Client, url: str, raw: bytes
) -> None:
    etag = client.head(url).headers["etag"]
    rest = get(client, url, range="bytes=1000-", if_range=etag)
    assert rest.status_code == 206
    assert raw[:1000] + rest.content == raw
    other = get(client, url, range="bytes=1000-", if_range='"sha256-0"')
    assert other.status_code == 200
    assert other.content == raw


@local_only
@pytest.mark.parametrize(
    "asked",
    ["bytes=x-y", "bytes=5-1", "bytes=0-1,5-1", "bytes=0-1,x", "bytes=", "bytes=-", "bytes", "bytes=1", "bytes=--5",
     "bytes=0-+5", "bytes=1_0-", "bytes=" + "9" * 5000 + "-", "lines=1-2", "="],
    ids=lambda asked: str(asked)[:20],
)  # fmt: skip
def test_a_range_that_is_none_is_ignored(client: httpx.Client, url: str, raw: bytes, asked: str) -> None:
    answer = get(client, url, range=asked)
    assert (answer.status_code, answer.content) == (200, raw)


@local_only
def test_a_range_that_cannot_be_served_is_refused_in_the_shape_of_all_errors(
    client: httpx.Client, url: str, raw: bytes
) -> None:
    answer = get(client, url, range=f"bytes={len(raw)}-")
    refused(answer, 416, "range_not_satisfiable")
    assert answer.headers["content-range"] == f"bytes */{len(raw)}"
    refused(get(client, url, range="bytes=-0"), 416, "range_not_satisfiable")
    # So many parts are no honest request; the whole is the answer. So it is for a unit that nobody knows.
    many = ",".join(f"{i}-{i}" for i in range(0, 1000, 2))
    assert get(client, url, range=f"bytes={many}").content == raw


def test_what_a_client_has_is_not_sent_again(client: httpx.Client, url: str, adapter: dict[str, Any]) -> None:
    for path in (url, f"/v1/adapters/{adapter['id']}/download"):
        etag = client.head(path).headers["etag"]
        for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
            for method in ("GET", "HEAD"):
                answer = client.request(method, path, headers={"if-none-match": known})
                assert (answer.status_code, answer.content) == (304, b"")
                assert answer.headers["etag"] == etag
        # A condition comes before the part that is asked for.
        assert get(client, path, if_none_match=etag, range="bytes=0-1").status_code == 304
        assert get(client, path, if_none_match='"sha256-0"').status_code == 200


def test_a_client_can_insist_on_the_file_that_it_means(client: httpx.Client, url: str, raw: bytes) -> None:
    etag = client.head(url).headers["etag"]
    for wanted in (etag, "*", f'"other", {etag}'):
        assert get(client, url, if_match=wanted).content == raw
    for wanted in ('"sha256-0"', f"W/{etag}"):
        refused(get(client, url, if_match=wanted), 412, "precondition_failed")


def test_head_tells_what_get_would(client: httpx.Client, url: str, adapter: dict[str, Any]) -> None:
    for path in (url, f"/v1/adapters/{adapter['id']}/download"):
        head, whole = client.head(path), get(client, path)
        assert head.status_code == whole.status_code == 200
        assert head.content == b""
        assert int(head.headers["content-length"]) == len(whole.content)
        if SCALED and path == url:
            continue
        changing = {"date", "x-request-id"}
        assert {k: v for k, v in head.headers.items() if k not in changing} == {
            k: v for k, v in whole.headers.items() if k not in changing
        }
    assert client.head(f"/v1/adapters/{adapter['id']}/files/nothing").status_code == 404
    assert client.head("/v1/adapters/adp_nothing/download").status_code == 404


def test_the_tar_is_the_folder(client: httpx.Client, fresh: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(fresh, tmp_path / "adapter")
    (folder / "tokenizer.json").write_bytes(b"{}" * 256)  # a whole block
    (folder / "README.md").write_bytes(b"")
    long = f"tokenizer_{'x' * 150}.json"  # longer than a tar's header holds
    (folder / long).write_bytes(b"long")
    adapter = upload(client, folder)
    answer = client.get(f"/v1/adapters/{adapter['id']}/download")
    assert answer.headers["content-type"] == "application/x-tar"
    assert answer.headers["content-disposition"] == f'attachment; filename="{adapter["id"]}.tar"'
    assert int(answer.headers["content-length"]) == len(answer.content)
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        assert all(member.isreg() and member.mtime == adapter["created_at"] for member in tar)
        tar.extractall(tmp_path / "out", filter="data")
    out = tmp_path / "out" / adapter["id"]
    names = sorted(path.name for path in folder.iterdir())
    assert sorted(path.name for path in out.iterdir()) == names
    assert long in names
    for name in names:
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    # And it can be sent back as it came.
    again = client.post("/v1/adapters", files=[("files", ("again.tar", answer.content))])
    assert again.status_code == 201, again.text
    assert again.json()["files"] == adapter["files"]


@pytest.mark.parametrize(
    "name",
    ["nothing", "..", ".", "%2e%2e", "..%2f..%2fsafegraft.sqlite", "%2fetc%2fpasswd", "adapter_config.json%00", "%00",
     "..%5c..", "ADAPTER_CONFIG.JSON", "%ff"],
)  # fmt: skip
def test_names_that_are_no_files_are_not_found(service: Running, adapter: dict[str, Any], name: str) -> None:
    # By hand: httpx would resolve `..` before it asks.
    target = f"/v1/adapters/{adapter['id']}/files/{name}"
    with httpx.Client(trust_env=False) as client:
        answer = client.request("GET", service.url, extensions={"target": target.encode()})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] in ("file_not_found", "route_not_found")


def test_ids_that_are_none_are_refused(client: httpx.Client) -> None:
    for name in ("adp_nothing", "%2e%2e", "ref_1"):
        refused(client.get(f"/v1/adapters/{name}"), 404, "adapter_not_found")
        refused(client.delete(f"/v1/adapters/{name}"), 404, "adapter_not_found")
        refused(client.get(f"/v1/adapters/{name}/files/{CONFIG}"), 404, "adapter_not_found")
    for name in ("x" * 81, "%00", "%ff"):
        refused(client.get(f"/v1/adapters/{name}"), 422, "invalid_request")


def test_deleting_removes_record_and_bytes(service: Running, client: httpx.Client, fresh: Path) -> None:
    first, second = upload(client, fresh), upload(client, fresh)
    stored = objects_of(service.data)
    place = f"tenants/default/adapters/{first['id']}"
    assert WEIGHTS in stored.names(place)
    answer = client.delete(f"/v1/adapters/{first['id']}")
    assert answer.json() == {"id": first["id"], "object": "adapter", "deleted": True}
    assert stored.names(place) == []
    for path in ("", "/download", f"/files/{WEIGHTS}"):
        refused(client.get(f"/v1/adapters/{first['id']}{path}"), 404, "adapter_not_found")
    refused(client.delete(f"/v1/adapters/{first['id']}"), 404, "adapter_not_found")
    refused(client.post("/v1/realignments", json={"adapter_id": first["id"]}), 404, "adapter_not_found")
    assert get(client, f"/v1/adapters/{second['id']}/files/{WEIGHTS}").status_code == 200


@pytest.fixture
def idle(bundle: Path, tmp_path: Path) -> Iterator[TestClient]:
    """A gateway without broker and workers: its jobs stay queued."""
    settings = GatewaySettings(dev=True, data=tmp_path, redis_url=f"redis://127.0.0.1:{free_port()}/0")
    open_references(settings).add(bundle)
    with TestClient(
        create_app(settings), client=("127.0.0.1", 50000), base_url="http://127.0.0.1", raise_server_exceptions=False
    ) as client:
        yield client


def test_an_adapter_in_use_stays(idle: TestClient, fresh: Path) -> None:
    adapter = idle.post("/v1/adapters", files=files_of(fresh)).json()["id"]
    created = idle.post("/v1/realignments", json={"adapter_id": adapter})
    assert created.status_code == 202, created.text
    job = created.json()["id"]
    assert job in refused(idle.delete(f"/v1/adapters/{adapter}"), 409, "adapter_in_use")["message"]
    assert idle.head(f"/v1/adapters/{adapter}/files/{WEIGHTS}").status_code == 200
    assert idle.post(f"/v1/realignments/{job}/cancel").json()["status"] == "cancelled"
    assert idle.delete(f"/v1/adapters/{adapter}").status_code == 200


@local_only
def test_a_store_that_fails_is_our_fault_and_told_in_the_same_shape(
    idle: TestClient, fresh: Path, tmp_path: Path
) -> None:
    (tmp_path / "objects").mkdir(exist_ok=True)
    (tmp_path / "objects" / "tenants").write_bytes(b"a file where a folder belongs")
    refused(idle.post("/v1/adapters", files=files_of(fresh)), 507, "storage_fault")
    assert list((tmp_path / "objects" / "scratch").iterdir()) == []


# Reports


@pytest.fixture(scope="session")
def job(service: Running, fresh: Path) -> str:
    with service.client() as client:
        ended = realign(client, upload(client, fresh)["id"], method={"type": "gram"})
    assert ended["status"] == "succeeded", ended
    return str(ended["id"])


@pytest.mark.parametrize(
    "path", ["report"] + [f"report.{form}" for form in ("json", "html", "csv", "png", "layers.png", "changes.png")]
)
def test_a_report_is_sent_by_us_with_its_own_headers(client: httpx.Client, job: str, path: str) -> None:
    url = f"/v1/realignments/{job}/{path}"
    whole, head = client.get(url), client.head(url)
    assert whole.status_code == head.status_code == 200
    digest = hashlib.sha256(whole.content)
    for answer in (whole, head):
        assert answer.headers["etag"] == f'"sha256-{digest.hexdigest()}"'
        assert answer.headers["repr-digest"] == f"sha-256=:{base64.b64encode(digest.digest()).decode()}:"
        assert int(answer.headers["content-length"]) == len(whole.content) > 100
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert head.content == b""
    again = client.get(url, headers={"if-none-match": whole.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    refused(client.get(url, headers={"if-match": '"sha256-0"'}), 412, "precondition_failed")


def test_a_picture_that_there_is_not_is_named(client: httpx.Client, job: str, fresh: Path) -> None:
    message = refused(client.get(f"/v1/realignments/{job}/report.strengths.png"), 404, "no_such_figure")
    refused(client.get(f"/v1/realignments/{job}/report.gif"), 422, "invalid_request")
    sweep = realign(client, upload(client, fresh)["id"], method={"type": "gram"}, strengths=[0.1, 1])
    curve = client.get(f"/v1/realignments/{sweep['id']}/report.strengths.png")
    assert (curve.status_code, curve.headers["content-type"]) == (200, "image/png"), message


def test_a_job_without_a_report_says_so(client: httpx.Client, fresh: Path) -> None:
    failed = realign(client, upload(client, fresh)["id"], method={"type": "nlsr", "form": "factor"})
    refused(client.get(f"/v1/realignments/{failed['id']}/report"), 409, "no_report")
    assert client.head(f"/v1/realignments/{failed['id']}/report.png").status_code == 409
    refused(client.get(f"/v1/realignments/{failed['id']}/side_car/side_car.safetensors"), 404, "no_side_car")


def test_a_side_car_is_a_file_like_any_other(client: httpx.Client, fresh: Path) -> None:
    ended = realign(client, upload(client, fresh)["id"], method={"type": "safetylock", "output": "side_car"})
    [url] = ended["result"]["side_car_urls"]
    [(name, sha256)] = client.get(ended["result"]["report_url"]).json()["side_cars"].items()
    assert url.endswith(f"/side_car/{name}")
    whole, head = get(client, url), client.head(url)
    assert hashlib.sha256(whole.content).hexdigest() == sha256
    assert head.headers["etag"] == f'"sha256-{sha256}"'
    assert int(head.headers["content-length"]) == len(whole.content)
    assert whole.headers["content-disposition"] == f'attachment; filename="{name}"'
    assert get(client, url, range="bytes=8-").content == whole.content[8:]
    assert client.get(url, headers={"if-none-match": head.headers["etag"]}).status_code == 304
    refused(client.get(url.replace(name, "other.safetensors")), 404, "no_side_car")
