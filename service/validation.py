"""Judges deliveries in processes of their own, with limits of memory, time and disk.

What strangers send is unpacked and parsed there, so that a file that costs too much, or crashes its reader, costs one
process and not the gateway. Each is forked from a server that has everything imported already (some milliseconds), ends
with its answer, and does not outlive the gateway, however that ends. It is no sandbox against code of a stranger's:
none is ever run. Nothing that it runs opens a connection; the kernel refuses if something tried.
"""

import asyncio
import json
import logging
import multiprocessing
import os
import resource
import signal
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from safegraft import confine, errors
from safegraft.contracts.adapter import Adapter
from safegraft.ingest import Delivery, ingest
from service.turns import Turns

log = logging.getLogger("safegraft.validation")
# numpy before its threads are forbidden, and the module that the children enter by.
PRELOAD = ["service.single_threaded", "service.validation"]
MAX_ANSWER_BYTES = 2**25
ENDING_SECONDS = 5.0

Judge = Callable[[str, Delivery, int], Adapter]


@dataclass(frozen=True)
class Limits:
    """memory: bytes of address space; seconds: by the clock and of processor time; file_bytes: of each written file."""

    memory: int
    seconds: float
    file_bytes: int


class Validator:
    """At most `at_once` processes; who comes later waits, in turns of tenants. One a gateway; close it at its end."""

    def __init__(self, limits: Limits, at_once: int, judge: Judge = ingest) -> None:
        self._limits = limits
        self._judge = judge
        # Threads of its own: those that write uploads to disk must not wait behind those that wait for a judgement.
        self._turns = Turns(at_once, "validation")
        self._context = multiprocessing.get_context("forkserver")

    def start(self) -> None:
        """Starts the server that children are forked from, so that the first upload need not wait for its imports."""
        self._context.set_forkserver_preload(PRELOAD)
        # It ends with this process: it reads a pipe whose other end only we (and its children) hold.
        forkserver.ensure_running()

    def close(self) -> None:
        self._turns.close()

    async def judge(self, tenant: str, adapter_id: str, delivery: Delivery) -> Adapter:
        """The record of what a tenant delivered. Raises what `ingest` raises; TooLarge (`validation_too_large`),
        InvalidAdapter (`validation_timeout`, `validation_crashed`) where a limit was met or the process crashed.
        """
        return await asyncio.wrap_future(self._turns.submit(tenant, lambda: self._judge_apart(adapter_id, delivery)))

    def _judge_apart(self, adapter_id: str, delivery: Delivery) -> Adapter:
        ours, theirs = self._context.Pipe(duplex=False)
        work = (theirs, self._limits, self._judge, adapter_id, delivery)
        process = self._context.Process(target=_enter, args=work, daemon=True)
        try:
            process.start()
        except OSError as error:
            ours.close()
            raise errors.SystemFault("No process could be started to judge an upload.") from error
        finally:
            theirs.close()
        try:
            return _record(_answer(process, ours, self._limits.seconds))
        finally:
            ours.close()
            _finish(process)


def _finish(process: BaseProcess) -> None:
    # One that has answered ends by itself; killing it would be a race with whoever gets its number next.
    if process.exitcode is None:
        process.join(ENDING_SECONDS)
    if process.exitcode is None:
        process.kill()
        process.join()
    process.close()


def _answer(process: BaseProcess, pipe: "Connection[Any, Any]", seconds: float) -> dict[str, Any]:
    """What the child sent before its time was over. Raises TooLarge or InvalidAdapter where nothing came."""
    if not wait([pipe, process.sentinel], timeout=seconds):
        process.kill()
        raise _too_slow()
    try:
        answer: dict[str, Any] = json.loads(pipe.recv_bytes(MAX_ANSWER_BYTES))
        return answer
    except (EOFError, OSError, ValueError):
        process.join(ENDING_SECONDS)
    if process.exitcode == -signal.SIGXCPU:
        raise _too_slow()
    if process.exitcode == -signal.SIGKILL:
        # Not by us: by the kernel, because memory ran out.
        raise _too_large()
    log.error("a judging process ended with %s and no answer", process.exitcode)
    raise errors.InvalidAdapter(
        "The process that read this upload crashed.",
        code="validation_crashed",
        hint="Save the adapter again with a current PEFT; if that is refused too, tell the operator the request id.",
    )


def _record(answer: dict[str, Any]) -> Adapter:
    if "adapter" in answer:
        return Adapter.model_validate(answer["adapter"])
    if "bug" in answer:
        log.error("judging an upload failed: %s", answer["bug"])
        raise errors.SystemFault("Judging the upload failed.", code="validation_failed")
    raise errors.heard(answer["error"])


def _too_slow() -> errors.InvalidAdapter:
    return errors.InvalidAdapter(
        "Reading the upload took too long.",
        code="validation_timeout",
        hint="Send the files instead of an archive, and weights without needless tensors.",
    )


def _too_large() -> errors.TooLarge:
    return errors.TooLarge(
        "Reading the upload took more memory than is allowed.",
        code="validation_too_large",
        hint="Send the files instead of an archive, and weights with fewer tensors.",
    )


# In the child


def _enter(pipe: "Connection[Any, Any]", limits: Limits, judge: Judge, adapter_id: str, delivery: Delivery) -> None:
    """The whole life of a child: limits first, then one answer."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _limit(limits)
    answer: dict[str, Any]
    try:
        adapter = judge(adapter_id, delivery, limits.file_bytes)
        answer = {"adapter": adapter.model_dump(mode="json")}
    except errors.SafegraftError as error:
        answer = {"error": errors.told(error)}
    except MemoryError:
        answer = {"error": errors.told(_too_large())}
    except Exception:
        answer = {"bug": traceback.format_exc()[-10_000:]}
    pipe.send_bytes(json.dumps(answer).encode())


def _end_with_parent() -> None:
    """The gateway may be killed; a child that is in the middle of gigabytes would go on without anybody to tell."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _limit(limits: Limits) -> None:
    seconds = max(1, round(limits.seconds))
    wanted = {
        resource.RLIMIT_AS: (limits.memory, limits.memory),
        # A warning by SIGXCPU, which ends the process, and a second later the end by SIGKILL.
        resource.RLIMIT_CPU: (seconds, seconds + 1),
        resource.RLIMIT_FSIZE: (limits.file_bytes, limits.file_bytes),
        resource.RLIMIT_CORE: (0, 0),
    }
    # Whoever polls or asks after health goes first: reading an upload can wait, and takes a while anyway.
    os.nice(15)
    confine.limit(wanted)
    confine.confine()
