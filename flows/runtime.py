"""What every flow needs around it: Prefect's settings, a server while the flow runs, and an end that comes.

Prefect reads its settings when it is imported, so importing any flow first sets them (`flows/__init__.py`).
What the user has set already stays.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from flows import access
from flows.access import AUTH, SERVER_AUTH
from prelar.utils.errors import UserError, one_line, run_main
from prelar.utils.parents import child, end_with_dvc, end_with_parent

HOME = Path(".prefect")
API = "PREFECT_API_URL"
PAGES = Path("reports/experiments")
PAGES_URL = "PRELAR_PAGES_URL"
PATIENCE = 180
GRACE = 30
SERVER_GRACE = 5
LOOPBACK = ("127.0.0.1", "localhost")
SETTINGS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(PATIENCE),
    "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
}
UI_FILES = "PREFECT_SERVER_UI_STATIC_DIRECTORY"


def set_environment() -> None:
    """Set Prefect's settings in the environment of this process and its children."""
    os.environ.setdefault("PREFECT_HOME", str(HOME.absolute()))
    with contextlib.suppress(OSError):  # a flow says itself, in one line, that nothing can be written here
        Path(os.environ["PREFECT_HOME"]).mkdir(mode=0o700, parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", message="Failed to create the Prefect home directory")
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    given = os.environ.get(API)
    if given and AUTH not in os.environ and (kept := access.find(given)):
        os.environ[AUTH] = kept
    _reach_this_machine()


def _reach_this_machine() -> None:
    """Let no HTTP proxy stand between a flow and a server on its own machine."""
    given = {name: os.environ[name] for name in ("NO_PROXY", "no_proxy") if name in os.environ}
    for name in ("NO_PROXY", "no_proxy"):
        held = [host.strip() for host in given.get(name, next(iter(given.values()), "")).split(",")]
        if "*" not in held:
            wanted = [host for host in held if host] + [host for host in LOOPBACK if host not in held]
            os.environ[name] = ",".join(wanted)


def run(main: Callable[[], None]) -> None:
    """Run a flow's entry point, `run_main`, and see that the process ends soon after it, and with DVC."""
    end_with_dvc()
    status = 1
    try:
        run_main(main)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
        raise
    finally:
        _end_within(GRACE, status)


def _end_within(seconds: float, status: int) -> None:
    """End the process with `status` if something still holds it up after `seconds`."""

    def end() -> None:
        time.sleep(seconds)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    threading.Thread(target=end, daemon=True).start()


@contextlib.contextmanager
def server() -> Iterator[str]:
    """Yield the URL of a Prefect API that answers: the user's, or a temporary server's for as long as needed.

    A `PREFECT_API_URL` that does not answer is named in one line, and a temporary server takes its place. The
    temporary server ends with this process, however this process ends. Raises `UserError` where the user's
    server refuses.
    """
    given = os.environ.get(API)
    if given and answers(given):
        check_access(given)
        yield given
        return
    if given:
        print(
            f"{API}={_shown(given)}: no Prefect server answers there; using a temporary one", file=sys.stderr
        )
    auth = access.draw()
    with _temporary(auth) as url:
        held = {name: os.environ.pop(name) for name in (API, AUTH) if name in os.environ}
        os.environ |= {API: url, AUTH: auth}
        _refresh()
        try:
            yield url
        finally:
            _drain()
            del os.environ[API], os.environ[AUTH]
            os.environ |= held


def answers(url: str, seconds: float = 5.0) -> bool:
    """Whether a Prefect API answers at `url` within `seconds`.

    Raises `UserError` where the environment names a proxy that Prefect's client, httpx, cannot use.
    """
    import httpx

    try:
        client = httpx.Client(timeout=seconds)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"a proxy of the environment (ALL_PROXY, …) is of no use to Prefect: {one_line(error)}; "
            "unset it, or give an http:// one"
        ) from None
    with client:
        try:
            return client.get(f"{url.rstrip('/')}/health").status_code == 200
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError):  # the last for what is no name of a host
            return False


def check_access(url: str) -> None:
    """See that the Prefect API at `url`, which answers, lets this process in. Raises `UserError`."""
    import httpx

    auth = os.environ.get(AUTH)
    headers = {"Authorization": f"Basic {base64.b64encode(auth.encode()).decode()}"} if auth else {}
    with contextlib.suppress(httpx.HTTPError):
        answer = httpx.get(f"{url.rstrip('/')}/admin/version", headers=headers, timeout=5.0)
        if answer.status_code in (401, 403):
            problem = "is wrong" if auth else "is not set"
            raise UserError(
                f"{API}={_shown(url)}: the server asks for its authentication string, and {AUTH} {problem}; "
                "export it"
            )


def _shown(url: str) -> str:
    """A URL without user, password and query."""
    import httpx

    from prelar.videos import download

    try:
        return download.shown(url) if httpx.URL(url).host else "(not a URL)"
    except (httpx.InvalidURL, UnicodeError):
        return "(not a URL)"


@contextlib.contextmanager
def _temporary(auth: str) -> Iterator[str]:
    """A server of our own on a free port of this machine, which asks for `auth`."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        started(listener, auth, "server.log", ui=False) as url,
    ):
        yield url


def _settings(root: str, auth: str, home: Path) -> dict[str, str]:
    """What protects a server at `root`, and where it keeps the files of its UI."""
    return {
        SERVER_AUTH: auth,
        "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": root,
        "PREFECT_SERVER_UI_API_URL": "/api",
        UI_FILES: str(home.absolute() / "ui"),
    }


@contextlib.contextmanager
def started(listener: socket.socket, auth: str, log_name: str, *, ui: bool) -> Iterator[str]:
    """A Prefect server on an open socket, which asks for `auth` and ends with this process; yields its API.

    Servers that start together would create the same data base, so they start one after the other. It has a
    session of its own: Ctrl-C reaches this process alone, which has yet to tell the server its end.
    """
    home = Path(os.environ["PREFECT_HOME"])
    home.mkdir(exist_ok=True)
    root = f"http://{access.netloc(*listener.getsockname()[:2])}"
    words = f"from flows.runtime import serve; serve({listener.fileno()}, {os.getpid()}, {ui})"
    with contextlib.ExitStack() as running:
        with (home / "start.lock").open("w") as lock, (home / log_name).open("w") as log:
            fcntl.flock(lock, fcntl.LOCK_EX)
            process = running.enter_context(
                child(
                    [sys.executable, "-c", words],
                    signal.SIGTERM,
                    SERVER_GRACE,
                    env=os.environ | _settings(root, auth, home),
                    pass_fds=[listener.fileno()],
                    stdout=log,
                    stderr=log,
                )
            )
            _wait(process, f"{root}/api", home / log_name)
        yield f"{root}/api"


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Wait until a server answers. Raises `UserError` where it ends or takes too long."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if process.poll() is not None:
            raise UserError(f"the Prefect server ended at once; {log} says why")
        if answers(url, seconds=2.0):
            return
        time.sleep(0.1)
    raise UserError(f"the Prefect server did not answer within {PATIENCE} s; run again, or see {log}")


def _refresh() -> None:
    """Let Prefect, imported before the server was there, see its address."""
    if "prefect" in sys.modules:
        from prefect.context import refresh_global_settings_context

        refresh_global_settings_context()


def _drain() -> None:
    """Send what Prefect has still to tell its server, which goes away next."""
    if "prefect" in sys.modules:
        from prefect.events.worker import EventsWorker
        from prefect.logging.handlers import APILogWorker

        with contextlib.suppress(Exception):
            EventsWorker.drain_all(timeout=10)
            APILogWorker.drain_all(timeout=10)


def serve(listener: int, parent: int, ui: bool) -> None:
    """Be a Prefect server on an open socket until the parent process ends."""
    end_with_parent(parent, signal.SIGKILL)
    warnings.simplefilter("ignore")
    import uvicorn
    from prefect.server.api.server import create_app

    taken = socket.socket(fileno=listener)
    app = create_app(ephemeral=not ui, final=True)
    access.stay_signed_in(Path(os.environ[UI_FILES]))
    gate = access.Gate(app, os.environ[SERVER_AUTH], taken.getsockname()[0])
    uvicorn.Server(uvicorn.Config(gate, log_level="error")).run(sockets=[taken])
