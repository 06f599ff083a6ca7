"""`make ui` on a pipeline that takes no time: what a person stops, stops."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.flows.test_experiments import until
from tests.flows.toy_pipeline import Toy, make_toy


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Toy, str]]:
    """A project whose stages take minutes, and the API of its UI."""
    toy = make_toy(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "flows.serve", "--port", str(port)]
    url = f"http://127.0.0.1:{port}/api"
    with subprocess.Popen(words, cwd=toy.root, env=toy.surroundings(TOY_SECONDS="600")) as process:
        try:
            until(lambda: answers(f"{url}/deployments/name/store-rlbench/rlbench"), "the UI's deployments")
            yield toy, url
        finally:
            process.terminate()


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=30).status_code == 200
    except httpx.HTTPError:
        return False


def started(url: str, deployment: str, **parameters: object) -> str:
    held = httpx.get(f"{url}/deployments/name/{deployment}", timeout=60).json()
    chosen = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
    run = httpx.post(f"{url}/deployments/{held['id']}/create_flow_run", json=chosen, timeout=60).json()
    return str(run["id"])


def workers(toy: Toy) -> list[str]:
    """What DVC runs for the project, and its stages."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            own = Path(process.cwd()).is_relative_to(toy.root)
        except (psutil.Error, OSError):
            continue
        if own and ("stage.py" in words or "exec-run" in words or {"exp", "run"} <= set(words)):
            found.append(" ".join(words))
    return found


@pytest.mark.long
def test_cancelling_a_run_ends_dvc_and_its_stage(served: tuple[Toy, str]) -> None:
    toy, url = served
    run = started(url, "pipeline/pipeline", params={"seed": 1})
    until(lambda: toy.ran("ssv2") and workers(toy), "a stage that runs")
    cancelling = {"state": {"type": "CANCELLING"}}
    httpx.post(f"{url}/flow_runs/{run}/set_state", json=cancelling, timeout=60).raise_for_status()
    until(lambda: not workers(toy), "the end of DVC and its stage")
    until(
        lambda: httpx.get(f"{url}/flow_runs/{run}", timeout=60).json()["state"]["type"] == "CANCELLED",
        "a run that shows as cancelled",
    )
    assert toy.command("git", "status", "--porcelain", "--untracked-files=no").stdout == ""
