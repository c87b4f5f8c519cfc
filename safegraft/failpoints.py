"""Named points at which a test can make this process fail: killed, stopped, or with an error of the disk.

    SAFEGRAFT_FAILPOINTS='worker.claimed=kill@1;store.publish=error:ENOSPC@2'   point=action[:value][@times]; …
    SAFEGRAFT_FAILPOINTS_DIR=/tmp/marks                                          needed by @times

actions: kill (this process, by SIGKILL), kill-group (its process group: a whole worker), stop (SIGSTOP), error:ERRNO
(OSError), sleep:SECONDS. With `@times` it happens only so often, among all processes and over their restarts: each time
takes one file `POINT.ACTION.NUMBER` in the folder. A test that removes such a file arms the point once more, one that
makes it beforehand disarms it, and a file that is there says that it has happened.

A process arms itself once, by `arm()`, when it starts. Without the variable nothing is ever armed and `hit` is a
function that looks at one name. The variables are not settings: no deployment passes them on.
"""

import errno
import logging
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safegraft.errors import InvalidParameter

log = logging.getLogger("safegraft.failpoints")
VARIABLE, FOLDER, ALLOWED = "SAFEGRAFT_FAILPOINTS", "SAFEGRAFT_FAILPOINTS_DIR", "SAFEGRAFT_FAILPOINTS_ALLOWED"
# Every point there is; a name that is none would be a test that tests nothing.
POINTS = {
    "gateway.receiving": "bytes of an upload are about to be written",
    "gateway.stored": "an adapter's bytes are stored, its row is not written",
    "gateway.creating": "a job's row is written, its transaction is not committed",
    "gateway.created": "a job is committed, its client has no answer and no worker a message",
    "dispatcher.due": "due jobs were chosen, none is announced",
    "store.publish": "files are about to be published (gateway and worker)",
    "worker.received": "a message has arrived, no job is claimed",
    "worker.claimed": "a job is claimed, nothing is fetched",
    "worker.fetched": "the adapter's files are in the workspace",
    "worker.patching": "some modules are patched",
    "worker.written": "result and report are written in the workspace",
    "worker.published": "the result's files are published, its row is not written",
    "worker.committed": "the job has ended, its message is not acknowledged",
}
ACTIONS = ("kill", "kill-group", "stop", "error", "sleep")


@dataclass(frozen=True)
class Failpoint:
    point: str
    action: str
    value: str = ""
    times: int = 0  # 0: always

    def __str__(self) -> str:
        value, times = f":{self.value}" if self.value else "", f"@{self.times}" if self.times else ""
        return f"{self.point}={self.action}{value}{times}"


class Armed:
    """The points of one process."""

    def __init__(self, points: list[Failpoint], folder: Path | None) -> None:
        self._points: dict[str, list[Failpoint]] = {}
        for point in points:
            self._points.setdefault(point.point, []).append(point)
        self._folder = folder

    def hit(self, name: str) -> None:
        for point in self._points.get(name, ()):
            if self._taken(point):
                log.warning("failpoint %s", point)
                _act(point)

    def _taken(self, point: Failpoint) -> bool:
        """Takes one of its times; False where there is none left."""
        if not point.times:
            return True
        assert self._folder is not None
        for number in range(1, point.times + 1):
            try:
                os.close(os.open(mark(self._folder, point.point, point.action, number), os.O_CREAT | os.O_EXCL))
                return True
            except FileExistsError:
                continue
        return False


_armed: Armed | None = None


def hit(name: str) -> None:
    """The work is at this point. Does nothing unless a test has armed it; may then raise OSError, or never return."""
    if _armed is not None:
        _armed.hit(name)


def mark(folder: Path, point: str, action: str, number: int = 1) -> Path:
    """The file that says that a point's action has happened for the `number`-th time."""
    return folder / f"{point}.{action}.{number}"


def parse(given: str) -> list[Failpoint]:
    """Raises InvalidParameter."""
    return [_parsed(part.strip()) for part in given.split(";") if part.strip()]


def arm(environment: Mapping[str, str] | None = None) -> None:
    """Arms what the environment names; what was armed before is not any more. Called by a process when it starts.

    Only in development mode (SAFEGRAFT_DEV) or with SAFEGRAFT_FAILPOINTS_ALLOWED=1: elsewhere the variable is a
    mistake, which is logged and changes nothing. Raises InvalidParameter (`bad_failpoint`).
    """
    global _armed
    _armed = None
    environment = os.environ if environment is None else environment
    given = environment.get(VARIABLE, "")
    if not given:
        return
    if not any(environment.get(name, "").lower() in ("1", "true", "yes", "on") for name in ("SAFEGRAFT_DEV", ALLOWED)):
        log.error("%s is set outside of development: nothing is armed (%s=1 would allow it)", VARIABLE, ALLOWED)
        return
    points = parse(given)
    folder = Path(environment[FOLDER]) if environment.get(FOLDER) else None
    if folder is None and any(point.times for point in points):
        raise _bad("@times counts files; name a folder for them.", FOLDER)
    log.warning("failpoints are armed, this process will fail on purpose: %s", "; ".join(map(str, points)))
    _armed = Armed(points, folder)


def _parsed(part: str) -> Failpoint:
    name, _, rest = part.partition("=")
    rest, _, times = rest.partition("@")
    action, _, value = rest.partition(":")
    if name not in POINTS:
        raise _bad(f"There is no failpoint {name!r}; there are {', '.join(POINTS)}.")
    if action not in ACTIONS:
        raise _bad(f"{part}: {action!r} is none of {', '.join(ACTIONS)}.")
    if times and not (times.isdecimal() and int(times) > 0):
        raise _bad(f"{part}: @{times} is no number of times.")
    if action == "error" and not hasattr(errno, value):
        raise _bad(f"{part}: {value!r} is no name of an errno.")
    if action == "sleep":
        try:
            float(value)
        except ValueError:
            raise _bad(f"{part}: {value!r} are no seconds.") from None
    return Failpoint(name, action, value, int(times or 0))


def _bad(message: str, param: str = VARIABLE) -> InvalidParameter:
    return InvalidParameter(message, code="bad_failpoint", param=param)


def _act(point: Failpoint) -> None:
    match point.action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "kill-group":
            os.killpg(0, signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "sleep":
            time.sleep(float(point.value))
        case "error":
            number = getattr(errno, point.value)
            raise OSError(number, os.strerror(number))
