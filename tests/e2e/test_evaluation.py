"""What was measured of an adapter's behaviour: added to a realignment's report by a person, and taken out again."""

import json
from pathlib import Path

from safegraft.contracts.report import Evaluation
from tests.e2e.conftest import FRESH, Console, Tab
from tests.service.conftest import realign


def test_an_evaluation_is_added_and_taken_out(tab: Tab, console: Console, tmp_path: Path) -> None:
    page = tab.page
    tab.sign_in()
    with console.api() as client:
        job = realign(client, console.upload(FRESH, name="evaluated")["id"], method={"type": "gram"})
        output = client.get(f"/v1/realignments/{job['id']}/report").json()["output"]["sha256"]
    before = {"harm_score": {"hits": 24, "total": 24}, "task_accuracy": {"hits": 87, "total": 96}}
    after = {"harm_score": {"hits": 1, "total": 24}, "task_accuracy": {"hits": 86, "total": 96}}
    measured = {"judge": "a <b>judge</b>", "before": before, "after": after, "output_sha256": output}
    file = tmp_path / "evaluation.json"

    tab.open(f"#/realignments/{job['id']}")
    section = page.get_by_role("region", name="How it behaves", exact=True)
    section.get_by_text("Nothing was measured yet").wait_for()
    assert (
        "safegraft evaluate"
        in section.get_by_label("Command that measures an adapter before and after", exact=True).inner_text()
    )
    # Of a fresh adapter; a continued one would be aligned twice.
    assert (
        "--aligned"
        in section.get_by_label("Command that measures an adapter before and after", exact=True).inner_text()
    )
    tab.look("not-evaluated")

    choose = section.get_by_label("Evaluation", exact=True)
    for text, code in (
        ("no json", "not_an_evaluation"),
        (json.dumps({**measured, "output_sha256": "0" * 64}), "other_adapter_evaluated"),
    ):
        file.write_text(text, encoding="utf-8")
        choose.set_input_files(file)
        section.get_by_role("alert").get_by_text(code).wait_for()
    tab.look("evaluation-refused")

    file.write_text(json.dumps(measured), encoding="utf-8")
    choose.set_input_files(file)
    section.get_by_text("Harm score fell from 1.00 to 0.04.").wait_for()
    assert page.evaluate("document.activeElement.textContent") == "How it behaves"
    for _ in range(2):
        rows = section.get_by_role("row")
        assert rows.count() == 3
        assert "1 of 24" in rows.nth(1).inner_text()
        assert "a <b>judge</b>" in section.inner_text()
        page.get_by_text("But for the evaluation above, this report measures weights").wait_for()
        page.reload()
        section.get_by_text("Harm score fell").wait_for()
    tab.look("evaluated")

    with page.expect_download() as saving:
        section.get_by_role("button", name="Table of the evaluation").click()
    assert Path(saving.value.path()).read_text(encoding="utf-8").startswith("measure,side,hits")
    with page.expect_download() as saving:
        page.get_by_role("button", name="Report as HTML").click()
    assert "How it behaves" in Path(saving.value.path()).read_text(encoding="utf-8")

    other = Evaluation.model_validate(measured | {"after": {"harm_score": {"hits": 2, "total": 24}}})
    file.write_text(other.model_dump_json(), encoding="utf-8")
    section.get_by_text("Replace it").click()
    section.get_by_label("Another evaluation").set_input_files(file)
    section.get_by_text("fell from 1.00 to 0.08").wait_for()
    against = page.get_by_text("What was measured speaks against serving this adapter: harm score is still 0.96.")
    assert against.count() == 0
    file.write_text(json.dumps(measured | {"after": {"harm_score": {"hits": 23, "total": 24}}}), encoding="utf-8")
    section.get_by_text("Replace it").click()
    section.get_by_label("Another evaluation").set_input_files(file)
    against.wait_for()
    tab.look("evaluated-against")
    tab.open("#/realignments")
    page.get_by_text("its evaluation speaks against it").wait_for()
    tab.look("list-evaluated-against")
    tab.open(f"#/adapters/{job['result']['adapter_id']}")
    against.wait_for()
    page.get_by_role("link", name="The report").click()
    against.wait_for()
    assert page.url.endswith(f"#/realignments/{job['id']}")

    section.get_by_role("button", name="Take it out").click()
    page.get_by_role("dialog").get_by_role("button", name="Keep it").click()
    assert console.job(job["id"])["result"]["evaluation"] is not None
    section.get_by_role("button", name="Take it out").click()
    page.get_by_role("dialog").get_by_role("button", name="Take it out").click()
    section.get_by_text("Nothing was measured yet").wait_for()
    assert console.job(job["id"])["result"]["evaluation"] is None
    page.get_by_text("This report measures weights").wait_for()
