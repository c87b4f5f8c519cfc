"""The engine's own process: `worker.engine` starts it and says what is to be done.

Its limits and the end of its network come before the first byte of a customer's. It ends with whoever started it.
"""

import errno
import json
import math
import os
import resource
import signal
import sys
import time
import traceback
from collections import OrderedDict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from safegraft import confine, logs
from safegraft.contracts.methods import METHOD_PARAMETERS
from safegraft.engine.pipeline import realign
from safegraft.engine.reference import LoadedReference
from safegraft.errors import OverLimit, SafegraftError, StorageFault, told
from safegraft.files import NO_SPACE
from safegraft.memory import prepare_memory
from worker.engine import out_of_memory

PROGRESS_SECONDS = 0.02


class Stopped(Exception):
    """Who asked wants no more of it."""


class Bench:
    """The references that are open, and the pipes."""

    def __init__(self, requests: "Connection[Any, Any]", answers: "Connection[Any, Any]", device: str) -> None:
        self._requests = requests
        self._answers = answers
        self._device = device
        self._loaded: OrderedDict[str, LoadedReference] = OrderedDict()
        self._told = "", 0.0

    def answer(self, message: dict[str, Any]) -> None:
        self._answers.send_bytes(json.dumps(message).encode())

    def hear(self) -> Any:
        """Raises EOFError where nobody asks any more."""
        return json.loads(self._requests.recv_bytes())

    def do(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request's answer; whatever fails is one too."""
        try:
            return self._load(**request) if "load" in request else self._realign(**request["realign"])
        except Stopped:
            return {"stopped": True}
        except SafegraftError as error:
            return {"error": told(error)}
        except MemoryError:
            return {"error": told(out_of_memory())}
        except (RuntimeError, OSError) as error:
            known = _known(error)
            return {"error": told(known)} if known is not None else {"bug": traceback.format_exc()[-10_000:]}
        except Exception:
            return {"bug": traceback.format_exc()[-10_000:]}

    def _load(self, load: str, keep: int) -> dict[str, Any]:
        if load not in self._loaded:
            while len(self._loaded) >= keep:
                self._loaded.popitem(last=False)[1].close()
            self._loaded[load] = LoadedReference(Path(load), self._device)
        self._loaded.move_to_end(load)
        return {"loaded": list(self._loaded), "manifest": self._loaded[load].manifest.model_dump(mode="json")}

    def _realign(
        self,
        reference: str,
        folder: str,
        method: dict[str, Any],
        out: str | None,
        strengths: list[float],
        output_rank: Any,
        dropped_files: list[str],
        seconds: float,
    ) -> dict[str, Any]:
        self._loaded.move_to_end(reference)
        self._told = "", 0.0
        used = resource.getrusage(resource.RUSAGE_SELF)
        # Soft, so that the next job has as much; what comes of it is SIGXCPU, which ends the process.
        until = math.ceil(used.ru_utime + used.ru_stime + seconds)
        confine.limit({resource.RLIMIT_CPU: (until, resource.getrlimit(resource.RLIMIT_CPU)[1])})
        report = realign(
            Path(folder),
            self._loaded[reference],
            METHOD_PARAMETERS.validate_python(method),
            Path(out) if out is not None else None,
            strengths=strengths,
            output_rank=output_rank,
            dropped_files=dropped_files,
            progress=self._progress,
        )
        return {"report": report.model_dump(mode="json")}

    def _progress(self, stage: str, done: int, total: int) -> None:
        # Who asked writes it down twice a second. A question and an answer for every module would take its time.
        now = time.monotonic()
        if stage == self._told[0] and done < total and now - self._told[1] < PROGRESS_SECONDS:
            return
        self._told = stage, now
        self.answer({"progress": [stage, done, total]})
        if self.hear() != "go":
            raise Stopped


def _known(error: RuntimeError | OSError) -> SafegraftError | None:
    """What torch and the system say where a limit was met."""
    if isinstance(error, OSError):
        if error.errno == errno.EFBIG:
            return OverLimit(
                "It wrote a larger file than is allowed.",
                code="file_limit",
                hint="SAFEGRAFT_JOB_FILE_BYTES is the limit.",
            )
        if error.errno == errno.ENOMEM:
            return out_of_memory()
        return StorageFault("The disk is full.") if error.errno in NO_SPACE else None
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text or "can't start new thread" in text:
        return out_of_memory()
    return None


def _confine(device: str, memory: int, file_bytes: int) -> confine.Boundary:
    if device != "cpu":
        # The driver's start opens what a job must not; it is over when this tensor is there.
        torch.ones(1, device=device)
    limits = {resource.RLIMIT_FSIZE: (file_bytes, file_bytes), resource.RLIMIT_CORE: (0, 0)}
    if device == "cpu":
        space = confine.address_space() + memory
        limits[resource.RLIMIT_AS] = (space, space)
    confine.limit(limits)
    confine.die_first()
    return confine.confine()


def main(given: dict[str, Any]) -> None:
    confine.end_with_parent(signal.SIGKILL)
    if os.getppid() != given["parent"]:
        return  # it was faster
    # A stop is the pool process's to decide: it may let the job end first.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logs.setup("json" if os.environ.get("SAFEGRAFT_LOG_FORMAT") == "json" else "text")
    prepare_memory()
    requests, answers = Connection(given["requests"], writable=False), Connection(given["answers"], readable=False)
    bench = Bench(requests, answers, given["device"])
    bench.answer({"boundary": _confine(given["device"], given["memory"], given["file_bytes"])})
    while True:
        try:
            request = bench.hear()
        except EOFError:
            return
        bench.answer(bench.do(request))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
