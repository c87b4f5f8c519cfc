"""Traces where nobody asked for them, and what a client's header is worth."""

import subprocess
import sys

import pytest

from safegraft import tracing

GOOD = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


GATEWAY = "import service.app, service.settings; service.app.create_app(service.settings.GatewaySettings(dev=True))"


# Redis's client loads the API and the metrics SDK by itself where they are installed; the rest would be our doing.
COSTLY = ("opentelemetry.sdk.trace", "opentelemetry.exporter", "opentelemetry.instrumentation")


@pytest.mark.parametrize("process", [GATEWAY, "import worker.tasks"])
def test_without_an_endpoint_nothing_is_loaded(process: str) -> None:
    program = (
        f"{process}\n"
        "import sys\n"
        "from safegraft import tracing\n"
        "assert tracing.start('x') is None\n"
        "with tracing.Attempt(None, 'rlg_1', 1) as attempt: attempt.stage('fetch')\n"
        "tracing.stop()\n"
        f"print([name for name in sys.modules if name.startswith({COSTLY!r})])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_without_the_packages_it_says_so_once_and_goes_on() -> None:
    program = (
        "import sys, logging; logging.basicConfig()\n"
        "sys.modules['opentelemetry'] = None\n"
        "from safegraft import tracing\n"
        "assert tracing.start('x') is None\n"
        "with tracing.Attempt(None, 'rlg_1', 1) as attempt: attempt.stage('fetch')\n"
    )
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert "safegraft[otel]" in done.stderr


def test_a_clients_trace_is_kept_if_it_is_one() -> None:
    tracing.arrived(GOOD)
    assert tracing.current() == GOOD
    assert tracing.trace_id(GOOD) == "0af7651916cd43dd8448eb211c80319c"
    tracing.arrived(None)
    assert tracing.current() is None


@pytest.mark.parametrize(
    "given",
    ["", "nonsense", GOOD + "x", GOOD.upper(), GOOD.replace("00-", "ff-", 1), GOOD[:-1], GOOD + "\n",
     f"00-{'0' * 32}-b7ad6b7169203331-01", f"00-0af7651916cd43dd8448eb211c80319c-{'0' * 16}-01"],
)  # fmt: skip
def test_what_is_no_trace_is_ignored(given: str) -> None:
    tracing.arrived(given)
    assert tracing.current() is None
    assert tracing.trace_id(given) is None
