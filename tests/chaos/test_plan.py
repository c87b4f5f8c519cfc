"""A seed is a plan: the same one each time, another one for another seed."""

from collections import Counter

from tests.chaos.plan import FAULTS, PAUSE, make


def test_a_seed_makes_one_plan() -> None:
    plans = [make(seed, 310, 100, 3) for seed in range(1, 6)]
    assert [plan.digest() for plan in plans] == [make(seed, 310, 100, 3).digest() for seed in range(1, 6)]
    assert len({plan.digest() for plan in plans}) == 5


def test_a_plan_has_what_was_asked_for() -> None:
    plan = make(1, 310, 100, 3)
    assert (len(plan.jobs), len(plan.faults)) == (310, 100)
    assert {job.tenant for job in plan.jobs} == {"acme", "bolt"}
    assert {job.adapter for job in plan.jobs} == {0, 1, 2}
    assert set(Counter(fault.kind for fault in plan.faults)) == set(FAULTS)
    for fault in plan.faults:
        assert 1 <= fault.before < 310
        assert fault.before < fault.until <= fault.before + PAUSE
