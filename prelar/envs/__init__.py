"""The suites of tasks: which simulator plays a task. A new one is a module and a branch in `make_env`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prelar.config import PLAIN, Config, View, refilled
from prelar.envs.names import DMC, METAWORLD, EnvSpec, suite_of
from prelar.utils.errors import UserError

if TYPE_CHECKING:
    from prelar.envs.simulator import Simulator


def make_env(
    task: str, *, time_limit: int | None = None, action_repeat: int | None = None, view: View = PLAIN
) -> Simulator:
    """A simulator of a task; sizes, `time_limit`, `action_repeat` and whether it succeeds travel with it.

    task: as in params.yaml. time_limit: simulator steps per episode. action_repeat: simulator steps that an
    action is applied for. None: the suite's own. view: how pictures look.
    Raises `UserError` for an unknown task, and where a suite is not installed.

    Simulators are imported late: they take OpenGL with them.
    """
    settings: dict[str, Any] = {"time_limit": time_limit, "action_repeat": action_repeat, "view": view}
    suite = suite_of(task)
    if suite is METAWORLD:
        from prelar.envs import metaworld

        return metaworld.Simulator(task, **settings)
    if suite is DMC:
        from prelar.envs import dmc

        return dmc.Simulator(task, **settings)
    from prelar.envs import own

    return own.Simulator(task, **settings)


def make_env_of(described: Mapping[str, Any], config: Config) -> Simulator:
    """The simulator that a fine-tuning checkpoint acts in, to the time limit of evaluations.

    Task, pace and view are as the checkpoint's config `described` says. It may come from a stranger: raises
    `UserError` where its task is an environment of one's own, which is code, and params.yaml names another.
    """
    task = described["task"]
    if suite_of(task) is None and task != config.task:
        raise UserError(
            f"task = {task}, says the checkpoint: an environment of one's own, which is code; where you "
            f"trust it, set task: {task} in params.yaml"
        )
    repeat = described.get("action_repeat", 1)  # not said by checkpoints of before
    view = View(**described.get("view", {}))
    return make_env(task, time_limit=config.evaluate.time_limit, action_repeat=repeat, view=view)


def describe(task: str) -> EnvSpec:
    """What a task's environment is: known by its name, or from making it where it is the user's own."""
    suite = suite_of(task)
    if suite is not None:
        return suite.spec(task)
    with make_env(task) as simulator:
        return EnvSpec(
            simulator.action_dim, simulator.time_limit, simulator.action_repeat, simulator.succeeds
        )


def settled(config: Config) -> Config:
    """`config` with its task's own time limit and action repeat where params.yaml leaves them to the task.

    Raises `UserError` where the presets do not fit them.
    """
    spec = describe(config.task)
    return refilled(config, time_limit=spec.time_limit, action_repeat=spec.action_repeat)
