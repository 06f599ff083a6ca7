"""The suites of tasks: which simulator plays a task. A new suite is a module here and a branch in `suite`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prelar.envs.metaworld import Simulator


def suite(task: str) -> type[Simulator]:
    """The simulator's class, which tells the size of its actions and for how many steps one is applied.

    Imported late: it takes OpenGL with it.
    """
    from prelar.envs.metaworld import Simulator

    return Simulator


def make_env(task: str, *, time_limit: int | None = None, action_repeat: int | None = None) -> Simulator:
    """A simulator of a task; sizes, `time_limit` and `action_repeat` travel with it.

    time_limit: simulator steps per episode. action_repeat: simulator steps that an action is applied for.
    None: the suite's own. Raises `UserError` for an unknown task.
    """
    found = suite(task)
    return found(
        task,
        time_limit=found.time_limit if time_limit is None else time_limit,
        action_repeat=found.action_repeat if action_repeat is None else action_repeat,
    )
