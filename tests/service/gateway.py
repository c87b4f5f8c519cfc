"""A gateway of its own, as uvicorn runs it: without broker and workers, and a test may kill it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import openai

from tests.service.conftest import environment_of, free_port, objects_of


class Gateway:
    """`data` survives it: started again it goes on where it was killed."""

    def __init__(self, data: Path, preexec: Callable[[], None] | None = None, **environment: str) -> None:
        self.data = data
        self.faulty = False  # its log may hold stack traces
        self.url = f"http://127.0.0.1:{free_port()}"
        self._preexec = preexec
        given = {"SAFEGRAFT_DEV": "1", "SAFEGRAFT_DATA": str(data), "SAFEGRAFT_REDIS_URL": "redis://127.0.0.1:1/0"}
        self._environment = environment_of(data) | given | environment
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "uvicorn", "--factory", "service.main:app"]
        command += ["--port", self.url.rpartition(":")[2], "--no-access-log"]
        self.data.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=out, env=self._environment, preexec_fn=self._preexec
            )
        deadline = time.monotonic() + 60
        while True:
            try:
                httpx.get(f"{self.url}/livez", trust_env=False).raise_for_status()
                return
            except httpx.TransportError:
                assert self.process.poll() is None, self.log.read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def worked(self) -> float:
        """CPU seconds of the gateway and of its processes, ended ones too. Linux."""
        ticks, waiting = 0, [self.process.pid]
        while waiting:
            number = waiting.pop()
            try:
                # Behind the name, which may hold anything: times of its own, and of children that it waited for.
                ticks += sum(map(int, Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[11:15]))
                for thread in Path(f"/proc/{number}/task").glob("*/children"):
                    waiting += map(int, thread.read_text().split())
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has ended since it was named
        return ticks / os.sysconf("SC_CLK_TCK")

    @property
    def log(self) -> Path:
        return self.data / "gateway.log"

    def client(self) -> httpx.Client:
        # With object storage, files are one step further.
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False, follow_redirects=True)

    def openai(self, retries: int = 0) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=retries)

    def kill(self) -> None:
        """As the kernel would: nothing is cleaned up."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(30)

    def scratch(self) -> list[Path]:
        return list((self.data / "objects" / "scratch").glob("*"))

    def stored(self, kind: str) -> list[str]:
        """What lies below the tenant's `files`, `uploads` or `adapters`."""
        objects, found = objects_of(self.data), []
        waiting = [f"tenants/default/{kind}"]
        while waiting:
            prefix = waiting.pop()
            found += [f"{prefix}/{name}" for name in objects.names(prefix)]
            waiting += [inner for inner, _ in objects.prefixes(prefix)]
        return sorted(found)

    def memory(self, field: str) -> int:
        """Bytes: VmRSS now, VmHWM at its highest. Linux."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith(f"{field}:"))) * 1024

    def descendants(self) -> set[int]:
        """The processes below it. Linux."""
        found, waiting = set(), [self.process.pid]
        while waiting:
            number = waiting.pop()
            try:
                children = Path(f"/proc/{number}/task/{number}/children").read_text()
            except OSError:
                continue
            new = {int(child) for child in children.split()}
            found |= new
            waiting += new
        return found
