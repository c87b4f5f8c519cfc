"""Waking up workers: a message with a job's id, by the task's name, so that no worker code is imported.

The message may be lost or doubled; the job record decides (see `safegraft.stores.jobs`).
"""

import logging

from celery import Celery
from kombu.exceptions import OperationalError

from safegraft import failpoints
from safegraft.contracts.queue import REALIGN_QUEUE, REALIGN_TASK
from safegraft.stores.jobs import JobStore
from service.settings import GatewaySettings

log = logging.getLogger("safegraft.dispatcher")
# A kept connection may be stale: once more, at once. By itself kombu sleeps for two seconds before that, and whoever
# asks after health, or stops the gateway, waits with it.
RETRIES, PAUSE = 1, 0
# Of a broker that takes connections and says nothing. Whoever asks after health gives up after a second or two.
PING_SECONDS = 0.5


class Queue:
    """The broker, as the gateway sees it."""

    def __init__(self, redis_url: str) -> None:
        self._celery = Celery("safegraft", broker=redis_url, set_as_current=False)
        self._celery.conf.update(
            task_ignore_result=True,
            broker_connection_retry_on_startup=True,
            broker_transport_options={
                "socket_connect_timeout": 2,
                "socket_timeout": 5,
                "max_retries": RETRIES,
                "interval_start": PAUSE,
            },
            task_publish_retry=False,
        )

    def submit(self, job_id: str) -> None:
        """Announces a job. Raises kombu's OperationalError where the broker does not answer."""
        self._celery.send_task(REALIGN_TASK, args=[job_id], queue=REALIGN_QUEUE, ignore_result=True)

    def ping(self) -> bool:
        """Does the broker answer?"""
        try:
            soon = {"socket_connect_timeout": PING_SECONDS, "socket_timeout": PING_SECONDS}
            with self._celery.connection_for_read(transport_options=soon) as connection:
                connection.ensure_connection(max_retries=RETRIES, interval_start=PAUSE, timeout=1)
            return True
        except (OperationalError, OSError):
            return False

    def close(self) -> None:
        self._celery.close()


class Dispatcher:
    """Announces due jobs and takes back those whose worker fell silent; one `turn` is one round of its loop."""

    def __init__(self, settings: GatewaySettings, jobs: JobStore, queue: Queue) -> None:
        self._limit = settings.announce_limit
        self._jobs = jobs
        self._queue = queue

    def turn(self) -> int:
        """One round: reap, then announce. Returns how many jobs were announced."""
        for job_id in self._jobs.reap():
            log.warning("%s: its worker fell silent", job_id)
        room = self._limit - self._jobs.waiting()
        due = self._jobs.due(room) if room > 0 else []
        if due:
            failpoints.hit("dispatcher.due")
        for sent, job_id in enumerate(due):
            try:
                self._queue.submit(job_id)
            except Exception:
                # Nobody heard of these: without this they would wait for as long as the broker was away, and longer.
                self._jobs.unannounce(due[sent:])
                raise
        return len(due)
