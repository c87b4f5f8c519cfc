import pytest

from benchmarks import page


def test_the_page_shows_what_was_measured() -> None:
    shown = page.PAGE.read_text(encoding="utf-8")
    assert page.filled(shown) == shown


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="no <!-- realign -->"):
        page.filled("nothing here")
