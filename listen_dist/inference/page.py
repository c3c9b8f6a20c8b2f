"""The page's web server: what it serves, and the two things a browser can ask it.

    POST /clips?name=a.flac   the bytes of a recording → {"clip": name to ask by, "seconds": …}
    POST /answers             a question about clips → JSON lines, as the answer is generated:
                              {"text": more of it} …, then {"answer": everything} or {"error": why there is none}

Errors before an answer begins come as {"error": message} with a status of 4xx or 5xx.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator, Generator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import anyio
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, Field
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.exceptions import HTTPException

from listen_dist.data.decode import AudioError, decode_audio
from listen_dist.errors import ListenError
from listen_dist.inference.listener import Answer, Clip, Listener
from listen_dist.inference.uploads import TooLarge, Upload, Uploads
from listen_dist.structures import SAMPLE_RATE
from listen_dist.tasks import TASKS, get_task

logger = logging.getLogger(__name__)

MOST_WAITING = 8
"""Answers in work or waiting for the model; who comes then is told to try again."""
FILES = {"/": ("page.html", "text/html"), "/page.css": ("page.css", "text/css"),
         "/page.js": ("page.js", "text/javascript")}
"""All that is served from disk."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
                               "media-src blob:; img-src data:; form-action 'none'; base-uri 'none'; "
                               "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Served:
    """What the page is about, and its limits."""

    checkpoint: str
    """Its name, for people."""
    usage: Mapping[str, list[float]]
    """By task, the share of clips that had each prompt in front [N]; empty where unknown."""
    max_seconds: float
    max_bytes: int
    hosts: frozenset[str] | None
    """Names that the server may be called by, without port; None: any. Another name means that some page of
    the web has its own name point here."""


class Question(BaseModel):
    """The body of POST /answers."""

    clips: list[str] = Field(min_length=1, max_length=2)
    task: str = Field("asr", max_length=80)
    instruction: str = Field("", max_length=1000)
    choices: list[str] = Field([], max_length=20)


def build(listener: Listener, served: Served, uploads: Uploads) -> FastAPI:
    """The server as an ASGI application."""
    # Its pages of documentation would load scripts from elsewhere.
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    waiting = 0

    @app.middleware("http")
    async def guard(request: Request, respond: Any) -> Response:
        refusal = None if served.hosts is None else foreign(request, served.hosts)
        response = await respond(request) if refusal is None else _error(403, refusal)
        response.headers.update(HEADERS)
        return response

    @app.exception_handler(RequestValidationError)
    async def not_understood(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return _error(422, f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}")

    @app.exception_handler(HTTPException)  # of the framework: no such path, another method, a body that is no text
    async def refused(_: Request, error: HTTPException) -> Response:
        return _error(error.status_code, str(error.detail))

    for path, (name, kind) in FILES.items():
        app.get(path)(_file(Path(__file__).with_name(name), kind))

    @app.get("/about")
    async def about() -> dict[str, Any]:
        config = listener.config
        return {"checkpoint": served.checkpoint, "prompts": len(listener.parts.model.pool.table()),
                "selection": config.pool.selection, "usage": served.usage, "max_seconds": served.max_seconds,
                "max_bytes": served.max_bytes, "window": listener.window,
                "tasks": [{"name": task.name, "instruction": task.instruction} for task in TASKS.values()]}

    @app.post("/clips")
    async def receive(request: Request, name: str = "recording") -> Response:
        name = Path(name.replace("\\", "/")).name[:200] or "recording"
        try:
            key = await uploads.receive(name, request.stream())
        except TooLarge as error:
            return _error(413, f"{name}: {error}")
        except OSError as error:
            return _error(507, f"{name}: could not be stored on the server ({error.strerror})")
        upload = uploads.get(key)
        assert upload is not None
        try:
            wave = await run_in_threadpool(decode_audio, upload.path, served.max_seconds)
        except AudioError as error:
            uploads.drop(key)
            return _error(422, _in_words(error, [upload]))
        return JSONResponse({"clip": key, "seconds": len(wave) / SAMPLE_RATE})

    @app.post("/answers")
    async def answer(question: Question) -> Response:
        nonlocal waiting
        known = [uploads.get(key) for key in question.clips]
        clips = [upload for upload in known if upload is not None]
        if len(clips) < len(known):
            return _error(404, "this recording is no longer on the server: choose it again")
        try:
            check(question)
        except ListenError as error:
            return _error(422, str(error))
        if waiting >= MOST_WAITING:
            return _error(503, f"{waiting} other questions are waiting for the model: try again in a moment")

        async def lines() -> AsyncIterator[bytes]:
            nonlocal waiting
            waiting += 1
            answering = answer_lines(listener, question, clips)
            try:
                async for line in iterate_in_threadpool(answering):
                    yield line
            finally:
                waiting -= 1
                with anyio.CancelScope(shield=True):  # if nobody reads on, the generation ends within a token
                    await run_in_threadpool(answering.close)

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    return app


def foreign(request: Request, hosts: frozenset[str]) -> str | None:
    """Why a request is refused that a page of another site sent, or None where it is not."""
    def bare(host: str) -> str:
        return host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host

    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    if bare(host) not in hosts:
        return f"this server is not called {bare(host)[:80]}"
    return None if origin is None or origin.partition("://")[2] == host else "sent by a page of another site"


def check(question: Question) -> None:
    """What can be known about a question without listening.

    Raises:
        ListenError: naming the cure.
    """
    task = get_task(question.task)
    pair = task.name == "speaker_verification"
    if pair != (len(question.clips) == 2):
        raise ListenError("choose two recordings to compare" if pair else f"{task.name} is about one recording")
    if not (task.instruction or question.instruction.strip()):
        raise ListenError("write a question first")
    if len(question.choices) == 1 or len(set(question.choices)) < len(question.choices):
        raise ListenError("answers to choose from: give two or more different ones")


def answer_lines(listener: Listener, question: Question, clips: list[Upload]) -> Generator[bytes, None, None]:
    """The JSON lines of one answer."""
    start = time.perf_counter()
    first: float | None = None
    clip: Clip = (clips[0].path, clips[1].path) if len(clips) == 2 else clips[0].path
    stream = listener.stream(clip, question.task, question.instruction.strip(), question.choices)
    try:
        while True:
            text = next(stream)
            first = first or time.perf_counter() - start
            yield _line({"text": text})
    except StopIteration as end:
        seconds = time.perf_counter() - start
        yield _line({"answer": as_tree(end.value), "timing": {"first": first or seconds, "total": seconds}})
    except ListenError as error:
        yield _line({"error": _in_words(error, clips)})
    except Exception:  # a fault of ours, out of memory, a file that vanished
        logger.exception("no answer to %r", question)
        yield _line({"error": "the server could not answer; its terminal says why"})
    finally:
        stream.close()


def as_tree(answer: Answer) -> dict[str, Any]:
    return {"text": answer.text, "seconds": answer.seconds, "parts": [asdict(part) for part in answer.parts]}


def _in_words(error: Exception, clips: list[Upload]) -> str:
    """The message with the sender's names instead of where the files lie here."""
    message, named = str(error), False
    for clip in clips:
        named = named or str(clip.path) in message
        message = message.replace(str(clip.path), clip.name)
    if "can't be decoded" in message:
        message = f"{message.partition(': ')[0]}: this is not an audio file, or one that is damaged"
    return message if named or len(clips) > 1 else f"{clips[0].name}: {message}"


def _file(path: Path, kind: str) -> Any:
    async def send() -> Response:
        return FileResponse(path, media_type=kind)

    return send


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status)


def _line(tree: Mapping[str, Any]) -> bytes:
    return json.dumps(tree, ensure_ascii=False).encode() + b"\n"
