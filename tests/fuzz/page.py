"""Requests to the page: odd paths, headers, forms, bodies, sounds and questions."""

from __future__ import annotations

import json
import logging
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient

from listen_dist.inference import page
from listen_dist.inference.listener import Listener
from listen_dist.inference.uploads import MOST_CLIPS, Uploads
from listen_dist.tasks import TASKS
from tests.fuzz import mutate, world
from tests.fuzz.cases import Fault
from tests.fuzz.sounds import sound

MOST_BYTES = 1 << 21
PATHS = (
    "/",
    "/about",
    "/clips",
    "/answers",
    "/page.js",
    "/page.css",
    "/../etc/passwd",
    "/%2e%2e/x",
    "/docs",
    "/openapi.json",
    "//",
    "/clips/",
    "/answers?x=1",
    "/%00",
    "/about/\u00e9",
)
METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE")


@dataclass(frozen=True)
class World:
    listener: Listener
    clips: list[bytes]


class _Said(logging.Handler):
    """What the page logs: an exception that it answers with a general line."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[BaseException] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1]:
            self.errors.append(record.exc_info[1])


def prepare(root: Path) -> World:
    world.one_thread()
    return World(world.build(root).listener, [])


def case(here: World, chance: random.Random, folder: Path) -> str:
    """A few requests to a server of its own."""
    uploads, said = Uploads(MOST_BYTES), _Said()
    hosts = chance.choice((None, None, frozenset(("testserver",))))
    app = page.build(here.listener, page.Served("c", {}, chance.choice((600.0, 3.0)), MOST_BYTES, hosts), uploads)
    page.logger.addHandler(said)
    keys: list[str] = []
    told: list[str] = []
    try:
        with TestClient(app, raise_server_exceptions=True) as client:
            for number in range(chance.randrange(1, 5)):
                request = chance.choice((_upload, _upload, _ask, _ask, _anything))(chance, keys)
                (folder / f"{number}.txt").write_text(repr(request)[:100_000], encoding="utf-8", errors="replace")
                told.append(_send(client, request, keys))
                if said.errors:
                    raise said.errors[0]
        if len(list(uploads.folder.iterdir())) > MOST_CLIPS:
            raise Fault("more recordings stay than may")
    finally:
        page.logger.removeHandler(said)
        uploads.close()
    return "answered" if "answer" in told else "received" if "clip" in told else "refused"


Request = dict[str, Any]


def _upload(chance: random.Random, _: list[str]) -> Request:
    made = sound(chance)
    content = made.content if chance.random() < 0.6 else mutate.data(chance, made.content)
    if chance.random() < 0.05:
        content = chance.choice((b"", b"\0", bytes(MOST_BYTES + 1)))
    name = chance.choice(
        (f"a.{made.suffix}", mutate.text(chance).replace("\ud800", ""), "../../x.g722", "x" * 3000 + ".wav")
    )
    return {
        "method": "POST",
        "url": "/clips",
        "params": {"name": name} if chance.random() < 0.9 else {},
        "content": content,
        "headers": _headers(chance),
    }


def _ask(chance: random.Random, keys: list[str]) -> Request:
    question: Any = {
        "clips": [chance.choice(keys)] if keys else ["nothing"],
        "task": chance.choice(("asr", *TASKS)),
        "instruction": chance.choice(("", "", "Who?")),
        "choices": chance.choice(([], [], ["yes", "no"])),
    }
    if question["task"] == "speaker_verification" and keys:
        question["clips"] *= 2
    if question["task"] == "speech_qa":
        question["instruction"] = "Who?"
    if chance.random() < 0.5:
        question = mutate.tree(chance, question)
    content = mutate.to_json(chance, question) if chance.random() < 0.3 else json.dumps(question).encode()
    if chance.random() < 0.1:
        content = mutate.data(chance, content)
    if chance.random() < 0.05:
        content = b"[" * 100_000
    return {
        "method": "POST",
        "url": "/answers",
        "content": content,
        "headers": {
            "content-type": chance.choice(("application/json",) * 6 + ("text/plain", "", "application/json; charset=x"))
        }
        | _headers(chance),
    }


def _anything(chance: random.Random, _: list[str]) -> Request:
    request: Request = {"method": chance.choice(METHODS), "url": chance.choice(PATHS), "headers": _headers(chance)}
    if chance.random() < 0.4:
        request["data"] = {"a": "b" * chance.choice((1, 100_000))}
    elif chance.random() < 0.5:
        request["files"] = {"file": ("a.wav", chance.randbytes(chance.choice((0, 10, 100_000))))}
    return request


def _headers(chance: random.Random) -> dict[str, str]:
    odd = {
        "host": chance.choice(("testserver", "evil.example", "[::1]:80", "", "a" * 5000, "testserver:x")),
        "origin": chance.choice(("null", "http://evil.example", "http://testserver", "://")),
        "content-length": chance.choice(("0", "-1", "99999999999", "x")),
        "content-type": chance.choice(("", "multipart/form-data", "é")),
        "range": "bytes=0-1",
        "content-encoding": "gzip",
        "transfer-encoding": "chunked",
        "if-none-match": "*",
    }
    return {name: odd[name] for name in odd if chance.random() < 0.04 and odd[name].isascii()}


def _send(client: TestClient, request: Request, keys: list[str]) -> str:
    """Send it, check the answer, and tell what came of it."""
    answer = client.request(**request, follow_redirects=False)
    kind = answer.headers.get("content-type", "")
    if answer.status_code >= 500 and answer.status_code not in (503, 507):
        raise Fault(f"status {answer.status_code}")
    if answer.status_code >= 400:
        if answer.content and not ("json" in kind and answer.json().get("error")):
            raise Fault(f"status {answer.status_code} without words")
        return "refused"
    if request["method"] == "POST" and request["url"] == "/clips":
        tree = answer.json()
        keys.append(tree["clip"])
        if not tree["seconds"] > 0:
            raise Fault("a recording of no length")
        return "clip"
    if request["method"] == "POST" and request["url"] == "/answers":
        rows = [json.loads(line) for line in answer.content.split(b"\n")[:-1]]
        if (
            not rows
            or not ("answer" in rows[-1] or rows[-1].get("error"))
            or any("text" not in row for row in rows[:-1])
        ):
            raise Fault("an answer without an end")
        return "answer" if "answer" in rows[-1] else "refused"
    return "other"
