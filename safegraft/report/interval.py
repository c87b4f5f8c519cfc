"""How far a share that was counted on a sample may lie from that of all prompts."""

import math

# Of the standard normal distribution, two-sided, for 95 %.
Z95 = 1.959963984540054


def wilson(hits: int, total: int) -> tuple[float, float]:
    """The 95 % interval of hits/total (E. B. Wilson, 1927), within 0 to 1. Raises ValueError without a sample.

    Unlike the usual plus-minus it is no point at 0 of 24 and does not leave 0 to 1.
    """
    if total < 1 or not 0 <= hits <= total:
        raise ValueError(f"{hits} of {total} is no share")
    share, z2 = hits / total, Z95 * Z95
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    spread = Z95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    # At the ends rounding would leave 1e-17 where it is 0 exactly.
    low = 0.0 if hits == 0 else centre - spread
    high = 1.0 if hits == total else centre + spread
    return low, high
