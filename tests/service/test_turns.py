"""Who waits gets a turn: by what runs of a tenant, then by who was served longest ago."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future

import pytest

from service.turns import Turns

SECONDS = 20


class Stage:
    """Pieces of work that note when they begin, and end when they are told to."""

    def __init__(self, at_once: int) -> None:
        self.turns = Turns(at_once, "test")
        self.begun: list[str] = []
        self._changed = threading.Condition()
        self._ends: dict[str, threading.Event] = {}

    def add(self, tenant: str, name: str) -> Future[str]:
        self._ends[name] = threading.Event()

        def work() -> str:
            with self._changed:
                self.begun.append(name)
                self._changed.notify_all()
            assert self._ends[name].wait(SECONDS)
            return name

        return self.turns.submit(tenant, work)

    def end(self, *names: str) -> None:
        for name in names:
            self._ends[name].set()

    def expect(self, *names: str) -> None:
        """These have begun, in this order, and no others."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.begun) >= len(names), SECONDS)
            assert self.begun == list(names)

    def close(self) -> None:
        self.end(*self._ends)
        self.turns.close()


@pytest.fixture
def stage() -> Iterator[Callable[[int], Stage]]:
    made: list[Stage] = []

    def make(at_once: int) -> Stage:
        made.append(Stage(at_once))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_tenants_are_served_in_turns_and_each_in_its_order(stage: Callable[[int], Stage]) -> None:
    here = stage(1)
    for name in ("a1", "a2", "a3", "b1", "b2", "c1"):
        here.add(name[0], name)
    order = ["a1", "b1", "c1", "a2", "b2", "a3"]
    for number, name in enumerate(order):
        here.expect(*order[: number + 1])
        here.end(name)


def test_the_last_place_is_for_another_tenant(stage: Callable[[int], Stage]) -> None:
    here = stage(3)
    for name in ("a1", "a2", "a3", "a4"):
        here.add("a", name)
    here.expect("a1", "a2")
    here.add("b", "b1")
    here.expect("a1", "a2", "b1")
    here.add("c", "c1")
    here.add("b", "b2")
    # Of those that wait the one of which nothing runs, whoever came first.
    here.end("a1")
    here.expect("a1", "a2", "b1", "c1")


def test_what_fails_or_is_cancelled_gives_its_place_back(stage: Callable[[int], Stage]) -> None:
    here = stage(1)

    def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        here.turns.submit("a", fail).result(SECONDS)
    first, second, third = here.add("a", "a1"), here.add("a", "a2"), here.add("b", "b1")
    here.expect("a1")
    assert second.cancel()
    assert not first.cancel()
    here.end("a1", "b1")
    assert (first.result(SECONDS), third.result(SECONDS)) == ("a1", "b1")
    assert here.begun == ["a1", "b1"]


def test_at_the_end_nobody_is_kept_waiting(stage: Callable[[int], Stage]) -> None:
    here = stage(1)
    runs, waits = here.add("a", "a1"), here.add("a", "a2")
    here.expect("a1")
    here.turns.close()
    with pytest.raises(CancelledError):
        waits.result(SECONDS)
    here.end("a1")
    assert runs.result(SECONDS) == "a1"
