"""Lists of adapters; what jobs do to adapters stands in test_jobs.py."""

from typing import Any

from safegraft.contracts.adapter import Origin
from safegraft.stores.adapters import AdapterFilters, AdapterStore
from tests.stores.records import adapter


def test_adapters_are_found_by_name_base_digest_and_origin(adapters: AdapterStore) -> None:
    changed: dict[str, dict[str, Any]] = {
        "Reviews of 100%": {"base_model": "org/A"},
        "reviews_2": {"base_model": "org/a", "sha256": "f" * 64},
        "news": {"base_model": None, "origin": Origin(realignment_id="rea_1")},
    }
    made = {name: adapter(name).model_copy(update=changes) for name, changes in changed.items()}
    for item in made.values():
        adapters.add(item, "t", "adapters/x")
    adapters.add(adapter("reviews"), "other", "adapters/x")
    for filters, wanted in (
        (AdapterFilters(), set(made)),
        (AdapterFilters(name="REVIEWS"), {"Reviews of 100%", "reviews_2"}),
        # Signs that mean something in a pattern are signs here.
        (AdapterFilters(name="0%"), {"Reviews of 100%"}),
        (AdapterFilters(name="s_2"), {"reviews_2"}),
        (AdapterFilters(name="_"), {"reviews_2"}),
        (AdapterFilters(base_model="org/A"), {"Reviews of 100%"}),
        (AdapterFilters(sha256="f" * 64), {"reviews_2"}),
        (AdapterFilters(origin="uploaded"), {"Reviews of 100%", "reviews_2"}),
        (AdapterFilters(origin="realigned"), {"news"}),
        (AdapterFilters(name="news", origin="uploaded"), set()),
    ):
        found, more = adapters.page("t", limit=10, filters=filters)
        assert ({item.name for item in found}, more) == (wanted, False), filters
    # A page is full of what is looked for, however much lies between.
    assert [item.name for item in adapters.page("t", limit=1, filters=AdapterFilters(base_model="org/A"))[0]] == [
        "Reviews of 100%"
    ]
