import platform
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import timing


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_a_ratio_is_the_median_over_turns_and_the_first_turn_only_warms_up(clock: list[float]) -> None:
    own, other = iter([100.0, 4.0, 2.0, 9.0]), iter([1.0, 2.0, 1.0, 1.0])
    tidied = []

    def take(times: Iterator[float]) -> None:
        clock[0] += next(times)

    found = timing.ratio(lambda: take(own), lambda: take(other), turns=3, after=lambda: tidied.append(1))
    assert (found.median, found.low, found.high) == (2.0, 2.0, 9.0)
    assert len(tidied) == 4


def test_what_is_short_is_repeated_and_its_median_counts(clock: list[float]) -> None:
    other = iter([1.0, 50.0, 1.0, 2.0, 2.0, 90.0])

    def beside() -> None:
        clock[0] += next(other)

    def work() -> None:
        clock[0] += 4.0

    assert timing.ratio(work, beside, turns=1, inner=3).median == 2.0


@pytest.mark.parametrize(("value", "shown"), [(1.2345, 1.23), (12.345, 12.3), (123.45, 123)])
def test_ratios_are_shown_in_three_digits(value: float, shown: float) -> None:
    assert timing.Ratio(value, value, value).shown() == {"ratio": shown, "spread": [shown, shown]}


def test_a_line_knows_how_straight_it_is() -> None:
    from benchmarks.growth import line

    straight = line([{"rank": n, "seconds": 0.5 + 2.0 * n} for n in (1, 2, 4)], "rank")
    assert straight["r_squared"] == 1.0
    assert [point["share_of_largest"] for point in straight["points"]] == [0.2941, 0.5294, 1.0]
    bent = line([{"rank": n, "seconds": float(n**3)} for n in (1, 2, 4, 8)], "rank")
    assert bent["r_squared"] < 0.95


def test_the_processor_is_named(tmp_path: Path) -> None:
    described = tmp_path / "cpuinfo"
    own = "model name\t: Fast One @ 2.00GHz\ncpu family\t: 6\nmodel\t\t: 143\nflags\t\t: fpu avx2 avx512f\n"
    described.write_text(own + "\n" + own)
    assert timing.processor(described) == "Fast One @ 2.00GHz, family 6, model 143 (AVX-512, AVX2)"
    described.write_text("model name\t: Plain\n")
    assert timing.processor(described) == "Plain"
    described.write_text("nothing known: here\n")
    assert timing.processor(described) == timing.processor(tmp_path / "none") == platform.machine()
