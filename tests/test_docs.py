"""The pages say what the files in the repository say."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import load
from safegraft.contracts.report import Evaluation
from service.routes.realignments import ReportForm
from tests.chaos import page as scoreboard
from tests.chaos.invariants import KINDS
from tests.chaos.rows import ROWS

ROOT = Path(__file__).parent.parent


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Any:
    """examples/compare.py, which is a script beside its helpers and no package."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    spec = importlib.util.spec_from_file_location("compare", ROOT / "examples" / "compare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "compare", module)
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_methods_are_those_that_were_measured(compare: Any, tmp_path: Path) -> None:
    shown = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    (tmp_path / "methods.md").write_text(shown, encoding="utf-8")
    results = json.loads((ROOT / "examples" / "results" / "compare.json").read_text(encoding="utf-8"))
    compare.write_page(results, tmp_path / "methods.md")
    assert (tmp_path / "methods.md").read_text(encoding="utf-8") == shown
    for rows in results.values():
        assert list(rows) == [compare.ALIGNED, compare.BEFORE, *compare.ROWS]


def test_the_load_of_operations_is_that_which_was_measured() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "load.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert load.table(result) in page
    assert result["machine"] in page
    # What the page promises.
    assert result["failed"] == []
    assert result["checked"] == result["arrived"] == result["uploads"] // 2
    assert result["objects_without_a_record"] == len(result["left_in_scratch"]) == 0
    assert result["health_p99_ms"] < 250
    assert result["gateway_resident_mb_peak"] < 300


def test_the_tests_that_the_page_on_security_names_are_there() -> None:
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    files = set(re.findall(r"`(tests/[\w/]+\.py)`", page))
    names = set(re.findall(r"`(test_\w+)`", page))
    assert len(files) > 15
    assert len(names) > 8
    assert [name for name in files if not (ROOT / name).is_file()] == []
    there = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name in names if f"def {name}(" not in there] == []


def test_the_page_on_security_is_linked_from_where_people_look() -> None:
    for name in ("README.md", "CONTRIBUTING.md"):
        assert "docs/security.md" in (ROOT / name).read_text(encoding="utf-8")


def test_the_scoreboard_of_reliability_is_that_which_was_counted() -> None:
    results = json.loads(scoreboard.RESULTS.read_text(encoding="utf-8"))
    page = scoreboard.PAGE.read_text(encoding="utf-8")
    assert scoreboard.shown(results, page) == page
    assert list(results["rows"]) == [str(number) for number in ROWS]
    assert results["machine"] in page
    # What the page promises.
    for number, row in results["rows"].items():
        assert row["title"] == ROWS[int(number)][0]
        for seed, run in row["seeds"].items():
            assert [run[kind] for kind in KINDS] == [0] * len(KINDS), (number, seed)
            assert run["tried"] > 0 or run["left_out"], number


def test_the_pictures_of_the_report_are_there_and_small() -> None:
    page = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    named = re.findall(r"!\[.*?\]\((pictures/.*?)\)", page)
    assert sorted(named) == sorted(f"pictures/{path.name}" for path in (ROOT / "docs" / "pictures").iterdir())
    for name in named:
        data = (ROOT / "docs" / name).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) < 200_000, name
    assert "docs/report.md" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_page_on_reports_has_an_evaluation_that_is_one() -> None:
    page = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```json\n(.*?)```", page, re.S)
    assert len(Evaluation.model_validate_json(example).measures()) == 2


def test_the_page_on_reports_names_every_form() -> None:
    page = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    for form in ReportForm:
        assert f"`report.{form}`" in page
        assert f"`OUT.report.{form}`" in page
