"""The suites of tasks: which simulator plays a task. A new suite is a module here and a branch in `suite`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prelar.envs.metaworld import Simulator


def suite(task: str) -> type[Simulator]:
    """The simulator's class, which tells the size of its actions. Imported late: it takes OpenGL with it."""
    from prelar.envs.metaworld import Simulator

    return Simulator


def make_env(task: str, *, time_limit: int | None = None) -> Simulator:
    """A simulator of a task: `action_dim`, `camera`, `width`, `height` and `time_limit` travel with it.

    time_limit: steps per episode, the suite's own for None. Raises `UserError` for an unknown task.
    """
    found = suite(task)
    return found(task) if time_limit is None else found(task, time_limit=time_limit)
