"""The Celery application: one queue, one task, delivery settings with their reasons."""

from celery import Celery

from safegraft.contracts.queue import REALIGN_QUEUE
from worker.settings import WorkerSettings


def create_worker(settings: WorkerSettings) -> Celery:
    """The application; the pool's processes open database and references themselves, after they were spawned."""
    app = Celery("safegraft", broker=settings.redis_url, include=["worker.tasks"])
    app.conf.update(
        task_default_queue=REALIGN_QUEUE,
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        # A message is only a wake-up call and the record decides, so acknowledging late is about speed, not safety; a
        # dead child's message is not redelivered, because a poisonous job would come back for ever.
        task_acks_late=True,
        task_reject_on_worker_lost=False,
        worker_prefetch_multiplier=1,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        # Only a backstop. Shorter than a task it would start the task again while it runs.
        broker_transport_options={"visibility_timeout": 6 * 3600},
        task_soft_time_limit=settings.job_seconds,
        task_time_limit=settings.job_seconds + 60,
        worker_max_tasks_per_child=settings.jobs_per_process,
        # One process with the references in memory; spawned, because a child that was forked after torch had used its
        # threads can hang in the first matrix product.
        worker_pool="prefork",
        worker_concurrency=1,
        worker_pool_start_method="spawn",
        # How long a new pool process may take until it is ready. It imports torch and verifies references; with the
        # default of 4 s Celery kills a replacement before it is ready, and the next, for ever.
        worker_proc_alive_timeout=600.0,
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
    )
    return app
