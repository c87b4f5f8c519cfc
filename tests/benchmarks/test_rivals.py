"""What the comparison with other people's procedures counts."""

import pytest
import torch

from benchmarks import rivals
from benchmarks.shapes import SMOLLM2_135M


@pytest.mark.parametrize(("inners", "fewer"), [(2, 16.0), (3, 10.7)])
def test_multiplications_are_counted(inners: int, fewer: float) -> None:
    # 2·r·d·k against inners·r²·(d + k), for d = k = 4096 and r = 128.
    assert rivals._fewer([(4096, 4096)] * 3, 128, inners=inners) == fewer


@pytest.mark.parametrize("warm", [True, False])
def test_both_ways_to_a_similarity_agree_before_they_are_timed(warm: bool) -> None:
    torch.manual_seed(0)
    found = rivals.similarity(SMOLLM2_135M, 8, 1, 1, warm=warm)
    assert ("warm" in found["what"]) == warm
    assert found["ratio"] > 0
