"""Answers labelled by hand, against which the two judges of refusals are held.

    python -m benchmarks.evidence sample FILE    200 answers out of the cache, without verdicts, to be labelled
    python -m benchmarks.evidence labels FILE    adds the labelled file to docs/evidence/data/labels.json

Most answers are plain: the sample is drawn from the four pairs of verdicts (both judges say refused, one, the other,
neither), 50 different texts of each where there are so many, so that rare ones are seen at all. A text counts as
often as it was given, and agreement over all answers is estimated by the pairs' shares. No text is committed.
"""

import hashlib
import json
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from benchmarks.evidence.judges import ANSWERED, REFUSED
from benchmarks.evidence.measure import kept_answers
from benchmarks.evidence.run import RESULTS

TOTAL, EACH, SEED = 200, 50, 9
PATH = RESULTS / "labels.json"
Texts = dict[str, Counter[str]]


def collect(answers: Path) -> Texts:
    """Pair of verdicts (`RR`, `Ra`, `aR`, `aa`: phrases, embeddings) → how often each text was given."""
    found: Texts = defaultdict(Counter)
    for path in sorted(RESULTS.glob("*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        for name, row in results.get("rows", {}).items():
            kept = kept_answers(answers, results["cell"]["name"], name)
            if not kept.exists():
                continue
            for asked, texts in json.loads(kept.read_text(encoding="utf-8")).items():
                if asked == "task" or asked not in row:
                    continue
                verdicts = zip(row[asked]["phrases"], row[asked]["embeddings"], strict=True)
                for text, pair in zip(texts, verdicts, strict=True):
                    found["".join(pair)][text] += 1
    return found


def sample(answers: Path, out: Path) -> None:
    """Writes what has no label yet, in random order: `[{"id": …, "text": …, "label": ""}]`."""
    generator, known, found = random.Random(SEED), _known(), collect(answers)
    chosen: list[str] = []
    for pair, texts in sorted(found.items()):
        free = [text for text in sorted(texts) if digest(text) not in known]
        taken = sum(item["phrases"] + item["embeddings"] == pair for item in known.values())
        chosen += generator.sample(free, max(0, min(EACH - taken, len(free))))
    # Pairs with few texts are filled up from the one with most.
    most = max(found.values(), key=len)
    free = [text for text in sorted(most) if digest(text) not in known and text not in chosen]
    chosen += generator.sample(free, max(0, min(TOTAL - len(known) - len(chosen), len(free))))
    generator.shuffle(chosen)
    lines = [{"id": digest(text), "text": text, "label": ""} for text in chosen]
    out.write_text(json.dumps(lines, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _known() -> dict[str, dict[str, str]]:
    """Labels that are there, by the text's digest."""
    if not PATH.exists():
        return {}
    return {item["id"]: item for item in json.loads(PATH.read_text(encoding="utf-8"))["labels"]}


def write(answers: Path, labelled: Path) -> None:
    """Raises SystemExit where a label is missing or is none."""
    new = {item["id"]: item["label"] for item in json.loads(labelled.read_text(encoding="utf-8"))}
    labels = {name: item["label"] for name, item in _known().items()} | new
    wrong = [name for name, label in labels.items() if label not in (REFUSED, ANSWERED)]
    if wrong:
        raise SystemExit(f"Neither {REFUSED!r} nor {ANSWERED!r}: {', '.join(wrong)}.")
    found = collect(answers)
    gone = set(labels) - {digest(text) for texts in found.values() for text in texts}
    if gone:
        raise SystemExit(
            f"{len(gone)} labelled answers are not in {answers}: label where they were given, or draw anew."
        )
    lines: list[dict[str, Any]] = [
        {"id": digest(text), "phrases": pair[0], "embeddings": pair[1], "label": labels[digest(text)],
         "answers": texts[text]}
        for pair, texts in sorted(found.items())
        for text in sorted(texts)
        if digest(text) in labels
    ]  # fmt: skip
    answered = {pair: sum(texts.values()) for pair, texts in sorted(found.items())}
    PATH.write_text(json.dumps({"answers": answered, "labels": lines}, indent=1) + "\n", encoding="utf-8")


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
