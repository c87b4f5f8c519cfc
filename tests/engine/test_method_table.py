"""docs/methods.md says what the code does: its generated parts are those of now, its grades those of the methods."""

import re

import pytest
import torch

from safegraft.contracts.methods import MODELS
from safegraft.engine.methods import METHODS
from tests.engine.families import Workshop, shared
from tests.engine.method_table import PAGE, between, merged, parameters, rewritten, table


@pytest.fixture(scope="session")
def page() -> str:
    return PAGE.read_text(encoding="utf-8")


@pytest.mark.long
def test_the_table_of_the_page_is_what_trying_everything_gives(
    page: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        workshop: Workshop = shared(tmp_path_factory.getbasetemp() / "families")
        found = table(workshop)
    finally:
        torch.set_num_threads(threads)
    assert between(page, "table") == found, "run `make methods`"


def test_the_parameters_of_the_page_are_those_that_requests_may_have(page: str) -> None:
    assert between(page, "parameters") == parameters(), "run `make methods`"


@pytest.mark.parametrize("method", MODELS)
def test_every_method_has_a_section_with_a_grade_for_each_form(page: str, method: str) -> None:
    sections = re.findall(rf"^## `{method}`.*?(?=^## )", page, flags=re.DOTALL | re.MULTILINE)
    assert len(sections) == 1
    grades = dict(re.findall(r"^- `(\w+)`: \*\*(.+?)\*\*", sections[0], flags=re.MULTILINE))
    assert grades == METHODS[method].fidelity


def test_architectures_that_disagree_are_named_in_their_cell() -> None:
    assert merged({"Llama": "works", "Phi": "works"}) == "works"
    assert (
        merged({"Llama": "works", "Phi": "refused: `x`", "Gemma": "works"})
        == "works (Llama, Gemma); refused: `x` (Phi)"
    )


def test_only_what_is_between_the_markers_changes() -> None:
    text = "before\n\n<!-- table -->\n\nold\nlines\n\n<!-- /table -->\n\nafter <!-- table -->"
    assert rewritten(text, "table", "new") == text.replace("old\nlines", "new")
    with pytest.raises(ValueError, match="0 places for parameters"):
        rewritten(text, "parameters", "new")
