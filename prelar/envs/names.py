"""Names that params.yaml may use: tasks and cameras of simulators, which are not imported to know them."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from prelar.config import OWN, PARAMS, Config, Demos, load_config, refilled
from prelar.utils.errors import UserError, nearest, shown

VERSION = "-v3"
ALL = ["all"]
# fmt: off
TASKS = (
    "assembly", "basketball", "bin-picking", "box-close", "button-press", "button-press-topdown",
    "button-press-topdown-wall", "button-press-wall", "coffee-button", "coffee-pull", "coffee-push",
    "dial-turn", "disassemble", "door-close", "door-lock", "door-open", "door-unlock", "drawer-close",
    "drawer-open", "faucet-close", "faucet-open", "hammer", "hand-insert", "handle-press",
    "handle-press-side", "handle-pull", "handle-pull-side", "lever-pull", "peg-insert-side",
    "peg-unplug-side", "pick-out-of-hole", "pick-place", "pick-place-wall", "plate-slide",
    "plate-slide-back", "plate-slide-back-side", "plate-slide-side", "push", "push-back", "push-wall",
    "reach", "reach-wall", "shelf-place", "soccer", "stick-pull", "stick-push", "sweep", "sweep-into",
    "window-close", "window-open",
)
# fmt: on
CAMERAS = ("topview", "corner", "corner2", "corner3", "corner4", "behindGripper", "gripperPOV")
DEMONSTRATED, SEEN_FROM = ("drawer-open", "reach", "dial-turn"), ("corner",)
RLBENCH_CAMERAS = ("left_shoulder", "right_shoulder", "overhead", "wrist", "front")
OWN_ENVS = "prelar.envs"
"""The group of entry points that name environments of one's own."""


class EnvSpec(NamedTuple):
    """What the environment of a task is.

    action_dim: numbers of an action. time_limit: simulator steps of a whole episode. action_repeat: simulator
    steps that an action is applied for, unless params.yaml says otherwise. succeeds: whether it tells
    success.
    """

    action_dim: int
    time_limit: int
    action_repeat: int
    succeeds: bool


@dataclass(frozen=True, eq=False)
class Suite:
    """Tasks of one simulator: their names, without `prefix`, with what each one's environment is.

    suffix: what a name in params.yaml may end with.
    """

    title: str
    prefix: str
    tasks: Mapping[str, EnvSpec]
    suffix: str = ""

    def __contains__(self, task: str) -> bool:
        """Whether a task, named as in params.yaml, is of this suite."""
        return task.startswith(self.prefix) and self._name(task) in self.tasks

    def spec(self, task: str) -> EnvSpec:
        """What a task's environment is, the task named as in params.yaml."""
        return self.tasks[self._name(task)]

    def _name(self, task: str) -> str:
        return task.removeprefix(self.prefix).removesuffix(self.suffix)


def _dmc(actions: int, *tasks: str) -> dict[str, EnvSpec]:
    return {task: EnvSpec(actions, time_limit=1000, action_repeat=2, succeeds=False) for task in tasks}


METAWORLD_SPEC = EnvSpec(action_dim=4, time_limit=500, action_repeat=1, succeeds=True)
METAWORLD = Suite("Meta-World", "", dict.fromkeys(TASKS, METAWORLD_SPEC), suffix=VERSION)
DMC = Suite(
    "DeepMind Control",
    "dmc/",
    _dmc(1, "acrobot-swingup", "cartpole-balance", "cartpole-balance-sparse")
    | _dmc(1, "cartpole-swingup", "cartpole-swingup-sparse")
    | _dmc(6, "cheetah-run")
    | _dmc(2, "cup-catch", "finger-spin", "finger-turn-easy", "finger-turn-hard")
    | _dmc(4, "hopper-hop", "hopper-stand")
    | _dmc(1, "pendulum-swingup")
    | _dmc(12, "quadruped-run", "quadruped-walk")
    | _dmc(2, "reacher-easy", "reacher-hard")
    | _dmc(6, "walker-run", "walker-stand", "walker-walk"),
)
SUITES = (METAWORLD, DMC)


def checked_config(path: Path = PARAMS) -> Config:
    """Read params.yaml and check it, names too, as every entry point does first. Raises `UserError`."""
    config = load_config(path)
    check_names(config)
    return config


def check_names(config: Config) -> None:
    """Check the values that name things of a simulator. Raises `UserError` with the nearest known name."""
    suite = suite_of(config.task)
    if suite:
        spec = suite.spec(config.task)
        refilled(config, time_limit=spec.time_limit, action_repeat=spec.action_repeat)
    for name in ("demos", *config.sources):
        if isinstance(settings := config.source(name), Demos):
            _check_demos(settings)


def _check_demos(settings: Demos) -> None:
    tasks, cameras = (chosen(given) or () for given in (settings.tasks, settings.cameras))
    if settings.source == "metaworld":
        for task in tasks:
            check_task(task)
        for camera in cameras:
            check_camera(camera)
    if settings.source == "rlbench":
        for camera in cameras:
            check_name("camera", camera, RLBENCH_CAMERAS, "RLBench")


def chosen(given: Sequence[str] | None) -> tuple[str, ...] | None:
    """The names that a key of params.yaml gives; None where it wants all, or leaves it to the source."""
    return None if given is None or list(given) == ALL else tuple(given)


def among(key: str, given: Sequence[str] | None, recorded: Iterable[str]) -> tuple[str, ...]:
    """The recorded names that a key gives, all for None. Raises `UserError` where one is not there."""
    names = tuple(recorded)
    if lacking := [name for name in given or () if name not in names]:
        close = nearest(lacking[0], names) or sorted(names)[:5]
        raise UserError(
            f"{key}: nothing recorded of {lacking[0]!r}; there is {', '.join(close)}; or say [all]"
        )
    return tuple(name for name in names if given is None or name in given)


def suite_of(task: str) -> Suite | None:
    """The suite of a task of params.yaml; None where it is an environment of the user's own.

    Raises `UserError` with the nearest names where the task, or what stands before its slash, is unknown.
    """
    for suite in SUITES:
        if task in suite:
            return suite
    own = importlib.metadata.entry_points(group=OWN_ENVS).names
    if OWN.fullmatch(task) or task in own:
        return None
    known = [suite.prefix + name for suite in SUITES for name in suite.tasks] + sorted(own)
    group, slash, _ = task.partition("/")
    if slash and f"{group}/" != DMC.prefix:
        raise UserError(
            f"task = {shown(task)}: no suite {shown(group)}; there is {DMC.prefix}walker-walk, "
            f"{METAWORLD.title}'s reach without a suite, and module:Class for an environment of your own"
        )
    close = nearest(task, known) or known[:5]
    owner = DMC.title if slash else METAWORLD.title
    raise UserError(f"task = {task!r}: {owner} has none of this name; did you mean {', '.join(close)}?")


def check_task(task: str) -> str:
    """A Meta-World task's name without version suffix. Raises `UserError` with near names if unknown."""
    return check_name("task", task.removesuffix(VERSION), TASKS)


def check_camera(camera: str) -> str:
    """The camera's name. Raises `UserError` with the nearest names if unknown."""
    return check_name("camera", camera, CAMERAS)


def check_name(kind: str, name: str, names: Sequence[str], owner: str = "Meta-World") -> str:
    """The name, if it is among the owner's. Raises `UserError` with the nearest names if not."""
    if name in names:
        return name
    close = nearest(name, names) or names[:5]
    raise UserError(f"{kind} = {name!r}: {owner} has none of this name; did you mean {', '.join(close)}?")
