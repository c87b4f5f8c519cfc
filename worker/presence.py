"""The worker's main process reports itself, and stops taking jobs while an operator wants it to drain."""

import logging
import threading
from typing import Any

import safegraft
from safegraft.contracts.queue import REALIGN_QUEUE
from safegraft.stores.database import open_database
from safegraft.stores.workers import WorkerStore
from worker.settings import WorkerSettings

log = logging.getLogger("safegraft.worker")
BEAT_SECONDS = 10.0


class Presence:
    """A thread that beats until it is stopped. `consumer` is Celery's, which takes the messages."""

    def __init__(self, settings: WorkerSettings, name: str, consumer: Any) -> None:
        self._settings = settings
        self._name = name
        self._consumer = consumer
        self._draining = False
        self._period = min(BEAT_SECONDS, settings.lease_seconds / 4)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="presence", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Takes the worker off the list."""
        self._stop.set()
        self._thread.join(timeout=self._period)

    def _run(self) -> None:
        store = None
        while True:
            try:
                started = store is None
                store = store or self._open()
                self._follow(store.beat(self._name, self._settings.device, safegraft.__version__, started=started))
            except Exception:
                log.warning("the worker could not report itself; trying again", exc_info=True)
            if self._stop.wait(self._period):
                break
        try:
            if store is not None:
                store.leave(self._name)
        except Exception:
            log.warning("the worker could not take itself off the list", exc_info=True)

    def _open(self) -> WorkerStore:
        settings = self._settings
        database = open_database(settings.database, upgrade=settings.database_upgrade)
        return WorkerStore(database, lease_seconds=settings.lease_seconds)

    def _follow(self, draining: bool) -> None:
        if draining == self._draining:
            return
        self._draining = draining
        log.warning("draining: no new jobs are taken" if draining else "no longer draining")
        # In Celery's own loop: its consumer is not made for other threads.
        change = self._consumer.cancel_task_queue if draining else self._consumer.add_task_queue
        self._consumer.call_soon(change, REALIGN_QUEUE)
