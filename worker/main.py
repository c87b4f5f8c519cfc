"""What Celery loads: `celery -A worker.main worker`. Reads the environment once."""

from safegraft import logs
from worker.app import create_worker
from worker.settings import WorkerSettings

settings = WorkerSettings()
logs.setup(settings.log_format)
app = create_worker(settings)
