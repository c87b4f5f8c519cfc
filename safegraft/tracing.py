"""Traces over OTLP/HTTP: where OTEL_EXPORTER_OTLP_ENDPOINT says where to, and the extra `otel` is installed.

Otherwise nothing is imported and nothing is done. What a job carries from the gateway to its worker is W3C's
`traceparent`, be it the gateway's own span or what the client sent.
"""

import logging
import os
import re
from contextvars import ContextVar
from types import TracebackType
from typing import Any

import safegraft
from safegraft.errors import SafegraftError

log = logging.getLogger("safegraft.tracing")
TRACEPARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_given: ContextVar[str | None] = ContextVar("safegraft_traceparent", default=None)
_provider: Any = None


def start(service: str) -> Any:
    """This process's tracer provider, made the first time; None where no traces are wanted."""
    global _provider
    if _provider is not None or not any(os.environ.get(name) for name in ENDPOINTS):
        return _provider
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        log.warning("no traces are sent: the packages of `pip install safegraft[otel]` are missing")
        return None
    about = {"service.name": os.environ.get("OTEL_SERVICE_NAME", service), "service.version": safegraft.__version__}
    # Not the global one: other libraries' spans are not asked for.
    _provider = TracerProvider(resource=Resource.create(about))
    _provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return _provider


def stop() -> None:
    """Sends what was not sent yet."""
    global _provider
    if _provider is not None:
        _provider.shutdown()
        _provider = None


def arrived(traceparent: str | None) -> None:
    """Notes what a request's header said; anything but a well-formed one is ignored."""
    _given.set(traceparent if traceparent and TRACEPARENT.fullmatch(traceparent) else None)


def current() -> str | None:
    """The `traceparent` of what runs here: of our own span, else what the client sent, else None."""
    if _provider is not None:
        from opentelemetry import trace

        context = trace.get_current_span().get_span_context()
        if context.is_valid:
            return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
    return _given.get()


def trace_id(traceparent: str | None) -> str | None:
    """The trace's id in a `traceparent`."""
    match = TRACEPARENT.fullmatch(traceparent or "")
    return match[1] if match else None


class Attempt:
    """The span of one attempt at a job, a child of the request that made it, with one span for each stage below it."""

    def __init__(self, traceparent: str | None, job_id: str, number: int) -> None:
        self._span: Any = None
        self._stage: Any = None
        if _provider is None:
            return
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = _provider.get_tracer("safegraft.worker", safegraft.__version__)
        self._span = self._tracer.start_span(
            "realignment attempt",
            context=TraceContextTextMapPropagator().extract({"traceparent": traceparent or ""}),
            kind=SpanKind.CONSUMER,
            attributes={"safegraft.job.id": job_id, "safegraft.job.attempt": number},
        )

    def stage(self, name: str) -> None:
        """From now on the attempt is in this stage. The same one again changes nothing."""
        if self._span is None or (self._stage is not None and self._stage.name == name):
            return
        from opentelemetry.trace import set_span_in_context

        self._end_stage()
        self._stage = self._tracer.start_span(name, context=set_span_in_context(self._span))

    def __enter__(self) -> "Attempt":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._span is None:
            return
        self._end_stage()
        if kind is not None and error is not None:
            from opentelemetry.trace import Status, StatusCode

            # The code alone: messages may quote what a customer's files say.
            self._span.set_attribute("error.type", error.code if isinstance(error, SafegraftError) else kind.__name__)
            if getattr(error, "fault", "system") != "user":
                self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()

    def _end_stage(self) -> None:
        if self._stage is not None:
            self._stage.end()
            self._stage = None
