"""All files are written, and the two for machines say exactly what the report says."""

import csv
import io
import json
from pathlib import Path

import pytest

from safegraft.contracts.report import ModuleLine, Report
from safegraft.report import figures, headline, render, tables, to_csv, to_json, with_headline
from safegraft.report.words import still_leaning
from tests.report.samples import METHODS, evaluation, five, line, lines, probe, report


def test_render_writes_all_files_beside_a_stem_with_dots(tmp_path: Path) -> None:
    paths = render(report(lines(2)), tmp_path / "adapter-v1.2.report")
    ends = ["json", "html", "csv", "png", "changes.png", "layers.png"]
    assert [path.name for path in paths] == [f"adapter-v1.2.report.{end}" for end in ends]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    assert all(path.stat().st_size for path in paths)


def test_equal_reports_give_equal_files(tmp_path: Path) -> None:
    first, second = (render(report(lines(2)), tmp_path / name) for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_an_evaluation_has_a_slide_and_a_table_of_its_own() -> None:
    assert "evaluation.png" not in figures(report(lines(2)))
    found = figures(report(lines(2), evaluation=evaluation()))
    assert found["evaluation.png"].startswith(b"\x89PNG")
    assert found["evaluation.png"] not in [data for ending, data in found.items() if ending != "evaluation.png"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lineage", ["continued", "fresh", "foreign"])
def test_json_reads_back_as_the_same_report(method: str, lineage: str) -> None:
    original = report(lines(3), method=method, lineage=lineage, output_rank="exact", probe=probe())
    assert Report.model_validate_json(to_json(original)) == with_headline(original)


def test_json_has_the_headline_and_is_read_where_it_has_none() -> None:
    sample = report(lines(3), headline="of another day")
    assert json.loads(to_json(sample))["headline"] == headline(sample)
    old = json.loads(to_json(sample))
    del old["headline"]
    assert with_headline(Report.model_validate(old)) == with_headline(sample)


def test_json_holds_every_strength_and_its_digest() -> None:
    original = five()
    again = Report.model_validate_json(to_json(original))
    assert again == with_headline(original)
    assert [variant.strength for variant in again.variants] == [0.3, 0.1, 3, 0.5, 1], "in the order asked for"
    assert len({variant.output.sha256 for variant in again.variants if variant.output}) == 5


def test_csv_holds_the_modules_of_the_first_strength_alone() -> None:
    original = five()
    rows = list(csv.DictReader(io.StringIO(to_csv(original), newline="")))
    assert [row["name"] for row in rows] == [module.name for module in original.modules]
    assert {row["strength"] for row in rows} == {str(original.variants[0].strength)}


def test_csv_of_strengths_has_the_curves_figures() -> None:
    original = five()
    rows = list(csv.DictReader(io.StringIO(tables(original)["strengths.csv"], newline="")))
    assert len(rows) == len(original.variants) == 5
    for row in rows:
        (found,) = [item for item in original.variants if item.strength == float(row["strength"])]
        assert (float(row["kept"]), float(row["edit"])) == (found.summary.kept, found.summary.edit)
        assert float(row["similarity_after_median"]) == found.summary.similarity_after.median
        assert row["output_sha256"] == (found.output.sha256 if found.output else "")
        assert row["still_leaning"] == still_leaning(original, found.summary) == "none"
    assert [float(row["strength"]) for row in rows] == sorted(item.strength for item in original.variants)
    assert set(tables(report(lines(2)))) == {"csv"}


def test_csv_of_an_evaluation_has_what_was_counted() -> None:
    original = report(lines(2), evaluation=evaluation())
    rows = list(csv.DictReader(io.StringIO(tables(original)["evaluation.csv"], newline="")))
    found = [(row["measure"], row["side"], int(row["hits"]), int(row["total"])) for row in rows]
    assert found == [
        (name, side, share.hits, share.total)
        for name, before, after in evaluation().measures()
        for side, share in (("before", before), ("after", after))
    ]
    for row in rows:
        assert 0 <= float(row["low"]) <= float(row["share"]) <= float(row["high"]) <= 1


def test_csv_holds_every_field_of_every_module() -> None:
    original = report([*lines(4), line("lm_head", None, 0.5, 0.75, selection_probability=0.25)])
    rows = list(csv.DictReader(io.StringIO(to_csv(original), newline="")))
    assert len(rows) == len(original.modules)
    assert list(rows[0]) == [*ModuleLine.model_fields, "strength"]
    for row, module in zip(rows, original.modules, strict=True):
        assert row.pop("strength") == ""
        cells = {key: value or None for key, value in row.items()}
        assert ModuleLine.model_validate(cells) == module


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", "＝"])
def test_no_name_becomes_a_formula(start: str) -> None:
    name = f'{start}HYPERLINK("x").q_proj'
    text = to_csv(report([line(name, 0, -0.5, kind=f"{start}1+1")]))
    (row,) = csv.DictReader(io.StringIO(text, newline=""))
    assert row["name"] == f"'{name}"
    assert row["kind"] == f"'{start}1+1"
    assert row["similarity_before"] == "-0.5", "a number stays a number"
