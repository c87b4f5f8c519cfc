"""The engine in a process of its own, which the pool process starts, watches and replaces.

The pool process speaks to the database, the broker and the object store, and never reads what a customer sent. The
engine process reads it and speaks to nobody: it has no network, no secret in its environment, and limits of memory,
processor time and of each file's size. It keeps the references loaded. Both speak JSON over two pipes:

    ours     {"load": folder, "keep": n}     {"realign": …}           go or stop, after each progress
    theirs   {"loaded": folders, "manifest"} {"progress": […]} … {"report"}   or {"error"}, {"bug"}, {"stopped"}

A process that met a limit, crashed or failed in a way that nobody foresaw is not used again.
"""

import contextlib
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from safegraft import confine
from safegraft.contracts.methods import MethodParameters
from safegraft.contracts.reference import ReferenceManifest
from safegraft.contracts.report import Report
from safegraft.errors import OverLimit, SystemFault, heard
from worker.offline import OFFLINE
from worker.settings import WorkerSettings

log = logging.getLogger("safegraft.worker")
# torch's import from a cold disk, and the drivers' start.
START_SECONDS = 600.0
STOP_SECONDS = 10.0
WATCH_SECONDS = 0.2
MAX_ANSWER_BYTES = 2**28
# All that the engine's process gets of our environment: no address and no secret is among it.
PASSED_ON = ("PATH", "HOME", "TMPDIR", "TZ", "LANG", "SAFEGRAFT_DATA", "SAFEGRAFT_LOG_FORMAT")
PASSED_ON_PREFIXES = (
    "LC_", "LD_", "PYTHON", "CUDA", "NVIDIA_", "NCCL_", "OMP_", "MKL_", "OPENBLAS_", "KMP_", "GOMP_", "MALLOC_",
    "TORCH", "PYTORCH_", "THP_", "ONEDNN_",
)  # fmt: skip
NAMES = {"kernel": "kernel", "python": "interpreter alone"}

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Limits:
    """memory: bytes beyond what the process needs for itself; seconds: of processor time, a job; file_bytes: of each
    written file."""

    memory: int
    seconds: float
    file_bytes: int


def limits_of(settings: WorkerSettings) -> Limits:
    """What the settings say, and what they leave to the machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Limits(
        memory=settings.job_memory_bytes or confine.machine_memory() * 3 // 4,
        seconds=settings.job_cpu_seconds or float(settings.job_seconds * cores),
        file_bytes=settings.job_file_bytes,
    )


class Engine:
    """One process, started when it is first needed. Not for several threads."""

    def __init__(self, settings: WorkerSettings, program: str = "worker.engine_process") -> None:
        self._settings = settings
        self._program = program
        self._limits = limits_of(settings)
        self._process: subprocess.Popen[bytes] | None = None
        self._to: Connection[Any, Any] | None = None
        self._from: Connection[Any, Any] | None = None
        self._killed_by_us = False
        self._ended_for_memory = 0
        self._resident_limit = 0
        self.loaded: dict[str, ReferenceManifest] = {}
        """The folders of the references that it holds open, with their manifests."""

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def load(self, folder: Path, *, keep: int) -> ReferenceManifest:
        """Verifies and opens a reference; of more than `keep` the one that was not used for longest is closed.

        Raises CorruptReference.
        """
        answer = self._ask({"load": str(folder), "keep": keep})
        manifest = ReferenceManifest.model_validate(answer["manifest"])
        known = self.loaded | {str(folder): manifest}
        self.loaded = {name: known[name] for name in answer["loaded"]}
        return manifest

    def realign(
        self,
        reference: Path,
        folder: Path,
        method: MethodParameters,
        out: Path | None,
        *,
        strengths: Sequence[float],
        output_rank: str,
        dropped_files: Sequence[str],
        progress: Progress,
    ) -> Report:
        """`safegraft.engine.pipeline.realign`, there; the reference was loaded before. Whatever `progress` raises stops
        it. Raises what the engine raises, OverLimit (`out_of_memory`, `time_limit`, `file_limit`), and SystemFault
        (`worker_lost`) where the process died.
        """
        wanted = {
            "reference": str(reference),
            "folder": str(folder),
            "method": method.model_dump(mode="json"),
            "out": str(out) if out is not None else None,
            "strengths": list(strengths),
            "output_rank": output_rank,
            "dropped_files": list(dropped_files),
            "seconds": self._limits.seconds,
        }
        return Report.model_validate(self._ask({"realign": wanted}, progress)["report"])

    def close(self) -> None:
        """Ends the process, whatever it does."""
        process, self._process, self.loaded = self._process, None, {}
        for end in (self._to, self._from):
            if end is not None:
                end.close()
        self._to = self._from = None
        if process is not None:
            _kill(process)

    def _ask(self, request: dict[str, Any], progress: Progress | None = None) -> dict[str, Any]:
        """The answer to a request. Unless that is one of those that the engine gives on purpose, the process is ended.

        Raises what the answer says.
        """
        if self._process is None:
            self._start()
        usable = False
        try:
            self._send(request)
            answer = self._answer()
            while "progress" in answer:
                assert progress is not None, "only a realignment reports progress"
                try:
                    progress(*answer["progress"])
                except BaseException:
                    self._send("stop")
                    usable = "stopped" in self._answer(STOP_SECONDS)
                    raise
                self._send("go")
                answer = self._answer()
            # After a limit or a fault nobody knows what else is left behind in there.
            usable = "bug" not in answer and answer.get("error", {}).get("kind") != OverLimit.__name__
        finally:
            if not usable:
                self.close()
        if "bug" in answer:
            log.error("the engine failed: %s", answer["bug"])
            raise SystemFault("The engine failed.")
        if "error" in answer:
            raise heard(answer["error"])
        return answer

    def _start(self) -> None:
        """Raises SystemFault where it does not come up."""
        theirs_in, self._to = _pipe()
        self._from, theirs_out = _pipe()
        given = {
            "device": self._settings.device,
            "memory": self._limits.memory,
            "file_bytes": self._limits.file_bytes,
            "parent": os.getpid(),
            "requests": theirs_in.fileno(),
            "answers": theirs_out.fileno(),
        }
        environment = {
            name: value
            for name, value in os.environ.items()
            if name in PASSED_ON or name.startswith(PASSED_ON_PREFIXES)
        }
        self._killed_by_us = False
        self._ended_for_memory = confine.killed_for_memory()
        self._process = subprocess.Popen(
            [sys.executable, "-m", self._program, json.dumps(given)],
            env=environment | OFFLINE,
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs_in.fileno(), theirs_out.fileno()),
        )
        weakref.finalize(self, _kill, self._process)  # with this object, should nobody close it
        theirs_in.close()
        theirs_out.close()
        try:
            boundary = self._answer(START_SECONDS)["boundary"]
        except BaseException:
            self.close()
            raise
        # Where the driver needs much more address space than memory: see docs/decisions/0008-limits.md.
        watched = self._settings.device != "cpu"
        self._resident_limit = confine.resident_memory(self._process.pid) + self._limits.memory if watched else 0
        log.info("the engine runs in process %d, kept off the network by the %s", self._process.pid, NAMES[boundary])

    def _send(self, message: Any) -> None:
        assert self._to is not None
        # Who is not there to read does not answer either, and that is where it is found.
        with contextlib.suppress(BrokenPipeError):
            self._to.send_bytes(json.dumps(message).encode())

    def _answer(self, seconds: float = math.inf) -> dict[str, Any]:
        """Raises OverLimit or SystemFault where none comes."""
        assert self._process is not None
        assert self._from is not None
        deadline = time.monotonic() + seconds
        while not self._from.poll(WATCH_SECONDS):
            if self._resident_limit and confine.resident_memory(self._process.pid) > self._resident_limit:
                self._killed_by_us = True
                self._process.kill()
            if time.monotonic() > deadline:
                raise SystemFault(f"The engine's process gave no answer for {seconds:.0f} s.")
        try:
            answer: dict[str, Any] = json.loads(self._from.recv_bytes(MAX_ANSWER_BYTES))
            return answer
        except (EOFError, OSError, ValueError):
            raise self._death() from None

    def _death(self) -> SystemFault:
        assert self._process is not None
        status = self._process.wait(STOP_SECONDS)
        log.error("the engine's process ended with status %d", status)
        if status == -signal.SIGXCPU:
            return OverLimit("It took more processor time than is allowed.", code="time_limit")
        for_memory = self._killed_by_us or confine.killed_for_memory() > self._ended_for_memory
        if status == -signal.SIGKILL and for_memory:
            return out_of_memory()
        return SystemFault("The engine's process died.", code="worker_lost")


def out_of_memory() -> OverLimit:
    return OverLimit(
        "It took more memory than is allowed.", code="out_of_memory", hint="SAFEGRAFT_JOB_MEMORY_BYTES is the limit."
    )


def _kill(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()


def _pipe() -> "tuple[Connection[Any, Any], Connection[Any, Any]]":
    """Where to read, and where to write. No sockets: these are for processes that may make none."""
    reader, writer = os.pipe()
    return Connection(reader, writable=False), Connection(writer, readable=False)
