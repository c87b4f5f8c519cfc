"""How the worker takes messages, and what the engine must not bring along."""

import subprocess
import sys

from safegraft.contracts.queue import REALIGN_QUEUE, REALIGN_TASK
from worker.app import create_worker
from worker.settings import WorkerSettings


def test_delivery_is_as_decided() -> None:
    """docs: the record decides, the message only wakes up; a dead child's message does not come back."""
    settings = WorkerSettings(redis_url="redis://127.0.0.1:1/0", job_seconds=100, jobs_per_process=7)
    app = create_worker(settings)
    wanted = {
        "broker_url": "redis://127.0.0.1:1/0",
        "task_default_queue": REALIGN_QUEUE,
        "task_acks_late": True,
        "task_reject_on_worker_lost": False,
        "task_ignore_result": True,
        "task_serializer": "json",
        "accept_content": ["json"],
        "worker_prefetch_multiplier": 1,
        "worker_concurrency": 1,
        "worker_pool": "prefork",
        "worker_pool_start_method": "spawn",
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "task_soft_time_limit": 100,
        "task_time_limit": 160,
        "worker_max_tasks_per_child": 7,
        "result_backend": None,
    }
    assert {key: app.conf[key] for key in wanted} == wanted
    # Shorter than a task it would start the task again while it runs.
    assert app.conf.broker_transport_options["visibility_timeout"] > WorkerSettings().job_seconds
    app.loader.import_default_modules()
    assert REALIGN_TASK in app.tasks


def loaded_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"], check=True, capture_output=True, text=True
    )
    return set(done.stdout.split())


def test_the_engine_brings_no_queue_no_http_and_no_database() -> None:
    found = loaded_after("import safegraft.engine.pipeline, safegraft.engine.build, safegraft.report")
    assert "torch" in found
    assert not found & {"celery", "kombu", "fastapi", "starlette", "sqlalchemy", "pydantic_settings"}


def test_the_command_line_starts_without_torch() -> None:
    assert not loaded_after("import safegraft.cli") & {"torch", "transformers", "celery", "fastapi"}
