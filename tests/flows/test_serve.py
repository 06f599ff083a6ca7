"""`make ui` on a pipeline that takes no time: what a person stops, stops."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.flows.test_experiments import finished
from tests.flows.toy_pipeline import Toy, make_toy
from tests.serving import admitted, answers, cancel, launch, ready, serving, start_run, until

pytestmark = pytest.mark.long


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Toy, str]]:
    """A project whose stages take minutes, and the API of its UI."""
    toy = make_toy(tmp_path)
    with serving(toy.root, toy.environment(TOY_SECONDS="600")) as url:
        yield toy, url


def workers(toy: Toy) -> list[str]:
    """What DVC runs for the project, and its stages."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            own = Path(process.cwd()).is_relative_to(toy.root)
        except (psutil.Error, OSError):
            continue
        if own and ("stage.py" in words or {"exp", "run"} <= set(words)):
            found.append(" ".join(words))
    return found


@pytest.mark.parametrize(
    ("deployment", "parameters"),
    [
        ("pipeline/pipeline", {"params": {"seed": 1}}),
        ("experiments/experiments", {"grid": {"seed": [1, 2]}, "workers": 1}),
    ],
)
def test_cancelling_a_run_ends_dvc_and_its_stage(
    served: tuple[Toy, str], deployment: str, parameters: dict[str, object]
) -> None:
    toy, url = served
    run = start_run(url, deployment, **parameters)
    until(lambda: toy.ran("ssv2") and workers(toy), "a stage that runs")
    cancel(url, run)
    until(lambda: not workers(toy), "the end of DVC and its stage")
    until(lambda: not list(toy.root.glob(".dvc/tmp/copies/*")), "the end of its copies")
    assert finished(toy) == []
    assert toy.command("git", "status", "--porcelain", "--untracked-files=no").stdout == ""


@contextmanager
def started(toy: Toy, told: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A process of `make ui` in a group of its own, and its API; what it tells goes to a file."""
    with told.open("w") as handle:
        process, url = launch(
            toy.root,
            toy.environment(TOY_SECONDS="600"),
            stdout=handle,
            stderr=handle,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            api = admitted(toy.root, url)
            ready(api)
            yield process, api
            until(lambda: not answers(f"{url}/health"), "the end of the server")
        finally:
            process.kill()
            process.wait()
    lines = told.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 and lines[0].startswith("The Prefect UI: "), lines


def test_a_kill_of_what_started_it_ends_the_server(tmp_path: Path) -> None:
    with started(make_toy(tmp_path), tmp_path / "told") as (process, _):
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_and_what_runs(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C, which reaches the whole group, and SIGTERM, which reaches one process."""
    toy = make_toy(tmp_path)
    with started(toy, tmp_path / "told") as (process, url):
        start_run(url, "pipeline/pipeline", params={"seed": 1})
        until(lambda: toy.ran("ssv2") and workers(toy), "a stage that runs")
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        assert process.wait(timeout=240) == 0
        until(lambda: not workers(toy), "the end of DVC and its stage")
    assert not list((toy.root / ".prefect").glob("auth-*"))
