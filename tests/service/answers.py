"""What every refusal looks like, whatever was refused."""

from collections.abc import Mapping
from typing import Any, Protocol

SHAPE = {"type", "title", "status", "detail", "errors", "error"}


class Answer(Protocol):
    """What httpx's and the test client's answers have in common."""

    status_code: int

    @property
    def headers(self) -> Mapping[str, str]: ...
    @property
    def text(self) -> str: ...
    def json(self) -> Any: ...


KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def refused(answer: Answer, status: int, code: str) -> dict[str, Any]:
    """Checks a refusal's status, code and shape, and that it tells nothing of our insides. Returns its `error`."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-request-id"].startswith("req_")
    for inside in ("Traceback", 'File "', "/scratch/", "site-packages"):
        assert inside not in answer.text
    body: dict[str, Any] = answer.json()
    assert set(body) == SHAPE
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code, answer.text
    assert body["status"] == status
    assert body["type"] == f"urn:safegraft:error:{code}"
    assert error["message"] == body["detail"] != ""
    assert error["type"] == ("server_error" if status >= 500 else KINDS.get(status, "invalid_request_error"))
    return error
