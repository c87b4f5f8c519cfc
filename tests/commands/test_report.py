"""`safegraft report`: the story of a report that lies there, and what an evaluation adds to it."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from safegraft.contracts.report import Report
from safegraft.report import headline, to_csv, to_html, to_json, with_headline
from safegraft.report.text import Look, story
from tests.report.samples import evaluation, five, lines, probe, report
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


def test_an_evaluation_of_another_adapter_is_refused(made: Path, tmp_path: Path) -> None:
    own = Report.model_validate_json(made.read_bytes()).output
    assert own is not None
    file = tmp_path / "evaluation.json"
    file.write_text(evaluation().model_copy(update={"output_sha256": own.sha256}).model_dump_json())
    assert "Harm score fell" in safegraft("report", made, "--evaluation", file).stdout
    file.write_text(evaluation().model_copy(update={"output_sha256": "0" * 64}).model_dump_json())
    message = refused("report", made, "--evaluation", file, code="other_adapter_evaluated")
    assert "0" * 64 in message
    assert own.sha256 in message


def test_what_is_no_report_is_refused(measured: Path) -> None:
    message = refused("report", measured, code="not_a_report")
    assert "mode: Field required" in message
    assert "writes it as OUT.report.json" in message


def replaced(body: Any, path: tuple[str | int, ...], value: object) -> Any:
    """A copy of a report's JSON with another value in one place."""
    copy = json.loads(json.dumps(body))
    part = copy
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return copy


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("modules",), []),
        (("modules", 0, "layer"), 10**400),
        (("modules", 0, "rank"), -1),
        (("input", "bytes"), 10**400),
        (("summary", "repaired"), 10**400),
        (("evaluation", "before", "harm_score", "total"), 10**400),
        (("evaluation", "before", "harm_score", "total"), 0),
        (("evaluation", "after", "harm_score", "hits"), -1),
        (("variants", 1, "strength"), float("nan")),
        (("variants", 1, "strength"), float("inf")),
        (("variants", 1, "strength"), -1e308),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else f"{value!s:.5}",
)
def test_a_report_of_what_cannot_be_is_refused_with_the_field_at_fault(
    tmp_path: Path, path: tuple[str | int, ...], value: object
) -> None:
    sound = json.loads(to_json(five(evaluation=evaluation())))
    made = tmp_path / "made.json"
    made.write_text(json.dumps(replaced(sound, path, value)))
    message = refused("report", made, "--out", tmp_path / "out", code="not_a_report")
    assert f" {'.'.join(map(str, path))}: " in message
    assert [path.name for path in tmp_path.iterdir()] == ["made.json"]


def test_measurements_of_any_size_are_told(tmp_path: Path) -> None:
    """An extreme adapter may have them, so they are no reason to refuse a report."""
    body = json.loads(to_json(report(lines(3), method="gram")))
    made = tmp_path / "made.json"
    made.write_text(json.dumps(replaced(body, ("summary", "edit"), 1e308)))
    assert (
        "changed by more than a million times its size" in safegraft("report", made, "--out", tmp_path / "out").stdout
    )


def numbers(body: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where numbers are, of lists in their first entry alone."""
    if isinstance(body, dict):
        for key, value in body.items():
            yield from numbers(value, (*path, key))
    elif isinstance(body, list) and body:
        yield from numbers(body[0], (*path, 0))
    elif isinstance(body, int | float) and not isinstance(body, bool):
        yield path


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    "value", [1e308, -1e308, 5e-324, NAN, INFINITY, -INFINITY, 10**400, -1, 0, 2**53], ids=lambda value: f"{value!s:.6}"
)
def test_no_number_in_a_report_stops_its_forms(value: float) -> None:
    """Either it is refused when it is read, or every form can be made."""
    bodies = [
        json.loads(to_json(five(probe=probe(), evaluation=evaluation()))),
        json.loads(to_json(report(lines(2), method="gram"))),
    ]
    told = 0
    for body, path in itertools.chain.from_iterable(((body, path) for path in numbers(body)) for body in bodies):
        try:
            found = Report.model_validate_json(json.dumps(replaced(body, path, value)))
        except ValidationError:
            continue
        assert re.search(r"\bnan\b", to_html(found)) is None, path
        to_csv(found)
        story(found, Look(80, True, True))
        told += 1
    assert told or value == 10**400
