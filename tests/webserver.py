"""A local HTTP server with Range support that misbehaves when told to."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import re
import threading
import time
from collections.abc import Callable, Iterator


@dataclasses.dataclass
class Behaviour:
    """What the server does wrong; counters run down to good behaviour."""

    breaks: int = 0
    stalls: int = 0
    stalled: threading.Event = dataclasses.field(default_factory=threading.Event)
    after: int = 1000
    errors: int = 0
    status: int = 503
    ranges: bool = True
    etag: str | None = '"one"'
    modified: str | None = "Mon, 01 Jan 2024 00:00:00 GMT"
    length: bool = True
    needs: tuple[str, str] | None = None
    redirect: str | None = None
    retry_after: str = "0"
    content_range: str | None = None
    content_length: str | None = None
    pace: float | None = None
    on_request: Callable[[Behaviour], None] = lambda behaviour: None


@dataclasses.dataclass
class Server:
    """A running server: where it is, what it serves, and what it was asked."""

    url: str
    files: dict[str, bytes]
    behaviour: Behaviour
    requests: list[tuple[str, dict[str, str]]]


@contextlib.contextmanager
def serve(files: dict[str, bytes], behaviour: Behaviour | None = None) -> Iterator[Server]:
    """Serve `files` by name on a free port of this machine."""
    server = Server("", files, behaviour or Behaviour(), [])

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            _answer(self, server)

        def log_message(self, *arguments: object) -> None:
            pass

    with listening(Handler) as server.url:
        yield server


@contextlib.contextmanager
def listening(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    """Let a handler answer on a free port of this machine, until the end; yields its address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as listener:
        listener.daemon_threads = True
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.server_address[1]}"
        finally:
            listener.shutdown()
            thread.join()


def _plain(handler: http.server.BaseHTTPRequestHandler, status: int, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": "0", **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()


def _answer(handler: http.server.BaseHTTPRequestHandler, server: Server) -> None:
    wrong = server.behaviour
    name = handler.path.partition("?")[0].lstrip("/")
    server.requests.append((handler.path, dict(handler.headers.items())))
    wrong.on_request(wrong)
    if wrong.redirect:
        _plain(handler, 302, Location=f"{wrong.redirect}/{name}")
        return
    if wrong.needs and handler.headers.get(wrong.needs[0]) != wrong.needs[1]:
        _plain(handler, 403)
        return
    if wrong.errors > 0:
        wrong.errors -= 1
        _plain(handler, wrong.status, Retry_After=wrong.retry_after)
        return
    if name not in server.files:
        _plain(handler, 404)
        return
    _send(handler, server.files[name], wrong)


def _send(handler: http.server.BaseHTTPRequestHandler, content: bytes, wrong: Behaviour) -> None:
    asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", "")) if wrong.ranges else None
    begin = int(asked[1]) if asked else 0
    if asked and begin >= len(content):
        _plain(handler, 416, Content_Range=f"bytes */{len(content)}")
        return
    body = content[begin:]
    handler.send_response(206 if asked else 200)
    if asked:
        told = wrong.content_range or f"bytes {begin}-{len(content) - 1}/{len(content)}"
        handler.send_header("Content-Range", told)
    for key, value in (("ETag", wrong.etag), ("Last-Modified", wrong.modified)):
        if value is not None:
            handler.send_header(key, value)
    if wrong.length:
        handler.send_header("Content-Length", wrong.content_length or str(len(body)))
    else:
        handler.send_header("Connection", "close")
        handler.close_connection = True
    handler.end_headers()
    if wrong.stalls > 0:
        wrong.stalls -= 1
        handler.wfile.write(body[: wrong.after])
        handler.wfile.flush()
        wrong.stalled.wait(60)
        handler.close_connection = True
        return
    if wrong.breaks > 0:
        wrong.breaks -= 1
        handler.wfile.write(body[: wrong.after])
        handler.wfile.flush()
        handler.close_connection = True
        return
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for byte in body if wrong.pace else ():
            handler.wfile.write(bytes([byte]))
            time.sleep(wrong.pace or 0)
        handler.wfile.write(body)
