"""As many threads as are worth it, and what comes out does not depend on them."""

import threading
import time

import pytest

from safegraft.engine.parallel import AHEAD, HELD, TRIED, each, worthwhile


def spend(seconds: float) -> None:
    """So much of a thread's own time."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        time.sleep(0.0)  # gives the interpreter away, as an operation of torch does


def threads_of(seconds: float, workers: int, count: int = 24, begin: int = 0) -> list[int]:
    """The thread of each item's work, which takes so long from item `begin` on."""

    def work(item: int) -> int:
        spend(seconds if item >= begin else 0.0)
        return threading.get_ident()

    found = list(each(range(count), work, workers))
    assert [item for item, _ in found] == list(range(count))
    return [thread for _, thread in found]


def test_short_work_stays_on_the_thread_that_asks() -> None:
    assert set(threads_of(0.0, 4)) == {threading.get_ident()}


def test_long_work_is_shared_after_two_items() -> None:
    found = threads_of(5 * HELD, 3)
    own = [thread == threading.get_ident() for thread in found]
    assert own == [True] * 2 + [False] * 22
    assert len(set(found[2:])) == 3


def test_middling_work_is_shared_after_a_layer() -> None:
    own = [thread == threading.get_ident() for thread in threads_of(2.6 * HELD, 2)]
    assert own[:2] == [True] * 2
    assert not any(own[TRIED:])


def test_work_that_becomes_long_is_shared_then() -> None:
    found = threads_of(10 * HELD, 3, begin=12)
    own = [thread == threading.get_ident() for thread in found]
    assert own[:14] == [True] * 14
    assert not any(own[16:])


def test_one_worker_is_the_thread_that_asks() -> None:
    assert set(threads_of(4 * HELD, 1)) == {threading.get_ident()}


@pytest.mark.parametrize(
    ("took", "threads"),
    [
        ([], 1),
        ([HELD * 100], 1),
        ([HELD / 2] * 7, 1),
        ([HELD * 2.5] * 7, 2),
        ([HELD * 100.5] * 7, 100),
        ([HELD * 100, HELD / 2], 1),
        ([HELD * 100] + [HELD / 2] * 6, 1),
        ([HELD * 10] * 3 + [HELD / 2] * 4, 3),
    ],
    ids=["nothing", "one", "short", "middling", "long", "one of two", "one of seven", "half are left as they are"],
)
def test_how_many_are_worth_it_follows_from_how_long_items_take(took: list[float], threads: int) -> None:
    assert worthwhile(took) == threads


@pytest.mark.parametrize("seconds", [0.0, 5 * HELD], ids=["short", "long"])
@pytest.mark.parametrize("failing", [0, 20])
def test_an_error_stops_what_has_not_begun(seconds: float, failing: int) -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        spend(seconds)
        if item == failing:
            raise ValueError(item)
        return item

    taken = each(range(1000), work, 2)
    assert [next(taken) for _ in range(failing)] == [(item, item) for item in range(failing)]
    with pytest.raises(ValueError, match=str(failing)):
        next(taken)
    assert len(begun) < 40


def test_results_do_not_pile_up_where_nobody_takes_them() -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        time.sleep(0.01)
        return item

    for taken, (item, result) in enumerate(each(range(40), work, 2), start=1):
        assert item == result == taken - 1
        time.sleep(0.05)
        assert len(begun) <= taken + AHEAD * 2, "a slow disk would fill the memory"
