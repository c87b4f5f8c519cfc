"""The scaled backend for tests: Postgres, an S3 server and a Redis server, all thrown away afterwards.

    python -m tests.scaled -- tests/stores tests/service tests/worker

starts them and runs pytest with these variables, which the fixtures read:

    SAFEGRAFT_TEST_BACKEND=scaled
    SAFEGRAFT_TEST_DATABASE_URL   a server; the stores' tests empty one database on it again and again
    SAFEGRAFT_TEST_STORAGE_URL    a bucket; each data folder has a prefix of its own in it
    SAFEGRAFT_TEST_REDIS_URL      a server; each data folder has a database of its own on it
    AWS_ENDPOINT_URL …            the S3 server is moto's

A data folder stands for an installation: `environment(data)` gives what makes a program use it, the same each time.
"""

import contextlib
import functools
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from sqlalchemy import create_engine, text
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.exc import OperationalError

from safegraft.launch import _die_with_parent, find_broker

SCALED = os.environ.get("SAFEGRAFT_TEST_BACKEND") == "scaled"
READY_SECONDS = 60.0
REDIS_DATABASES = 8192
# Where several pytest processes share the servers, each has so many of Redis's databases.
DATABASES_PER_PROCESS = 1024
_numbers: dict[str, int] = {}


class Missing(Exception):
    """A server that these tests need is not installed."""


def process() -> int:
    """Which of the pytest processes this is that share the servers; 0 where there is one."""
    return int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))


def stores_database() -> str:
    """This process's database for the stores' tests; made where there is none yet."""
    given = make_url(os.environ["SAFEGRAFT_TEST_DATABASE_URL"])
    name = f"{given.database}{process()}"
    engine = create_engine(given, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        if not connection.execute(text("SELECT 1 FROM pg_database WHERE datname = :name"), {"name": name}).scalar():
            connection.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return given.set(database=name).render_as_string(hide_password=False)


def environment(data: Path) -> dict[str, str]:
    """The settings of the installation in this data folder; empty unless the backend is the scaled one."""
    if not SCALED:
        return {}
    name = "t_" + hashlib.sha256(str(data.resolve()).encode()).hexdigest()[:16]
    number = _numbers.get(name)
    admin = make_url(os.environ["SAFEGRAFT_TEST_DATABASE_URL"])
    if number is None:
        assert len(_numbers) < DATABASES_PER_PROCESS
        number = _numbers[name] = process() * DATABASES_PER_PROCESS + len(_numbers)
        engine = create_engine(admin, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        engine.dispose()
    return {
        "SAFEGRAFT_DATABASE_URL": admin.set(database=name).render_as_string(hide_password=False),
        "SAFEGRAFT_STORAGE_URL": f"{os.environ['SAFEGRAFT_TEST_STORAGE_URL']}/{name}",
        "SAFEGRAFT_REDIS_URL": f"{os.environ['SAFEGRAFT_TEST_REDIS_URL']}/{number}",
    }


@contextlib.contextmanager
def disposed_engines() -> Iterator[None]:
    """Closes what is opened within: a connection to Postgres complains when it is only forgotten."""
    from safegraft.stores import database

    engines = []

    def create(*args: Any, **options: Any) -> Engine:
        engines.append(create_engine(*args, **options))
        return engines[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(database, "create_engine", create)
        yield
    for engine in engines:
        engine.dispose()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """moto's server as a process; the variables with which S3 clients find it."""
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _running(command, lambda: httpx.get(f"{endpoint}/moto-api/", trust_env=False).is_success):
        yield {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing-secret",
        }


def make_bucket(endpoint: str, name: str) -> str:
    """Returns its s3:// address."""
    httpx.put(f"{endpoint}/{name}", trust_env=False).raise_for_status()
    return f"s3://{name}"


@contextlib.contextmanager
def redis_server() -> Iterator[str]:
    """Debian's redis-server where there is one, else the embedded Valkey; its address without a database."""
    found = shutil.which("redis-server") or str(find_broker())
    print(f"broker: {found}", flush=True)  # noqa: T201
    port = free_port()
    command = [found, "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no"]
    command += ["--databases", str(REDIS_DATABASES), "--maxmemory-policy", "noeviction"]
    with _running(command, lambda: bool(redis.Redis(port=port).ping())):
        yield f"redis://127.0.0.1:{port}"


@contextlib.contextmanager
def postgres_server() -> Iterator[str]:
    """A cluster in a temporary folder; the address of an empty database. Raises Missing."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name.split(".")[0]))
    found = programs[-1] if programs else None
    if found is None and (initdb := shutil.which("initdb")):
        found = Path(initdb).resolve().parent
    if found is None:
        raise Missing("Postgres was found neither in /usr/lib/postgresql nor on the PATH: apt-get install postgresql")
    print(f"database: {found}", flush=True)  # noqa: T201
    user = _unprivileged()
    with tempfile.TemporaryDirectory(prefix="safegraft-postgres-") as name:
        folder = Path(name)
        if user:
            shutil.chown(folder, user)
        data = str(folder / "data")
        subprocess.run(
            [found / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "-N"],
            check=True, stdout=subprocess.DEVNULL, cwd=folder, user=user,
        )  # fmt: skip
        port = free_port()
        command = [str(found / "postgres"), "-D", data, "-p", str(port), "-k", str(folder), "-h", "127.0.0.1"]
        # Thrown away afterwards: what a power cut would do to it does not matter.
        for option in ("fsync=off", "full_page_writes=off", "max_connections=500", "log_min_messages=error"):
            command += ["-c", option]
        url = f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres"
        # SIGINT is Postgres's word for "now, without waiting for clients".
        with _running(command, lambda: _answers(url), user=user, cwd=folder, last=signal.SIGINT):
            engine = create_engine(url, isolation_level="AUTOCOMMIT")
            with engine.connect() as connection:
                connection.execute(text("CREATE DATABASE stores"))
            engine.dispose()
            yield url.removesuffix("/postgres") + "/stores"


def _unprivileged() -> str | None:
    """Postgres does not run as root. None: we are not root."""
    if os.getuid() != 0:
        return None
    import pwd

    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


def _answers(url: str) -> bool:
    engine = create_engine(url)
    try:
        with engine.connect() as connection:
            return bool(connection.execute(text("SELECT 1")).scalar())
    except OperationalError:
        return False
    finally:
        engine.dispose()


@contextlib.contextmanager
def _running(
    command: list[str],
    ready: Callable[[], bool],
    *,
    user: str | None = None,
    cwd: Path | None = None,
    last: signal.Signals = signal.SIGTERM,
) -> Iterator[None]:
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, user=user, cwd=cwd, start_new_session=True,
            preexec_fn=functools.partial(_die_with_parent, last),
        )  # fmt: skip
        try:
            deadline = time.monotonic() + READY_SECONDS
            while not _is(ready):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise AssertionError(f"{command[0]} did not start: {log.read().decode(errors='replace')}")
                time.sleep(0.05)
            yield
        finally:
            process.send_signal(last)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _is(ready: Callable[[], bool]) -> bool:
    try:
        return ready()
    except (httpx.TransportError, redis.ConnectionError):
        return False


def main(arguments: list[str]) -> int:
    """Runs pytest with these arguments on the scaled backend. Exit status 3: a server is missing."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything below is cleaned up
    try:
        with postgres_server() as database, redis_server() as broker, s3_server() as aws:
            given = {
                "SAFEGRAFT_TEST_BACKEND": "scaled",
                "SAFEGRAFT_TEST_DATABASE_URL": database,
                "SAFEGRAFT_TEST_STORAGE_URL": make_bucket(aws["AWS_ENDPOINT_URL"], "safegraft-tests"),
                "SAFEGRAFT_TEST_REDIS_URL": broker,
                **aws,
            }
            return subprocess.run([sys.executable, "-m", "pytest", *arguments], env=os.environ | given).returncode
    except Missing as error:
        print(error, file=sys.stderr)  # noqa: T201
        if os.environ.get("CI") == "true":
            return 3
        print("The tests on the scaled backend were left out.", file=sys.stderr)  # noqa: T201
        return 0


if __name__ == "__main__":
    given = sys.argv[1:]
    raise SystemExit(main(given[1:] if given[:1] == ["--"] else given))
