"""The audit log's rows that come from commands."""

import os
import pwd

from safegraft.commands.terminal import database_of, err
from safegraft.contracts.keys import DEFAULT_TENANT
from safegraft.settings import SharedSettings
from safegraft.stores.audit import AuditLog, Entry


def audited(settings: SharedSettings, action: str, target: str | None, *, tenant: str = DEFAULT_TENANT) -> None:
    """Notes what a command has just done. action: group and command, such as `keys.create`; target: an id, no secret.

    A row that cannot be written is said, but does not undo what was done, nor hide its result.
    """
    try:
        database = database_of(settings)
        try:
            AuditLog(database).add(Entry(tenant, f"cli:{_user()}", action, target, status=0))
        finally:
            database.dispose()
    except Exception as error:
        line = f"audit_failed: {action} of {target} was done, but is not in the audit log ({type(error).__name__})."
        err.print(line, style="red", markup=False, highlight=False, soft_wrap=True)


def _user() -> str:
    # Not from the environment, where it can be anybody.
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
