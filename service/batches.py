"""Batches: made by a request, advanced by a loop in every gateway. All that is decided here lies in the records."""

import logging

from safegraft.compatibility import check_offered
from safegraft.contracts.batch import MIN_JUDGED, BatchCreate, BatchStatus, RealignmentBatch, StopRule
from safegraft.contracts.realignment import Failure, RealignmentCreate
from safegraft.errors import QuotaExceeded, SafegraftError, UserError
from safegraft.stores.batches import Active, Tally, Waiting
from safegraft.stores.jobs import Origins
from service.auth import Principal
from service.dependencies import Services
from service.submission import submit

log = logging.getLogger("safegraft.batches")


def open_batch(here: Services, tenant: str, request: BatchCreate, idempotency_key: str | None) -> RealignmentBatch:
    """Records a batch; the loop makes its jobs. Raises NotFound, Incompatible, and what BatchStore.create raises."""
    first = here.batches.replay(tenant, request, idempotency_key) if idempotency_key else None
    if first is not None:
        return first
    reference = here.references.get(request.reference_id)
    if request.method.type != "auto":
        check_offered(reference.manifest, request.method.type)
    return here.batches.create(tenant, request, idempotency_key)


def cancel_batch(here: Services, tenant: str, batch_id: str) -> RealignmentBatch:
    """Ends a batch that goes on, and its open jobs. An ended one stays as it is."""
    here.batches.get(tenant, batch_id)
    if here.batches.end(batch_id, "cancelled"):
        cancel_abandoned(here)
    return here.batches.get(tenant, batch_id)


def cancel_abandoned(here: Services) -> None:
    """Cancels jobs whose batch was stopped or cancelled, also those that were made in that very moment."""
    for tenant, job_id in here.batches.abandoned():
        here.jobs.cancel(tenant, job_id)


def broken(rule: StopRule | None, tally: Tally) -> str | None:
    """What breaks the rule, in words; None where it holds."""
    judged = tally.failed + tally.succeeded
    if rule is None or not judged:
        return None
    if rule.max_failed_share is not None and tally.failed > rule.max_failed_share * judged:
        return f"{tally.failed} of {judged} adapters failed; the stop rule allows a share of {rule.max_failed_share:g}."
    if rule.min_similarity is not None and tally.similarity is not None and tally.similarity < rule.min_similarity:
        return f"The mean similarity is {tally.similarity:.3g}; the stop rule asks for {rule.min_similarity:g}."
    if rule.max_edit is not None and tally.edit is not None and tally.edit > rule.max_edit:
        return f"The mean edit is {tally.edit:.3g}; the stop rule allows {rule.max_edit:g}."
    return None


class Batches:
    """Advances every batch that goes on; one `turn` is one round of its loop."""

    def __init__(self, here: Services) -> None:
        self._here = here

    def turn(self) -> None:
        """One round: note what ended, judge, make jobs, and cancel what a stopped batch left open."""
        self._here.batches.settle()
        for batch in self._here.batches.active():
            try:
                self._advance(batch)
            except Exception:
                # One batch must not hold up the others; its next turn starts from the records again.
                log.exception("%s could not be advanced; trying again", batch.id)
        cancel_abandoned(self._here)

    def _advance(self, batch: Active) -> None:
        tally = self._here.batches.tally(batch)
        canary = batch.state == "canary"
        if tally.left == 0 or (not canary and tally.failed + tally.succeeded >= MIN_JUDGED):
            reason = broken(batch.plan.stop_rule, tally)
            if reason is not None:
                self._end(batch, "stopped", f"Canary: {reason}" if canary else reason)
                return
        if tally.left:
            self._make_jobs(batch)
        elif canary:
            self._here.batches.go_on(batch.id)
        else:
            self._end(batch, "succeeded")

    def _end(self, batch: Active, state: BatchStatus, reason: str | None = None) -> None:
        if self._here.batches.end(batch.id, state, reason):
            log.info("%s: %s %s", batch.id, state, reason or "")

    def _make_jobs(self, batch: Active) -> None:
        limits = self._here.keys.limits(batch.tenant)
        allowed = self._here.settings.max_jobs_per_tenant if limits.max_jobs is None else limits.max_jobs
        # Never more than half of what the tenant may have open: the other half is for what it asks for meanwhile.
        room = min(self._here.settings.batch_open_jobs, max(1, allowed // 2) if allowed else 2**31)
        asking = Principal(batch.tenant, batch.id, frozenset(), limits)
        for waiting in self._here.batches.take(batch, room):
            try:
                self._make_job(batch, waiting, asking)
            except QuotaExceeded as error:
                log.info("%s waits: %s", batch.id, error)
                return

    def _make_job(self, batch: Active, waiting: Waiting, asking: Principal) -> None:
        """Raises QuotaExceeded where the tenant has no room now; every other refusal is the adapter's end."""
        store, plan = self._here.batches, batch.plan
        request = RealignmentCreate(
            adapter_id=waiting.adapter_id,
            reference_id=plan.reference_id,
            method=plan.method,
            mode=plan.mode,
            output_rank=plan.output_rank,
            metadata=plan.metadata,
        )
        try:
            made = (
                waiting.made
                or submit(
                    self._here, asking, request, idempotency_key=waiting.key, origins=Origins(batch_id=batch.id)
                ).job.id
            )
        except QuotaExceeded:
            raise
        except UserError as error:
            store.refused(batch.id, waiting.adapter_id, _failure(error))
        except Exception as error:
            log.warning("%s: no job could be made for %s", batch.id, waiting.adapter_id, exc_info=error)
            store.faulted(batch.id, waiting.adapter_id, _failure(error))
        else:
            # Where the batch ended in this moment the job is an abandoned one.
            store.opened(batch.id, waiting.adapter_id, made)


def _failure(error: Exception) -> Failure:
    if isinstance(error, UserError):
        return Failure(code=error.code, message=str(error)[:1000], fault="user")
    code = error.code if isinstance(error, SafegraftError) else "internal_error"
    return Failure(code=code, message="No job could be made, through a fault on our side.", fault="system")
