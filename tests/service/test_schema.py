"""The API description against the service: requests that a generator made of it, with a key and without.

No answer may be a 5xx, none may differ from what is described, and nothing but health and docs may answer strangers.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.app import create_app
from service.openapi import operations
from service.settings import GatewaySettings
from tests.service.conftest import Running, operate, start

ST = str(Path(sys.executable).parent / "st")
# Not `positive_data_acceptance`: a body can have the right form and name an adapter of the wrong kind; that is a 422.
LEFT_OUT = "positive_data_acceptance"
OPEN = {"livez", "readyz"}


@pytest.fixture(scope="module")
def secured(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, str]]:
    """A service that asks for keys, and a key that may do everything."""
    data = tmp_path_factory.mktemp("schema") / "data"
    operate(data, "reference", "add", str(bundle))
    key = operate(data, "keys", "create", "--scopes", "admin")
    running = start(
        data,
        workers=1,
        log=data / "serve.log",
        dev=False,
        SAFEGRAFT_MAX_REQUESTS_PER_SECOND="0",
        # The requests make endpoints; nothing may leave this machine because of them.
        SAFEGRAFT_WEBHOOK_SECONDS="3600",
    )
    yield running, key
    running.process.terminate()
    assert running.process.wait(60) == 0
    for log in (data / "logs").iterdir():
        assert "Traceback" not in log.read_text(errors="replace"), log


# As long as what is generated takes on a busy machine.
pytestmark = pytest.mark.timeout(600)


def run(url: str, folder: Path, *arguments: str) -> str:
    command = [ST, "run", f"{url}/openapi.json", "--seed", "1", "--continue-on-failure", "--no-color", *arguments]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=560)
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-1000:]
    return ended.stdout


@pytest.mark.parametrize(
    "generated",
    [["--phases", "fuzzing", "--max-examples", "3"], pytest.param(["--max-examples", "12"], marks=pytest.mark.long)],
    ids=["few", "all"],
)
def test_with_a_key_every_answer_is_as_described(
    secured: tuple[Running, str], tmp_path: Path, generated: list[str]
) -> None:
    running, key = secured
    checks = ["--checks", "all", "--exclude-checks", LEFT_OUT, *generated]
    out = run(running.url, tmp_path, "-H", f"Authorization: Bearer {key}", *checks)
    document = create_app(GatewaySettings(dev=True)).openapi()
    count = len(list(operations(document)))
    assert f"Tested: {count}" in out


@pytest.mark.long
def test_without_a_key_every_answer_is_as_described_too(secured: tuple[Running, str], tmp_path: Path) -> None:
    running, _ = secured
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    run(running.url, tmp_path, "--checks", checks, "--phases", "coverage", "--max-examples", "3")


def test_strangers_reach_health_and_docs_alone(secured: tuple[Running, str]) -> None:
    running, _ = secured
    document = create_app(GatewaySettings(dev=True)).openapi()
    asked = 0
    with httpx.Client(base_url=running.url, trust_env=False) as stranger:
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                address = path.replace("{form}", "json").replace("{", "").replace("}", "")
                for headers in ({}, {"authorization": "Bearer sgk_wrong"}, {"authorization": "Basic YTpi"}):
                    answer = stranger.request(method, address, headers=headers)
                    asked += 1
                    assert (answer.status_code == 401) == (operation["operationId"] not in OPEN), (method, path)
                if operation["operationId"] not in OPEN:
                    assert operation["security"], path
    assert asked > 100
