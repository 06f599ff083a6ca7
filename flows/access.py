"""Who may ask the servers of the flows: who knows the string drawn at their start, from their own pages.

A server checks the name that it was asked under (Host), for any domain can be led to this machine; the page
that asks (Origin); and HTTP Basic with the string, of web sockets too. Prefect's own check of the string
stays on behind it. Open are the UI's files, which hold nothing of the user's, and `/api/health`.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import ipaddress
import os
import re
import secrets
import socket
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.websockets import WebSocket

from prelar.utils.errors import UserError
from prelar.utils.files import write_text

AUTH = "PREFECT_API_AUTH_STRING"
SERVER_AUTH = "PREFECT_SERVER_API_AUTH_STRING"
SHORTEST = 12
SIGN_IN = "/signin"
KEEP = """
const word = location.hash.slice(1);
fetch("/api/admin/version", {headers: {Authorization: "Basic " + btoa(word)}}).then(answer => {
  if (answer.ok) { localStorage.setItem("prefect-password", btoa(word)); location.replace("/"); }
  else { document.body.textContent = "This link is of an earlier start; use the last."; }
});
"""
STAY = """
let leaving = false;
addEventListener("beforeunload", () => { leaving = true; setTimeout(() => { leaving = false; }, 5000); });
const remove = Storage.prototype.removeItem;
Storage.prototype.removeItem = function (name) { if (!leaving) { remove.call(this, name); } };
"""
PAGE = f'<!DOCTYPE html><meta charset="utf-8"><title>Prefect</title><body><script>{KEEP}</script></body>'
KEEP_DIGEST, STAY_DIGEST = (
    base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in (KEEP, STAY)
)
UNFRAMED = {
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
OWN_FILES = {
    "Content-Security-Policy": "default-src 'self'; worker-src 'self' blob:; "
    f"script-src 'self' 'unsafe-eval' 'sha256-{STAY_DIGEST}'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'",
    **UNFRAMED,
}
REASONS = {
    400: "Host is not a name of this server's; use the address that it was started with",
    401: f"the authentication string is missing or wrong; set {AUTH}, or use the link of make ui",
    403: "Origin is not this server's; open its own pages",
}


def draw() -> str:
    """An authentication string for one start of a server, as HTTP Basic has it: a user and a password."""
    return f"prelar:{secrets.token_urlsafe(32)}"


def own_string(host: str) -> str | None:
    """The user's string for a server that binds `host`; None for one to be drawn.

    Raises `UserError` where others than this machine could reach the server, and the string is none or short.
    """
    given = os.environ.get(SERVER_AUTH)
    if given is None and is_loopback(host):
        return None
    if not given or len(given) < SHORTEST or not (given.isascii() and given.isprintable()):
        raise UserError(
            f"{SERVER_AUTH}: a server at {host} needs a password of yours; export one of {SHORTEST} or more "
            "ASCII characters"
        )
    return given


def stay_signed_in(folder: Path) -> None:
    """Let the pages of Prefect's UI in `folder` keep the string while they are left.

    They ask the server whether it is right, and forget it where the next page breaks that question off.
    """
    for page in folder.glob("*/index.html"):
        text = page.read_text(encoding="utf-8")
        if STAY not in text:
            write_text(page, text.replace("<head>", f"<head><script>{STAY}</script>", 1))


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own, which no other machine reaches."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def netloc(host: str, port: int) -> str:
    """An address as it stands in a URL; that of this machine for one that means all of its addresses."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"{shown}:{port}"


class Names:
    """The names of a server."""

    def __init__(self, address: str) -> None:
        """`address` is the one that the server is bound to."""
        self._near = is_loopback(address)
        self._names = set() if self._near else {socket.gethostname().lower(), socket.getfqdn().lower()}

    def refuse(self, hosts: list[str], origins: list[str]) -> int | None:
        """The status that refuses a request with these headers Host and Origin; None where they are right.

        An address is nobody's domain, so beyond this machine each is right.
        """
        host = hosts[0].lower() if len(hosts) == 1 else ""
        parts = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::[0-9]{1,5})?", host)
        name = (parts[1] or parts[2]) if parts else ""
        if not (is_loopback(name) or (not self._near and (name in self._names or _is_address(name)))):
            return 400
        return 403 if any(origin.lower() != f"http://{host}" for origin in origins) else None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Gate:
    """An ASGI application that lets through to another what is allowed."""

    def __init__(self, app: Any, auth: str, address: str) -> None:
        """`auth` is the server's string, `address` the one that it is bound to."""
        self._app = app
        self._names = Names(address)
        self._basic = b"Basic " + base64.b64encode(auth.encode())

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        status = self._refuse(scope)
        answer: Response
        if status:
            problem = {"type": "about:blank", "title": "Refused", "status": status, "detail": REASONS[status]}
            answer = JSONResponse(problem, status, media_type="application/problem+json")
        elif scope["path"] == SIGN_IN:
            policy = f"default-src 'none'; script-src 'sha256-{KEEP_DIGEST}'; connect-src 'self'"
            answer = HTMLResponse(PAGE, headers={"Content-Security-Policy": policy, **UNFRAMED})
        else:
            await self._app(scope, receive, _confined(send))
            return
        if scope["type"] == "websocket":
            await WebSocket(scope, receive, send).send_denial_response(answer)
        else:
            await answer(scope, receive, send)

    def _refuse(self, scope: MutableMapping[str, Any]) -> int | None:
        """The status that refuses a request, None where it is allowed."""
        named: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            named.setdefault(name, []).append(value)
        hosts, origins = (
            [value.decode("latin-1") for value in named.get(name, [])] for name in (b"host", b"origin")
        )
        if status := self._names.refuse(hosts, origins):
            return status
        path = scope["path"]
        is_open = scope["type"] == "http" and (path == "/api/health" or not path.startswith("/api"))
        given = b"".join(named.get(b"authorization", []))
        return None if is_open or hmac.compare_digest(given, self._basic) else 401


def _confined(send: Any) -> Any:
    """`send` with headers by which a page loads nothing from elsewhere, and is no part of another."""

    async def sent(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            given = {name.lower() for name, _ in message["headers"]}
            more = [(name.lower().encode(), value.encode()) for name, value in OWN_FILES.items()]
            message["headers"] = [*message["headers"], *(one for one in more if one[0] not in given)]
        await send(message)

    return sent


def _file(api: str) -> Path | None:
    """Where the string of a server on this machine is kept while it runs."""
    try:
        host, port = urlsplit(api).hostname, urlsplit(api).port
    except ValueError:
        return None
    return Path(os.environ["PREFECT_HOME"]) / f"auth-{port}" if host and is_loopback(host) else None


@contextlib.contextmanager
def kept(api: str, auth: str) -> Iterator[None]:
    """Keep a server's string in a file that only this user reads, for other commands of the project."""
    path = _file(api)
    if path is None:
        yield
        return
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as handle:
        handle.write(auth)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def find(api: str) -> str | None:
    """The string of a server of this project, None where none is kept."""
    path = _file(api)
    try:
        return path.read_text() if path else None
    except OSError:
        return None
