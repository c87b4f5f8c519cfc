"""What the service adds: `make bench-service`.

One gateway with its embedded broker and one worker, examples/fresh (4.9 MB), a reference of SmolLM2-135M's shapes:

    jobs      POST to started and POST to done, one after the other (median, 99th percentile), and jobs a second when
              all wait in the queue, each also against `realign` alone in a process with a warm reference; a few jobs
              before them find the worker's reference loaded and its code warm
    polls     GETs of a job's state a second against those of a bare FastAPI route, in turn, over the same connections
    uploads   seconds of a raw part against those of a bare uvicorn application that reads a body and drops it, in turn
    memory    the gateway's growth while 1 GiB passes

Client and service share the machine, so ratios count and not times. Writes benchmarks/results/service.json.
"""

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from benchmarks import timing
from benchmarks.load import Connection, free_port, gateway_of, quantile, resident_mb, safegraft, wait
from benchmarks.shapes import SMOLLM2_135M, write_reference
from safegraft.contracts.methods import GramParameters
from safegraft.engine.pipeline import realign
from safegraft.engine.reference import LoadedReference

EXAMPLES = Path(__file__).parent.parent / "examples"
PAIRS_KEPT = 500
PART = 64 * 2**20
WARMING = 3
SETTINGS = {
    "SAFEGRAFT_MAX_REQUESTS_PER_SECOND": "0",
    "SAFEGRAFT_MAX_BYTES": "0",
    "SAFEGRAFT_MAX_RUNNING_JOBS": "0",
}


def bare(port: int) -> None:
    """The routes beside which ours are measured, in a process of its own."""
    app = FastAPI()

    @app.get("/state")
    async def state() -> dict[str, str]:
        return {"status": "succeeded"}

    async def sink(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await app(scope, receive, send)
            return
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    uvicorn.run(sink, port=port, log_level="error")


async def polls_a_second(port: int, key: str, path: str, seconds: float, connections: int = 8) -> float:
    until = time.monotonic() + seconds
    answered = 0

    async def one() -> None:
        nonlocal answered
        connection = Connection(port, key)
        await connection.open()
        while time.monotonic() < until:
            assert (await connection.get(path)).status == 200
            answered += 1
        connection.close()

    await asyncio.gather(*(one() for _ in range(connections)))
    return answered / seconds


def jobs(client: httpx.Client, adapter: str, count: int, work: Path) -> dict[str, Any]:
    body = {"adapter_id": adapter, "method": {"type": "gram"}}
    started: list[float] = []
    done: list[float] = []
    for turn in range(WARMING + count):
        if turn == WARMING:
            started.clear()
            done.clear()
        began = time.time()
        job = client.post("/v1/realignments", json=body).raise_for_status().json()["id"]
        first: float | None = None
        while (found := client.get(f"/v1/realignments/{job}").json())["status"] not in ("succeeded", "failed"):
            if first is None and found["status"] == "running":
                first = time.time() - began
            time.sleep(0.005)
        assert found["status"] == "succeeded", found
        done.append(time.time() - began)
        started.append(first if first is not None else done[-1])
    began = time.monotonic()
    waiting = [client.post("/v1/realignments", json=body).raise_for_status().json()["id"] for _ in range(count)]
    # In the order of the queue, so that what is asked meanwhile takes next to nothing of the machine.
    for job in waiting:
        while (state := client.get(f"/v1/realignments/{job}").json()["status"]) != "succeeded":
            assert state not in ("failed", "cancelled")
            time.sleep(0.05)
    rate = count / (time.monotonic() - began)
    reference = LoadedReference(work / "reference")
    alone = []
    for turn in range(6):
        alone.append(timing.seconds(lambda: realign(EXAMPLES / "fresh", reference, GramParameters(), work / "out")))
        shutil.rmtree(work / "out")
        if not turn:
            alone.clear()
    own = sorted(alone)[len(alone) // 2]
    return {
        "jobs": count,
        "started_ms": {"p50": round(quantile(started, 0.5)), "p99": round(quantile(started, 0.99))},
        "done_ms": {"p50": round(quantile(done, 0.5)), "p99": round(quantile(done, 0.99))},
        "done_against_realign_alone": round(quantile(done, 0.5) / 1000 / own, 2),
        "jobs_a_second": round(rate, 2),
        "rate_against_realign_alone": round(rate * own, 2),
        "stages_share": stages(client),
    }


def stages(client: httpx.Client) -> dict[str, float]:
    """Of the time that the worker took for its jobs, what each stage took."""
    text = client.get("/metrics").raise_for_status().text
    seconds: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("safegraft_job_stage_seconds_sum{"):
            seconds[line.partition('stage="')[2].partition('"')[0]] = float(line.rpartition(" ")[2])
    whole = sum(seconds.values())
    return {stage: round(value / whole, 3) for stage, value in seconds.items()}


def uploads(client: httpx.Client, sink: httpx.Client, gateway: int, gigabytes: float, turns: int) -> dict[str, Any]:
    data = os.urandom(PART)

    def begin(size: int) -> str:
        body = {
            "filename": "x.safetensors",
            "bytes": size,
            "mime_type": "application/octet-stream",
            "purpose": "user_data",
        }
        return str(client.post("/v1/uploads", json=body).raise_for_status().json()["id"])

    def part(upload: str) -> None:
        files = {"data": ("part", data, "application/octet-stream")}
        client.post(f"/v1/uploads/{upload}/parts", files=files).raise_for_status()

    upload = begin(PART * (turns + 1))
    ratio = timing.ratio(
        lambda: part(upload),
        lambda: sink.post("/", files={"data": ("part", data, "application/octet-stream")}).raise_for_status(),
        turns=turns,
    )
    before = resident_mb(gateway, "VmRSS")
    count = round(gigabytes * 2**30 / PART)
    upload = begin(PART * count)
    for _ in range(count):
        part(upload)
    return {
        "part_megabytes": PART / 1e6,
        "upload_against_bare_uvicorn": ratio.shown(),
        "passed_bytes": count * PART,
        "gateway_grew_megabytes": round(max(0.0, resident_mb(gateway) - before), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bare", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="a few of each, nothing written")
    arguments = parser.parse_args()
    if arguments.bare:
        bare(arguments.bare)
        return
    quick = arguments.quick
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_reference(work / "reference", SMOLLM2_135M, rank=8, pairs=PAIRS_KEPT)
        data = work / "data"
        safegraft("reference", "add", str(work / "reference"), "--data", str(data))
        key = json.loads(safegraft("keys", "create", "--scopes", "admin", "--data", str(data), "--json"))["key"]
        port, other = free_port(), free_port()
        command = [str(Path(sys.executable).parent / "safegraft"), "serve", "--port", str(port), "--data", str(data)]
        process = subprocess.Popen(command, env=os.environ | SETTINGS, stderr=subprocess.DEVNULL)
        beside = subprocess.Popen([sys.executable, "-m", "benchmarks.service", "--bare", str(other)])
        try:
            own = httpx.Client(
                base_url=f"http://127.0.0.1:{port}",
                headers={"authorization": f"Bearer {key}"},
                trust_env=False,
                timeout=120,
            )
            sink = httpx.Client(base_url=f"http://127.0.0.1:{other}", trust_env=False, timeout=120)
            with own as client, sink:
                wait(lambda: client.get("/readyz").status_code == 200)
                wait(lambda: sink.get("/state").status_code == 200)
                files = [("files", (path.name, path.read_bytes())) for path in sorted((EXAMPLES / "fresh").iterdir())]
                adapter = client.post("/v1/adapters", files=files).raise_for_status().json()["id"]
                found = jobs(client, adapter, 3 if quick else 50, work)
                last = client.get("/v1/realignments").json()["data"][0]["id"]
                turns = []
                for _ in range(1 if quick else 5):
                    one = asyncio.run(polls_a_second(port, key, f"/v1/realignments/{last}", 2.0))
                    turns.append((one, asyncio.run(polls_a_second(other, key, "/state", 2.0))))
                ratios = sorted(own / base for own, base in turns)
                found["polls_against_bare_fastapi"] = {
                    "ratio": round(ratios[len(ratios) // 2], 2), "spread": [round(ratios[0], 2), round(ratios[-1], 2)],
                }  # fmt: skip
                found |= uploads(client, sink, gateway_of(process.pid), 0.25 if quick else 1.0, 1 if quick else 5)
        finally:
            for running in (process, beside):
                running.terminate()
                running.wait(60)
    print(json.dumps(found, indent=1))
    if not quick:
        timing.store("service", **found)


if __name__ == "__main__":
    main()
