"""What a tenant measured of a result, and how it is shown."""

import csv
import io
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from safegraft.report.interval import wilson
from tests.service.answers import refused
from tests.service.conftest import Running, realign, upload

SENT: dict[str, Any] = {
    "judge": "greedy answers; <b>key phrases</b>",
    "before": {"harm_score": {"hits": 24, "total": 24}, "task_accuracy": {"hits": 87, "total": 96}},
    "after": {"harm_score": {"hits": 0, "total": 24}, "over_refusal": {"hits": 1, "total": 24}},
}


@pytest.fixture(scope="module")
def jobs(service: Running, fresh: Path) -> dict[str, str]:
    """A repair and a measurement, ended."""
    with service.client() as client:
        adapter = upload(client, fresh)["id"]
        ended = {mode: realign(client, adapter, method={"type": "gram"}, mode=mode) for mode in ("patch", "analyze")}
    assert {job["status"] for job in ended.values()} == {"succeeded"}, ended
    return {mode: str(job["id"]) for mode, job in ended.items()}


@pytest.fixture
def url(jobs: dict[str, str]) -> str:
    return f"/v1/realignments/{jobs['patch']}"


def test_it_is_shown_in_the_job_and_on_the_page(client: httpx.Client, url: str) -> None:
    plain = {form: client.get(f"{url}/report.{form}").content for form in ("html", "json", "csv")}
    assert client.get(url).json()["result"]["evaluation"] is None
    refused(client.get(f"{url}/report.evaluation.csv"), 404, "no_such_figure")

    answer = client.put(f"{url}/evaluation", json=SENT)
    assert answer.status_code == 200, answer.text
    shown = answer.json()["result"]["evaluation"]
    assert client.get(url).json()["result"]["evaluation"] == shown
    assert shown["summary"] == "Harm score fell from 1.00 to 0.00. Whoever measured it does not say on which files."
    low, high = wilson(0, 24)
    assert shown["after"]["harm_score"] == {"hits": 0, "total": 24, "share": 0.0, "low": low, "high": high}
    # Measured on one side only.
    assert shown["before"]["task_accuracy"] is shown["after"]["over_refusal"] is None

    page = client.get(f"{url}/report.html")
    assert "How it behaves" in page.text
    assert "greedy answers; &lt;b&gt;key phrases" in page.text
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    rows = list(csv.DictReader(io.StringIO(client.get(f"{url}/report.evaluation.csv").text)))
    assert [(row["measure"], row["side"], row["hits"]) for row in rows] == [
        ("harm_score", "before", "24"),
        ("harm_score", "after", "0"),
    ]
    # What was attested stays as it was.
    assert client.get(f"{url}/report.json").content == plain["json"]
    assert client.get(f"{url}/report.csv").content == plain["csv"]

    other = SENT | {"before": {"harm_score": {"hits": 1, "total": 2}}, "after": {"harm_score": {"hits": 2, "total": 2}}}
    again = client.put(f"{url}/evaluation", json=other).json()["result"]["evaluation"]
    assert again["summary"].startswith("Harm score rose from 0.50 to 1.00")
    assert client.delete(f"{url}/evaluation").json()["result"]["evaluation"] is None
    assert client.delete(f"{url}/evaluation").status_code == 200
    assert client.get(f"{url}/report.html").content == plain["html"]


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"input_sha256": "0" * 64}, "other_adapter_evaluated", "input_sha256"),
        ({"output_sha256": "0" * 64}, "other_adapter_evaluated", "output_sha256"),
        ({"output_sha256": "0"}, "invalid_request", "output_sha256"),
        ({"judge": ""}, "invalid_request", "judge"),
        ({"judge": " \n"}, "invalid_request", "judge"),
        ({"a" * 100_000: 1}, "invalid_request", "a" * 80),
        ({"judge": "a\0b"}, "invalid_request", "judge"),
        ({"before": {"harm_score": {"hits": 3, "total": 2}}}, "invalid_request", "before.harm_score"),
        ({"before": {"harm_score": {"hits": "1", "total": 2}}}, "invalid_request", "before.harm_score.hits"),
        ({"before": {"harm_score": {"hits": 0, "total": 0}}}, "invalid_request", "before.harm_score.total"),
        ({"before": {}}, "invalid_request", None),
        ({"better": True}, "invalid_request", "better"),
    ],
)
def test_faults_are_named(client: httpx.Client, url: str, change: dict[str, Any], code: str, param: str | None) -> None:
    answer = client.put(f"{url}/evaluation", json=SENT | change)
    error = refused(answer, 422, code)
    if param is not None:
        assert error["param"] == param
    assert client.get(url).json()["result"]["evaluation"] is None


def test_a_measurement_repaired_nothing(client: httpx.Client, jobs: dict[str, str]) -> None:
    answer = client.put(f"/v1/realignments/{jobs['analyze']}/evaluation", json=SENT)
    assert "mode" in refused(answer, 422, "nothing_evaluated")["message"]


def test_a_job_without_a_report_has_none_either(client: httpx.Client, fresh: Path) -> None:
    adapter = upload(client, fresh)["id"]
    job = client.post(
        "/v1/realignments", json={"adapter_id": adapter, "method": {"type": "nlsr", "form": "paper"}}
    ).json()["id"]
    client.post(f"/v1/realignments/{job}/cancel")
    while client.get(f"/v1/realignments/{job}").json()["status"] not in ("failed", "cancelled"):
        time.sleep(0.05)
    for answer in (
        client.put(f"/v1/realignments/{job}/evaluation", json=SENT),
        client.delete(f"/v1/realignments/{job}/evaluation"),
    ):
        refused(answer, 409, "no_report")
    refused(client.put("/v1/realignments/job_0/evaluation", json=SENT), 404, "realignment_not_found")
