"""The console as files: what a browser is given, under which rules, and how much of it. Browsers: `make e2e`."""

import gzip
import re
import tomllib
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import get_args

import pytest
from fastapi.testclient import TestClient

from safegraft.adapter import COMPANIONS, CONFIG, WEIGHTS
from safegraft.contracts.methods import MAX_STRENGTHS
from safegraft.contracts.realignment import Status
from safegraft.report import grid
from service.app import create_app
from service.routes.console import POLICY, TYPES, accepts_gzip, assets
from service.settings import GatewaySettings

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "service" / "console"
FILES = sorted(path.name for path in FOLDER.iterdir() if path.suffix in TYPES)
# What the console may weigh on the wire, all of it together.
MOST_BYTES = 300_000


@pytest.fixture
def client() -> TestClient:
    """Without its lifespan: neither database nor broker is needed to serve files."""
    return TestClient(create_app(GatewaySettings()))


def source(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def test_the_page_is_served_at_the_root_without_a_key(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.text == source("index.html")
    # Before any script ran: the form, and a sentence where scripts do not run.
    assert '<form id="signin"' in answer.text
    assert "<noscript>" in answer.text


@pytest.mark.parametrize("path", ["/", *(f"/console/{name}" for name in FILES)])
def test_every_file_has_its_type_its_rules_and_an_etag(client: TestClient, path: str) -> None:
    name = path.rpartition("/")[2] or "index.html"
    answer = client.get(path, headers={"accept-encoding": "gzip"})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == TYPES[Path(name).suffix]
    assert answer.headers["content-encoding"] == "gzip"
    assert answer.headers["content-security-policy"] == POLICY
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["vary"] == "accept-encoding"
    assert answer.content == (FOLDER / name).read_bytes()
    plain = client.get(path, headers={"accept-encoding": "identity"})
    assert "content-encoding" not in plain.headers
    assert plain.content == answer.content
    # A strong tag names bytes, and these are other ones.
    assert plain.headers["etag"] != answer.headers["etag"]
    for tag, coding in ((answer.headers["etag"], "gzip"), (plain.headers["etag"], "identity")):
        known = client.get(path, headers={"accept-encoding": coding, "if-none-match": tag})
        assert known.status_code == 304
        assert known.content == b""
        assert known.headers["content-security-policy"] == POLICY
    head = client.head(path, headers={"accept-encoding": "gzip"})
    assert head.status_code == 200
    assert int(head.headers["content-length"]) == len(gzip.compress((FOLDER / name).read_bytes(), mtime=0))


def test_an_operator_can_do_without_it() -> None:
    client = TestClient(create_app(GatewaySettings(console=False)))
    for path in ("/", "/console/app.js"):
        assert client.get(path).json()["error"]["code"] == "route_not_found"


@pytest.mark.parametrize("name", ["nothing.js", "__init__.py", "..%2Fapp.py", "%2e%2e/app.py", "__pycache__"])
def test_nothing_else_is_served(client: TestClient, name: str) -> None:
    answer = client.get(f"/console/{name}")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "route_not_found"


def test_the_policy_lets_nothing_in_from_elsewhere() -> None:
    rules = dict(rule.strip().partition(" ")[::2] for rule in POLICY.split(";"))
    assert rules["default-src"] == "'none'"
    for name in ("script-src", "style-src", "connect-src", "worker-src"):
        assert rules[name] == "'self'"
    for name in ("frame-ancestors", "base-uri", "form-action"):
        assert rules[name] == "'none'"
    assert "unsafe" not in POLICY
    assert "http" not in POLICY


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        ("gzip", True), ("br, GZip;q=0.5", True), ("gzip;q=0", False), ("gzip;q=0.000", False), ("gzip; q=0.001", True),
        ("", False), ("identity", False), ("x-gzip", False),
    ],
)  # fmt: skip
def test_gzip_is_sent_to_those_who_name_it(header: str, wanted: bool) -> None:
    assert accepts_gzip(header) is wanted


def test_all_of_it_is_small() -> None:
    assert sum(len(asset.packed) for asset in assets().values()) < MOST_BYTES


# What makes markup or code out of text, and what loads from elsewhere. Namespaces are names, not addresses.
FORBIDDEN = (
    r"\binnerHTML\b", r"\bouterHTML\b", r"insertAdjacentHTML", r"document\.write", r"\beval\(", r"new Function\b",
    r"\bDOMParser\b", r"createContextualFragment", r"srcdoc", r"javascript:", r"setAttribute\(\s*[\"']on",
    r"set(?:Timeout|Interval)\(\s*[\"'`]",
)  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_no_file_makes_code_of_text_or_loads_from_elsewhere(name: str) -> None:
    text = source(name)
    for pattern in FORBIDDEN:
        assert not re.search(pattern, text), pattern
    addresses = [found for found in re.findall(r"https?://[^\s\"'<)]+", text) if found != "http://www.w3.org/2000/svg"]
    assert addresses == []
    assert "@import" not in text
    if name.endswith(".html"):
        assert not re.search(r"\son[a-z]+\s*=", text)
        assert not re.search(r"\sstyle\s*=", text)
        assert "<style" not in text
        assert re.findall(r"<script(?![^>]*\bsrc=)", text) == []


def test_whatever_a_file_names_is_there() -> None:
    page = source("index.html")
    named = set(re.findall(r'(?:src|href)="console/([^"]+)"', page))
    assert named >= {"app.js", "theme.js", "console.css", "favicon.svg"}
    for name in FILES:
        named |= set(re.findall(r'(?:from |import |new URL\()"(?:\./)?([\w.-]+\.js)"', source(name)))
    assert named <= set(FILES)
    assert set(FILES) - named == {"index.html"}


def test_the_key_is_put_into_no_address_and_kept_no_longer_than_the_tab() -> None:
    for name in FILES:
        if name.endswith(".js"):
            text = source(name)
            assert not re.search(r"localStorage[^;]*\bkey\b", text, re.IGNORECASE)
            assert "document.cookie" not in text
    assert "localStorage" not in source("api.js")


def test_the_wheel_holds_all_of_it() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    patterns = settings["package-data"]["service.console"]
    assert [name for name in FILES if not any(fnmatchcase(name, pattern) for pattern in patterns)] == []
    # A package of its own, which `packages.find` sees, and which the image copies with the folder service/.
    assert (FOLDER / "__init__.py").is_file()
    assert resources.files("service.console").joinpath("index.html").is_file()
    assert "COPY service/ service/" in (ROOT / "docker" / "gateway.Dockerfile").read_text(encoding="utf-8")


def test_what_the_console_knows_by_heart_is_what_the_service_says() -> None:
    """Names that no route tells, and the colours of the report."""
    upload = source("upload.js")
    listed = re.search(r"COMPANIONS = \[(.*?)\];", upload, re.DOTALL)
    assert listed is not None
    assert tuple(re.findall(r'"([^"]+)"', listed[1])) == COMPANIONS
    assert f'CONFIG = "{CONFIG}"' in upload
    assert f'WEIGHTS = "{WEIGHTS}"' in upload
    colours = re.search(r"COLOURS = \[(.*?)\];", source("maps.js"), re.DOTALL)
    assert colours is not None
    assert tuple(re.findall(r'"(#\w+)"', colours[1])) == grid.COLOURS
    differences = re.search(r"DIFFERENCES = \[(.*?)\];", source("maps.js"), re.DOTALL)
    assert differences is not None
    assert tuple(re.findall(r'"(#\w+)"', differences[1])) == grid.DIFFERENCES
    kinds = re.search(r"USUAL_KINDS = \[(.*?)\];", source("maps.js"), re.DOTALL)
    assert kinds is not None
    assert tuple(re.findall(r'"(\w+)"', kinds[1])) == grid.USUAL_KINDS
    assert f"MOST_STRENGTHS = {MAX_STRENGTHS};" in source("start.js")
    statuses = re.search(r"STATUS = \{(.*?)\n\};", source("parts.js"), re.DOTALL)
    assert statuses is not None
    assert set(re.findall(r"^  (\w+):", statuses[1], re.MULTILINE)) == set(get_args(Status))


def test_the_page_about_it_is_there_and_the_readme_leads_to_it() -> None:
    page = (ROOT / "docs" / "console.md").read_text(encoding="utf-8")
    assert "docs/console.md" in (ROOT / "README.md").read_text(encoding="utf-8")
    for rule in POLICY.split(";"):
        assert rule.strip() in page
