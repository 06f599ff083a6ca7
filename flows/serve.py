"""`make ui`: a Prefect server on this machine, and the deployments to run and schedule in its UI."""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, cast

from flows import runtime
from flows.runtime import PAGES, PAGES_URL
from prelar.errors import UserError, run_main
from prelar.names import checked_config

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment

NIGHTLY = "0 3 * * *"
ANYWHERE = ("0.0.0.0", "::")
BOUND = """
import os, sys
from prelar.parents import end_with
end_with(int(sys.argv[1]))
os.execv(sys.argv[2], sys.argv[2:])
"""


def main() -> None:
    """Start the server, serve the deployments until Ctrl-C, stop the server."""
    parser = argparse.ArgumentParser(prog="make ui", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to bind (default: this machine only)")
    parser.add_argument("--port", type=int, default=4200, help="port of UI and API (default: %(default)s)")
    given = parser.parse_args()
    checked_config()
    with _server(given.host, given.port) as url:
        os.environ |= {runtime.API: f"{url}/api", "PREFECT_LOGGING_LEVEL": "INFO"}
        with _pages(given.host):
            _serve(url)


@contextmanager
def _server(host: str, port: int) -> Iterator[str]:
    """A Prefect server that ends with this process; yields the address of its UI.

    It has a session of its own: Ctrl-C reaches this process alone, which has yet to tell the server its end.
    """
    url = f"http://{'127.0.0.1' if host in ANYWHERE else host}:{port}"
    if runtime.answers(f"{url}/api"):
        raise UserError(
            f"port = {port}: a Prefect server runs there already; open {url} or choose another port"
        )
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", host, "--port", str(port)]
    process = subprocess.Popen(
        [sys.executable, "-c", BOUND, str(os.getpid()), *command],
        env=os.environ | {"PREFECT_SERVER_UI_API_URL": "/api"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + runtime.PATIENCE
        while not runtime.answers(f"{url}/api"):
            if process.poll() is not None:
                raise UserError(f"port = {port}: the Prefect server ended at once; choose another port")
            if time.monotonic() > end:
                raise UserError(f"the Prefect server did not answer within {runtime.PATIENCE} s; run again")
            time.sleep(0.3)
        yield url
    finally:
        process.terminate()
        process.wait()


@contextmanager
def _pages(host: str) -> Iterator[None]:
    """Serve the pages of experiments, which a browser would not open from the disk out of the UI."""
    PAGES.mkdir(parents=True, exist_ok=True)
    with ThreadingHTTPServer((host, 0), functools.partial(_Page, directory=str(PAGES))) as server:
        shown = "127.0.0.1" if host in ANYWHERE else host
        os.environ[PAGES_URL] = f"http://{shown}:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield
        finally:
            server.shutdown()


class _Page(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Print no line per request."""


def _serve(url: str) -> None:
    """Make the deployments known to the server and run what it asks for."""
    from prefect import serve

    print(f"The Prefect UI: {url} (Ctrl-C stops it)", flush=True)
    serve(*deployments(), print_starting_message=False)


def deployments() -> list[RunnerDeployment]:
    """What the UI offers. Of each one run at a time; a second waits for the first."""
    from prefect.schedules import Cron

    from flows import stores
    from flows.experiments import experiments
    from flows.pipeline import pipeline

    nightly = [Cron(NIGHTLY, active=False, slug="nightly")]
    offered: list[tuple[Any, str, str, list[str], Any]] = [
        (
            pipeline,
            "pipeline",
            "One experiment: the stages of dvc.yaml that the changed params concern.",
            ["dvc", "training"],
            nightly,
        ),
        (
            experiments,
            "experiments",
            "A sweep over params: queued experiments that share their pre-training. Started again, it runs "
            "what has no result yet.",
            ["dvc", "training", "sweep"],
            None,
        ),
        (stores.ssv2, "ssv2", "The store of Something-Something V2 alone.", ["dvc", "data"], None),
        (stores.rlbench, "rlbench", "The store of demonstrations alone.", ["dvc", "data"], None),
    ]
    return [
        cast(
            "RunnerDeployment",
            flow.to_deployment(name, description=about, tags=tags, schedules=schedules, concurrency_limit=1),
        )
        for flow, name, about, tags, schedules in offered
    ]


if __name__ == "__main__":
    run_main(main)
