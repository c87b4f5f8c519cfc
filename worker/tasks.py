"""The one task: claim → fetch → realign → render → publish, under a heartbeat."""

import contextvars
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from billiard.exceptions import TimeLimitExceeded, WorkerLostError
from celery import Task, shared_task
from celery.exceptions import SoftTimeLimitExceeded
from celery.signals import (
    celeryd_after_setup,
    setup_logging,
    task_failure,
    worker_init,
    worker_process_init,
    worker_process_shutdown,
    worker_ready,
    worker_shutdown,
    worker_shutting_down,
)

from safegraft import failpoints, logs, tracing
from safegraft.adapter import describe
from safegraft.contracts.adapter import Adapter, Origin
from safegraft.contracts.methods import strength_name, strength_of
from safegraft.contracts.queue import NOT_STARTED, REALIGN_TASK
from safegraft.contracts.realignment import Progress
from safegraft.contracts.reference import ReferenceManifest
from safegraft.contracts.report import Report, Subject
from safegraft.dsse import load_signing_key
from safegraft.errors import CorruptReference, LostLease, NotFound, OverLimit, SafegraftError, SystemFault, UserError
from safegraft.files import folder_bytes, has_room, sha256_file, side_car_folder
from safegraft.ids import new_id
from safegraft.provenance import (
    PROVENANCE,
    REPORT,
    Invocation,
    input_digests,
    make_statement,
    record_digests,
    write_provenance,
)
from safegraft.records import adapter_record
from safegraft.report import render
from safegraft.stores.adapters import AdapterStore
from safegraft.stores.database import open_database
from safegraft.stores.jobs import Claim, JobStore
from safegraft.stores.objects import open_objects, remove_or_leave, result_prefix
from safegraft.stores.references import open_references
from worker.engine import Engine
from worker.presence import Presence
from worker.settings import WorkerSettings
from worker.workspace import Workspace, workspace

log = logging.getLogger("safegraft.worker")


def worker_name() -> str:
    """Names the worker a process belongs to; the same in the parent and in its pool.

    SAFEGRAFT_WORKER_NAME promises that no other living worker on this database has that name.
    """
    return os.environ.get("SAFEGRAFT_WORKER_NAME") or f"{socket.gethostname()}-{_parent()}"


def _parent() -> int:
    # Pool processes are children of the worker's main process, which is the one that hears of their death.
    import billiard

    return os.getppid() if billiard.current_process().name != "MainProcess" else os.getpid()


class Cancelled(Exception):
    """The client asked for the job to stop."""

    fault = "user"


class Bench:
    """What one pool process keeps between jobs: stores, and the engine's process, which holds the references."""

    def __init__(self, settings: WorkerSettings, engine: Engine | None = None) -> None:
        self.settings = settings
        database = open_database(settings.database, upgrade=settings.database_upgrade)
        self.jobs = JobStore(
            database,
            lease_seconds=settings.lease_seconds,
            max_attempts=settings.max_attempts,
            retention=settings.retention_seconds,
        )
        self.adapters = AdapterStore(database)
        self.objects = open_objects(settings)
        self.registry = open_references(settings, self.objects)
        self.signer = load_signing_key(settings.signing_key) if settings.signing_key is not None else None
        self.engine = engine or Engine(settings)
        self._folders: dict[str, Path] = {}

    def warm(self) -> None:
        """Loads the newest references before the first job asks for them."""
        import matplotlib.font_manager  # noqa: F401 - in a new home it searches for fonts, for seconds

        for installed in reversed(self.registry.installed()[: self.settings.loaded_references]):
            self.reference(installed.id)

    def reference(self, reference_id: str) -> tuple[Path, ReferenceManifest]:
        """From the engine's memory, or verified and loaded; the one that was not used for longest makes room."""
        folder = self._folders.get(reference_id)
        if folder is None or str(folder) not in self.engine.loaded:
            try:
                folder = self.registry.folder(reference_id)
            except NotFound as error:
                # It was there when the job was accepted: the operator's move, not the customer's.
                raise SystemFault(f"{reference_id} is no longer installed.", code="reference_missing") from error
            try:
                self.engine.load(folder, keep=self.settings.loaded_references)
            except CorruptReference:
                self.registry.discard_copy(reference_id)
                raise
            self._folders[reference_id] = folder
            log.info("%s loaded", reference_id)
        return folder, self.engine.loaded[str(folder)]


class Heartbeat:
    """Renews a job's lease from a thread and carries its progress; `report` raises where the work must stop."""

    def __init__(self, jobs: JobStore, claim: Claim, period: float, attempt: tracing.Attempt) -> None:
        self._jobs = jobs
        self._claim = claim
        self._period = period
        self._attempt = attempt
        self._progress = Progress(stage="fetch", done=0, total=0)
        self._cancelled = self._lost = False
        self._stop = threading.Event()
        # With the context of the job, so that its log lines name it.
        run = contextvars.copy_context().run
        self._thread = threading.Thread(target=run, args=(self._run,), name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def report(self, stage: str, done: int = 0, total: int = 0) -> None:
        """Notes where the work is. Raises Cancelled or LostLease."""
        self._attempt.stage(stage)
        if stage == "patch" and done:
            failpoints.hit("worker.patching")
        self._progress = Progress(stage=stage, done=done, total=total)
        if self._lost:
            raise LostLease(f"{self._claim.id}: attempt {self._claim.attempt} was taken over.")
        if self._cancelled:
            raise Cancelled

    def _run(self) -> None:
        sent = None
        waited = 0.0
        # Progress is written when it moved, at most twice a second; an unchanged one only as often as the lease needs.
        while not self._stop.wait(0.5):
            waited += 0.5
            if self._progress == sent and waited < self._period:
                continue
            sent, waited = self._progress, 0.0
            try:
                self._cancelled = self._jobs.heartbeat(self._claim.id, self._claim.attempt, sent)
            except LostLease:
                self._lost = True
                return
            except Exception:
                log.warning("%s: a heartbeat failed; trying again", self._claim.id, exc_info=True)


class BenchTask(Task):  # type: ignore[type-arg]
    """A task whose process keeps a bench. A pool process is a new interpreter: it reads its environment itself."""

    @cached_property
    def bench(self) -> Bench:
        """Made in the process that uses it: connections do not survive a fork or spawn."""
        return Bench(WorkerSettings())


# Shared: a spawned pool process builds its own application, and takes its tasks from the modules that it includes.
@shared_task(base=BenchTask, bind=True, name=REALIGN_TASK, ignore_result=True)
def realign_job(task: BenchTask, ticket: str) -> None:
    """One message from the queue: a job may be due, this or another."""
    run_job(task.bench, ticket)


@setup_logging.connect
def configure_logging(**_: Any) -> None:
    """In every process of the worker, instead of Celery's own handlers."""
    logs.setup(WorkerSettings().log_format)
    failpoints.arm()


@celeryd_after_setup.connect
def quiet_spawning(**_: Any) -> None:
    """In the parent: else its children, before they have set up their logging, say in text that they were spawned."""
    os.environ["_MP_FORK_LOGLEVEL_"] = ""  # billiard's


@worker_process_init.connect
def warm(**_: Any) -> None:
    """Loads the references before the first job, in the pool process."""
    tracing.start("safegraft-worker")
    try:
        realign_job.bench.warm()
    except SafegraftError as error:
        # Its jobs will say so too, one by one, and be tried elsewhere.
        log.error("%s: %s", error.code, error)


@worker_process_shutdown.connect
def leave(**_: Any) -> None:
    """In a pool process that ends by itself: the engine ends too, and what was not sent yet is sent."""
    realign_job.bench.engine.close()
    tracing.stop()


_presence: list[Presence] = []
_pools: list[Any] = []
_stopping = threading.Event()


@worker_ready.connect
def arrive(sender: Any = None, **_: Any) -> None:
    """In the parent, once it takes messages: the worker is on the list."""
    _presence.append(Presence(WorkerSettings(), worker_name(), sender))
    _presence[-1].start()
    _pools.append(sender.pool)


@worker_shutdown.connect
def depart(**_: Any) -> None:
    """In the parent, when it has stopped."""
    while _presence:
        _presence.pop().stop()


@worker_shutting_down.connect
def stop(sig: str = "", how: str = "", **_: Any) -> None:
    """In the parent, within the handler of the signal: the job may end, for so long."""
    if how == "Warm":
        timer = threading.Timer(WorkerSettings().drain_seconds, hand_back)
        timer.daemon = True
        timer.start()


def hand_back() -> None:
    """Gives back what runs here, and ends the pool process, which else would go on with it."""
    _stopping.set()
    try:
        with _job_store() as jobs:
            for job_id in jobs.hand_back(worker_name(), "Its worker was stopped."):
                log.warning("%s: handed back, because this worker is stopping", job_id)
    except Exception:
        log.exception("jobs could not be handed back; their leases will run out")
    for pid in [pid for pool in _pools for pid in pool.info["processes"]]:
        # It removes its scratch folder, and its engine ends with it.
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


@task_failure.connect
def lost(sender: Any = None, args: Any = None, exception: Any = None, **_: Any) -> None:
    """In the parent, when its child was killed: gives the job back at once instead of after the lease."""
    killed = isinstance(exception, WorkerLostError | TimeLimitExceeded)
    if getattr(sender, "name", "") == REALIGN_TASK and args and killed:
        # One that this worker ended, because it is stopping, is no news: its job was handed back.
        log.log(logging.INFO if _stopping.is_set() else logging.ERROR, "a process of this worker died (%s)", exception)
        with _job_store() as jobs:
            for job_id in jobs.release_from(args[0], worker_name(), "Its worker process died."):
                log.warning("%s: taken back from a process that died", job_id)


@worker_init.connect
def recover(sender: Any = None, **_: Any) -> None:
    """In the parent, before it takes work: references are whole, and what its predecessor of the same name held when
    it was killed is given back. Ends the worker with NOT_STARTED where a reference is not whole."""
    settings = WorkerSettings()
    try:
        open_references(settings).check()
    except CorruptReference as error:
        log.critical("not started: %s: %s", error.code, error)
        raise SystemExit(NOT_STARTED) from None
    open_objects(settings).sweep()
    if settings.log_format == "json":
        sender.quiet = True  # no banner: it is text
    try:
        open_database(settings.database, upgrade=settings.database_upgrade).dispose()
    except SafegraftError as error:
        # Celery would log it and go on, with processes that can do nothing.
        raise SystemExit(f"{error.code}: {error}") from None
    if os.environ.get("SAFEGRAFT_WORKER_NAME"):
        with _job_store() as jobs:
            for job_id in jobs.release_all(worker_name(), "Its worker was killed."):
                log.warning("%s: taken back from a killed worker", job_id)


@contextmanager
def _job_store() -> Iterator[JobStore]:
    """For the parent, which keeps no connection: its pool processes do the work."""
    settings = WorkerSettings()
    engine = open_database(settings.database, upgrade=settings.database_upgrade)
    try:
        yield JobStore(
            engine,
            lease_seconds=settings.lease_seconds,
            max_attempts=settings.max_attempts,
            retention=settings.retention_seconds,
        )
    finally:
        engine.dispose()


def run_job(bench: Bench, ticket: str) -> None:
    """One attempt at the job whose turn it is. Whatever happens, the record says it afterwards; nothing is raised but
    for a kill."""
    failpoints.hit("worker.received")
    if not _has_room(bench):
        # No fault of the job's, whose attempts would be spent in seconds: it waits, and is announced again.
        log.warning("%s: left in the queue; this machine's disk is full", ticket)
        return
    claim = bench.jobs.claim_next(worker_name(), ticket)
    if claim is None:
        log.info("%s: nothing to do", ticket)
        return
    with logs.bound(job_id=claim.id, attempt=claim.attempt, trace_id=tracing.trace_id(claim.traceparent)):
        _run_claimed(bench, claim)


def _has_room(bench: Bench) -> bool:
    folders = [folder for folder in (bench.settings.data, bench.objects.scratch) if folder.exists()]
    try:
        return has_room(*folders) if folders else True
    except OSError:
        return True  # the attempt will say what it is


def _run_claimed(bench: Bench, claim: Claim) -> None:
    job_id = claim.id
    failpoints.hit("worker.claimed")
    log.info("%s: attempt %d", job_id, claim.attempt)
    began = time.monotonic()
    try:
        with (
            tracing.Attempt(claim.traceparent, job_id, claim.attempt) as attempt,
            Heartbeat(bench.jobs, claim, bench.settings.lease_seconds / 4, attempt) as beat,
        ):
            _attempt(bench, claim, beat)
        log.info("%s: succeeded in %.3f s", job_id, time.monotonic() - began)
    except UserError as error:
        log.info("%s: %s %s", job_id, error.code, error)
        bench.jobs.fail(job_id, claim.attempt, error)
    except Cancelled:
        bench.jobs.cancelled(job_id, claim.attempt)
    except LostLease:
        log.warning("%s: attempt %d was taken over", job_id, claim.attempt)
    except SoftTimeLimitExceeded:
        bench.jobs.release(job_id, claim.attempt, "It took too long.", code="time_limit")
    except OverLimit as error:
        # Ours and not the customer's: what the gateway accepted is within the limits that are told to customers.
        log.error("%s: attempt %d: %s %s", job_id, claim.attempt, error.code, error)
        bench.jobs.release(job_id, claim.attempt, error.message, code=error.code)
    except Exception as error:
        log.exception("%s: attempt %d failed", job_id, claim.attempt)
        # Only codes of ours: SQLAlchemy's errors have a `code` as well.
        code = error.code if isinstance(error, SafegraftError) else "internal_error"
        bench.jobs.release(job_id, claim.attempt, "It failed on our side.", code=code)


def _attempt(bench: Bench, claim: Claim, beat: Heartbeat) -> None:
    started = time.time()
    beat.report("fetch")
    began = time.monotonic()
    reference, _ = bench.reference(claim.reference_id)
    customer = bench.adapters.get(claim.tenant, claim.adapter_id)
    with workspace(bench.objects, claim, bench.adapters.prefix(claim.tenant, claim.adapter_id)) as desk:
        failpoints.hit("worker.fetched")
        patching = claim.request.mode == "patch"
        fetched = time.monotonic()
        report = bench.engine.realign(
            reference,
            desk.adapter,
            claim.request.method,
            desk.result if patching else None,
            strengths=claim.request.strengths,
            output_rank=claim.request.output_rank,
            dropped_files=customer.dropped_files,
            progress=beat.report,
        )
        beat.report("publish")
        publishing = time.monotonic()
        subject = Subject(adapter=customer.name or customer.id, realignment_id=claim.id, written_at=int(time.time()))
        report = report.model_copy(update={"subject": subject})
        render(report, desk.report / "report")
        failpoints.hit("worker.written")
        timings = {**report.timings, "fetch": fetched - began, "render": time.monotonic() - publishing}
        _publish(bench, claim, desk, customer, report, timings, started)


def _publish(
    bench: Bench,
    claim: Claim,
    desk: Workspace,
    customer: Adapter,
    report: Report,
    timings: dict[str, float],
    started: float,
) -> None:
    prefix = result_prefix(claim.tenant, claim.id, claim.attempt)
    published: list[tuple[Adapter, str, str]] = []
    began = time.monotonic()
    strengths = [variant.strength for variant in report.variants]
    # By its strength also where there is one: the results of several jobs on one adapter are told apart by it.
    own = strength_of(report.method.parameters)
    alone = "" if own is None else strength_name(own)
    try:
        if report.mode == "patch":
            for name in map(strength_name, strengths) if strengths else [""]:
                how = f"{report.method.type} {name or alone}"
                published.append(_published(bench, claim, desk.result / name, customer, how))
        side_cars = side_car_folder(desk.result)
        names = sorted(path.name for path in side_cars.glob("*.safetensors"))
        own_bytes = 0
        if names:
            own_bytes += folder_bytes(side_cars)
            bench.objects.publish(side_cars, f"{prefix}/side_car")
        _attest(bench, claim, desk, [adapter for adapter, _, _ in published], report, started)
        own_bytes += folder_bytes(desk.report)
        bench.objects.publish(desk.report, f"{prefix}/report")
    except BaseException:
        # No row names these files yet, and none will: the next attempt has a prefix of its own.
        remove_or_leave(bench.objects, prefix)
        raise
    timings = {**timings, "publish": time.monotonic() - began}
    failpoints.hit("worker.published")
    # The commit point: files without this row are never shown, and this row is only written once.
    if not bench.jobs.succeed(
        claim.id,
        claim.attempt,
        published,
        strengths=strengths,
        side_cars=names,
        own_bytes=own_bytes,
        summaries=[variant.summary for variant in report.variants] or [report.summary],
        modules=report.summary.modules,
        method=report.method.type,
        timings=timings,
    ):
        remove_or_leave(bench.objects, prefix)
        raise LostLease(f"{claim.id}: attempt {claim.attempt} was taken over before it could publish.")
    failpoints.hit("worker.committed")


def _attest(bench: Bench, claim: Claim, desk: Workspace, made: list[Adapter], report: Report, started: float) -> None:
    """Writes the result's provenance beside its report."""
    names = [strength_name(variant.strength) for variant in report.variants] or [""]
    outputs: dict[str, str] = {}
    for adapter, name in zip(made, names, strict=False):  # none was made where the job only measured
        outputs |= record_digests(adapter.files, name)
    _, manifest = bench.reference(claim.reference_id)
    statement = make_statement(
        report,
        manifest,
        invocation=Invocation(id=f"{claim.id}/{claim.attempt}", builder=bench.settings.builder_id, started=started),
        outputs=outputs,
        inputs=input_digests(desk.adapter, report),
        report_sha256=sha256_file(desk.report / REPORT),
    )
    write_provenance(statement, desk.report / PROVENANCE, bench.signer)


def _published(bench: Bench, claim: Claim, folder: Path, customer: Adapter, how: str) -> tuple[Adapter, str, str]:
    """Puts one patched adapter among the objects; returns its record, tenant and prefix."""
    wanted = claim.request.name
    adapter = adapter_record(
        new_id("adp"),
        wanted if wanted and not claim.request.strengths else f"{(wanted or customer.name)[:180]} ({how.strip()})",
        folder,
        describe(folder, own=True),
        dropped=[],
        origin=Origin(realignment_id=claim.id),
    )
    if adapter.sha256 == customer.sha256:
        adapter = adapter.model_copy(update={"origin": Origin(realignment_id=claim.id, unchanged=True)})
    prefix = f"{result_prefix(claim.tenant, claim.id, claim.attempt)}/adapter/{adapter.id}"
    bench.objects.publish(folder, prefix)
    return adapter, claim.tenant, prefix
