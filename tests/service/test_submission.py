"""What is looked at before a job is queued."""

from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.app import create_app
from service.settings import GatewaySettings
from tests.scaled import SCALED, free_port
from tests.service.answers import refused
from tests.service.conftest import files_of

pytestmark = pytest.mark.skipif(SCALED, reason="the gateway is this process, on files and SQLite")


def test_a_job_whose_results_would_not_fit_is_refused(tmp_path: Path, bundle: Path, fresh: Path) -> None:
    """Of several strengths each makes an adapter of its own."""
    settings = GatewaySettings(dev=True, data=tmp_path / "data", redis_url=f"redis://127.0.0.1:{free_port()}/0")
    with TestClient(create_app(settings), client=("127.0.0.1", 50000), base_url="http://127.0.0.1") as client:
        client.app.state.services.references.add(bundle)  # type: ignore[attr-defined]
        adapter = client.post("/v1/adapters", files=files_of(fresh)).json()
        settings.max_bytes_per_tenant = 3 * adapter["bytes"]
        job: dict[str, Any] = {"adapter_id": adapter["id"], "method": {"type": "gram"}}
        large = client.post("/v1/realignments", json=job | {"strengths": [0.1, 0.2, 0.3]})
        error = refused(large, 403, "storage_quota_exceeded")
        assert f"{3 * adapter['bytes']} more bytes do not fit: {2 * adapter['bytes']} of" in error["message"]
        for fits in ({"strengths": [0.1, 0.2]}, {}, {"mode": "analyze"}):
            answer = client.post("/v1/realignments", json=job | fits)
            assert answer.status_code == 202, answer.text
        settings.max_bytes_per_tenant = adapter["bytes"]
        refused(client.post("/v1/realignments", json=job | {"mode": "analyze"}), 403, "storage_quota_exceeded")
