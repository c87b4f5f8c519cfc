"""Several jobs and adapters side by side: told apart, kept up to date, and started again with other parameters."""

from tests.e2e.conftest import FRESH, Console, Tab
from tests.service.conftest import realign


def test_a_list_goes_on_by_itself(tab: Tab, console: Console) -> None:
    page = tab.page
    tab.sign_in()
    adapter = console.upload(FRESH, name="goes on")
    with console.engine_stopped(), console.api() as client:
        job = client.post("/v1/realignments", json={"adapter_id": adapter["id"], "method": {"type": "gram"}}).json()
        tab.open(f"#/realignments?adapter_id={adapter['id']}")
        page.get_by_role("link", name="goes on, gram 0.2").wait_for()
        page.locator(".badge", has_text="Running").wait_for()
    page.locator(".badge", has_text="Succeeded").wait_for()
    assert console.job(job["id"])["status"] == "succeeded"


def test_what_was_not_changed_is_not_called_repaired(tab: Tab, console: Console) -> None:
    page = tab.page
    tab.sign_in()
    adapter = console.upload(FRESH, name="as it was")
    with console.api() as client:
        job = realign(client, adapter["id"], method={"type": "none"})
    tab.open("#/adapters?name=as it was (none)")
    page.get_by_text("unchanged", exact=True).wait_for()
    assert page.get_by_text("repaired", exact=True).count() == 0
    page.get_by_role("link", name="as it was (none)").click()
    page.get_by_text("Its weights are those of the adapter that came, byte for byte").wait_for()
    tab.look("unchanged-adapter")
    tab.open(f"#/realignments/{job['id']}")
    page.get_by_role("button", name="Download the adapter, unchanged").wait_for()
    assert "too weak" not in page.inner_text("main"), "a control was not meant to repair"


def test_a_job_is_started_again_with_other_parameters(tab: Tab, console: Console) -> None:
    page = tab.page
    tab.sign_in()
    adapter = console.upload(FRESH, name="once more")
    with console.api() as client:
        job = realign(client, adapter["id"], method={"type": "gram", "steepness": 3}, strengths=[0.5, 0.1],
                      metadata={"customer": "c-17"})  # fmt: skip
    tab.open(f"#/realignments/{job['id']}")
    page.get_by_role("columnheader", name="Still lean to safety prompts").wait_for()
    assert "general_weight" not in page.locator("dd", has_text="steepness").inner_text(), "each strength has its own"
    assert page.title() == "once more, gram, 2 strengths from 0.1 to 0.5 · safegraft"
    page.get_by_role("button", name="Other parameters").click()
    many = page.get_by_label("Values of general_weight")
    many.wait_for()
    assert page.get_by_label("Several, compared on one chart").is_checked()
    assert many.input_value() == "0.5, 0.1"
    assert page.get_by_label("steepness").input_value() == "3"
    assert page.get_by_label("Metadata").input_value() == "customer=c-17"
    many.fill("0.3")
    page.get_by_role("button", name="Start the realignment").click()
    page.get_by_role("heading", name="Realignment of once more").wait_for()
    other = console.job(page.url.rpartition("/")[2])
    assert other["strengths"] == [0.3]
    assert page.title() == "once more, gram 0.3 · safegraft"
    assert other["method"]["steepness"] == 3
    assert other["metadata"] == {"customer": "c-17"}


def test_of_adapters_of_one_name_the_one_that_is_meant_is_chosen(tab: Tab, console: Console) -> None:
    page = tab.page
    tab.sign_in()
    older, newer = (console.upload(FRESH, name="twin")["id"] for _ in range(2))
    with console.api() as client:
        job = realign(client, older, method={"type": "none"})
    tab.open("#/realignments")
    name = page.get_by_label("Adapter", exact=True)
    name.fill("twi")
    name.press("Enter")
    page.get_by_text("None of the newest hundred adapters is called so").wait_for()
    name.fill("twin")
    name.press("Enter")
    page.get_by_text("2 adapters are called so; until you choose one, all are listed.").wait_for()
    tab.look("twins")
    assert [page.get_by_role("button", name=one).count() for one in (older, newer)] == [1, 1]
    page.get_by_role("button", name=older).click()
    page.locator(f'a[href="#/realignments/{job["id"]}"]').wait_for()
    assert page.locator(".rows .row").count() == 1


def test_modules_are_sorted_by_the_numbers_in_their_names(tab: Tab, console: Console) -> None:
    page = tab.page
    tab.sign_in()
    with console.api() as client:
        job = realign(client, console.upload(FRESH, name="sorted")["id"], mode="analyze", method={"type": "gram"})
    tab.open(f"#/realignments/{job['id']}")
    page.get_by_text("This run measured and changed nothing.").wait_for()
    page.get_by_role("columnheader", name="Module").get_by_role("button").click()
    page.wait_for_timeout(200)
    found = page.locator("table.data tbody tr td:first-child").all_inner_texts()
    layers = [int(text.split("layers.")[1].split(".")[0]) for text in found if "layers." in text]
    assert len(set(layers)) > 2
    assert layers in (sorted(layers), sorted(layers, reverse=True))


def test_a_cell_that_is_touched_is_told_in_sight(tab: Tab, console: Console) -> None:
    page = tab.page
    tab.sign_in()
    with console.api() as client:
        job = realign(client, console.upload(FRESH, name="touched")["id"], method={"type": "gram"})
    page.set_viewport_size({"width": 360, "height": 480})
    tab.open(f"#/realignments/{job['id']}")
    cell = page.get_by_role("grid").first.locator("tbody td").first
    cell.wait_for()
    cell.evaluate("cell => scrollBy(0, cell.getBoundingClientRect().top - 100)")
    readout = page.locator(".map .readout").first
    assert readout.bounding_box()["y"] > 480, "the map goes on below the window"
    cell.click()
    page.locator(".map .readout", has_text="layer 0, q_proj").first.wait_for()
    box = readout.bounding_box()
    assert box["y"] > 0
    assert box["y"] + box["height"] <= 481
