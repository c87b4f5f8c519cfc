import pytest

from benchmarks import page


def test_the_page_shows_what_was_measured() -> None:
    shown = page.PAGE.read_text(encoding="utf-8")
    assert page.filled(shown) == shown


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="no <!-- realign -->"):
        page.filled("nothing here")


def test_a_table_names_its_machine_and_day_where_they_were_noted() -> None:
    machine = {"cores": 2, "processor": "Fast One", "torch": "2.13.0+cpu"}
    assert page.measured_on(machine) == ""
    assert page.measured_on(machine | {"date": "2026-11-22"}) == "2 cores of Fast One, PyTorch 2.13.0+cpu, 2026-11-22."
