"""`safegraft`, started by fork from a process that has its libraries behind it.

A test of the command line needs a process of its own, with its own arguments, environment, folder, streams and status.
It does not need Python and PyTorch to be loaded anew, which costs more than everything that it looks at. What depends
on that (the interpreter's own variables, say) is started as a user starts it, and so is `real=True`.
"""

import atexit
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO

SAFEGRAFT = str(Path(sys.executable).parent / "safegraft")
# All but these are read by the interpreter or by libraries, when they are loaded or whenever they please.
OURS = ("SAFEGRAFT_", "AWS_")
NAMES = ("REDIS_URL", "COLUMNS", "NO_COLOR", "TERM")
# safegraft.commands.terminal and safegraft.cli are not among them: their consoles look at the environment.
LIGHT = (
    "typer", "rich.progress", "rich.table", "sqlalchemy", "cryptography.hazmat.primitives.asymmetric.ed25519",
    "safegraft.records", "safegraft.report.text", "safegraft.verification", "safegraft.sizes", "safegraft.finite",
    "safegraft.stores.references", "safegraft.stores.keys", "safegraft.stores.jobs", "safegraft.stores.overview",
)  # fmt: skip
HEAVY = (
    "torch", "peft", "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto",
    "safegraft.engine.build", "safegraft.engine.pipeline", "safegraft.engine.rerun", "safegraft.engine.behaviour",
    "matplotlib.backends.backend_agg", "matplotlib.figure",
)  # fmt: skip
ENGINE = ("realign", "evaluate", "verify", "report", "build")


def run(
    arguments: Sequence[str], environment: Mapping[str, str], *, timeout: float = 120, real: bool = False
) -> subprocess.CompletedProcess[str]:
    """`safegraft ARGUMENTS` in this environment and folder, with nothing to read. Raises subprocess.TimeoutExpired."""
    if real or not _zygote().may_start(environment):
        command = [SAFEGRAFT, *arguments]
        return subprocess.run(
            command, env=dict(environment), capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
        )
    return _zygote().run(list(arguments), dict(environment), timeout)


@cache
def _zygote() -> "Zygote":
    return Zygote()


class Zygote:
    """The process that forks; it ends with the one that made it."""

    def __init__(self) -> None:
        self._given = dict(os.environ)
        self._ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.zygote", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                cwd=Path(__file__).parents[1],
                stdin=subprocess.DEVNULL,
            )
        atexit.register(self._end)

    def _end(self) -> None:
        self._ours.close()
        self._process.wait()

    def may_start(self, environment: Mapping[str, str]) -> bool:
        """Whether the environment differs from the zygote's in nothing that was read when it started."""
        changed = {
            name for name in self._given.keys() | environment.keys() if self._given.get(name) != environment.get(name)
        }
        # pytest tells in it which test is running.
        changed.discard("PYTEST_CURRENT_TEST")
        return all(name.startswith(OURS) or name in NAMES for name in changed)

    def run(
        self, arguments: list[str], environment: dict[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            asked = json.dumps({"arguments": arguments, "environment": environment, "folder": os.getcwd()}).encode()
            socket.send_fds(self._ours, [len(asked).to_bytes(4)], [out.fileno(), err.fileno()])
            self._ours.sendall(asked)
            child = int.from_bytes(_exactly(self._ours, 4))
            self._ours.settimeout(timeout)
            try:
                status = int.from_bytes(_exactly(self._ours, 4), signed=True)
            except TimeoutError as error:
                self._ours.settimeout(None)
                os.kill(child, signal.SIGKILL)
                _exactly(self._ours, 4)
                raise subprocess.TimeoutExpired(arguments, timeout, _text(out), _text(err)) from error
            finally:
                self._ours.settimeout(None)
            return subprocess.CompletedProcess([SAFEGRAFT, *arguments], status, _text(out), _text(err))


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    # As subprocess does where it is asked for text.
    return file.read().decode().replace("\r\n", "\n").replace("\r", "\n")


def _exactly(connection: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        piece = connection.recv(count - len(found))
        if not piece:
            raise EOFError("the other side has gone")
        found += piece
    return found


def serve(connection: socket.socket) -> None:
    """Forks for every request until the other side has gone."""
    # As `safegraft` has it before its libraries.
    os.environ.setdefault("TQDM_DISABLE", "1")
    _import(LIGHT)
    while True:
        head, fds, _, _ = socket.recv_fds(connection, 4, 2)
        if not head:
            return
        asked = json.loads(_exactly(connection, int.from_bytes(head)))
        if any(word in ENGINE for word in asked["arguments"][:2]):
            _import(HEAVY)
        child = os.fork()
        if not child:
            connection.close()
            _become(asked["arguments"], asked["environment"], asked["folder"], *fds)
        for fd in fds:
            os.close(fd)
        connection.sendall(child.to_bytes(4))
        _, status = os.waitpid(child, 0)
        connection.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, signed=True))


def _import(names: Sequence[str]) -> None:
    for name in names:
        importlib.import_module(name)


def _become(arguments: list[str], environment: dict[str, str], folder: str, out: int, err: int) -> None:
    """Does what `safegraft ARGUMENTS` does, and ends the process as that ends."""
    status = 1
    try:
        for stream, fd, to in ((sys.stdout, out, 1), (sys.stderr, err, 2)):
            stream.flush()
            os.dup2(fd, to)
            os.close(fd)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        sys.argv = [SAFEGRAFT, *arguments]
        # By it click tells whether it was started as a program or as `python -m`.
        sys.modules["__main__"].__package__ = ""
        from safegraft.cli import main

        try:
            main()
            status = 0
        except SystemExit as ended:
            if isinstance(ended.code, str):
                print(ended.code, file=sys.stderr)  # noqa: T201
            else:
                status = ended.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        # Not through the interpreter's end: that of the libraries takes as long as their beginning.
        os._exit(status)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as given:
        serve(given)
