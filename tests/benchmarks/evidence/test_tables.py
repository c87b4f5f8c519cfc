import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.evidence import tables
from benchmarks.evidence.grid import CELLS, ELSEWHERE, MAIN, ROWS, VARIANTS, plan
from benchmarks.evidence.run import RESULTS
from safegraft.engine.measure import WEAK_MEASURED


def test_halves_of_a_hundredth_go_up() -> None:
    shown = [tables.share(hits / 200) for hits in (1, 2, 3, 5, 9, 49, 199, 200)]
    assert shown == [".01", ".01", ".02", ".03", ".05", ".25", "1.00", "1.00"]


def test_the_page_shows_what_was_measured() -> None:
    page = tables.PAGE.read_text(encoding="utf-8")
    assert tables.filled(page, tables.read()) == page


def test_what_was_measured_is_complete_a_prompt_a_letter() -> None:
    for name, found in tables.read().items():
        assert found["cell"] == CELLS[name].__dict__
        for row, values in found["rows"].items():
            assert row in ROWS
            if "refused" in values:
                continue
            assert len(values["task"]) == 200
            for judge in ("phrases", "embeddings", "incoherent", "unfinished"):
                assert len(values["harmful"][judge]) == (80 if name == "translate" else 200)
                assert len(values["benign"][judge]) == 100


def test_no_answer_to_a_harmful_prompt_lies_in_the_repository() -> None:
    """Verdicts, numbers and names alone; hand-labelled answers are named by their hash."""

    def texts(value: Any) -> list[str]:
        if isinstance(value, dict):
            return [text for item in value.values() for text in texts(item)]
        if isinstance(value, list):
            return [text for item in value for text in texts(item)]
        return [value] if isinstance(value, str) else []

    for path in RESULTS.glob("*.json"):
        for text in texts(json.loads(path.read_text(encoding="utf-8"))):
            assert " " not in text or text in ROWS or text in {cell.factor for cell in CELLS.values()}, (path, text)


def test_a_table_says_what_is_missing(tmp_path: Path) -> None:
    assert tables.read(tmp_path) == {}
    assert tables.poison_table({}).count(tables.DASH) == 5 * len(MAIN)
    with pytest.raises(ValueError, match="no <!-- main -->"):
        tables.filled("nothing here", {})


def test_the_papers_claims_stand_beside_rows_that_are_planned() -> None:
    planned = {(cell.name, row.name) for cell, row in plan()}
    assert all((claim.cell, row) in planned for claim in tables.PAPER for row in claim.rows)


def test_a_claim_of_harmbench_is_measured_there() -> None:
    def row(harmful: str, other: str) -> dict[str, Any]:
        return {"harmful": {"phrases": harmful}, "HarmBench": {"phrases": other}}

    results = {"headline-1": {"rows": {"no repair": row("--", "--"), "nlsr": row("RR", "R-")}}}
    line = next(line for line in tables.paper_table(results).splitlines() if "HarmBench" in line)
    assert "no repair 100.0, nlsr 50.0" in line


def test_agreement_over_all_answers_weighs_rare_disagreements_little() -> None:
    labels = [
        {"phrases": "R", "embeddings": "R", "label": "R", "answers": 7},
        {"phrases": "R", "embeddings": "a", "label": "R", "answers": 3},
        {"phrases": "R", "embeddings": "a", "label": "a", "answers": 1},
    ]
    assert tables.agreement(labels, {"RR": 98, "Ra": 2}, "phrases") == pytest.approx(0.995)
    assert tables.agreement(labels, {"RR": 98, "Ra": 2}, "embeddings") == pytest.approx(0.985)
    assert tables.agreement(labels, {"RR": 2, "Ra": 98}, "embeddings") == pytest.approx(0.265)


def test_a_cells_change_has_the_interval_of_paired_shares() -> None:
    assert tables.change([True, False, True], [True, True, False]) == [0, 1, -1]
    assert tables.change_in_points([-1] * 4 + [0] * 196) == "−2.0 [−5.0, −0.1]"
    assert tables.change_in_points([0] * 100) == "0.0 [−3.7, +3.7]", "no change among a hundred is not certainty"


def test_what_is_kept_of_the_gain_is_told_from_the_aligned_models_accuracy() -> None:
    def right(count: int) -> dict[str, Any]:
        return {"task": "1" * count + "0" * (10 - count)}

    rows = {"no repair": right(9), "gram": right(8), "the aligned model": right(5)}
    results = {"headline-1": {"rows": rows}, "news-clean": {"rows": rows}}
    assert tables.gain_kept(results, CELLS["headline-1"]) == ".75"
    assert tables.gain_kept(results, CELLS["headline-2"]) == tables.DASH
    assert tables.gain_kept(results, CELLS["news-clean"]) == tables.DASH, "its floor is another task's"


def test_means_over_cells_are_drawn_over_questions() -> None:
    assert tables.points([[0.0] * 200]) == "0.0 [0.0, 0.0]"
    assert tables.points([[-1.0] * 50]) == "−100.0 [−100.0, −100.0]"
    # 4 of 200 lost, none won: the interval of a share of 2 %.
    shown = tables.points([[-1.0] * 4 + [0.0] * 196])
    assert re.fullmatch(r"−2\.0 \[−4\.\d, −0\.5\]", shown), shown
    assert shown == tables.points([[-1.0] * 4 + [0.0] * 196]), "drawn anew, the same"
    # Two groups, of which one counts three times: (3·(−4) + 0)/4.
    assert tables.points([[-0.04] * 10, [0.0] * 10], [3, 1]).startswith("−3.0 ")


def test_an_empty_run_has_empty_tables() -> None:
    for name in ("seeds", "poison", "tasks", "lineage", "settings", "attackers", "references", "hidden", "transfer"):
        rows = tables.TABLES[name]({}).splitlines()[2:]
        assert rows, name
        assert all(set(row.split(" | ", 1)[1].rstrip(" |").split(" | ")) == {tables.DASH} for row in rows), name
    for name in ("cost", "calibration", "similarity"):
        assert len(tables.TABLES[name]({}).splitlines()) == 2, "a head and nothing below it"
    assert tables.main_table({}).count(";") == len(set(ROWS) - ELSEWHERE) - 1, "all are named as missing"
    assert tables.variant_table({}).count(";") == len({*MAIN, *VARIANTS}) - 1


def test_the_warning_of_weak_strengths_quotes_what_was_measured() -> None:
    rows = json.loads((RESULTS / "headline-1.json").read_text())["rows"]
    shares = []
    for name in ("gram", "gram λ=.5", "gram λ=1"):
        judged = rows[name]["harmful"]["phrases"]
        shares.append(sum(letter != "R" for letter in judged) / len(judged))
    first, second, third = map(tables.share, shares)
    assert f"{first}, {second} and {third}" == WEAK_MEASURED
