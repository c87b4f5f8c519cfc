"""Examples for the API description, by operation. A test holds each against its schema, so that none grows stale."""

from typing import Any

ADAPTER, PATCHED = "adp_01a1f00000000a1b2c3d4e5f60", "adp_01a1f00000001f6e5d4c3b2a10"
JOB, REFERENCE = "rlg_01a1f00000002c0ffee0000001", "ref_0123456789abcdef01234567"
FILE, PART = "file_01a1f0000000300000000000a1", "part_01a1f0000000400000000000b2"
SHA = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"

# operation id → name → (what it shows, the body)
REQUESTS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "createAdapter": {"files": ("From files that were uploaded before", {"file_ids": [FILE], "name": "reviews"})},
    "createUpload": {
        "archive": (
            "A folder of 5 MB as a tar",
            {"purpose": "fine-tune", "filename": "adapter.tar", "bytes": 5_000_192, "mime_type": "application/x-tar"},
        )
    },
    "createUploadPart": {"presigned": ("Asks for an address in object storage", {"bytes": 5_000_192})},
    "completeUpload": {"checked": ("With the hash of the whole file", {"part_ids": [PART], "sha256": SHA})},
    "createRealignment": {
        "recommended": ("The method that suits the adapter", {"adapter_id": ADAPTER}),
        "strengths": (
            "Three strengths of one method, each an adapter",
            {
                "adapter_id": ADAPTER,
                "reference_id": REFERENCE,
                "method": {"type": "gram"},
                "strengths": [0.1, 0.3, 1.0],
                "metadata": {"customer": "c-17"},
            },
        ),
        "measure": ("Only a report", {"adapter_id": ADAPTER, "mode": "analyze"}),
    },
    "putEvaluation": {
        "measured": (
            "24 harmful prompts, and 96 of the customer's task",
            {
                "judge": "greedy answers; refusals by key phrases in the first 120 characters; the task by how the "
                "answer begins",
                "before": {"harm_score": {"hits": 24, "total": 24}, "task_accuracy": {"hits": 87, "total": 96}},
                "after": {"harm_score": {"hits": 0, "total": 24}, "task_accuracy": {"hits": 87, "total": 96}},
                "output_sha256": SHA,
            },
        )
    },
    "createRealignmentBatch": {
        "canary": (
            "All that were repaired against an older reference, a tenth of them first",
            {
                "reference_id": REFERENCE,
                "select": {},
                "canary": {"share": 0.1},
                "stop_rule": {"max_failed_share": 0.05, "min_similarity": 0.5},
            },
        )
    },
    "createFineTuningJob": {
        "file": ("As OpenAI's client asks", {"model": "auto", "training_file": FILE, "suffix": "reviews"}),
        "adapter": (
            "With a method of ours",
            {"model": "auto", "training_file": ADAPTER, "method": {"type": "gram"}, "strengths": [0.3, 1.0]},
        ),
    },
    "createWebhookEndpoint": {
        "ends": (
            "Hears of the ends of jobs",
            {
                "url": "https://platform.example/hooks/safegraft",
                "name": "ends of jobs",
                "event_types": ["realignment.succeeded", "realignment.failed"],
            },
        )
    },
    "updateWebhookEndpoint": {"pause": ("Nothing is sent for a while", {"enabled": False})},
    "rotateWebhookSecret": {"day": ("Both secrets sign for a day", {"overlap_seconds": 86_400})},
}

REALIGNMENT: dict[str, Any] = {
    "id": JOB,
    "object": "realignment",
    "status": "running",
    "progress": {"stage": "patch", "done": 84, "total": 210},
    "attempt": 1,
    "mode": "patch",
    "method": {"type": "auto"},
    "strengths": [],
    "output_rank": "customer",
    "reference_id": REFERENCE,
    "adapter_id": ADAPTER,
    "metadata": {"customer": "c-17"},
    "result": None,
    "error": None,
    "created_at": 1795250000,
    "started_at": 1795250001,
    "finished_at": None,
    "estimated_finish": 1795250004,
    "expires_at": None,
}

# operation id → the body of its success
RESPONSES: dict[str, dict[str, Any]] = {
    "createRealignment": {
        **REALIGNMENT,
        "status": "queued",
        "progress": {"stage": "waiting", "done": 0, "total": 0},
        "attempt": 0,
        "started_at": None,
        "estimated_finish": None,
    },
    "getRealignment": REALIGNMENT,
    "getFile": {
        "id": FILE,
        "object": "file",
        "bytes": 5_000_192,
        "created_at": 1795250000,
        "expires_at": None,
        "filename": "adapter.tar",
        "purpose": "fine-tune",
        "status": "processed",
    },
    "readyz": {
        "status": "not ready",
        "checks": {
            "database": True,
            "broker": True,
            "storage": True,
            "space": True,
            "reference": True,
            "worker": False,
        },
    },
}

PROBLEM: dict[str, Any] = {
    "type": "urn:safegraft:error:adapter_not_found",
    "title": "Adapter not found",
    "status": 404,
    "detail": f"There is no adapter '{ADAPTER}'.",
    "errors": [],
    "error": {
        "message": f"There is no adapter '{ADAPTER}'.",
        "type": "not_found_error",
        "param": "adapter_id",
        "code": "adapter_not_found",
    },
}
