"""The containers, as far as they can be proven where no Docker engine runs.

The files are read as an engine would read them, and every CMD and HEALTHCHECK in them is started as written, with the
environment that Compose would give it. Only what the machine decides is replaced: ports, the broker's address and the
data folder. What this cannot show is the build itself.
"""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pydantic import SecretStr
from sqlalchemy.engine import make_url

from safegraft.launch import find_broker
from service.settings import GatewaySettings
from worker.settings import WorkerSettings

ROOT = Path(__file__).parents[2]
VENV = Path(sys.executable).parent
# What an operator writes into .env: nothing but what is asked for.
GIVEN: dict[str, str] = {}
SCALED_GIVEN = {
    "POSTGRES_PASSWORD": "p" * 48,
    "SAFEGRAFT_KEY_PEPPER": "k" * 48,
    "S3_ACCESS_KEY_ID": "i" * 48,
    "S3_SECRET_ACCESS_KEY": "s" * 48,
}
HEAVY = {"torch", "transformers", "peft", "safetensors", "accelerate"}
AWS = {"AWS_ENDPOINT_URL", "AWS_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")


# Reading the files


@dataclass(frozen=True)
class Image:
    """A Dockerfile, as its instructions."""

    instructions: list[tuple[str, str]]

    def all(self, name: str) -> list[str]:
        return [arguments for instruction, arguments in self.instructions if instruction == name]

    @property
    def command(self) -> list[str]:
        found: list[str] = json.loads(self.all("CMD")[-1])
        return found

    @property
    def healthcheck(self) -> list[str]:
        found: list[str] = json.loads(self.all("HEALTHCHECK")[-1].partition("CMD ")[2])
        return found

    @property
    def environment(self) -> dict[str, str]:
        return dict(pair.split("=", 1) for line in self.all("ENV") for pair in shlex.split(line))

    @property
    def sources(self) -> list[str]:
        """What is copied from the build context."""
        return [name for line in self.all("COPY") for name in line.split()[:-1]]

    @property
    def requirements(self) -> list[str]:
        """What the image installs: the `python -c …` of the file, run as it stands there."""
        [line] = [line for line in self.all("RUN") if " > requirements.txt " in line]
        program = shlex.split(line.partition(" > ")[0])
        out = subprocess.run(program, cwd=ROOT, env=on_path({}), check=True, capture_output=True, text=True).stdout
        return out.split("\n")[:-1]


def read_image(path: Path) -> Image:
    lines = [line for line in path.read_text().split("\n") if line.strip() and not line.startswith("#")]
    whole = "\n".join(lines).replace("\\\n", " ")
    pairs = [re.split(r"\s+", line.strip(), maxsplit=1) for line in whole.split("\n")]
    return Image([(name, arguments) for name, arguments in pairs])


GATEWAY = read_image(ROOT / "docker/gateway.Dockerfile")
WORKER = read_image(ROOT / "docker/worker.Dockerfile")
IMAGES = {"gateway": GATEWAY, "worker": WORKER, "worker-gpu": WORKER}
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
SCALED: dict[str, Any] = yaml.safe_load((ROOT / "docker/compose.scaled.yml").read_text())


def interpolate(text: str, given: dict[str, str]) -> str:
    """Compose's `${NAME:-default}` and `${NAME:?complaint}`."""

    def value(match: re.Match[str]) -> str:
        name, kind, rest = match.groups()
        if given.get(name) or kind == "-":
            return given.get(name) or str(rest)
        raise KeyError(f"{name}: {rest}")

    return VARIABLE.sub(value, text)


def container_environment(service: str, given: dict[str, str]) -> dict[str, str]:
    """What a container's first process finds: the image's variables, then Compose's; one without a value is passed on
    from the operator's, and unset where he has none."""
    found = dict(IMAGES[service].environment)
    for name, value in SERVICES[service]["environment"].items():
        if value is not None:
            found[name] = interpolate(value, given)
        elif name in given:
            found[name] = given[name]
    return found


def on_path(environment: dict[str, str]) -> dict[str, str]:
    """Programs come from the virtual environment, as they come from the image's own Python there."""
    return {"PATH": f"{VENV}{os.pathsep}{os.environ['PATH']}", **environment}


# Running what they say


@dataclass(frozen=True)
class Running:
    """The services of docker-compose.yml as processes of this machine."""

    url: str
    data: Path
    environment: dict[str, dict[str, str]]
    port: int

    def checks(self) -> dict[str, bool]:
        found: dict[str, bool] = httpx.get(f"{self.url}/readyz", trust_env=False).json()["checks"]
        return found

    def healthy(self, service: str, **changed: str) -> bool:
        """Runs the image's HEALTHCHECK in the container's environment."""
        command = with_port(IMAGES[service].healthcheck, self.port)
        environment = self.environment[service] | changed
        return subprocess.run(command, env=environment, capture_output=True, timeout=60).returncode == 0


def with_port(command: list[str], port: int) -> list[str]:
    return [re.sub(r"^8000$|(?<=:)8000(?=/)", str(port), word) for word in command]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def process(command: list[str], environment: dict[str, str], folder: Path, log: Path) -> Iterator[None]:
    """A program that must also end when it is asked to."""
    with log.open("wb") as out:
        # A session of its own, so that nothing is left of it should it have to be killed.
        child = subprocess.Popen(
            command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield
        assert child.poll() is None, f"{command[0]} ended by itself:\n{log.read_text()}"
    finally:
        child.terminate()
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            raise


def eventually(condition: Callable[[], bool], what: str, logs: Iterable[Path] = (), seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except (httpx.TransportError, redis.ConnectionError):
            pass
        time.sleep(0.1)
    raise AssertionError(f"{what}: not within {seconds} s\n" + "\n".join(log.read_text() for log in logs))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    root = tmp_path_factory.mktemp("compose")
    # Both programs search their working directory for modules first: in the images it is empty.
    folder, volume, broker_data = root / "empty", root / "data", root / "redis"
    for path in (folder, volume, broker_data):
        path.mkdir()
    logs = {name: root / f"{name}.log" for name in ("redis", "gateway", "worker")}
    broker_port, port = free_port(), free_port()
    # Home is this user's own: matplotlib's list of fonts lies there, as it does in the image.
    own = {"HOME": str(Path.home()), "HOSTNAME": socket.gethostname()}
    environments = {}
    for service in ("gateway", "worker"):
        found = container_environment(service, GIVEN)
        found["SAFEGRAFT_REDIS_URL"] = found["SAFEGRAFT_REDIS_URL"].replace(
            "//redis:6379", f"//127.0.0.1:{broker_port}"
        )
        assert found["SAFEGRAFT_DATA"] == "/data"
        environments[service] = on_path(own | found | {"SAFEGRAFT_DATA": str(volume)})

    server, *options = SERVICES["redis"]["command"]
    assert server == "redis-server"
    broker = [
        str(find_broker()),
        *options,
        "--port",
        str(broker_port),
        "--bind",
        "127.0.0.1",
        "--dir",
        str(broker_data),
    ]
    client = redis.Redis(port=broker_port)
    with ExitStack() as stack:
        stack.callback(client.close)
        stack.enter_context(process(broker, on_path({}), broker_data, logs["redis"]))
        eventually(lambda: bool(client.ping()), "the broker answers", [logs["redis"]])
        for service in ("gateway", "worker"):
            command = with_port(IMAGES[service].command, port)
            stack.enter_context(process(command, environments[service], folder, logs[service]))
        here = Running(f"http://127.0.0.1:{port}", volume, environments, port)
        eventually(
            lambda: httpx.get(f"{here.url}/livez", trust_env=False).is_success, "/livez answers", [logs["gateway"]]
        )
        eventually(lambda: b"ready." in logs["worker"].read_bytes(), "the worker is ready", [logs["worker"]])
        yield here


def test_gateway_reaches_database_and_broker(running: Running) -> None:
    checks = running.checks()
    assert checks["database"]
    assert checks["broker"]


def test_worker_starts_without_a_reference_and_is_healthy(running: Running) -> None:
    assert running.healthy("worker")


def test_worker_of_another_name_is_not_healthy(running: Running) -> None:
    # Else one worker would vouch for all.
    command = [word.replace("--timeout 10", "--timeout 1") for word in WORKER.healthcheck]
    environment = running.environment["worker"] | {"HOSTNAME": "another"}
    assert subprocess.run(command, env=environment, capture_output=True, timeout=60).returncode != 0


def documented(command: str, end: str = "") -> list[list[str]]:
    """`safegraft …` as docker/README.md runs it in the gateway's container of the plain Compose file."""
    readme = (ROOT / "docker/README.md").read_text()
    lines = re.findall(
        rf"^docker compose run --rm --no-deps .*gateway (safegraft {command}){end}$", readme, re.MULTILINE
    )
    assert len(lines) == 1, lines
    return [shlex.split(line) for line in lines]


def test_a_reference_makes_the_gateway_ready_and_a_job_passes_through_both(
    running: Running, bundle: Path, continued: Path
) -> None:
    # Given a new installation
    assert not running.healthy("gateway")

    # When a reference is added and a key made by the commands of docker/README.md, in the gateway's container
    environment = running.environment["gateway"]
    for words in documented("reference add", " /reference"):
        subprocess.run([*words, str(bundle)], env=environment, check=True, capture_output=True)
    [words] = documented("keys create")
    key = subprocess.run(words, env=environment, check=True, capture_output=True, text=True).stdout.strip()
    assert (running.data / "pepper").is_file()

    # Then the gateway is ready, through a proxy's variables too
    assert running.healthy("gateway", http_proxy="http://127.0.0.1:9", HTTP_PROXY="http://127.0.0.1:9")

    # And a job goes from the one container to the other and back, through broker and volume
    with httpx.Client(base_url=running.url, trust_env=False, timeout=30) as client:
        assert client.get("/v1/adapters").status_code == 401
        client.headers["authorization"] = f"Bearer {key}"
        files = [("files", (path.name, path.read_bytes())) for path in sorted(continued.iterdir())]
        adapter = client.post("/v1/adapters", files=files).raise_for_status().json()
        job = client.post("/v1/realignments", json={"adapter_id": adapter["id"]}).raise_for_status().json()

        def status() -> str:
            return str(client.get(f"/v1/realignments/{job['id']}").json()["status"])

        eventually(lambda: status() in ("succeeded", "failed"), "the job ends")
        assert status() == "succeeded"


# What the files promise


@pytest.mark.parametrize("name", ["gateway", "worker"])
def test_copied_files_exist_and_reach_the_engine(name: str) -> None:
    ignore = [line for line in (ROOT / ".dockerignore").read_text().split("\n") if line and not line.startswith("#")]
    assert ignore[0] == "*", "everything stays out but what is named"
    sent = {line[1:] for line in ignore if line.startswith("!")}
    for source in IMAGES[name].sources:
        assert (ROOT / source).exists(), source
        assert source.rstrip("/") in sent, f"{source} is held back by .dockerignore"
    used = {source.rstrip("/") for image in IMAGES.values() for source in image.sources}
    assert sent == used, "nothing is sent that no image takes"


@pytest.mark.parametrize("name", ["gateway", "worker"])
def test_image_is_pinned_and_steps_down_from_root(name: str) -> None:
    image = IMAGES[name]
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", image.all("FROM")[-1])
    assert image.all("USER") == ["10001:10001"]
    order = [instruction for instruction, _ in image.instructions]
    assert order.index("USER") < order.index("CMD")
    assert image.all("VOLUME") == ["/data"]
    assert image.environment["SAFEGRAFT_DATA"] == "/data"
    installs = [step for line in image.all("RUN") for step in re.findall(r"pip install[^&]*", line)]
    assert all("-c constraints.txt" in step or step.endswith("--no-deps .") for step in installs)


def test_constraints_are_exact_and_leave_the_torch_build_open() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().split("\n") if line and not line.startswith("#")]
    pins = {str(canonicalize_name(Requirement(line).name)): str(Requirement(line).specifier) for line in lines}
    assert all(pin.startswith("==") for pin in pins.values())
    # `==2.13.0+cpu` would exclude the builds with CUDA, `==2.13.0` takes every one.
    assert "+" not in pins["torch"]
    # `pip freeze` leaves out what installs packages itself; torch asks for it.
    wanted = requirement_closure(WORKER.requirements) - {"setuptools"}
    assert wanted <= set(pins), f"not pinned: {sorted(wanted - set(pins))}"


def test_gateway_image_holds_no_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert project["dependencies"] + extras["scaled"] + extras["otel"] == GATEWAY.requirements
    assert not requirement_closure(GATEWAY.requirements) & HEAVY
    # The image has no worker and no engine extra, so what it runs must not ask for them.
    program = f"import sys, service.main; print(*sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.split() == []


def test_worker_image_holds_the_engine() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert project["dependencies"] + extras["engine"] + extras["scaled"] + extras["otel"] == WORKER.requirements
    assert requirement_closure(WORKER.requirements) >= HEAVY


def requirement_closure(lines: Iterable[str]) -> set[str]:
    """These requirements and all that they need in turn, as the installed packages say."""
    waiting = [Requirement(line) for line in lines]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        for line in distribution(name).requires or []:
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in {"", *extras}):
                waiting.append(needed)
    return {name for name, _ in seen}


@pytest.mark.parametrize("name", ["gateway", "worker"])
def test_both_images_speak_to_postgres_and_s3(name: str) -> None:
    assert {"psycopg", "psycopg-binary", "obstore"} <= requirement_closure(IMAGES[name].requirements)


def test_compose_never_passes_on_the_development_mode() -> None:
    for service in SERVICES.values():
        assert "SAFEGRAFT_DEV" not in service.get("environment", {})


# Postgres and S3


def scaled_environment(service: str, given: dict[str, str]) -> dict[str, str]:
    """What a container's first process finds with both Compose files: the second one's variables come last."""
    found = container_environment(service, given)
    own: dict[str, str] = SCALED["services"][service]["environment"]
    return found | {name: interpolate(value, given) for name, value in own.items()}


@pytest.mark.parametrize("missing", list(SCALED_GIVEN))
def test_the_scaled_services_ask_for_every_password(missing: str) -> None:
    given = {name: value for name, value in SCALED_GIVEN.items() if name != missing}
    with pytest.raises(KeyError, match=missing):
        interpolate(json.dumps(SCALED), given)
    interpolate(json.dumps(SCALED), SCALED_GIVEN)
    assert not [value for value in SCALED_GIVEN.values() if value in json.dumps(SCALED)]


def test_the_documented_env_file_is_complete() -> None:
    readme = (ROOT / "docker/README.md").read_text()
    [names] = re.findall(r"^for name in ([A-Z0-9_ ]+); do$", readme, re.MULTILINE)
    assert names.split() == list(SCALED_GIVEN)


@pytest.mark.parametrize("service", ["gateway", "worker", "worker-gpu"])
def test_the_scaled_services_share_database_bucket_and_pepper(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = scaled_environment(service, SCALED_GIVEN)
    for name in [name for name in os.environ if name.startswith("SAFEGRAFT_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = (GatewaySettings if service == "gateway" else WorkerSettings)()
    url = make_url(settings.database)
    assert (url.drivername, url.host, url.database, url.username) == (
        "postgresql+psycopg", "postgres", "safegraft", SCALED["services"]["postgres"]["environment"]["POSTGRES_USER"],
    )  # fmt: skip
    assert url.password == SCALED_GIVEN["POSTGRES_PASSWORD"]
    assert settings.storage_url == "s3://safegraft"
    assert settings.key_pepper.get_secret_value() == SCALED_GIVEN["SAFEGRAFT_KEY_PEPPER"]
    assert settings.redis_url == "redis://redis:6379/0"
    [identity] = json.loads(interpolate(SCALED["configs"]["s3"]["content"], SCALED_GIVEN))["identities"]
    [credentials] = identity["credentials"]
    assert environment["AWS_ACCESS_KEY_ID"] == credentials["accessKey"]
    assert environment["AWS_SECRET_ACCESS_KEY"] == credentials["secretKey"]
    assert all(action.endswith(":safegraft") for action in identity["actions"]), "this bucket and no other"
    assert environment["AWS_ENDPOINT_URL"].startswith("http://seaweedfs:")


def test_the_scaled_file_only_adds() -> None:
    own = {"postgres", "seaweedfs", "bucket"}
    assert set(SCALED["services"]) == set(IMAGES) | own
    for name in IMAGES:
        added = SCALED["services"][name]
        assert set(added) == {"environment", "depends_on"}
        assert added == SCALED["x-scaled"]
        assert set(added["environment"]) <= set(SERVICES[name]["environment"]), "also to be set without this file"
    for name in own:
        service = SCALED["services"][name]
        assert re.fullmatch(r"[a-z/]+:\d+\.\d+(-alpine)?", service["image"])
        assert service["restart"] in ("unless-stopped", "on-failure")
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), "on loopback alone"
    healthy = {name for name in own if "healthcheck" in SCALED["services"][name]}
    for name in [*IMAGES, *own]:
        for needed, how in SCALED["services"][name].get("depends_on", {}).items():
            ends = {"condition": "service_completed_successfully"}
            assert how == ({"condition": "service_healthy"} if needed in healthy else ends)
    kept = {volume.partition(":")[0] for name in own for volume in SCALED["services"][name].get("volumes", [])}
    assert kept == set(SCALED["volumes"]) == {"postgres", "objects"}


def test_compose_publishes_the_gateway_on_loopback_and_nothing_else() -> None:
    assert [interpolate(port, {}) for port in SERVICES["gateway"]["ports"]] == ["127.0.0.1:8000:8000"]
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["gateway"]
    given = {"SAFEGRAFT_HOST": "0.0.0.0", "SAFEGRAFT_PORT": "80"}
    assert [interpolate(port, given) for port in SERVICES["gateway"]["ports"]] == ["0.0.0.0:80:8000"]


def test_compose_starts_in_order_and_again() -> None:
    healthy = {name for name, service in SERVICES.items() if "healthcheck" in service} | set(IMAGES)
    for service in SERVICES.values():
        assert service["restart"] == "unless-stopped"
        for needed, how in service.get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"}
            assert needed in healthy
    assert [name for name, service in SERVICES.items() if "depends_on" in service] == list(IMAGES)


def test_compose_shares_one_volume_and_builds_what_is_here() -> None:
    for name in IMAGES:
        service = SERVICES[name]
        assert service["volumes"] == ["data:/data"]
        assert read_image(ROOT / service["build"]["context"] / service["build"]["dockerfile"]) == IMAGES[name]
        declared = {line.partition("=")[0] for line in IMAGES[name].all("ARG")}
        assert set(service["build"].get("args", {})) <= declared
    assert set(COMPOSE["volumes"]) == {"data", "redis"}


def test_compose_lets_redis_lose_nothing() -> None:
    redis_service = SERVICES["redis"]
    assert re.fullmatch(r"redis:\d+\.\d+\.\d+-\w+", redis_service["image"])
    line = " ".join(redis_service["command"])
    assert "--appendonly yes" in line
    assert "--maxmemory-policy noeviction" in line
    assert redis_service["volumes"] == ["redis:/data"]


def test_compose_gives_the_gpu_to_one_worker_only() -> None:
    assert SERVICES["worker-gpu"]["profiles"] == ["gpu"]
    [device] = SERVICES["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert container_environment("worker-gpu", {})["SAFEGRAFT_DEVICE"] == "cuda"
    assert container_environment("worker", {})["SAFEGRAFT_DEVICE"] == "cpu"


def settings_of(service: str) -> dict[str, Any]:
    kind = GatewaySettings if service == "gateway" else WorkerSettings
    return {f"SAFEGRAFT_{name.upper()}": field.default for name, field in kind.model_fields.items()}


@pytest.mark.parametrize("service", ["gateway", "worker", "worker-gpu"])
def test_every_setting_can_be_set_and_no_other(service: str) -> None:
    known = set(settings_of(service))
    fixed = {name for name in IMAGES[service].environment if name.startswith("SAFEGRAFT_")}
    passed = set(SERVICES[service]["environment"]) - AWS
    assert fixed <= known
    assert passed <= known, f"no settings: {sorted(passed - known)}"
    missing = known - fixed - passed - {"SAFEGRAFT_DEV"}
    assert not missing, f"docker-compose.yml does not pass on to {service}: {sorted(missing)}"
    assert set(SERVICES[service]["environment"]) >= AWS


def test_readme_lists_the_settings_with_what_holds_here() -> None:
    readme = (ROOT / "docker/README.md").read_text()
    rows = re.findall(r"^\| `(SAFEGRAFT_\w+)` \|(.*?)\| (\w+) \|", readme, re.MULTILINE)
    listed = {name: (default.strip(" `"), owner) for name, default, owner in rows}
    expected: dict[str, tuple[str, str]] = {}
    for service in ("gateway", "worker"):
        here = container_environment(service, {})
        for name, default in settings_of(service).items():
            expected[name] = (here.get(name, shown(default)), "both" if name in expected else service)
    missing = [f"| `{name}` | `{value}` | {of} | … |" for name, (value, of) in expected.items() if name not in listed]
    assert not missing, "docker/README.md lacks these rows:\n" + "\n".join(missing)
    assert sorted(listed) == sorted(expected), "docker/README.md lists what is no setting"
    for name, row in expected.items():
        assert listed[name] == row, f"docker/README.md: {name} is {row[0]!r} here, of {row[1]}"


def shown(default: Any) -> str:
    """A setting's default as the table shows it."""
    if isinstance(default, SecretStr):
        default = default.get_secret_value()
    if default is None:
        return ""
    return default if isinstance(default, str) else json.dumps(default, default=str)
