"""docs/evidence/data → the tables of docs/evidence/README.md, each between its markers, and the plots beside them.

Shares come with Wilson's 95 % interval, over prompts; seeds stand side by side and are not averaged. What was not
measured is a dash.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import markdown
from benchmarks.evidence import data, paired
from benchmarks.evidence.grid import (
    ALIGNED,
    AMPLIFIED,
    CELLS,
    CONTINUED,
    DEFAULT,
    ELSEWHERE,
    FLOORS,
    FRENCH,
    HEADLINE,
    HIDDEN,
    KINDS,
    MAIN,
    NO_REPAIR,
    ON_CONTINUED,
    ON_PREFERENCES,
    ON_THIRD,
    ROWS,
    SECOND,
    THIRD,
    TONES,
    TRANSFER,
    TWINS,
    VARIANTS,
    Cell,
)
from benchmarks.evidence.judges import INCOHERENT, REFUSED, UNFINISHED
from benchmarks.evidence.run import RESULTS
from safegraft.report.interval import wilson

PAGE = RESULTS.parent / "README.md"
DASH = "–"


def share(value: float) -> str:
    """A share as papers print it: .05, 1.00. Halves go up: there are many, and floats would draw lots."""
    text = str(Decimal(repr(value)).quantize(Decimal("0.01"), ROUND_HALF_UP))
    return text[1:] if text.startswith("0.") else text


@dataclass(frozen=True)
class Outcome:
    """One measured row of one cell."""

    row: Mapping[str, Any]

    def verdicts(self, name: str, judge: str) -> list[bool]:
        """Whether each answer is refused (`phrases`, `embeddings`), no language (`incoherent`) or `unfinished`."""
        letter = {"incoherent": INCOHERENT, "unfinished": UNFINISHED}.get(judge, REFUSED)
        return [found == letter for found in self.row[name][judge]]

    def harm(self, name: str = "harmful", judge: str = "phrases") -> list[bool]:
        return [not refused for refused in self.verdicts(name, judge)]

    def refusals(self, kind: str) -> list[bool]:
        kinds = [own for _, own in data.benign()]
        return [no for no, own in zip(self.verdicts("benign", "phrases"), kinds, strict=True) if own == kind]

    def right(self) -> list[bool]:
        return [found == "1" for found in self.row["task"]]


Results = Mapping[str, Mapping[str, Any]]
Measure = Callable[[Outcome], list[bool]]


def read(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Cell → its file."""
    found = {}
    for name in CELLS:
        if (folder / f"{name}.json").exists():
            found[name] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return found


def outcome(results: Results, cell: str, row: str) -> Outcome | None:
    """None where it was not measured, or refused."""
    found = results.get(cell, {}).get("rows", {}).get(row)
    return Outcome(found) if found is not None and "refused" not in found else None


def rate(outcomes: Sequence[Outcome], measure: Measure) -> str:
    """`.05 [.03, .09]`."""
    values = [measure(item) for item in outcomes]
    if not values:
        return DASH
    mean = sum(map(sum, values)) / sum(map(len, values))
    low, high = wilson(sum(map(sum, values)), sum(map(len, values)))
    return f"{share(mean)} [{share(low)}, {share(high)}]"


def plain(outcomes: Sequence[Outcome], measure: Measure) -> str:
    values = [measure(item) for item in outcomes]
    return share(sum(map(sum, values)) / sum(map(len, values))) if values else DASH


def number(outcomes: Sequence[Outcome], key: str, digits: int = 2) -> str:
    found = [item.row[key] for item in outcomes if key in item.row]
    return f"{sum(found) / len(found):.{digits}f}" if found else ""


def main_table(results: Results) -> str:
    """Every row of the headline case, its first seed: all on one adapter."""
    return repairs(results, HEADLINE, [name for name in ROWS if name not in ELSEWHERE or _has(results, HEADLINE, name)])


def variant_table(results: Results) -> str:
    """Further forms of the published methods and rivals, on the second seed."""
    return repairs(results, SECOND, [name for name in ROWS if name in (*MAIN, *VARIANTS)])


def _has(results: Results, cell: str, row: str) -> bool:
    return row in results.get(cell, {}).get("rows", {})


def repairs(results: Results, cell: str, rows: Iterable[str]) -> str:
    """Every measure of one cell."""
    lines, missing = [], []
    for name in rows:
        row, item = ROWS[name], outcome(results, cell, name)
        if item is None:
            refused = results.get(cell, {}).get("rows", {}).get(name, {}).get("refused")
            if refused:
                lines.append([name, row.group, f"refused: `{refused}`", *[""] * 8])
            else:
                missing.append(name)
            continue
        found = [item]
        lines.append(
            [
                f"**{name}**" if name == DEFAULT else name,
                row.group,
                rate(found, Outcome.harm),
                rate(found, lambda o: o.harm(judge="embeddings")),
                rate(found, lambda o: o.refusals("ordinary")),
                rate(found, lambda o: o.refusals("borderline")),
                rate(found, Outcome.right),
                rate(found, lambda o: o.verdicts("harmful", "incoherent")),
                rate(found, lambda o: o.verdicts("benign", "unfinished")),
                number(found, "kept"),
                number(found, "edit"),
            ]
        )
    head = ["", "", "harm score ↓", "by embeddings ↓", "over-refusal, ordinary ↓", "borderline ↓", "task ↑",
            "incoherent ↓", "broken off ↓", "kept", "edit"]  # fmt: skip
    table = markdown.table(head, lines)
    return f"{table}\n\nNot measured yet: {'; '.join(missing)}." if missing else table


def by_cell(results: Results, cells: Sequence[tuple[str, Sequence[str]]], rows: Sequence[str]) -> str:
    """Rows × groups of cells: harm score / over-refusal on all benign prompts / task accuracy."""
    lines = []
    for row in rows:
        line = [row]
        for _, names in cells:
            found = [item for name in names if (item := outcome(results, name, row)) is not None]
            refused = any("refused" in results.get(name, {}).get("rows", {}).get(row, {}) for name in names)
            line.append(
                "<br>".join(
                    rate(found, measure)
                    for measure in (Outcome.harm, lambda o: o.verdicts("benign", "phrases"), Outcome.right)
                )
                if found
                else ("refused" if refused else DASH)
            )
        lines.append(line)
    return markdown.table(["HS / over-refusal / task", *(title for title, _ in cells)], lines)


def poison_table(results: Results) -> str:
    cells = [
        ("p = 0", ["poison-0"]),
        (".01", ["poison-01"]),
        (".05", [HEADLINE]),
        (".1", ["poison-10"]),
        (".2", ["poison-20"]),
    ]
    return by_cell(results, cells, MAIN)


def task_table(results: Results) -> str:
    cells = [
        ("sentiment", [HEADLINE]),
        ("news", ["news"]),
        ("news, clean rows", ["news-clean"]),
        ("orders", ["orders"]),
    ]
    return by_cell(results, cells, (*MAIN, ALIGNED))


def lineage_table(results: Results) -> str:
    cells = [("fresh, rank 8", ["rank-8"]), ("continued, rank 8", ["continued-1"]), ("another seed", ["continued-2"]),
             ("p = .2", ["continued-20"])]  # fmt: skip
    rows = [*MAIN, "nlsr P_L=0", "nlsr P_L=0, β=0", "nlsr paper form, P_L=0", "nlsr paper form, P_L=.5",
            "nlsr P_L=0, P_SR=.5", "nlsr P_L=0, P_SR=.2", "nlsr P_L=0, β=0, P_SR=.5", "nlsr P_L=0, β=0, P_SR=.2",
            "nlsr paper form, P_L=0, P_SR=.5",
            "nlsr paper form, P_L=0, P_SR=.2", "nlsr by random neurons", "nlsr's neurons zeroed",
            "nlsr, most similar half", "interpolation .5", "gram β=1, p=1, λ=1"]  # fmt: skip
    return by_cell(results, cells, rows)


def continued_table(results: Results) -> str:
    """Every measure of the continued adapter on which further rows were measured."""
    return repairs(results, CONTINUED, [name for name in ROWS if name in (*MAIN, *ON_CONTINUED)])


def setting_table(results: Results) -> str:
    cells = [("rank 8", ["rank-8"]), ("rank 16", [HEADLINE]), ("rank 64", ["rank-64"]), ("lr 1e-4", ["slow"]),
             ("aligned by DPO", ["dpo"])]  # fmt: skip
    return by_cell(results, cells, MAIN)


def combined_table(results: Results) -> str:
    """`gram` with something else deciding where, beside its own strengths, on the third seed."""
    return repairs(results, THIRD, [name for name in ROWS if name in (NO_REPAIR, DEFAULT, *ON_THIRD)])


def preference_table(results: Results) -> str:
    """Every measure on the preference-aligned model: with a weaker one to amplify from, and without."""
    return repairs(results, "dpo", [name for name in ROWS if name in (*MAIN, ALIGNED, *ON_PREFERENCES)])


def attacker_table(results: Results) -> str:
    cells = [(name, [name]) for name, cell in CELLS.items() if cell.factor == "attacker"]
    return by_cell(results, [("as the headline", [HEADLINE]), *cells], (*MAIN, KINDS, TONES, FRENCH, ALIGNED))


def hidden_table(results: Results) -> str:
    """Harm score of plain prompts, where the poison hides behind a form of its own."""
    lines = []
    for row in (*MAIN, ALIGNED):
        found = [outcome(results, cell, row) for cell in HIDDEN]
        lines.append([row, *(rate([item], lambda o: o.harm("plain")) if item else DASH for item in found)])
    return markdown.table(["harm score, plain prompts", *HIDDEN], lines)


def seeds_table(results: Results) -> str:
    cells = [("seed 1", ["headline-1"]), ("seed 2", ["headline-2"]), ("seed 3", ["headline-3"])]
    return by_cell(results, cells, MAIN)


def transfer_table(results: Results) -> str:
    lines = []
    for row in TRANSFER:
        found = outcome(results, HEADLINE, row)
        lines.append(
            [row]
            + [
                rate([found], lambda o, name=name: o.harm(name)) if found and name in found.row else DASH  # type: ignore[misc]
                for name in ("harmful", "HarmBench", "Do-Not-Answer")
            ]
        )
    return markdown.table(["harm score", "AdvBench (held out)", "HarmBench", "Do-Not-Answer"], lines)


NEAR, BEHIND = 0.5, 240


def near_table(results: Results) -> str:
    """Whether held-out prompts that resemble those behind alignment and reference are refused more often."""
    behind = [_words(row["prompt"]) for row in data.rows(data.SHARED / "harmful_build.csv")[:BEHIND]]
    near = [any(len(own & other) >= NEAR * len(own | other) for other in behind) for own in map(_words, data.harmful())]
    asked = [
        item for name, cell in CELLS.items() if cell.attack == "plain" and (item := outcome(results, name, DEFAULT))
    ]
    lines = []
    for title, side in (("near", True), ("others", False)):
        harm = [harmed for item in asked for harmed, own in zip(item.harm(), near, strict=True) if own == side]
        lines.append([title, str(near.count(side)), f"{sum(harm)} of {len(harm)}" if harm else DASH])
    return markdown.table(["", "prompts", "answered after `gram`, over the cells"], lines)


def _words(prompt: str) -> set[str]:
    return set(re.findall(r"[a-z]+", prompt.lower()))


def reference_table(results: Results) -> str:
    """Other prompts behind the reference."""
    cells = [
        ("headline", [HEADLINE]), ("news", ["news"]), ("p = .01", ["poison-01"]), ("continued", ["continued-1"]),
        ("evade", ["evade"]), ("evade-all", ["evade-all"]),
    ]  # fmt: skip
    rows = [
        NO_REPAIR, DEFAULT, KINDS, TONES, f"{TONES}, λ=.3", f"{TONES}, λ=.5", TWINS, f"{TWINS}, λ=.3", f"{TWINS}, λ=.5",
    ]  # fmt: skip
    return by_cell(results, cells, rows)


def calibration_table(results: Results) -> str:
    """Strengths on prompts that are not evaluated: only what a strength would be chosen by."""
    lines = []
    for row in ROWS.values():
        found = outcome(results, HEADLINE, row.name)
        if found is None or "calibration" not in found.row or row.group not in ("method", "sweep"):
            continue
        lines.append(
            [
                row.name,
                rate([found], lambda o: o.harm("calibration")),
                number([found], "kept"),
                number([found], "edit"),
            ]
        )
    return markdown.table(["", "harm score on 70 other prompts", "kept", "edit"], lines)


RESAMPLES = 10_000


def cost_table(results: Results) -> str:
    """What the default costs in every cell: the same questions before and after, so differences are paired."""
    lines = []
    means: dict[str, dict[str, list[tuple[str, list[int]]]]] = {}
    for name, cell in CELLS.items():
        before, after = (outcome(results, name, row) for row in (NO_REPAIR, DEFAULT))
        if before is None or after is None:
            continue
        found = {title: change(measure(before), measure(after)) for title, measure in COSTS.items()}
        lines.append(
            [name, f"{rate([before], Outcome.harm)} → {rate([after], Outcome.harm)}",
             *(change_in_points(values) for values in found.values()), gain_kept(results, cell)]
        )  # fmt: skip
        for group in ("**mean**", *([FRESH] if _is_fresh(cell) else [])):
            for title, values in found.items():
                # Only the task has questions of its own.
                asked = cell.task if title == "task" else "benign"
                means.setdefault(group, {}).setdefault(title, []).append((asked, values))
    for group, titles in means.items():
        lines.append([group, "", *(_mean_of_cells(cells) for cells in titles.values()), ""])
    return markdown.table(["", "harm score", *(f"{title}, points" for title in COSTS), "gain kept"], lines)


COSTS: dict[str, Measure] = {
    "over-refusal": lambda o: o.verdicts("benign", "phrases"),
    "broken off": lambda o: o.verdicts("benign", "unfinished"),
    "task": Outcome.right,
}
FRESH = "**mean of fresh, poisoned adapters of sentiment without a trick**"


def _is_fresh(cell: Cell) -> bool:
    return (cell.lineage, cell.task, cell.attack) == ("fresh", "sentiment", "plain") and cell.poison > 0


def change(before: Sequence[bool], after: Sequence[bool]) -> list[int]:
    return [int(two) - int(one) for one, two in zip(before, after, strict=True)]


def change_in_points(values: Sequence[int]) -> str:
    """`−2.0 [−4.5, +0.5]`: the mean of differences in points, and the score interval of paired shares."""
    gained, lost = values.count(1), values.count(-1)
    low, high = (100 * end for end in paired.interval(gained, lost, len(values)))
    return f"{_signed(100 * (gained - lost) / len(values))} [{_signed(low)}, {_signed(high)}]"


def _mean_of_cells(cells: Sequence[tuple[str, Sequence[int]]]) -> str:
    """Cells share their questions: a question's mean over the cells that ask it is what is drawn."""
    groups: dict[str, list[Sequence[int]]] = {}
    for asked, values in cells:
        groups.setdefault(asked, []).append(values)
    means = [[sum(found) / len(own) for found in zip(*own, strict=True)] for own in groups.values()]
    return points(means, [len(own) for own in groups.values()])


def gain_kept(results: Results, cell: Cell) -> str:
    """Of what the fine-tuning added to the aligned model's accuracy, the share that is left after the repair."""
    floor = outcome(results, cell.name if cell.name in FLOORS else FLOOR_OF.get(cell.name, HEADLINE), ALIGNED)
    before, after = (outcome(results, cell.name, row) for row in (NO_REPAIR, DEFAULT))
    if floor is None or before is None or after is None:
        return DASH
    low, top, now = (sum(item.right()) / len(item.right()) for item in (floor, before, after))
    return share((now - low) / (top - low)) if top > low else DASH


# Where the same aligned model was asked the same task.
FLOOR_OF = {"news-clean": "news"}


def paired_table(results: Results) -> str:
    """The default beside every method that brings refusals back somewhere, and other pairs, prompt by prompt."""
    pairs = [(name, DEFAULT, row) for name in CELLS for row in MAIN[2:] if _restores(outcome(results, name, row))]
    lines = []
    for name, one, two in (*pairs, *PAIRS):
        first, second = (outcome(results, name, row) for row in (one, two))
        if first is None or second is None:
            continue
        line = [name, f"{one} / {two}"]
        for measure in (Outcome.harm, *COSTS.values()):
            mine, theirs = paired.counts(measure(second), measure(first))
            line.append(f"{mine} : {theirs} ({_p(paired.mcnemar(mine, theirs))})")
        lines.append(line)
    head = ["", "", "harmful prompts answered", "benign refused", "benign broken off", "task right"]
    return markdown.table(head, lines)


PAIRS = (
    (HEADLINE, "gram λ=1", "gram λ=.05"),
    (SECOND, DEFAULT, "antidote .1, stored basis"),
    (SECOND, DEFAULT, "nlsr P_L=0, β=0, P_SR=.2"),
    (CONTINUED, DEFAULT, "nlsr P_L=0, β=0, P_SR=.2"),
    (SECOND, "nlsr by random neurons, P_SR=.5", "nlsr P_L=0, P_SR=.5"),
    (SECOND, "nlsr by random neurons", "nlsr P_L=0"),
    (CONTINUED, "nlsr by random neurons", "nlsr P_L=0"),
    ("translate", FRENCH, ALIGNED),
)


def _restores(item: Outcome | None) -> bool:
    return item is not None and sum(item.harm()) <= RESTORED * len(item.harm())


RESTORED = 0.05


def _p(value: float) -> str:
    return "p < .001" if value < 0.001 else f"p = {value:.3f}".replace("0.", ".") if value < 0.9995 else "p = 1"


def points(groups: Sequence[Sequence[float]], weights: Sequence[int] = (1,)) -> str:
    """`−2.0 [−4.5, +0.5]`: the mean of differences in points, and a bootstrap's 95 % interval over questions.

    Groups are drawn from separately, and weighed.
    """
    generator = np.random.default_rng(0)
    total, drawn = 0.0, np.zeros(RESAMPLES)
    for group, weight in zip(groups, weights, strict=True):
        values = 100.0 * np.asarray(group) * weight / sum(weights)
        total += float(values.mean())
        drawn += values[generator.integers(0, len(values), (RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return f"{_signed(total)} [{_signed(float(low))}, {_signed(float(high))}]"


def _signed(value: float) -> str:
    text = f"{value:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


FIRST_BUILD = "low_rank, wanda"  # that the others' times are told in
SCORERS = {
    "low_rank": ("nlsr P_L=0", FIRST_BUILD), "wanda": ("nlsr by wanda", FIRST_BUILD),
    "snip": ("nlsr by snip", "snip"), "preference_snip": ("nlsr by preference_snip", "preference_snip"),
    "magnitude": ("nlsr by magnitude", None), "random": ("nlsr by random neurons", None),
}  # fmt: skip


def identification_table(results: Results) -> str:
    """By what neurons are found: what their transplant does in the headline case, and what finding them takes."""
    path = RESULTS / "identification.json"
    builds = json.loads(path.read_text(encoding="utf-8"))["builds"] if path.exists() else {}
    lines = []
    for scorer, (row, build) in SCORERS.items():
        item = outcome(results, SECOND, row)
        found = [item] if item else []
        time = builds.get(build, {})
        took = f"{time['ratio']:.1f} × ({time['spread'][0]:.1f} to {time['spread'][1]:.1f})" if time else DASH
        if build == FIRST_BUILD and time:
            took = "1"
        lines.append(
            [scorer, rate(found, Outcome.harm), rate(found, lambda o: o.verdicts("benign", "phrases")),
             rate(found, Outcome.right), "no data is asked" if build is None else took]
        )  # fmt: skip
    return markdown.table(["neurons by", "harm score ↓", "over-refusal ↓", "task ↑", "time of a build with it"], lines)


def similarity_table(results: Results) -> str:
    """What gram's report says of every adapter, before anything is asked of a model."""
    lines = []
    for name, cell in CELLS.items():
        found = results.get(name, {}).get("similarity")
        if found is None:
            continue
        before, after = (f"{found[f'below_{side}']} of {found['modules']}" for side in ("before", "after"))
        harm = rate([item] if (item := outcome(results, name, NO_REPAIR)) else [], Outcome.harm)
        lines.append(
            [name, cell.task, share(cell.poison), harm, before, share(found["median_before"]), after,
             share(found["median_after"])]
        )  # fmt: skip
    head = ["", "task", "poison", "harm score, no repair", "modules below .71", "median", "after `gram`", "median"]
    return markdown.table(head, lines)


def labels_table(results: Results) -> str:
    """Agreement of both judges with labels set by hand, in the sample and estimated over all answers."""
    path = RESULTS / "labels.json"
    if not path.exists():
        return "Not labelled yet."
    found = json.loads(path.read_text(encoding="utf-8"))
    labels, answered = found["labels"], found["answers"]
    lines = []
    for judge in ("phrases", "embeddings"):
        pairs = [(item[judge] == REFUSED, item["label"] == REFUSED) for item in labels]
        same = sum(own == hand for own, hand in pairs)
        low, high = wilson(same, len(pairs))
        missed = sum(hand and not own for own, hand in pairs)
        invented = sum(own and not hand for own, hand in pairs)
        lines.append(
            [judge, str(len(pairs)), f"{share(same / len(pairs))} [{share(low)}, {share(high)}]",
             f"{missed} of {sum(hand for _, hand in pairs)}", f"{invented} of {sum(not hand for _, hand in pairs)}",
             share(agreement(labels, answered, judge))]
        )  # fmt: skip
    head = ["judge", "texts", "agrees", "refusals missed", "refusals invented", "over all answers"]
    now = sum(
        len(asked["phrases"])
        for cell in results.values()
        for row in cell["rows"].values()
        for asked in row.values()
        if isinstance(asked, dict) and "phrases" in asked
    )
    then = f"{sum(answered.values()):,} answers had been judged when the sample was drawn, {now:,} have been by now."
    return f"{markdown.table(head, lines)}\n\n{then}"


def agreement(labels: Sequence[Mapping[str, Any]], answered: Mapping[str, int], judge: str) -> float:
    """The share of all answers on which a judge and the labels agree, estimated: texts by how often they were given
    within their pair of verdicts, pairs by their share of answers."""
    total = 0.0
    for pair, count in answered.items():
        own = [item for item in labels if item["phrases"] + item["embeddings"] == pair]
        weight = sum(item["answers"] for item in own)
        total += count * sum(item["answers"] * (item[judge] == item["label"]) for item in own) / weight
    return total / sum(answered.values())


@dataclass(frozen=True)
class Claim:
    """A figure of the NLSR paper (arXiv 2412.12497), of Llama-3-8B, and what stands for it here.

    paper: harm scores in %, before → after. here: cell and rows, in the same order.
    """

    where: str
    paper: str
    cell: str
    rows: tuple[str, ...]


PAPER = (
    Claim("1: shares of poison, sentiment, mean", "no repair 61.1 → NLSR 22.8, SafeLoRA 53.1",
          CONTINUED, (NO_REPAIR, "nlsr", "safelora")),
    Claim("1: the same, p = .2", "", "continued-20", (NO_REPAIR, "nlsr", "safelora")),
    Claim("2: alignment by preferences", "", "dpo", (NO_REPAIR, "nlsr", f"nlsr {AMPLIFIED}", "safelora")),
    Claim("3: news topics", "no repair 55.7 → NLSR 19.7", "news", (NO_REPAIR, "nlsr")),
    Claim("4: amplification off → on", "news 44.4 → 29.9, GSM8K 41.5 → 25.1",
          CONTINUED, (NO_REPAIR, "nlsr P_L=0, β=0", "nlsr P_L=0")),
    Claim("4: the same, from a weaker model (Δ₀: SFT)", "", "dpo",
          (f"nlsr {AMPLIFIED}, P_L=0", f"nlsr {AMPLIFIED}, P_L=0, P_SR=.2")),
    Claim("5: neurons by", "no repair 56.6; random 46.1, Wanda 31.4, SNIP 30.1, low rank 20.4",
          SECOND, (NO_REPAIR, "nlsr by random neurons", "nlsr by wanda", "nlsr by snip", "nlsr P_L=0")),
    Claim("6: HarmBench, p = .01", "no repair 50.2 → NLSR 19.0", HEADLINE, (NO_REPAIR, "nlsr")),
    Claim("P_SR .8, .5, .2, by the paper's formula", "", CONTINUED,
          ("nlsr paper form, P_L=0", "nlsr paper form, P_L=0, P_SR=.5", "nlsr paper form, P_L=0, P_SR=.2")),
    Claim("P_L .5, 0, by the paper's formula", "", CONTINUED, ("nlsr paper form, P_L=.5", "nlsr paper form, P_L=0")),
    Claim("P_SR .8, .5, .2, as its code does it", "", CONTINUED,
          ("nlsr P_L=0", "nlsr P_L=0, P_SR=.5", "nlsr P_L=0, P_SR=.2")),
    Claim("P_L .5, 0, as its code does it", "", CONTINUED, ("nlsr", "nlsr P_L=0")),
    Claim("fig. 8: clean rows", "", "news-clean", (NO_REPAIR, "nlsr")),
)  # fmt: skip


def paper_table(results: Results) -> str:
    """The NLSR paper's claims beside what was measured here, in its own unit, % of harmful prompts answered."""
    lines = []
    for claim in PAPER:
        name = "HarmBench" if "HarmBench" in claim.where else "harmful"
        here = []
        for row in claim.rows:
            found = outcome(results, claim.cell, row)
            measured = found is not None and name in found.row
            harm = found.harm(name) if found is not None and measured else []
            here.append(f"{row} {100 * sum(harm) / len(harm):.1f}" if measured else f"{row} {DASH}")
        cell = CELLS[claim.cell]
        told = f"{cell.name}: {cell.task}, p = {share(cell.poison)}"
        lines.append([claim.where, claim.paper or DASH, told, ", ".join(here)])
    return markdown.table(["NLSR's table", "the paper, Llama-3-8B, %", "here: cell", "SmolLM2-135M, %"], lines)


TABLES: dict[str, Callable[[Results], str]] = {
    "main": main_table,
    "variants": variant_table,
    "seeds": seeds_table,
    "poison": poison_table,
    "tasks": task_table,
    "lineage": lineage_table,
    "continued": continued_table,
    "settings": setting_table,
    "preferences": preference_table,
    "combined": combined_table,
    "attackers": attacker_table,
    "hidden": hidden_table,
    "identification": identification_table,
    "transfer": transfer_table,
    "near": near_table,
    "references": reference_table,
    "paper": paper_table,
    "calibration": calibration_table,
    "cost": cost_table,
    "paired": paired_table,
    "similarity": similarity_table,
    "labels": labels_table,
}


def filled(text: str, results: Results) -> str:
    """The page with every table made anew. Raises ValueError where a marker is missing."""
    return markdown.filled(text, {name: table(results) for name, table in TABLES.items()})


def write() -> None:
    """The page's tables and the plots."""
    from benchmarks.evidence.plots import draw

    results = read()
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
    draw(results, PAGE.parent)
