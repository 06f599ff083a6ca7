"""A server on this machine that answers as the Hugging Face Hub does, as far as its client asks here."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.webserver import listening

PATH = re.compile(
    r"/(?:api/(?P<api>models|datasets)/(?P<id>[^/]+/[^/]+)(?P<rest>/.*)?|(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)"
    r"/resolve/(?P<rev>[^/]+)/(?P<file>.+))"
)


@dataclass
class Hub:
    """What the server holds, commit by commit, and what it was asked.

    commits: of `models/org/name` and `datasets/org/name`, each its files by path, oldest first. tokens: those
    that may write, and read what is `private`.
    """

    url: str = ""
    commits: dict[str, list[dict[str, bytes]]] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=lambda: {"hf_may"})
    private: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)

    def find(self, repository: str, revision: str) -> dict[str, bytes] | None:
        """The files of a commit, or of the newest for `main`."""
        for files in reversed(self.commits.get(repository, [])):
            if revision in ("main", digest(files)):
                return files
        return None


def digest(files: dict[str, bytes]) -> str:
    """A commit's hash."""
    found = hashlib.sha1()
    for name, content in sorted(files.items()):
        found.update(name.encode() + b"\0" + content)
    return found.hexdigest()


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """Serve a hub without repositories on a free port."""
    hub = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            _read(self, hub)

        do_HEAD = do_GET

        def do_POST(self) -> None:
            _write(self, hub, self.rfile.read(int(self.headers.get("Content-Length", 0))))

        def log_message(self, *arguments: object) -> None:
            pass

    with listening(Handler) as hub.url:
        yield hub


def _may(handler: Any, hub: Hub) -> bool:
    return handler.headers.get("Authorization", "").removeprefix("Bearer ") in hub.tokens


def _send(handler: Any, status: int, content: Any = b"", **headers: str) -> None:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)


def _read(handler: Any, hub: Hub) -> None:
    path = handler.path.partition("?")[0]
    hub.asked.append(f"{handler.command} {path}")
    found = PATH.fullmatch(path)
    if found is None:
        return _send(handler, 404)
    repository = (
        f"{found['api'] or found['kind'] or 'models'}".rstrip("/") + f"/{found['id'] or found['name']}"
    )
    if repository not in hub.commits or (repository in hub.private and not _may(handler, hub)):
        return _send(handler, 401 if repository in hub.private else 404, X_Error_Code="RepoNotFound")
    revision = found["rev"] or re.sub(r"^/(revision|tree)/", "", found["rest"] or "") or "main"
    files = hub.find(repository, revision)
    if files is None:
        return _send(handler, 404, X_Error_Code="RevisionNotFound")
    if found["file"]:
        content = files.get(found["file"])
        if content is None:
            return _send(handler, 404, X_Error_Code="EntryNotFound")
        marks = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X_Repo_Commit": digest(files)}
        return _send(handler, 200, content, **marks)
    if "/tree/" in (found["rest"] or ""):
        rows = [
            {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
            for n, c in files.items()
        ]
        return _send(handler, 200, rows)
    siblings = [{"rfilename": name} for name in files]
    return _send(handler, 200, {"id": found["id"], "sha": digest(files), "siblings": siblings, "tags": []})


def _write(handler: Any, hub: Hub, body: bytes) -> None:
    hub.asked.append(f"POST {handler.path}")
    if not _may(handler, hub):
        return _send(handler, 401, {"error": "no"})
    if handler.path == "/api/validate-yaml":
        return _send(handler, 200, {"errors": [], "warnings": []})
    if handler.path == "/api/repos/create":
        wish = json.loads(body)
        name = f"{wish['organization']}/{wish['name']}" if wish.get("organization") else wish["name"]
        hub.commits.setdefault(f"models/{name}", [{}])
        if wish.get("private") or wish.get("visibility") == "private":
            hub.private.add(f"models/{name}")
        return _send(handler, 200, {"url": f"{hub.url}/{name}", "id": name})
    found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main.*", handler.path)
    if found is None:
        return _send(handler, 404)
    if found[2] == "preupload":
        modes = [
            {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
            for file in json.loads(body)["files"]
        ]
        return _send(handler, 200, {"files": modes})
    held = hub.commits[f"models/{found[1]}"]
    files = dict(held[-1])
    for line in body.splitlines():
        row = json.loads(line)
        if row["key"] == "file":
            files[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
    held.append(files)
    made = {
        "commitUrl": f"{hub.url}/{found[1]}/commit/{digest(files)}",
        "commitOid": digest(files),
        "success": True,
    }
    return _send(handler, 200, made)
