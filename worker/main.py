"""What Celery loads: `celery -A worker.main worker`. Reads the environment once."""

import logging

from safegraft.dsse import load_signing_key
from safegraft.errors import SafegraftError
from worker.app import create_worker
from worker.settings import WorkerSettings

logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
settings = WorkerSettings()
if settings.signing_key is not None:
    try:
        load_signing_key(settings.signing_key)
    except SafegraftError as error:
        raise SystemExit(f"{error.code}: {error}") from None
app = create_worker(settings)
