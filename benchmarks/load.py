"""One gateway under load: `make bench-load`.

200 uploads at once, half of them cut off in the middle, beside 500 polls a second of a job's state, on one gateway
process with its embedded broker and one idle worker. Every upload that arrives is compared with what was sent, by its
SHA-256; afterwards nothing of the others may be left. Client and service share this machine. Writes
benchmarks/results/load.json; docs/operations.md shows its table.
"""

import argparse
import asyncio
import hashlib
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx

from benchmarks.shapes import SMOLLM2_135M, write_adapter, write_reference
from safegraft.adapter import CONFIG, WEIGHTS

RESULTS = Path(__file__).parent / "results" / "load.json"
RANK, PAIRS = 8, 16
BOUNDARY = b"safegraft-load"
PIECE = 2**16


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


@dataclass
class Seen:
    """What the client saw. Times in seconds."""

    polls: list[float] = field(default_factory=list)
    health: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    stored: dict[str, str] = field(default_factory=dict)  # id → SHA-256 that was sent
    cut: int = 0
    refused: int = 0


class Connection:
    """HTTP/1.1 over one kept-alive socket: a client that costs as little as it can of the shared machine."""

    def __init__(self, port: int, key: str) -> None:
        self._port = port
        self._auth = f"Authorization: Bearer {key}\r\n"
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter

    async def open(self) -> None:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self._port)

    def head(self, method: str, path: str, extra: str = "") -> bytes:
        return f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\n{self._auth}{extra}\r\n".encode()

    async def answer(self) -> Answer:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        body = await self.reader.readexactly(int(headers.get("content-length", 0)))
        return Answer(int(head[0].split()[1]), headers, body)

    async def get(self, path: str) -> Answer:
        self.writer.write(self.head("GET", path))
        return await self.answer()

    def close(self) -> None:
        self.writer.close()


def part(name: str, data: bytes) -> bytes:
    disposition = f'Content-Disposition: form-data; name="files"; filename="{name}"'.encode()
    return b"--" + BOUNDARY + b"\r\n" + disposition + b"\r\n\r\n" + data + b"\r\n"


async def ticking(rate: float, until: asyncio.Event, workers: int, port: int, key: str, path: str, seen: Seen) -> None:
    """Sends `rate` requests a second in all, each due at its own moment; waiting for a turn counts as latency."""
    due = time.monotonic()
    lock = asyncio.Lock()
    times = seen.polls if path.startswith("/v1/") else seen.health

    async def one() -> None:
        nonlocal due
        connection = Connection(port, key)
        await connection.open()
        while not until.is_set():
            async with lock:
                mine = due
                due += 1 / rate
            await asyncio.sleep(max(0.0, mine - time.monotonic()))
            answer = await connection.get(path)
            times.append(time.monotonic() - mine)
            if answer.status != 200:
                seen.failed.append(f"{path}: {answer.status}")
        connection.close()

    await asyncio.gather(*(one() for _ in range(workers)))


async def upload(port: int, key: str, body: bytes, sha256: str, cut_at: int | None, seen: Seen) -> None:
    """One client: sends its adapter, waits where it is told to, and is cut off at `cut_at` bytes if that is given."""
    for _ in range(200):
        connection = Connection(port, key)
        await connection.open()
        kind = f"Content-Type: multipart/form-data; boundary={BOUNDARY.decode()}\r\nContent-Length: {len(body)}\r\n"
        connection.writer.write(connection.head("POST", "/v1/adapters", f"{kind}Connection: close\r\n"))
        answering = asyncio.create_task(connection.answer())
        try:
            for start in range(0, len(body), PIECE):
                if answering.done():
                    break  # refused before all was sent
                if cut_at is not None and start >= cut_at:
                    answering.cancel()
                    connection.writer.transport.abort()
                    seen.cut += 1
                    return
                connection.writer.write(body[start : start + PIECE])
                await connection.writer.drain()
            answer = await answering
        except (ConnectionError, asyncio.IncompleteReadError):
            if not answering.done() or answering.exception() is not None:
                seen.refused += 1
                await asyncio.sleep(1.0)
                continue
            answer = answering.result()
        finally:
            connection.close()
        if answer.status == 429:
            seen.refused += 1
            await asyncio.sleep(float(answer.headers["retry-after"]) * random.uniform(0.5, 1.0))
            continue
        if answer.status != 201:
            seen.failed.append(f"upload: {answer.status} {answer.body[:200]!r}")
            return
        adapter = json.loads(answer.body)
        seen.stored[adapter["id"]] = sha256
        if adapter["sha256"] != sha256:
            seen.failed.append(f"{adapter['id']}: stored with another SHA-256")
        return
    seen.failed.append("upload: refused for ever")


async def send(port: int, key: str, folder: Path, uploads: int) -> Seen:
    """All uploads at once; every second one is cut off somewhere."""
    seen = Seen()
    config, weights = (folder / CONFIG).read_bytes(), (folder / WEIGHTS).read_bytes()
    chance = random.Random(1)
    tasks = []
    for number in range(uploads):
        # Each another file: the last two numbers differ, and are finite in every format.
        own = weights[:-4] + number.to_bytes(2, "little") + b"\x00\x00"
        body = part(CONFIG, config) + part(WEIGHTS, own) + b"--" + BOUNDARY + b"--\r\n"
        cut_at = chance.randrange(1, len(body) - PIECE) if number % 2 else None
        tasks.append(upload(port, key, body, hashlib.sha256(own).hexdigest(), cut_at, seen))
    await asyncio.gather(*tasks)
    return seen


async def watch(port: int, key: str, job: str, polls: float, sending: "Future[Seen]") -> tuple[Seen, float]:
    """Polls the job and asks after the gateway's health for as long as is sent, and for ten seconds at least."""
    seen = Seen()
    until = asyncio.Event()
    ticks = [
        asyncio.create_task(ticking(polls, until, 16, port, key, f"/v1/realignments/{job}", seen)),
        asyncio.create_task(ticking(20.0, until, 4, port, key, "/livez", seen)),
    ]
    began = time.monotonic()
    await asyncio.wrap_future(sending)
    await asyncio.sleep(max(0.0, began + 10.0 - time.monotonic()))
    lasted = time.monotonic() - began
    until.set()
    await asyncio.gather(*ticks)
    return seen, lasted


def sender(port: int, key: str, folder: Path, uploads: int) -> Seen:
    """In a process of its own, so that what it costs to send is not counted as the gateway's latency."""
    return asyncio.run(send(port, key, folder, uploads))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def gateway_of(supervisor: int) -> int:
    """The process id of the gateway among the supervisor's children."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                status = (entry / "status").read_text()
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if f"PPid:\t{supervisor}\n" in status and b"service.main:app" in command:
                return int(entry.name)
    raise RuntimeError("no gateway among the children")


def resident_mb(process: int, field_name: str = "VmHWM") -> float:
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(f"{field_name}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no such field")


def quantile(times: list[float], share: float) -> float:
    return 1000 * sorted(times)[min(len(times) - 1, int(share * len(times)))]


def safegraft(*arguments: str) -> str:
    command = [str(Path(sys.executable).parent / "safegraft"), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--uploads", type=int, default=200)
    parser.add_argument("--polls", type=float, default=500.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_adapter(work / "adapter", SMOLLM2_135M, RANK)
        write_reference(work / "reference", SMOLLM2_135M, rank=RANK, pairs=PAIRS)
        data = work / "data"
        safegraft("reference", "add", str(work / "reference"), "--data", str(data))
        key = json.loads(safegraft("keys", "create", "--data", str(data), "--json"))["key"]
        result = run(data, key, work / "adapter", given.uploads, given.polls)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    if result["failed"]:
        sys.exit(1)


def run(data: Path, key: str, folder: Path, uploads: int, polls: float) -> dict[str, Any]:
    port = free_port()
    environment = os.environ | {"SAFEGRAFT_MAX_REQUESTS_PER_SECOND": "0"}
    command = [str(Path(sys.executable).parent / "safegraft"), "serve", "--port", str(port), "--data", str(data)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        headers = {"authorization": f"Bearer {key}"}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, trust_env=False, timeout=60) as client:
            wait(lambda: client.get("/readyz").status_code == 200)
            files = [("files", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]
            adapter = client.post("/v1/adapters", files=files).raise_for_status().json()["id"]
            body = {"adapter_id": adapter, "method": {"type": "gram"}}
            job = client.post("/v1/realignments", json=body).raise_for_status().json()["id"]
            wait(lambda: client.get(f"/v1/realignments/{job}").json()["status"] == "succeeded")
            gateway = gateway_of(process.pid)
            before = resident_mb(gateway, "VmRSS")
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                sending = pool.submit(sender, port, key, folder, uploads)
                watched, lasted = asyncio.run(watch(port, key, job, polls, sending))
            seen = sending.result()
            peak = resident_mb(gateway)
            seen.failed += watched.failed
            checked = check(client, seen)
            time.sleep(1.0)
            left = sorted(path.name for path in (data / "objects" / "scratch").glob("*"))
            kept = {path.name for path in (data / "objects" / "tenants" / "default" / "adapters").iterdir()}
    finally:
        process.terminate()
        process.wait(60)
    orphans = kept - set(seen.stored) - {adapter}
    return {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "uploads": uploads,
        "bytes_each": sum(path.stat().st_size for path in folder.iterdir()),
        "arrived": len(seen.stored),
        "cut_off": seen.cut,
        "told_to_wait": seen.refused,
        "checked": checked,
        "failed": seen.failed[:10],
        "left_in_scratch": left,
        "objects_without_a_record": len(orphans),
        "seconds": round(lasted, 1),
        "polls_asked_per_second": polls,
        "polls_answered_per_second": round(len(watched.polls) / lasted, 1),
        "poll_p50_ms": round(1000 * statistics.median(watched.polls), 1),
        "poll_p99_ms": round(quantile(watched.polls, 0.99), 1),
        "health_p50_ms": round(1000 * statistics.median(watched.health), 1),
        "health_p99_ms": round(quantile(watched.health, 0.99), 1),
        "gateway_resident_mb_before": round(before, 1),
        "gateway_resident_mb_peak": round(peak, 1),
    }


def table(result: dict[str, Any]) -> str:
    """The rows of docs/operations.md."""
    rows = {
        "uploads at once, half of them cut off": f"{result['uploads']} of {result['bytes_each'] / 1e6:.1f} MB",
        "arrived, each with the SHA-256 that was sent": f"{result['checked']} of {result['arrived']}",
        "told to wait (429) and sent again": result["told_to_wait"],
        "files or objects left by those cut off": len(result["left_in_scratch"]) + result["objects_without_a_record"],
        "polls a second, asked and answered": f"{result['polls_asked_per_second']:.0f}, "
        f"{result['polls_answered_per_second']:.0f}",
        "polls that failed": len(result["failed"]),
        "`/livez`, median and p99": f"{result['health_p50_ms']:.0f} ms, {result['health_p99_ms']:.0f} ms",
        "polls, median and p99 (waiting for a turn included)": f"{result['poll_p50_ms']:.0f} ms, "
        f"{result['poll_p99_ms']:.0f} ms",
        "gateway's resident memory, before and at its peak": f"{result['gateway_resident_mb_before']:.0f} MB, "
        f"{result['gateway_resident_mb_peak']:.0f} MB",
    }
    return "".join(f"| {name} | {value} |\n" for name, value in rows.items())


def check(client: httpx.Client, seen: Seen) -> int:
    """Downloads every adapter that arrived and compares it with what was sent."""
    for adapter_id, sha256 in seen.stored.items():
        found = hashlib.sha256(client.get(f"/v1/adapters/{adapter_id}/files/{WEIGHTS}").content).hexdigest()
        if found != sha256:
            seen.failed.append(f"{adapter_id}: other bytes came back")
    return len(seen.stored)


def wait(ready: Any, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if ready():
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise TimeoutError("the service did not become ready")


if __name__ == "__main__":
    main()
