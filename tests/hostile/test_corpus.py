"""Every hostile upload against one real gateway: its own code, at once, at a bounded price, and nothing stays."""

import asyncio
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from safegraft import cli
from safegraft.adapter import CONFIG, WEIGHTS
from safegraft.errors import SafegraftError
from safegraft.ingest import ARCHIVES, Delivery, is_wanted
from service.validation import Limits, Validator
from tests.fuzz.oracle import MAX_SHOWN
from tests.hostile.corpus import Case, cases
from tests.hostile.judges import MEASURED, measured
from tests.service.answers import refused
from tests.service.conftest import SAFEGRAFT, environment_of
from tests.service.gateway import Gateway

linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
CASES = cases()
SENT = [case for case in CASES if not case.local]
ARCHIVED = ("tar", "tar-header", "zip", "bomb", "archive")
# The parsers are the gateway's: what takes them long is tried there.
FOLDERS = [case for case in CASES if case.kind not in ARCHIVED and not case.large]
# Of a judging process: what the kernel allows, and what it may really use. The largest takes some 190 MiB.
ALLOWED, JUDGE_MEMORY = 2**29, 2**28
# By which the gateway may grow, whatever it was sent.
GATEWAY_GROWTH = 2**26
# Of the processor, where the kernel counts them: others use the machine as well. The best of so many tries counts.
TRIES = 3
SECONDS, LARGE_SECONDS = 1.0, 5.0
MEDIA = {".tar": "application/x-tar", ".zip": "application/zip"}


def named(case: Case) -> str:
    return case.id


class Place:
    """Everything that could be touched lies below `root`: the gateway's data and working folder, what is sent, and a
    file that hostile uploads aim at."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "cwd").mkdir()
        self.gateway = Gateway(
            root / "data",
            preexec=lambda: os.chdir(root / "cwd"),
            SAFEGRAFT_VALIDATION_MEMORY_BYTES=str(ALLOWED),
            SAFEGRAFT_MAX_REQUESTS_PER_SECOND="0",
        )
        for folder in (root, root / "sent", root / "data", root / "cwd"):
            folder.mkdir(exist_ok=True)
            (folder / "outside").write_text("untouched")
        self.validator = Validator(Limits(ALLOWED, 60, 2**33), 1, measured)
        self.validator.start()

    def write(self, case: Case) -> Path:
        folder = self.root / "sent" / "adapter"
        folder.mkdir()
        case.write(folder)
        return folder

    def listing(self) -> dict[str, tuple[int, int]]:
        """Size and time of change of all there is, but of what a gateway writes at any time."""
        found = {}
        for path in self.root.rglob("*"):
            if path.name.startswith("safegraft.sqlite") or path == self.gateway.log:
                continue
            known = path.lstat()
            found[str(path.relative_to(self.root))] = (known.st_size, 0 if path.is_dir() else known.st_mtime_ns)
        return found

    def close(self) -> None:
        self.validator.close()
        self.gateway.stop()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place = Place(tmp_path_factory.mktemp("hostile"))
    yield place
    place.close()


@pytest.fixture(scope="module")
def client(place: Place) -> Iterator[httpx.Client]:
    with place.gateway.client() as client:
        sound = next(case for case in CASES if case.id == "value/minus-zero")
        answer = send(client, place.write(sound))
        assert answer.status_code == 201, answer.text
        client.delete(f"/v1/adapters/{answer.json()['id']}").raise_for_status()
        shutil.rmtree(place.root / "sent" / "adapter")
        yield client


@pytest.fixture
def unharmed(place: Place, client: httpx.Client) -> Iterator[None]:
    """Whatever a test sent: afterwards all is as it was, and the log has neither stack traces nor a stranger's
    control characters."""
    before, logged = place.listing(), place.gateway.log.stat().st_size
    memory = place.gateway.memory("VmHWM") if sys.platform == "linux" else 0
    yield
    shutil.rmtree(place.root / "sent" / "adapter")
    deadline = time.monotonic() + 10
    while place.gateway.scratch() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert place.gateway.scratch() == []
    assert place.gateway.stored("adapters") == []
    assert client.get("/v1/adapters").json()["data"] == []
    after = place.listing()
    # Folders for tenants are made once and stay.
    assert {path: after[path] for path in after if not path.startswith("data/objects")} == {
        path: before[path] for path in before if not path.startswith("data/objects")
    }
    with place.gateway.log.open("rb") as file:
        file.seek(logged)
        text = file.read().decode()
    assert "Traceback" not in text
    assert all(line.isprintable() for line in text.splitlines())
    if sys.platform == "linux":
        assert place.gateway.memory("VmHWM") - memory < GATEWAY_GROWTH


def send(client: httpx.Client, folder: Path, *, raw: bool = False) -> httpx.Response:
    """A folder as a form; raw: its one archive as the whole body."""
    paths = sorted(folder.iterdir())
    with ExitStack() as stack:
        if raw:
            kind = MEDIA.get(paths[0].suffix, MEDIA[".tar"])
            file = stack.enter_context(paths[0].open("rb"))
            return client.post("/v1/adapters", content=file, headers={"content-type": kind})
        files = [("files", (path.name, stack.enter_context(path.open("rb")))) for path in paths]
        return client.post("/v1/adapters", files=files)


def status_for(code: str) -> int:
    return 413 if code in ("archive_too_large", "companion_too_large") else 422


def check(client: httpx.Client, answer: httpx.Response, case: Case) -> None:
    """Refused by its code; or accepted, and then nothing is kept but an adapter's files."""
    if case.code:
        error = refused(answer, status_for(case.code), case.code)
        assert all(len(text) < MAX_SHOWN and text.isprintable() for text in (error["message"], error["param"] or ""))
        return
    assert answer.status_code == 201, answer.text
    adapter = answer.json()
    assert {file["name"] for file in adapter["files"]} >= {CONFIG, WEIGHTS}
    assert all(is_wanted(file["name"]) for file in adapter["files"])
    assert all(name.isprintable() for name in adapter["dropped_files"])
    client.delete(f"/v1/adapters/{adapter['id']}").raise_for_status()


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("case", SENT, ids=named)
def test_the_gateway_answers_by_its_code_at_once_and_keeps_nothing(
    place: Place, client: httpx.Client, case: Case
) -> None:
    folder = place.write(case)
    limit = LARGE_SECONDS if case.large else SECONDS
    clock = place.gateway.worked if sys.platform == "linux" else time.monotonic
    for _ in range(TRIES):
        start = clock()
        answer = send(client, folder)
        took = clock() - start
        check(client, answer, case)
        if took < limit:
            break
    assert took < limit
    assert not (folder.parent / "opened").exists(), "a pickle was opened"


WHOLE = [case for case in SENT if case.kind in ("archive", "bomb")]


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("case", [case for case in WHOLE if not case.id.endswith("as-config")], ids=named)
def test_an_archive_as_the_whole_body_is_answered_like_one_in_a_form(
    place: Place, client: httpx.Client, case: Case
) -> None:
    check(client, send(client, place.write(case), raw=True), case)


HEAVY = [case for case in SENT if case.large or case.kind in ("bomb", "pattern")]


@linux
@pytest.mark.parametrize("case", HEAVY, ids=named)
def test_judging_takes_little_memory(place: Place, tmp_path: Path, case: Case) -> None:
    """In the process that the gateway judges in, below the kernel's limit. The limit has a code of its own."""
    sent = tmp_path / "sent"
    sent.mkdir()
    case.write(sent)
    delivery = Delivery(tmp_path / "adapter")
    delivery.folder.mkdir()
    for path in sorted(sent.iterdir()):
        if (target := delivery.place(path.name)) is not None:
            os.link(path, target)
    code = ""
    try:
        asyncio.run(place.validator.judge("t", "adp_1", delivery))
    except SafegraftError as error:
        code = error.code
    assert code == case.code
    assert int((tmp_path / MEASURED).read_text()) * 1024 < JUDGE_MEMORY


# The command line.


def command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str | Path
) -> tuple[int, str, str]:
    """Runs it in this process, which spares a second a time. Exit status, standard output and error."""
    monkeypatch.setattr(sys, "argv", ["safegraft", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr()
    return int(ended.value.code or 0), shown.out, shown.err


def check_told(status: int, out: str, err: str, code: str) -> None:
    """Refused in one clear line; no stack trace, nothing that a terminal would act on."""
    assert "Traceback" not in out + err
    assert (out + err).replace("\n", "").isprintable()
    if code:
        assert status == 2, err
        assert re.fullmatch(rf"{code}: .+\n", err)
        assert out == ""
    else:
        assert (status, err) == (0, "")


@pytest.mark.parametrize("case", FOLDERS, ids=named)
def test_inspect_says_in_one_line_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    (tmp_path / "adapter").mkdir()
    case.write(tmp_path / "adapter")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    check_told(*command(capsys, monkeypatch, "inspect", tmp_path / "adapter"), case.code)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def of_each_kind() -> list[Case]:
    """The first refused folder of every kind; values are looked at after shapes, which fit no model here."""
    found: dict[str, Case] = {}
    for case in FOLDERS:
        if case.code and case.kind != "value":
            found.setdefault(case.kind, case)
    return list(found.values())


@pytest.mark.parametrize("case", of_each_kind(), ids=named)
def test_realign_refuses_before_it_writes_anything(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    (tmp_path / "adapter").mkdir()
    case.write(tmp_path / "adapter")
    out = tmp_path / "out"
    check_told(
        *command(capsys, monkeypatch, "realign", tmp_path / "adapter", "--reference", bundle, "--out", out), case.code
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


@pytest.mark.parametrize("id_", ["pickle/protocol-4", "folder/fifo-as-weights"])
def test_as_a_process_of_its_own_it_ends_with_status_2(tmp_path: Path, id_: str) -> None:
    (tmp_path / "adapter").mkdir()
    case = next(case for case in FOLDERS if case.id == id_)
    case.write(tmp_path / "adapter")
    done = subprocess.run(
        [SAFEGRAFT, "inspect", str(tmp_path / "adapter")],
        env=environment_of(tmp_path), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    check_told(done.returncode, done.stdout, done.stderr, case.code)
    assert not (tmp_path / "opened").exists()


# The corpus itself.


def test_ids_are_unique_and_every_case_says_why() -> None:
    assert len({case.id for case in CASES}) == len(CASES) >= 60
    assert all(case.why for case in CASES)


def test_a_case_with_one_archive_is_what_kinds_of_archives_hold(tmp_path: Path) -> None:
    for case in WHOLE:
        folder = tmp_path / case.id.replace("/", "-")
        folder.mkdir()
        if case.large or case.id.endswith("as-config"):
            continue
        case.write(folder)
        (path,) = folder.iterdir()
        assert path.name.endswith(ARCHIVES)
