"""The scoreboard's short rows, one round each, on one service; the others, and all rounds, are `make chaos`."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import scaled
from tests.chaos.ground import Material
from tests.chaos.rows import ROWS, Stage

# Seconds on an idle machine of two cores: 3, 3, 3, 12, 1, 3.
SHORT = (9, 5, 3, 7, 10, 11)

pytestmark = pytest.mark.skipif(scaled.SCALED, reason="the scoreboard's services are its own, on files and SQLite")


@pytest.fixture(scope="module")
def stage(bundle: Path, fresh: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    stage = Stage(Material(bundle, (fresh,)), tmp_path_factory.mktemp("chaos"), quick=True)
    yield stage
    stage.close()


@pytest.mark.parametrize("number", SHORT)
def test_a_row_is_green(stage: Stage, number: int) -> None:
    _, function = ROWS[number]
    score = function(stage)
    assert score.found == []
    assert score.left_out == ""
    assert score.faults > 0
    assert score.tried > 0


def test_there_are_fifteen_rows() -> None:
    assert sorted(ROWS) == list(range(1, 16))
