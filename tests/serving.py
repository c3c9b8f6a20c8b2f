"""A real nginx on loopback, and a proxy that breaks connections in front of it."""

from __future__ import annotations

import os
import shutil
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.launching import ROOT, free_port

sys.path.insert(0, str(ROOT / "tools/prepare"))

from debian_packages import PrepareError, fetch_files

_CONFIG = """
daemon off; master_process off; pid {run}/pid; error_log {run}/error.log;
events {{ worker_connections 64; }}
http {{
  log_format plain '$status|$http_range|$uri';
  access_log {run}/access.log plain;
  client_body_temp_path {run}/body; proxy_temp_path {run}/proxy; fastcgi_temp_path {run}/fastcgi;
  uwsgi_temp_path {run}/uwsgi; scgi_temp_path {run}/scgi;
  limit_req_zone $binary_remote_addr zone=busy:1m rate=2r/s;
  server {{
    listen 127.0.0.1:{port}; root {root};
    location /slow/ {{ alias {root}/; limit_rate 64k; }}
    location /whole/ {{ alias {root}/; max_ranges 0; }}
    location /busy/ {{ alias {root}/; limit_req zone=busy; }}
    location /broken/ {{ return 500; }}
    location /closed/ {{ return 444; }}
    location /private/ {{ return 403; }}
  }}
}}
"""


@dataclass(frozen=True)
class Nginx:
    """A running server of the files below `root`."""

    root: Path
    run: Path
    port: int

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}/{path}"

    def forget(self) -> None:
        """Begin the list of requests anew.

        The last line may still be on its way, and is written before that of a request made now: one process serves all.
        """
        mark = f"/forget-{time.monotonic_ns()}"
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(self.url(mark.removeprefix("/")), timeout=10)
        while mark not in (self.run / "access.log").read_text():
            time.sleep(0.01)
        os.truncate(self.run / "access.log", 0)

    def requests(self, count: int) -> list[tuple[int, str, str]]:
        """Status, range asked for and path of every answer since, in the order they ended.

        A line is written a little after the answer, so `count` of them are waited for; more are returned too.
        """
        for _ in range(500):
            rows = [line.split("|") for line in (self.run / "access.log").read_text().splitlines()]
            if len(rows) >= count:
                break
            time.sleep(0.02)
        return [(int(status), asked.removeprefix("bytes="), path) for status, asked, path in rows]


def find_nginx(cache: Path) -> Path:
    """The nginx of this machine, or one taken out of the Debian package (no root needed) and kept in `cache`."""
    found = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if found:
        return Path(found)
    try:
        fetch_files({"nginx": lambda name: "nginx" if name == "usr/sbin/nginx" else None}, cache)
    except PrepareError as error:
        pytest.skip(f"no nginx here, and none to be had: {error}")
    (cache / "nginx").chmod(0o755)
    return cache / "nginx"


@contextmanager
def serve(binary: Path, root: Path, run: Path) -> Iterator[Nginx]:
    """Serve `root` on a free port of loopback; logs and temporary files go into `run`."""
    run.mkdir()
    port = free_port()
    (run / "nginx.conf").write_text(_CONFIG.format(run=run, root=root, port=port))
    process = subprocess.Popen([binary, "-p", run, "-c", run / "nginx.conf"], stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(300):
            if process.poll() is not None:
                raise AssertionError(f"nginx ended: {process.stderr.read() if process.stderr else ''}")
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield Nginx(root, run, port)
    finally:
        process.terminate()
        process.wait(20)


STALL = -1
"""A fault: take the request, and never answer."""


class _Connection(socketserver.BaseRequestHandler):
    """Passes one connection on, up to the number of bytes that the proxy's next fault lets through."""

    server: FaultyProxy

    def handle(self) -> None:
        allowed = self.server.faults.pop(0) if self.server.faults else sys.maxsize
        if allowed == STALL:
            while self.request.recv(65536):
                pass
            return
        if not allowed:  # dropped before the request goes any further
            return
        with socket.create_connection(("127.0.0.1", self.server.target)) as upstream:
            threading.Thread(target=_pump, args=(self.request, upstream), daemon=True).start()
            while allowed and (data := upstream.recv(min(65536, allowed))):
                self.request.sendall(data)
                allowed -= len(data)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # the other side is gone


class FaultyProxy(socketserver.ThreadingTCPServer):
    """Forwards connections to a port; `faults` says how many bytes of answer each of the next may bring."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, target: int) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.target = target
        self.faults: list[int] = []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{path}"
