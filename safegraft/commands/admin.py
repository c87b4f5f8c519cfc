"""`safegraft admin`: what an operator does to a service that runs. It works on the database, without the gateway."""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from safegraft.commands.audit import audited
from safegraft.commands.terminal import (
    Data,
    Json,
    database_of,
    err,
    installed_database_of,
    out,
    print_json,
    print_list,
    settings_for,
)
from safegraft.contracts.keys import Limits
from safegraft.errors import Conflict, InvalidParameter
from safegraft.stores import options, overview
from safegraft.stores.database import database_status, upgrade_database
from safegraft.stores.garbage import GarbageCollector
from safegraft.stores.jobs import JobStore
from safegraft.stores.keys import KeyStore
from safegraft.stores.objects import open_objects
from safegraft.stores.references import ReferenceRegistry, open_references
from safegraft.stores.workers import WorkerStore
from safegraft.vault import open_vault

app = typer.Typer(help="Look after a running service.", no_args_is_help=True)
references_app = typer.Typer(
    help="Install and remove references, and say which one is preferred.", no_args_is_help=True
)
app.add_typer(references_app, name="references")
database_app = typer.Typer(help="Look at the database's schema, and upgrade it.", no_args_is_help=True)
app.add_typer(database_app, name="database")
DEFAULT = "default"
Identity = Annotated[str, typer.Argument(help="The reference's id, ref_…")]


@app.command("jobs")
def jobs(
    dead: Annotated[
        bool, typer.Option("--dead", envvar="SAFEGRAFT_DEAD", help="Those that ended because of our own failures.")
    ] = False,
    limit: Annotated[int, typer.Option(envvar="SAFEGRAFT_LIMIT", min=1, max=10000, help="How many at most.")] = 100,
    data: Data = Path("var"),
    as_json: Json = False,
) -> None:
    """Lists the jobs of all tenants that are queued or running, newest first."""
    states = ["dead"] if dead else ["queued", "running"]
    found = overview.jobs(installed_database_of(settings_for(data)), states, limit=limit)
    if as_json:
        print_json([asdict(job) for job in found])
        return
    columns = ("id", "tenant", "state", "attempt", "method", "error", "worker", "made", "ended")
    rows = [
        (
            job.id,
            job.tenant,
            job.state,
            str(job.attempt),
            job.method,
            job.error or "",
            (job.worker or "") if job.state == "running" else "",
            _when(job.created_at),
            _when(job.finished_at),
        )
        for job in found
    ]
    _print_table(columns, rows)


@app.command("requeue")
def requeue(
    job_id: Annotated[str, typer.Argument(metavar="JOB", help="The job's id, rlg_…")],
    data: Data = Path("var"),
    as_json: Json = False,
) -> None:
    """Queues a dead job once more, with as many attempts as a new one."""
    settings = settings_for(data)
    store = JobStore(
        installed_database_of(settings), lease_seconds=settings.lease_seconds, max_attempts=settings.max_attempts
    )
    attempts = store.requeue(job_id)
    audited(settings, "admin.requeue", job_id)
    if as_json:
        print_json({"id": job_id, "state": "queued", "attempts_before": attempts})
    else:
        err.print(f"{job_id} is queued again, after {attempts} attempts.", highlight=False)


@app.command("workers")
def workers(data: Data = Path("var"), as_json: Json = False) -> None:
    """Lists the workers. Silent ones have not reported themselves for longer than a lease."""
    found = _workers(data).all()
    if as_json:
        print_json([asdict(worker) for worker in found])
        return
    rows = [
        (
            worker.name,
            worker.state,
            f"{worker.seen_seconds:.0f} s ago",
            worker.device,
            worker.version,
            _when(worker.started_at),
        )
        for worker in found
    ]
    _print_table(("name", "state", "seen", "device", "version", "started"), rows)


@app.command("drain")
def drain(
    worker: Annotated[str, typer.Argument(help="The worker's name, as `safegraft admin workers` shows it.")] = "",
    every: Annotated[bool, typer.Option("--all", envvar="SAFEGRAFT_ALL", help="All workers that there are.")] = False,
    undo: Annotated[bool, typer.Option("--undo", envvar="SAFEGRAFT_UNDO", help="Let it take jobs again.")] = False,
    data: Data = Path("var"),
    as_json: Json = False,
) -> None:
    """Lets a worker finish its job and take no new one, from now on and until --undo or until it is stopped."""
    if bool(worker) == every:
        raise InvalidParameter("Name one worker, or --all.", param="worker")
    names = _workers(data).drain(worker or None, undo=undo)
    for name in names:
        audited(settings_for(data), "admin.undrain" if undo else "admin.drain", name)
    if as_json:
        print_json({"workers": names, "draining": not undo})
    else:
        word = "takes jobs again" if undo else "takes no new jobs"
        err.print("\n".join(f"{name} {word}." for name in names) or "There is no worker.", highlight=False)


@app.command("limits")
def limits(
    tenant: Annotated[str, typer.Argument()],
    max_bytes: Annotated[
        str, typer.Option(metavar="N|default", envvar="SAFEGRAFT_MAX_BYTES", help="That it may store.")
    ] = "",
    max_jobs: Annotated[
        str, typer.Option(metavar="N|default", envvar="SAFEGRAFT_MAX_JOBS", help="That it may have open.")
    ] = "",
    max_requests: Annotated[
        str,
        typer.Option(
            "--max-requests",
            "--max-requests-per-second",
            metavar="N|default",
            # Not SAFEGRAFT_MAX_REQUESTS_PER_SECOND, which is the gateway's setting for those without a limit.
            envvar="SAFEGRAFT_MAX_REQUESTS",
            help="In a second.",
        ),
    ] = "",
    show: Annotated[bool, typer.Option("--show", envvar="SAFEGRAFT_SHOW", help="Only show them.")] = False,
    data: Data = Path("var"),
    as_json: Json = False,
) -> None:
    """Sets a tenant's own limits; `default` takes one back. What is not named stays. Gateways follow within seconds."""
    settings = settings_for(data)
    store = KeyStore(installed_database_of(settings), open_vault(settings))
    found = store.limits(tenant)
    given = {"max_bytes": max_bytes, "max_jobs": max_jobs, "max_requests_per_second": max_requests}
    changes = {name: _limit(name, text) for name, text in given.items() if text}
    if not show:
        if not changes:
            raise InvalidParameter("Name a limit to set, or --show.", param="--show")
        found = found.model_copy(update=changes)
        store.set_limits(tenant, found)
        audited(settings, "admin.limits", tenant, tenant=tenant)
    _print_limits(tenant, found, as_json)


@app.command("gc")
def gc(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", envvar="SAFEGRAFT_DRY_RUN", help="Remove nothing; say what would be.")
    ] = False,
    data: Data = Path("var"),
    as_json: Json = False,
) -> None:
    """Removes what has expired, and bytes that belong to nothing. Gateways do the same every hour."""
    settings = settings_for(data)
    collected = GarbageCollector(installed_database_of(settings), open_objects(settings)).collect(dry_run=dry_run)
    if as_json:
        removed = {kind: asdict(item) for kind, item in collected.kinds.items()}
        print_json({"dry_run": dry_run, "removed": removed, "failed": collected.failed})
        return
    rows = [(kind.replace("_", " "), str(item.count), str(item.bytes)) for kind, item in collected.kinds.items()]
    _print_table(("would be removed" if dry_run else "removed", "count", "bytes"), rows)
    if collected.failed:
        err.print(f"{collected.failed} things could not be removed; the log names them.", highlight=False)


@references_app.command("list")
def list_references(data: Data = Path("var"), as_json: Json = False) -> None:
    """Lists the installed references, newest first, and which one is preferred."""
    preferred = options.get(database_of(settings_for(data)), options.DEFAULT_REFERENCE)
    found = _registry(data).installed()
    if as_json:
        shown = ({"id": item.id, "name": item.manifest.name, "default": item.id == preferred} for item in found)
        print_json(list(shown))
        return
    rows = [(item.id, item.manifest.name, "default" if item.id == preferred else "") for item in found]
    _print_table(("id", "name", ""), rows)


@references_app.command("add")
def add_reference(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False)],
    data: Data = Path("var"),
    as_json: Json = False,
) -> None:
    """Verifies a bundle and installs it; the service sees it at once."""
    installed = _registry(data).add(folder)
    audited(settings_for(data), "admin.references.add", installed.id)
    if as_json:
        print_json({"id": installed.id, "name": installed.manifest.name})
    else:
        out.print(installed.id, markup=False, highlight=False)


@references_app.command("remove")
def remove_reference(reference: Identity, data: Data = Path("var"), as_json: Json = False) -> None:
    """Uninstalls a reference that no queued or running job uses."""
    registry, database = _registry(data), database_of(settings_for(data))
    registry.get(reference)
    job = overview.reading_reference(database, reference)
    if job is not None:
        raise Conflict(
            f"{reference} is used by {job}.",
            code="reference_in_use",
            param="reference",
            hint="Wait until its jobs have ended: safegraft admin jobs.",
        )
    registry.remove(reference)
    audited(settings_for(data), "admin.references.remove", reference)
    if options.get(database, options.DEFAULT_REFERENCE) == reference:
        options.put(database, options.DEFAULT_REFERENCE, None)
    if as_json:
        print_json({"id": reference, "removed": True})
    else:
        err.print(f"{reference} is removed.", highlight=False)


@references_app.command("default")
def default_reference(
    reference: Annotated[str, typer.Argument(help="The reference's id, or `none`.")],
    data: Data = Path("var"),
    as_json: Json = False,
) -> None:
    """The reference that is taken where a request names none and several fit."""
    identity = None if reference == "none" else _registry(data).get(reference).id
    options.put(database_of(settings_for(data)), options.DEFAULT_REFERENCE, identity)
    audited(settings_for(data), "admin.references.default", identity)
    if as_json:
        print_json({"default": identity})
    else:
        err.print(f"{identity} is preferred." if identity else "None is preferred.", highlight=False)


@database_app.command("status")
def status(data: Data = Path("var"), as_json: Json = False) -> None:
    """Says at which revision the database is, and which ones an upgrade would apply. Changes nothing."""
    found = database_status(settings_for(data).database)
    if as_json:
        print_json(asdict(found))
        return
    rows = [
        ("state", found.state),
        ("revision", found.revision or "none"),
        ("this version's", found.head),
        ("to be applied", ", ".join(found.pending) or "none"),
    ]
    _print_table(("database", ""), rows)


@database_app.command("upgrade")
def upgrade(data: Data = Path("var"), as_json: Json = False) -> None:
    """Brings the database to this version's revision, at once or not at all. Stop gateways and workers, and back it up
    first: there is no downgrade, only the backup."""
    settings = settings_for(data)
    if not as_json:
        err.print("There is no way back but a backup of the database.", highlight=False)
    before, applied = upgrade_database(settings.database)
    if applied:
        audited(settings, "admin.database.upgrade", applied[-1])
    if as_json:
        print_json({"before": before.revision, "revision": before.head, "applied": applied})
    elif applied:
        err.print(
            f"The database is at revision {before.head} now; it was at {before.revision or 'none'}.", highlight=False
        )
    else:
        err.print(f"The database was at revision {before.head} already.", highlight=False)


def _registry(data: Path) -> ReferenceRegistry:
    return open_references(settings_for(data))


def _workers(data: Path) -> WorkerStore:
    settings = settings_for(data)
    return WorkerStore(installed_database_of(settings), lease_seconds=settings.lease_seconds)


def _limit(name: str, text: str) -> int | None:
    if text == DEFAULT:
        return None
    # Within what every database holds; requests and jobs in 32 bits.
    most = 2**63 - 1 if name == "max_bytes" else 2**31 - 1
    if not text.isascii() or not text.isdecimal() or int(text[:20]) > most:
        option = "--" + name.replace("_", "-")
        raise InvalidParameter(f"{option} {text!r}: expected a number up to {most}, or default.", param=option)
    return int(text)


def _print_limits(tenant: str, found: Limits, as_json: bool) -> None:
    if as_json:
        print_json({"tenant": tenant, **found.model_dump()})
        return
    rows = [(name, DEFAULT if value is None else str(value)) for name, value in found.model_dump().items()]
    _print_table(("limit", tenant), rows)


def _print_table(columns: Sequence[str], rows: Sequence[tuple[str, ...]]) -> None:
    table = Table(box=None)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    print_list(table)


def _when(seconds: float | None) -> str:
    return "" if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}"
