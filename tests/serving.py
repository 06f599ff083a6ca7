"""`make ui` of a project as a process of its own, and the API of its server."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx


def launch(root: Path, environment: dict[str, str], **options: Any) -> tuple[subprocess.Popen[bytes], str]:
    """Start `make ui` for the project in `root`; returns the process and the address of its API."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "flows.serve", "--port", str(port)]
    process = subprocess.Popen(command, cwd=root, env=environment, **options)
    return process, f"http://127.0.0.1:{port}/api"


def admitted(root: Path, url: str) -> str:
    """The address of a project's API with the string that it asks for, once it has started."""
    kept = root / f".prefect/auth-{httpx.URL(url).port}"
    until(lambda: answers(f"{url}/health") and kept.is_file(), "the server")
    return url.replace("://", f"://{kept.read_text(encoding='utf-8')}@")


def split(url: str) -> tuple[str, str]:
    """An address without its string, and the string."""
    scheme, _, rest = url.partition("://")
    auth, _, place = rest.partition("@")
    return f"{scheme}://{place}", auth


@contextmanager
def serving(root: Path, environment: dict[str, str]) -> Iterator[str]:
    """Yield the API, with its string, once the server knows the deployments of the project in `root`."""
    process, bare = launch(root, environment)
    with process:
        try:
            url = admitted(root, bare)
            ready(url)
            yield url
        finally:
            process.terminate()


def ready(url: str) -> None:
    """Wait until the server knows the deployments."""
    until(lambda: answers(f"{url}/deployments/name/store-demos/demos"), "the UI's deployments")


def until(reached: Callable[[], object], what: str, seconds: float = 240) -> None:
    """Wait for something that is to come true."""
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.2)


def answers(url: str) -> bool:
    """Whether an address has what it stands for."""
    try:
        return httpx.get(url, timeout=30).status_code == 200
    except httpx.HTTPError:
        return False


def told(method: str, url: str, **content: Any) -> httpx.Response:
    """An answer of the server; a busy one, whose data base is locked for a moment, is asked again."""
    api, headers = url.partition("/api")[0] + "/api", {"Prefect-Csrf-Client": "tests"}
    for _ in range(30):
        if method != "GET":
            asked = httpx.get(f"{api}/csrf-token", params={"client": "tests"}, timeout=60)
            headers["Prefect-Csrf-Token"] = asked.json().get("token", "")
        answer = httpx.request(method, url, timeout=60, headers=headers, **content)
        if answer.status_code < 500:
            break
        time.sleep(1)
    return answer


def create_run(url: str, deployment: str, state: str = "SCHEDULED", **parameters: Any) -> httpx.Response:
    """The answer to the wish for a run of a deployment, named as `flow/deployment`, in a state."""
    held = told("GET", f"{url}/deployments/name/{deployment}").json()
    wish = {"parameters": parameters, "state": {"type": state}}
    return told("POST", f"{url}/deployments/{held['id']}/create_flow_run", json=wish)


def start_run(url: str, deployment: str, **parameters: Any) -> str:
    """Start a run of a deployment; returns its id."""
    answer = create_run(url, deployment, **parameters)
    assert answer.is_success, answer.text
    return str(answer.json()["id"])


def cancel(url: str, run: str) -> None:
    """Cancel a run as the UI does, and wait until it shows as cancelled."""
    wish = {"state": {"type": "CANCELLING"}}
    assert told("POST", f"{url}/flow_runs/{run}/set_state", json=wish).is_success
    until(
        lambda: told("GET", f"{url}/flow_runs/{run}").json()["state"]["type"] == "CANCELLED",
        "a run that shows as cancelled",
    )
