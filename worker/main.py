"""What Celery loads: `celery -A worker.main worker`. Reads the environment once."""

import os

from worker.offline import OFFLINE

os.environ.update(OFFLINE)


from safegraft import logs
from safegraft.dsse import load_signing_key
from safegraft.errors import SafegraftError
from safegraft.settings import warn_of_mistyped
from worker.app import create_worker
from worker.settings import WorkerSettings

settings = WorkerSettings()
logs.setup(settings.log_format)
warn_of_mistyped(WorkerSettings)
if settings.signing_key is not None:
    try:
        load_signing_key(settings.signing_key)
    except SafegraftError as error:
        raise SystemExit(f"{error.code}: {error}") from None
app = create_worker(settings)
