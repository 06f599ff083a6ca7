"""The work of the flow `demos` where it is asked for, without Prefect and worker processes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from flows import demos
from prelar.demos.episodes import Job, Source
from prelar.demos.rlbench_live import RlbenchLive

WORKERS = demos.episode_workers


@contextlib.contextmanager
def episode_workers(
    source: Source, *rest: Any
) -> Iterator[tuple[Callable[[Job], Any], Callable[[Job], None]]]:
    """Jobs are done where they are given; live ones by simulators as ever."""
    if isinstance(source, RlbenchLive):
        with WORKERS(source, *rest) as found:
            yield found
    else:
        yield lambda job: functools.partial(source.collect, job), lambda job: None


def work_inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `demos.fill` do so."""

    def submit(*arguments: Any) -> Any:
        return SimpleNamespace(result=functools.partial(demos.collect.fn, *arguments))

    monkeypatch.setattr(demos.collect, "submit", submit)
    monkeypatch.setattr(demos, "episode_workers", episode_workers)
