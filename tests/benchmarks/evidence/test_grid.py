import pytest

from benchmarks.evidence.grid import (
    CELLS,
    CONTINUED,
    ELSEWHERE,
    HEADLINE,
    MAIN,
    ON_CONTINUED,
    ON_PREFERENCES,
    ON_THIRD,
    ROWS,
    SECOND,
    THIRD,
    TRANSFER,
    VARIANTS,
    plan,
)
from benchmarks.evidence.rivals import RIVALS
from safegraft.contracts.methods import METHOD_PARAMETERS


def test_every_row_can_be_run() -> None:
    for row in ROWS.values():
        if row.parameters:
            assert METHOD_PARAMETERS.validate_python(row.parameters).type == row.parameters["type"]
        if row.rival is not None:
            assert row.rival in RIVALS


def test_the_plan_asks_for_everything_once_and_for_the_headline_first() -> None:
    planned = [(cell.name, row.name) for cell, row in plan()]
    assert len(set(planned)) == len(planned)
    assert planned[0] == (HEADLINE, "no repair")
    assert {row for cell, row in planned if cell == HEADLINE} >= set(ROWS) - ELSEWHERE
    assert {row for cell, row in planned if cell in (SECOND, THIRD, CONTINUED, "translate", "dpo")} >= ELSEWHERE
    assert all((name, row) in planned for name in CELLS for row in MAIN)


@pytest.mark.parametrize("names", [MAIN, ON_CONTINUED, ON_PREFERENCES, ON_THIRD, TRANSFER, VARIANTS])
def test_rows_are_named_as_they_are(names: tuple[str, ...]) -> None:
    assert set(names) <= set(ROWS)


def test_a_cell_varies_one_factor() -> None:
    usual = CELLS[HEADLINE]
    for cell in CELLS.values():
        differing = {
            key
            for key, value in cell.__dict__.items()
            if key not in ("name", "factor", "seed") and value != usual.__dict__[key]
        }
        # A continued adapter has the rank of the one that it continues.
        two = cell.name in ("news-clean", "continued-20")
        assert len(differing - {"rank"} if cell.lineage == "continued" else differing) <= (2 if two else 1), cell
