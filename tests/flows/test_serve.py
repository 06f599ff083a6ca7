"""`make ui` on a pipeline that takes no time: what a person stops, stops."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
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


@pytest.mark.parametrize(
    "end", [lambda pid: os.killpg(pid, signal.SIGINT), lambda pid: os.kill(pid, signal.SIGKILL)]
)
def test_the_server_ends_with_what_started_it(tmp_path: Path, end: Callable[[int], None]) -> None:
    """After Ctrl-C, which reaches the whole group, and after a kill."""
    toy = make_toy(tmp_path)
    with (tmp_path / "told").open("w") as told:
        process, url = launch(
            toy.root,
            toy.environment(),
            stdout=told,
            stderr=told,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        ready(admitted(toy.root, url))
        end(process.pid)
        process.wait(timeout=120)
    until(lambda: not answers(f"{url}/health"), "the end of the server")
    assert "Traceback" not in (tmp_path / "told").read_text(encoding="utf-8")
