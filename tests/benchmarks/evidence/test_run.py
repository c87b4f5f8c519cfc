"""Which results may be added to which, on another machine than theirs."""

import json
from pathlib import Path

import pytest

from benchmarks.evidence import run, training
from benchmarks.evidence.grid import ALIGNED, BASE_MODEL, CELLS, DEFAULT, NO_REPAIR, ROWS, plan
from safegraft.adapter import WEIGHTS


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(run, "RESULTS", tmp_path / "data")
    monkeypatch.setenv("SAFEGRAFT_CACHE", str(tmp_path / "cache"))
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


def test_half_a_cell_never_takes_the_place_of_a_whole_one(results: Path, tmp_path: Path) -> None:
    cell, one, two = CELLS["news"], adapter(tmp_path / "one", "one"), adapter(tmp_path / "two", "two")
    run.store(run.load(cell, one) | {"rows": {"no repair": {"recipe": "old"}}})
    published = (results / "news.json").read_bytes()
    run.begin_anew(cell)
    assert run.known(cell, ROWS[NO_REPAIR]) is None, "begun anew"
    found = run.load(cell, two)
    planned = [row.name for own, row in plan() if own == cell]
    for name in planned[:-1]:
        found["rows"][name] = {"recipe": "new"}
        run.store(found)
        assert not run.publish(cell)
        assert (results / "news.json").read_bytes() == published
    assert run.known(cell, ROWS[NO_REPAIR]) == "new", "an interrupted run goes on with what it has"
    with pytest.raises(SystemExit, match="another adapter"):
        run.load(cell, one)
    found["rows"][planned[-1]] = {"recipe": "new"}
    run.store(found)
    assert run.publish(cell)
    assert json.loads((results / "news.json").read_text(encoding="utf-8")) == found
    assert not run.anew("news").exists()
    assert not run.publish(cell), "once"


def test_an_adapter_that_was_trained_elsewhere_is_not_trained_to_be_told_so(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_training(*arguments: object) -> None:
        raise AssertionError("nothing is to be trained")

    class Workshop(run.Workshop):
        def __init__(self, base: str, folder: Path) -> None:
            self._folder = folder

    monkeypatch.setattr(run, "Workshop", Workshop)
    monkeypatch.setattr(training, "customer", no_training)
    run.store(run.load(CELLS["slow"], adapter(tmp_path / "elsewhere", "elsewhere")))
    before = (results / "slow.json").read_bytes()
    run.run(only=["slow"])
    assert "trained elsewhere: slow. `--restart slow --cell slow` trains one here" in capsys.readouterr().out
    assert (results / "slow.json").read_bytes() == before


def test_what_is_not_planned_is_said() -> None:
    with pytest.raises(SystemExit, match="No such cell: sunday"):
        run.run(only=["sunday"])
    with pytest.raises(SystemExit, match="No such row: prayer"):
        run.run(rows=["prayer"])
