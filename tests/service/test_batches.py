"""Batches over HTTP with real workers, and their loop step by step: canary, stop rule, room, and several gateways."""

import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from safegraft.adapter import describe
from safegraft.contracts.adapter import Origin
from safegraft.contracts.batch import MIN_JUDGED, BatchCreate, StopRule
from safegraft.contracts.keys import Limits
from safegraft.errors import StorageFault
from safegraft.ids import new_id
from safegraft.records import adapter_record
from safegraft.stores.batches import Tally
from safegraft.stores.jobs import Filters
from safegraft.stores.objects import adapter_prefix
from service.app import open_services
from service.batches import Batches, broken, cancel_batch, open_batch
from service.dependencies import Services
from service.settings import GatewaySettings
from tests.service.answers import refused
from tests.service.conftest import finished, free_port, upload
from tests.stores.test_batches import end

ENDED = ("succeeded", "stopped", "cancelled")


def reference_of(client: httpx.Client) -> str:
    return str(client.get("/v1/references").json()["data"][0]["id"])


def ended(client: httpx.Client, batch_id: str, seconds: float = 90) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        batch: dict[str, Any] = client.get(f"/v1/realignment_batches/{batch_id}").json()
        if batch["status"] in ENDED:
            return batch
        time.sleep(0.1)
    raise AssertionError(batch)


def post(client: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/realignment_batches", json={"reference_id": reference_of(client), **body})
    assert answer.status_code == 202, answer.text
    batch: dict[str, Any] = answer.json()
    assert answer.headers["location"] == f"/v1/realignment_batches/{batch['id']}"
    return batch


# Over HTTP, with workers


def test_a_batch_realigns_every_adapter_once(client: httpx.Client, fresh: Path, continued: Path) -> None:
    ids = [upload(client, folder)["id"] for folder in (fresh, continued, fresh)]
    batch = post(
        client,
        adapter_ids=ids,
        method={"type": "gram"},
        canary={"share": 0.3},
        stop_rule={"max_failed_share": 0.0, "min_similarity": -1.0, "max_edit": 100.0},
        metadata={"round": "1"},
    )
    assert (batch["status"], batch["counts"]["total"], batch["counts"]["waiting"]) == ("canary", 3, 3)
    batch = ended(client, batch["id"])
    assert (batch["status"], batch["reason"]) == ("succeeded", None)
    assert batch["counts"] == {
        "total": 3,
        "waiting": 0,
        "queued": 0,
        "running": 0,
        "succeeded": 3,
        "failed": 0,
        "cancelled": 0,
    }
    jobs = client.get("/v1/realignments", params={"batch_id": batch["id"]}).json()["data"]
    assert sorted(job["adapter_id"] for job in jobs) == sorted(ids)
    assert {job["batch_id"] for job in jobs} == {batch["id"]}
    assert all(job["metadata"] == {"round": "1"} and job["method"]["type"] == "gram" for job in jobs)
    for job in jobs:
        report = client.get(job["result"]["report_url"]).json()
        assert job["result"]["summary"] == report["summary"]
    members = client.get(f"/v1/realignment_batches/{batch['id']}/adapters").json()["data"]
    assert {item["id"]: item["realignment_id"] for item in members} == {job["adapter_id"]: job["id"] for job in jobs}
    assert sum(item["canary"] for item in members) == 1
    assert batch["id"] in [item["id"] for item in client.get("/v1/realignment_batches").json()["data"]]
    # They are up to date now: nothing is left to select for this reference.
    again = client.post(
        "/v1/realignment_batches",
        json={"reference_id": batch["reference_id"], "select": {"metadata": {"round": "1"}}},
    )
    refused(again, 422, "nothing_selected")


def test_an_adapter_that_does_not_fit_fails_without_a_job(client: httpx.Client, fresh: Path) -> None:
    adapter_id = upload(client, fresh)["id"]
    batch = post(client, adapter_ids=[adapter_id], method={"type": "nlsr", "scorer": "snip"}, stop_rule=None)
    batch = ended(client, batch["id"])
    assert (batch["status"], batch["counts"]["failed"]) == ("succeeded", 1)
    (item,) = client.get(f"/v1/realignment_batches/{batch['id']}/adapters?status=failed").json()["data"]
    assert (item["id"], item["realignment_id"]) == (adapter_id, None)
    assert (item["error"]["code"], item["error"]["class"]) == ("scorer_not_offered", "user")
    assert client.get("/v1/realignments", params={"batch_id": batch["id"]}).json()["data"] == []


def test_a_failing_canary_stops_the_batch(client: httpx.Client, fresh: Path) -> None:
    ids = [upload(client, fresh)["id"] for _ in range(4)]
    # Only the weights tell that this form cannot treat a fresh adapter: the jobs are made, and fail.
    method = {"type": "nlsr", "form": "factor"}
    batch = ended(client, post(client, adapter_ids=ids, method=method, canary={"share": 0.25})["id"])
    assert batch["status"] == "stopped"
    assert batch["reason"] == "Canary: 1 of 1 adapters failed; the stop rule allows a share of 0.1."
    assert (batch["counts"]["failed"], batch["counts"]["cancelled"]) == (1, 3)
    (item,) = client.get(f"/v1/realignment_batches/{batch['id']}/adapters?status=failed").json()["data"]
    assert item["error"]["code"] == "lineage_mismatch"
    (job,) = client.get("/v1/realignments", params={"batch_id": batch["id"]}).json()["data"]
    assert finished(client, job["id"])["status"] == "failed"


def test_a_cancelled_batch_leaves_no_open_job(client: httpx.Client, fresh: Path) -> None:
    ids = [upload(client, fresh)["id"] for _ in range(6)]
    batch = post(client, adapter_ids=ids, method={"type": "gram"})
    answer = client.post(f"/v1/realignment_batches/{batch['id']}/cancel")
    assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
    for job in client.get("/v1/realignments", params={"batch_id": batch["id"]}).json()["data"]:
        assert finished(client, job["id"])["status"] in ("cancelled", "succeeded")
    again = client.post(f"/v1/realignment_batches/{batch['id']}/cancel").json()
    assert (again["status"], again["finished_at"]) == ("cancelled", answer.json()["finished_at"])


def test_the_same_idempotency_key_makes_one_batch(client: httpx.Client, fresh: Path) -> None:
    body = {"reference_id": reference_of(client), "adapter_ids": [upload(client, fresh)["id"]], "mode": "analyze"}
    headers = {"Idempotency-Key": "batch-order-1"}
    first = client.post("/v1/realignment_batches", json=body, headers=headers)
    again = client.post("/v1/realignment_batches", json=body, headers=headers)
    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json()["id"] == again.json()["id"]
    other = client.post("/v1/realignment_batches", json={**body, "metadata": {"a": "b"}}, headers=headers)
    refused(other, 422, "idempotency_key_reused")
    assert ended(client, first.json()["id"])["counts"]["succeeded"] == 1


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({}, "invalid_request"),
        ({"adapter_ids": []}, "invalid_request"),
        ({"adapter_ids": ["adp_1", "adp_1"]}, "invalid_request"),
        ({"adapter_ids": ["adp_1"], "select": {}}, "invalid_request"),
        ({"adapter_ids": ["adp_1"], "canary": {"share": 0}}, "invalid_request"),
        ({"adapter_ids": ["adp_1"], "canary": {"share": 1.1}}, "invalid_request"),
        ({"adapter_ids": ["adp_1"], "stop_rule": {"max_failed_share": -0.1}}, "invalid_request"),
        ({"adapter_ids": ["adp_1"], "strengths": [1.0]}, "invalid_request"),
        ({"adapter_ids": ["adp_1"], "metadata": {"a": "\0"}}, "invalid_request"),
        ({"adapter_ids": [f"adp_{n}" for n in range(10_001)]}, "invalid_request"),
        ({"select": {"metadata": {"nobody": "has this"}}}, "nothing_selected"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_no_batch_is_refused(client: httpx.Client, body: dict[str, Any], code: str) -> None:
    before = client.get("/v1/realignment_batches").json()["first_id"]
    answer = client.post("/v1/realignment_batches", json={"reference_id": reference_of(client), **body})
    refused(answer, 422, code)
    assert client.get("/v1/realignment_batches").json()["first_id"] == before


def test_what_is_not_there_is_not_found(client: httpx.Client) -> None:
    for path in ("", "/adapters"):
        refused(client.get(f"/v1/realignment_batches/rbt_0{path}"), 404, "batch_not_found")
    refused(client.post("/v1/realignment_batches/rbt_0/cancel"), 404, "batch_not_found")
    body = {"reference_id": "ref_" + "0" * 24, "adapter_ids": ["adp_0"]}
    refused(client.post("/v1/realignment_batches", json=body), 404, "reference_not_found")
    body["reference_id"] = reference_of(client)
    refused(client.post("/v1/realignment_batches", json=body), 404, "adapter_not_found")


# Step by step, without workers


@pytest.fixture
def here(bundle: Path, tmp_path: Path) -> Iterator[Services]:
    """What a gateway holds, its loops not started."""
    made = open_services(
        GatewaySettings(
            dev=True, data=tmp_path / "data", redis_url=f"redis://127.0.0.1:{free_port()}/0", batch_open_jobs=4
        )
    )
    made.references.add(bundle)
    yield made
    made.queue.close()
    made.database.dispose()


def stored(here: Services, folder: Path, count: int) -> list[str]:
    ids = []
    for _ in range(count):
        copy = here.objects.scratch / new_id("copy")
        shutil.copytree(folder, copy)
        adapter = adapter_record(new_id("adp"), "a", copy, describe(copy), dropped=[], origin=Origin())
        here.objects.publish(copy, adapter_prefix("t", adapter.id))
        here.adapters.add(adapter, "t", adapter_prefix("t", adapter.id))
        ids.append(adapter.id)
    return ids


def opened(here: Services, ids: list[str], **body: Any) -> str:
    reference = here.references.installed()[0].id
    request = BatchCreate.model_validate({"reference_id": reference, "adapter_ids": ids, **body})
    return open_batch(here, "t", request, None).id


def open_jobs(here: Services, batch_id: str) -> list[str]:
    jobs, _ = here.jobs.page("t", limit=1000, filters=Filters(batch_id=batch_id))
    return [job.id for job in reversed(jobs) if job.status in ("queued", "running")]


def all_jobs(here: Services, batch_id: str) -> list[str]:
    jobs, _ = here.jobs.page("t", limit=1000, filters=Filters(batch_id=batch_id))
    return [job.adapter_id for job in jobs]


def test_at_most_so_many_jobs_are_open_and_all_are_made_in_the_end(here: Services, fresh: Path) -> None:
    ids = stored(here, fresh, 11)
    batch_id, loop = opened(here, ids, canary={"share": 0.1}), Batches(here)
    most, turns = 0, 0
    while here.batches.get("t", batch_id).status not in ENDED:
        loop.turn()
        waiting = open_jobs(here, batch_id)
        most = max(most, len(waiting))
        if here.batches.get("t", batch_id).status == "canary":
            assert len(all_jobs(here, batch_id)) <= 2
        for job_id in waiting[:3]:
            end(here.jobs, job_id, "succeeded")
        turns += 1
        assert turns < 30
    assert most == 4
    assert sorted(all_jobs(here, batch_id)) == sorted(ids)
    batch = here.batches.get("t", batch_id)
    assert (batch.status, batch.counts.succeeded) == ("succeeded", 11)


@pytest.mark.parametrize(("allowed", "most"), [(0, 4), (1, 1), (5, 2), (6, 3), (100, 4)])
def test_half_of_what_a_tenant_may_have_open_is_left_to_it(
    here: Services, fresh: Path, allowed: int, most: int
) -> None:
    here.keys.create("t")
    here.keys.set_limits("t", Limits(max_jobs=allowed))
    batch_id, loop = opened(here, stored(here, fresh, 6)), Batches(here)
    for _ in range(3):
        loop.turn()
    assert len(open_jobs(here, batch_id)) == most


def test_a_tenant_without_room_is_waited_for(here: Services, fresh: Path) -> None:
    here.keys.create("t")
    here.keys.set_limits("t", Limits(max_jobs=1))
    ids = stored(here, fresh, 2)
    first, loop = opened(here, ids), Batches(here)
    second = opened(here, ids)
    loop.turn()
    loop.turn()
    assert (len(open_jobs(here, first)), open_jobs(here, second)) == (1, [])
    assert here.batches.get("t", second).counts.waiting == 2
    end(here.jobs, open_jobs(here, first)[0], "succeeded")
    loop.turn()
    end(here.jobs, open_jobs(here, first)[0], "succeeded")
    loop.turn()
    loop.turn()
    assert here.batches.get("t", first).status == "succeeded"
    assert len(open_jobs(here, second)) == 1


def test_the_rule_is_judged_again_over_everything(here: Services, fresh: Path) -> None:
    batch_id = opened(here, stored(here, fresh, 16), canary={"share": 0.1}, stop_rule={"max_failed_share": 0.3})
    loop, done = Batches(here), 0
    while here.batches.get("t", batch_id).status not in ENDED:
        loop.turn()
        for job_id in open_jobs(here, batch_id):
            if done < MIN_JUDGED + 2:
                # The canary is well, and what comes later fails.
                end(here.jobs, job_id, "succeeded" if done < 6 else "failed")
                done += 1
        assert done <= MIN_JUDGED + 2
    batch = here.batches.get("t", batch_id)
    assert batch.status == "stopped"
    assert batch.reason is not None
    assert batch.reason.endswith("adapters failed; the stop rule allows a share of 0.3.")
    assert open_jobs(here, batch_id) == []
    here.batches.settle()
    counts = here.batches.get("t", batch_id).counts
    assert (counts.waiting, counts.queued, counts.running) == (0, 0, 0)
    assert counts.succeeded + counts.failed + counts.cancelled == 16


def test_few_failures_early_on_say_little_without_a_canary(here: Services, fresh: Path) -> None:
    batch_id, loop = opened(here, stored(here, fresh, 12)), Batches(here)
    loop.turn()
    end(here.jobs, open_jobs(here, batch_id)[0], "failed")
    loop.turn()
    assert here.batches.get("t", batch_id).status == "running"
    while here.batches.get("t", batch_id).status == "running":
        for job_id in open_jobs(here, batch_id):
            end(here.jobs, job_id, "succeeded")
        loop.turn()
    assert here.batches.get("t", batch_id).counts.failed == 1
    assert here.batches.get("t", batch_id).status == "succeeded"


def test_what_breaks_a_rule_is_said_in_words() -> None:
    def tally(failed: int = 0, succeeded: int = 10, similarity: float | None = 0.5, edit: float | None = 0.2) -> Tally:
        return Tally(0, succeeded, failed, similarity, edit)

    rule = StopRule(max_failed_share=0.1, min_similarity=0.4, max_edit=0.3)
    assert broken(rule, tally()) is None
    assert broken(rule, tally(failed=1, succeeded=9)) is None
    assert broken(rule, tally(failed=2)) == "2 of 12 adapters failed; the stop rule allows a share of 0.1."
    assert broken(rule, tally(similarity=0.39)) == "The mean similarity is 0.39; the stop rule asks for 0.4."
    assert broken(rule, tally(edit=0.31)) == "The mean edit is 0.31; the stop rule allows 0.3."
    assert broken(rule, tally(succeeded=0, similarity=None, edit=None)) is None
    assert broken(StopRule(max_failed_share=None), tally(failed=9)) is None
    assert broken(None, tally(failed=9)) is None
    assert broken(StopRule(max_failed_share=0.0), tally(failed=1)) is not None


def test_five_gateways_make_one_job_an_adapter(here: Services, fresh: Path) -> None:
    ids = stored(here, fresh, 12)
    batch_id = opened(here, ids, canary={"share": 0.2})
    stop = threading.Event()

    def gateway(_: int) -> int:
        loop, turns = Batches(here), 0
        while not stop.is_set():
            loop.turn()
            turns += 1
        return turns

    with ThreadPoolExecutor(5) as pool:
        running = [pool.submit(gateway, number) for number in range(5)]
        try:
            deadline = time.monotonic() + 60
            while here.batches.get("t", batch_id).status not in ENDED:
                assert time.monotonic() < deadline
                assert not any(future.done() for future in running), [f.exception() for f in running if f.done()]
                waiting = open_jobs(here, batch_id)
                assert len(waiting) <= 4
                for job_id in waiting:
                    end(here.jobs, job_id, "succeeded")
        finally:
            stop.set()
        assert all(future.result() > 0 for future in running)
    assert here.batches.get("t", batch_id).status == "succeeded"
    assert sorted(all_jobs(here, batch_id)) == sorted(ids)


def test_a_gateway_that_died_between_job_and_note_is_taken_up(
    here: Services, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id, loop = opened(here, stored(here, fresh, 3)), Batches(here)
    with monkeypatch.context() as patch:
        patch.setattr(here.batches, "opened", lambda *_: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            loop.turn()
    assert len(all_jobs(here, batch_id)) == 1
    assert here.batches.get("t", batch_id).counts.waiting == 3
    Batches(here).turn()
    assert len(all_jobs(here, batch_id)) == 3
    assert here.batches.get("t", batch_id).counts.queued == 3


def test_a_job_made_in_the_moment_of_the_cancellation_is_cancelled(
    here: Services, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id, loop = opened(here, stored(here, fresh, 3)), Batches(here)
    take = here.batches.take

    def late(*given: Any) -> Any:
        found = take(*given)
        cancel_batch(here, "t", batch_id)
        return found

    monkeypatch.setattr(here.batches, "take", late)
    loop.turn()
    assert len(all_jobs(here, batch_id)) == 3
    assert open_jobs(here, batch_id) == []
    counts = here.batches.get("t", batch_id).counts
    assert (counts.cancelled, counts.total) == (3, 3)


def test_a_storage_that_is_away_fails_no_adapter(here: Services, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch_id, loop = opened(here, stored(here, fresh, 2)), Batches(here)

    def away(*_: object) -> None:
        raise StorageFault("Away.")

    with monkeypatch.context() as patch:
        patch.setattr(here.objects, "open", away)
        loop.turn()
    assert here.batches.get("t", batch_id).counts.waiting == 2
    assert all_jobs(here, batch_id) == []


def test_one_broken_batch_does_not_hold_up_the_others(
    here: Services, fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ids = stored(here, fresh, 1)
    first, second = opened(here, ids), opened(here, ids)
    tally = here.batches.tally

    def fail(batch: Any) -> Any:
        if batch.id == first:
            raise RuntimeError("broken")
        return tally(batch)

    monkeypatch.setattr(here.batches, "tally", fail)
    Batches(here).turn()
    assert open_jobs(here, first) == []
    assert len(open_jobs(here, second)) == 1
    assert f"{first} could not be advanced" in caplog.text
