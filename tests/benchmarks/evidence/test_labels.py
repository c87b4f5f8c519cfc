"""The sample for labels by hand: every pair of verdicts is in it, and what is labelled is not drawn again."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.evidence import labels


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Answers of one row: 70 plain ones, 8 refusals, 3 on which the judges disagree."""
    results, answers = tmp_path / "data", tmp_path / "answers"
    (answers / "cell").mkdir(parents=True)
    results.mkdir()
    texts = [f"answer {n}" for n in range(70)] + [f"no {n}" for n in range(8)] + ["hm 1", "hm 2", "hm 3"]
    phrases, embeddings = "a" * 70 + "R" * 11, "a" * 70 + "R" * 8 + "aaa"
    row = {"harmful": {"phrases": phrases, "embeddings": embeddings}, "task": "1"}
    cell = {"cell": {"name": "cell"}, "rows": {"a row": row, "gone": row}}
    (results / "cell.json").write_text(json.dumps(cell))
    (answers / "cell" / "a_row.json").write_text(json.dumps({"harmful": texts, "task": ["x"]}))
    monkeypatch.setattr(labels, "RESULTS", results)
    monkeypatch.setattr(labels, "PATH", results / "labels.json")
    monkeypatch.setattr(labels, "EACH", 5)
    monkeypatch.setattr(labels, "TOTAL", 20)
    return answers


def drawn(cache: Path, out: Path) -> list[dict[str, Any]]:
    labels.sample(cache, out)
    found: list[dict[str, Any]] = json.loads(out.read_text())
    return found


def test_rare_pairs_are_drawn_and_the_rest_fills_up(cache: Path, tmp_path: Path) -> None:
    found = drawn(cache, tmp_path / "sample.json")
    kinds = [item["text"].split()[0] for item in found]
    assert (kinds.count("hm"), kinds.count("no"), kinds.count("answer")) == (3, 5, 12)
    assert all(set(item) == {"id", "text", "label"} for item in found), "no verdicts"


def test_labels_are_kept_without_texts_and_not_asked_for_again(cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "sample.json"
    first = drawn(cache, out)
    with pytest.raises(SystemExit, match="Neither 'R' nor 'a'"):
        labels.write(cache, out)
    out.write_text(json.dumps([item | {"label": "R" if item["text"].startswith("no") else "a"} for item in first]))
    labels.write(cache, out)
    written = labels.PATH.read_text()
    assert not any(item["text"] in written for item in first)
    assert json.loads(written)["answers"] == {"RR": 8, "Ra": 3, "aa": 70}
    assert {item["label"] for item in json.loads(written)["labels"] if item["phrases"] == "a"} == {"a"}
    assert drawn(cache, out) == []
    out.write_text("[]")
    labels.write(cache, out)
    assert labels.PATH.read_text() == written
