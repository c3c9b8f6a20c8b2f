"""What `python -m listen_dist.app` does once its arguments are read."""

from __future__ import annotations

import argparse
import signal
import socket
import sys
from pathlib import Path

import uvicorn

from listen_dist.engine import exports
from listen_dist.inference import page
from listen_dist.inference.listener import Listener
from listen_dist.inference.shell import newest_below
from listen_dist.inference.uploads import Uploads
from listen_dist.inference.usage import known_usage

LOOPBACK = frozenset(("127.0.0.1", "localhost", "[::1]"))


def run(arguments: argparse.Namespace) -> int:
    """Load the model and serve the page until the program is stopped; the exit code."""
    path = newest_below(Path("runs")) if arguments.checkpoint == "latest" else Path(arguments.checkpoint)
    folder = exports.resolve(path)
    listening = _listen(arguments.host, arguments.port)  # a port that is taken is known before anything is loaded
    listener = Listener.from_checkpoint(
        folder, device=arguments.device, dtype=arguments.dtype, top_k=arguments.top_k, llm=arguments.llm,
        speech_encoder=arguments.speech_encoder, audio_encoder=arguments.audio_encoder)
    max_bytes = int(arguments.max_megabytes * 2**20)
    local = arguments.host in ("127.0.0.1", "localhost", "::1")
    served = page.Served(_name(folder), known_usage(folder, listener.config.pool), arguments.max_seconds, max_bytes,
                         LOOPBACK if local else None)
    uploads = Uploads(max_bytes)
    try:
        _serve(page.build(listener, served, uploads), listening, local)
    finally:
        uploads.close()
    return 0


def _listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address.

    Raises:
        OSError: it is taken or not this machine's; the message names the cure.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise OSError(f"--host {host} --port {port}: {error.strerror}; take another --port, or 0 for any free one"
                      ) from error
    return listening


def _serve(application: object, listening: socket.socket, local: bool) -> None:
    host, port = listening.getsockname()[:2]
    config = uvicorn.Config(application, log_level="warning", timeout_graceful_shutdown=2)  # type: ignore[arg-type]
    server = uvicorn.Server(config)
    print(f"The page is at http://{f'[{host}]' if ':' in host else host}:{port} (Ctrl-C stops it)", flush=True)
    if not local:
        print("warning: whoever reaches this address can use the model; there is no password", file=sys.stderr)
    # uvicorn ends its work and then sends the signal again, whose default would leave the uploads behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    server.run(sockets=[listening])


def _name(folder: Path) -> str:
    """A checkpoint as people call it: the run's and its own name."""
    return f"{folder.parent.parent.name}/{folder.name}" if folder.parent.name == "checkpoints" else folder.name
