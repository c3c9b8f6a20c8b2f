"""The page's refusals, asked in this process."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from listen_dist.inference import page
from listen_dist.inference.uploads import Uploads


@pytest.mark.parametrize(("method", "url", "content", "status"), [
    ("GET", "/nowhere", b"", 404), ("PUT", "/answers", b"{}", 405), ("POST", "/answers", b'{"clips": "\xff"}', 400),
    ("POST", "/answers", b"[" * 100_000, 400), ("POST", "/answers", b'{"clips": []}', 422)])
def test_every_refusal_is_json_with_words(method: str, url: str, content: bytes, status: int) -> None:
    listener: Any = None  # no request gets so far
    uploads = Uploads(1000)
    app = page.build(listener, page.Served("c", {}, 30.0, 1000, None), uploads)
    with TestClient(app) as client:
        answer = client.request(method, url, content=content, headers={"content-type": "application/json"})
    uploads.close()
    assert answer.status_code == status
    assert set(answer.json()) == {"error"} and answer.json()["error"]
