"""What Prometheus is told: of this process its requests, of the whole installation what the database knows.

The database's numbers are the same from every gateway. No label ever holds a tenant, an id or a path that a client made
up: routes are templates, methods the known ones.
"""

import logging
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError

import safegraft
from safegraft.stores import overview, totals
from safegraft.stores.workers import WorkerStore
from service.shares import Shares

log = logging.getLogger("safegraft.metrics")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
# From a poll that the cache answers to the upload of some gigabytes.
SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0, 300.0)


class HttpMetrics:
    """Requests of this process. Cheap: the children of each label set are kept."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "safegraft_http_requests",
            "Requests that were answered, or (499) given up by the client.",
            ["route", "method", "status"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "safegraft_http_request_duration_seconds",
            "From the request's head to the answer's last byte.",
            ["route", "method"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self._uploads = Gauge("safegraft_active_uploads", "Uploads that are being received.", registry=self.registry)
        self._installation: Installation | None = None
        self._children: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        ProcessCollector(registry=self.registry)

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        key = (route, method if method in METHODS else "other", status)
        children = self._children.get(key)
        if children is None:
            children = (self._requests.labels(*key), self._seconds.labels(*key[:2]))
            self._children[key] = children
        children[0].inc()
        children[1].observe(seconds)

    def watch(self, database: Engine, workers: WorkerStore, slots: Shares) -> None:
        """Adds what is only known once the gateway has started."""
        self._uploads.set_function(lambda: slots.taken)
        if self._installation is not None:
            self.registry.unregister(self._installation)
        self._installation = Installation(database, workers)
        self.registry.register(self._installation)


class Installation(Collector):
    """Read from the database whenever somebody asks."""

    def __init__(self, database: Engine, workers: WorkerStore) -> None:
        self._database = database
        self._workers = workers

    def describe(self) -> Iterable[Metric]:
        return []  # without it, registering would ask the database

    def collect(self) -> Iterator[Metric]:
        build = GaugeMetricFamily("safegraft_build_info", "Always 1; the label tells the version.", labels=["version"])
        build.add_metric([safegraft.__version__], 1)
        yield build
        up = GaugeMetricFamily(
            "safegraft_database_up", "Whether the database answered; without it the rest is missing."
        )
        try:
            found = [*self._queue(), *self._present(), *self._totals()]
        except SQLAlchemyError:
            log.warning("the database does not answer", exc_info=True)
            found = []
        up.add_metric([], 1 if found else 0)
        yield up
        yield from found

    def _queue(self) -> Iterator[Metric]:
        queue = overview.queue(self._database)
        jobs = GaugeMetricFamily("safegraft_jobs", "Jobs that have not ended.", labels=["state"])
        jobs.add_metric(["queued"], queue.queued)
        jobs.add_metric(["running"], queue.running)
        yield jobs
        oldest = GaugeMetricFamily(
            "safegraft_queue_oldest_age_seconds", "For how long the oldest queued job has been waiting; 0 without one."
        )
        oldest.add_metric([], queue.oldest_seconds)
        yield oldest

    def _present(self) -> Iterator[Metric]:
        workers = self._workers.all()
        states = GaugeMetricFamily("safegraft_workers", "Workers; silent: for longer than a lease.", labels=["state"])
        for state in ("live", "draining", "silent"):
            states.add_metric([state], sum(worker.state == state for worker in workers))
        yield states
        silence = GaugeMetricFamily(
            "safegraft_worker_silence_seconds", "Since the worker last reported itself.", labels=["worker"]
        )
        for worker in workers:
            silence.add_metric([worker.name], worker.seen_seconds)
        yield silence

    def _totals(self) -> Iterator[Metric]:
        counted: dict[str, dict[tuple[str, str], float]] = {}
        for name, first, second, value in totals.read(self._database):
            counted.setdefault(name, {})[first, second] = value
        jobs = CounterMetricFamily(
            "safegraft_jobs_ended",
            "Jobs that have ended, by the method that was asked for.",
            labels=["status", "method"],
        )
        failures = CounterMetricFamily(
            "safegraft_job_failures", "Jobs that failed; class tells whose fault it was.", labels=["code", "class"]
        )
        for family, name in ((jobs, "jobs"), (failures, "failures")):
            for labels, value in counted.get(name, {}).items():
                family.add_metric(list(labels), value)
            yield family
        stages = SummaryMetricFamily(
            "safegraft_job_stage_seconds", "Time of succeeded jobs, by the method that ran.", labels=["stage", "method"]
        )
        for labels, seconds in counted.get("stage_seconds", {}).items():
            stages.add_metric(list(labels), int(counted["stage_count"][labels]), seconds)
        yield stages
        received = CounterMetricFamily("safegraft_received_bytes", "Of the adapters that were accepted.")
        received.add_metric([], counted.get("bytes_received", {}).get(("", ""), 0))
        yield received
        published = CounterMetricFamily("safegraft_published_bytes", "Of what jobs made: adapters, side-cars, reports.")
        published.add_metric([], counted.get("bytes_published", {}).get(("", ""), 0))
        yield published
