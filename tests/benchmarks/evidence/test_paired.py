import math

import pytest

from benchmarks.evidence import paired


def test_only_prompts_that_changed_count() -> None:
    assert paired.counts([True, True, False, False], [True, False, True, True]) == (2, 1)
    with pytest.raises(ValueError, match="shorter"):
        paired.counts([True, True], [True])


def test_mcnemar_is_a_fall_of_coins() -> None:
    assert paired.mcnemar(0, 0) == 1.0
    assert paired.mcnemar(8, 0) == pytest.approx(2 / 2**8)
    assert paired.mcnemar(1, 1) == 1.0
    assert paired.mcnemar(2, 7) == paired.mcnemar(7, 2) == pytest.approx(2 * (1 + 9 + 36) / 2**9)


@pytest.mark.parametrize(("gained", "lost", "total"), [(2, 14, 44), (0, 4, 200), (8, 0, 100)])
def test_the_ends_are_where_the_score_test_turns(gained: int, lost: int, total: int) -> None:
    """Held against the definition: the likeliest shares with that difference, found by trying them all."""
    for end in paired.interval(gained, lost, total):
        grid = [step / 200_000 for step in range(1, 200_000) if 0 < step / 200_000 + end < 1]
        likelihoods = [
            gained * math.log(own + end) + lost * math.log(own) + (total - gained - lost) * math.log(rest)
            if (rest := 1 - 2 * own - end) > 0
            else -math.inf
            for own in grid
        ]
        own = grid[max(range(len(grid)), key=likelihoods.__getitem__)]
        score = (gained - lost - total * end) / math.sqrt(total * (2 * own + end * (1 - end)))
        assert abs(score) == pytest.approx(1.96, abs=0.01)


def test_no_change_is_no_certainty() -> None:
    low, high = paired.interval(0, 0, 100)
    # z²/(n + z²)
    assert [-low, high] == pytest.approx([3.8415 / 103.8415] * 2, abs=1e-4)


@pytest.mark.parametrize(("gained", "lost", "total"), [(0, 4, 200), (4, 0, 200), (3, 9, 100), (50, 50, 100), (0, 9, 9)])
def test_an_interval_holds_its_estimate_and_turns_with_its_signs(gained: int, lost: int, total: int) -> None:
    low, high = paired.interval(gained, lost, total)
    estimate = (gained - lost) / total
    assert -1 <= low <= estimate + 1e-9
    assert estimate - 1e-9 <= high <= 1
    assert high - low > 0.01
    assert list(paired.interval(lost, gained, total)) == pytest.approx([-high, -low])


@pytest.mark.parametrize(("gained", "lost", "total"), [(0, 0, 0), (1, 1, 1), (-1, 0, 4)])
def test_what_is_no_sample_is_refused(gained: int, lost: int, total: int) -> None:
    with pytest.raises(ValueError, match="no paired shares"):
        paired.interval(gained, lost, total)


def test_it_covers_what_it_promises() -> None:
    """Of draws with a known difference, about 95 % of the intervals hold it: counted exactly over all outcomes."""
    total, only_after, only_before = 40, 0.05, 0.15
    covered = 0.0
    for gained in range(total + 1):
        for lost in range(total + 1 - gained):
            ways = math.comb(total, gained) * math.comb(total - gained, lost)
            chance = (
                ways
                * only_after**gained
                * only_before**lost
                * (1 - only_after - only_before) ** (total - gained - lost)
            )
            if chance < 1e-6:
                continue
            low, high = paired.interval(gained, lost, total)
            covered += chance * (low <= only_after - only_before <= high)
    assert 0.93 < covered < 0.98
