"""The scoreboard's short rows, one round each, on one service; the others, and all rounds, are `make chaos`."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import scaled
from tests.chaos.ground import Material
from tests.chaos.rows import ROWS, Stage

# A few seconds each, once the service is up. The others wait for processes that load torch, or for messages that are
# sent again after ten seconds.
SHORT = (9, 5, 6, 3, 10, 11)

pytestmark = pytest.mark.skipif(scaled.SCALED, reason="the scoreboard's services are its own, on files and SQLite")


@pytest.fixture(scope="module")
def stage(bundle: Path, fresh: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    stage = Stage(Material(bundle, (fresh,)), tmp_path_factory.mktemp("chaos"), quick=True)
    yield stage
    stage.close()


# Rows whose faults take their time: they are waited for.
LONG = (5, 6, 9, 11)


@pytest.mark.parametrize(
    "number", [pytest.param(number, marks=[pytest.mark.long] if number in LONG else []) for number in SHORT]
)
def test_a_row_is_green(stage: Stage, number: int) -> None:
    _, function = ROWS[number]
    score = function(stage)
    assert score.found == []
    assert score.left_out == ""
    assert score.faults > 0
    assert score.tried > 0


def test_there_are_fifteen_rows() -> None:
    assert sorted(ROWS) == list(range(1, 16))
