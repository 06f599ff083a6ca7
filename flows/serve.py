"""`make ui`: a Prefect server on this machine, with the deployments to run and schedule in its UI."""

from __future__ import annotations

import argparse
import asyncio
import hmac
import os
import secrets
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, cast

from flows import access, runtime
from flows.runtime import PAGES, PAGES_URL
from prelar.envs.names import checked_config
from prelar.utils.errors import UserError, run_main

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment

NIGHTLY = "0 3 * * *"
PACE = 2.0
PAGE_HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": "default-src 'none'; script-src 'none'; style-src 'unsafe-inline'; "
    "img-src data:; media-src data:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    **access.UNFRAMED,
}


def main() -> None:
    """Start the server, serve the deployments until Ctrl-C, stop the server."""
    parser = argparse.ArgumentParser(prog="make ui", description=__doc__)
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: this machine only); any other needs a password in "
        f"{access.SERVER_AUTH}",
    )
    parser.add_argument(
        "--port", type=int, default=4200, help="port of the UI and the API (default: %(default)s)"
    )
    given = parser.parse_args()
    own = access.own_string(given.host)
    auth = own or access.draw()
    checked_config()
    with ExitStack() as stack:
        listener = stack.enter_context(_listening(given.host, given.port))
        api = stack.enter_context(runtime.started(listener, auth, "ui.log", ui=True))
        stack.enter_context(access.kept(api, auth))
        stack.enter_context(_pages(listener.getsockname()[0]))
        os.environ |= {runtime.API: api, access.AUTH: auth, "PREFECT_LOGGING_LEVEL": "INFO"}
        root = api.removesuffix("/api")
        _serve(root if own else f"{root}{access.SIGN_IN}#{auth}")


def _listening(host: str, port: int) -> socket.socket:
    """An open socket. Raises `UserError` where there can be none."""
    url = f"http://{access.netloc(host, port)}"
    if runtime.answers(f"{url}/api"):
        raise UserError(
            f"port = {port}: a Prefect server runs there already; open {url} or choose another port"
        )
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"host = {host}, port = {port}: {getattr(error, 'strerror', None) or error}; choose another"
        ) from None


@contextmanager
def _pages(address: str) -> Iterator[None]:
    """Serve the pages of experiments, which a browser would not open from the disk out of the UI.

    Their address has a word drawn anew: a link in the UI cannot send the string that its API asks for.
    """
    PAGES.mkdir(parents=True, exist_ok=True)
    with _Pages(address) as server:
        os.environ[PAGES_URL] = f"http://{access.netloc(address, server.server_port)}/{server.word}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield
        finally:
            server.shutdown()


class _Pages(ThreadingHTTPServer):
    """The server of the pages."""

    def __init__(self, address: str) -> None:
        """`address` is the one to bind."""
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.word = secrets.token_urlsafe(32)
        self.names = access.Names(address)
        super().__init__((address, 0), _Page)


class _Page(BaseHTTPRequestHandler):
    """A page for who knows the server's word; nothing is listed, and no folder below is reached."""

    timeout = 30

    def do_GET(self) -> None:
        """Answer with a page, or with the status that refuses it."""
        server = cast(_Pages, self.server)
        word, _, name = self.path.removeprefix("/").partition("/")
        hosts, origins = (self.headers.get_all(key, []) for key in ("Host", "Origin"))
        known = hmac.compare_digest(word.encode(), server.word.encode())
        status = server.names.refuse(hosts, origins) or (None if known else 401)
        page = PAGES / name
        if status is None and not (page.suffix == ".html" and page.name == name and page.is_file()):
            status = 404
        content = b"" if status else page.read_bytes()
        with suppress(ConnectionError):  # a browser that leaves early
            self.send_response(status or 200)
            for key, value in {**PAGE_HEADERS, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Print no line per request."""


def _serve(url: str) -> None:
    """Make the deployments known to the server and run what it asks for, until Ctrl-C or SIGTERM."""
    from prefect.runner import Runner

    print(f"The Prefect UI: {url} (Ctrl-C stops it)", flush=True)
    with tempfile.TemporaryDirectory(prefix="prelar-") as own, suppress(KeyboardInterrupt):
        tempfile.tempdir = own  # the runner's folder would have the same name for every user
        runner = Runner(query_seconds=PACE)
        runner.handle_sigterm = lambda *_: runner.execute_in_background(runner.astop)  # type: ignore
        for deployment in deployments():
            runner.add_deployment(deployment)
        asyncio.run(runner.start())


def deployments() -> list[RunnerDeployment]:
    """What the UI offers. Of each one run at a time; a second waits for the first."""
    from prefect.deployments.runner import EntrypointType
    from prefect.schedules import Cron

    from flows.experiments import experiments
    from flows.pipeline import demos, pipeline, ssv2

    nightly = [Cron(NIGHTLY, active=False, slug="nightly")]
    offered: list[tuple[Any, str, str, list[str], Any]] = [
        (
            pipeline,
            "pipeline",
            "One experiment: runs the stages of dvc.yaml that the changed params affect.",
            ["dvc", "training"],
            nightly,
        ),
        (
            experiments,
            "experiments",
            "A sweep over params: experiments that share stages with the same params. Starting it again "
            "runs only what has no result yet.",
            ["dvc", "training", "sweep"],
            None,
        ),
        (
            ssv2,
            "ssv2",
            "Only the store of Something-Something V2, or of the videos in ssv2.source.",
            ["dvc", "data"],
            None,
        ),
        (demos, "demos", "Only the store of demonstrations.", ["dvc", "data"], None),
    ]
    return [
        cast(
            "RunnerDeployment",
            flow.to_deployment(
                name,
                description=about,
                tags=tags,
                schedules=schedules,
                concurrency_limit=1,
                entrypoint_type=EntrypointType.MODULE_PATH,  # a file's folder would hide packages
            ),
        )
        for flow, name, about, tags, schedules in offered
    ]


if __name__ == "__main__":
    run_main(main)
