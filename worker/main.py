"""What Celery loads: `celery -A worker.main worker`. Reads the environment once."""

import logging

from worker.app import create_worker
from worker.settings import WorkerSettings

logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
app = create_worker(WorkerSettings())
