"""Which results may be added to which, on another machine than theirs."""

import json
from pathlib import Path

import pytest

from benchmarks.evidence import run
from benchmarks.evidence.grid import ALIGNED, BASE_MODEL, CELLS, DEFAULT, NO_REPAIR, ROWS
from safegraft.adapter import WEIGHTS


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(run, "RESULTS", tmp_path / "data")
    return tmp_path / "data"


def adapter(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / WEIGHTS).write_text(text)
    return folder


def test_rows_of_one_adapter_are_never_mixed_with_anothers(results: Path, tmp_path: Path) -> None:
    cell, one, two = CELLS["news"], adapter(tmp_path / "one", "one"), adapter(tmp_path / "two", "two")
    found = run.load(cell, one)
    assert found["rows"] == {}
    run.store(found)
    assert run.load(cell, one) == json.loads((results / "news.json").read_text(encoding="utf-8")) == found
    with pytest.raises(SystemExit, match="--restart news"):
        run.load(cell, two)


def test_rows_of_the_models_alone_need_no_adapter(results: Path, tmp_path: Path) -> None:
    cell = CELLS["news"]
    with pytest.raises(SystemExit, match="nothing was measured there yet"):
        run.load(cell, None)
    run.store(run.load(cell, adapter(tmp_path / "one", "one")))
    assert run.load(cell, None)["rows"] == {}
    assert [name for name, row in ROWS.items() if run.without_adapter(cell, row)] == [ALIGNED, BASE_MODEL]
    assert not run.without_adapter(CELLS["dpo"], ROWS[ALIGNED]), "its aligned adapter is trained on each machine"
    assert {NO_REPAIR, DEFAULT} <= ROWS.keys()


def test_what_is_not_planned_is_said() -> None:
    with pytest.raises(SystemExit, match="No such cell: sunday"):
        run.run(only=["sunday"])
    with pytest.raises(SystemExit, match="No such row: prayer"):
        run.run(rows=["prayer"])
