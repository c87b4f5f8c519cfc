"""What a tenant measured of a result: from what was sent to what a job shows, and back to what a report holds."""

from safegraft.contracts.realignment import MeasuredBehaviour, MeasuredShare, ResultEvaluation
from safegraft.contracts.report import Behaviour, Evaluation, Share
from safegraft.report import words
from safegraft.report.interval import wilson


def measured(evaluation: Evaluation, created_at: int) -> ResultEvaluation:
    """With shares and intervals, of what was counted on both sides; created_at: Unix seconds."""
    sides: dict[str, dict[str, MeasuredShare]] = {"before": {}, "after": {}}
    for name, before, after in evaluation.measures():
        sides["before"][name], sides["after"][name] = _with_interval(before), _with_interval(after)
    return ResultEvaluation(
        summary=words.evaluation(evaluation),
        caution=words.evaluated_against(evaluation),
        judge=evaluation.judge,
        before=MeasuredBehaviour(**sides["before"]),
        after=MeasuredBehaviour(**sides["after"]),
        input_sha256=evaluation.input_sha256,
        output_sha256=evaluation.output_sha256,
        created_at=created_at,
    )


def evaluation_of(shown: ResultEvaluation) -> Evaluation:
    """What was sent, without what was counted on one side only."""
    return Evaluation(
        judge=shown.judge,
        before=_counted(shown.before),
        after=_counted(shown.after),
        input_sha256=shown.input_sha256,
        output_sha256=shown.output_sha256,
    )


def _with_interval(found: Share) -> MeasuredShare:
    low, high = wilson(found.hits, found.total)
    return MeasuredShare(hits=found.hits, total=found.total, share=found.share, low=low, high=high)


def _counted(side: MeasuredBehaviour) -> Behaviour:
    pairs = {name: getattr(side, name) for name in Behaviour.model_fields}
    return Behaviour(
        **{name: Share(hits=share.hits, total=share.total) for name, share in pairs.items() if share is not None}
    )
