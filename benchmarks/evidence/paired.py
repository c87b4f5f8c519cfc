"""The same prompts before and after: how far apart two rows are, and whether chance alone would put them there."""

import math
from collections.abc import Sequence

from safegraft.report.interval import Z95


def counts(before: Sequence[bool], after: Sequence[bool]) -> tuple[int, int]:
    """Prompts that hold only after, and only before. Raises ValueError where they are not as many."""
    pairs = list(zip(before, after, strict=True))
    return sum(two and not one for one, two in pairs), sum(one and not two for one, two in pairs)


def mcnemar(gained: int, lost: int) -> float:
    """The exact two-sided p of McNemar's test: of `gained + lost` coins, as uneven a fall or a more uneven one."""
    total, fewer = gained + lost, min(gained, lost)
    return min(1.0, 2 * sum(math.comb(total, k) for k in range(fewer + 1)) / float(2**total))


def interval(gained: int, lost: int, total: int) -> tuple[float, float]:
    """The 95 % score interval of (gained − lost)/total, a difference of paired shares (T. Tango, 1998).

    Unlike a bootstrap's it is no point where no prompt changed. Raises ValueError without a sample.
    """
    if total < 1 or gained < 0 or lost < 0 or gained + lost > total:
        raise ValueError(f"{gained} and {lost} of {total} are no paired shares")
    estimate = (gained - lost) / total

    def score(difference: float) -> float:
        """The statistic at a difference; it falls from one end to the other."""
        a = 2 * total
        b = -gained - lost + (2 * total - gained + lost) * difference
        c = -lost * difference * (1 - difference)
        # The likeliest share of prompts that hold only before, given the difference.
        only_before = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
        variance = total * (2 * only_before + difference * (1 - difference))
        away = gained - lost - total * difference
        if variance <= 0:
            return math.copysign(math.inf, away) if away else 0.0
        return away / math.sqrt(variance)

    def crossing(low: float, high: float, level: float) -> float:
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if score(middle) > level else (low, middle)
        return (low + high) / 2

    return crossing(-1.0, estimate, Z95), crossing(estimate, 1.0, -Z95)
