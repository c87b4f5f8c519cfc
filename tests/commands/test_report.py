"""`safegraft report`: the story of a report that lies there, and what an evaluation adds to it."""

import json
import re
from pathlib import Path

import pytest

from safegraft.contracts.report import Report
from safegraft.report import headline, to_json, with_headline
from tests.report.samples import evaluation, five, lines, report
from tests.test_cli import refused, safegraft


@pytest.fixture
def made(tmp_path: Path) -> Path:
    path = tmp_path / "made.report.json"
    path.write_text(to_json(report(lines(3))), encoding="utf-8")
    return path


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    path = tmp_path / "evaluation.json"
    path.write_text(evaluation().model_dump_json(), encoding="utf-8")
    return path


def test_a_report_is_told(made: Path) -> None:
    told = safegraft("report", made).stdout
    assert told.splitlines()[0] == headline(report(lines(3)))
    assert "Largest changes" in told
    assert "Warning: Bringing the result back" in told
    assert sorted(path.name for path in made.parent.iterdir()) == [made.name], "nothing is written unless asked for"


def test_an_evaluation_becomes_part_of_all_forms(made: Path, measured: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "v1.2"
    out.parent.mkdir()
    told = safegraft("report", made, "--evaluation", measured, "--out", out).stdout
    assert "Harm score fell from 1.00 to 0.00." in told
    assert f"{out}.html" in told
    again = Report.model_validate_json((out.parent / "v1.2.json").read_bytes())
    assert again == with_headline(report(lines(3), evaluation=evaluation()))
    assert "How it behaves" in (out.parent / "v1.2.html").read_text(encoding="utf-8")
    assert json.loads(safegraft("report", out.parent / "v1.2.json", "--json").stdout) == json.loads(to_json(again))


def test_it_may_be_written_over_itself(made: Path, measured: Path) -> None:
    safegraft("report", made, "--evaluation", measured, "--out", made.with_suffix(""))
    assert Report.model_validate_json(made.read_bytes()).evaluation == evaluation()


def test_several_strengths_have_their_curve_as_a_picture(tmp_path: Path) -> None:
    (tmp_path / "five.json").write_text(to_json(five()), encoding="utf-8")
    safegraft("report", tmp_path / "five.json", "--out", tmp_path / "five")
    assert (tmp_path / "five.strengths.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("{", "Invalid JSON"),
        ("{}", "judge: Field required"),
        ('{"judge": "j", "before": {}, "after": {}}', "none of harm_score, over_refusal, task_accuracy"),
        (
            '{"judge": "j", "before": {"harm_score": {"hits": 3, "total": 2}}, "after": {}}',
            "before.harm_score: .*3 hits are more than the 2 answers",
        ),
        ('{"judge": "j", "before": {"harm": {}}, "after": {}}', "before.harm: Extra inputs"),
    ],
)  # fmt: skip
def test_a_bad_evaluation_is_refused_with_the_field_at_fault(made: Path, tmp_path: Path, body: str, says: str) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text(body)
    message = refused("report", made, "--evaluation", bad, "--out", tmp_path / "out", code="not_an_evaluation")
    assert re.search(says, message), message
    assert not list(tmp_path.glob("out*"))


def test_what_is_no_report_is_refused(measured: Path) -> None:
    assert "mode: Field required" in refused("report", measured, code="not_a_report")
