"""Names that params.yaml may use: tasks and cameras of simulators, which are not imported to know them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from prelar.config import PARAMS, Config, Demos, load_config
from prelar.utils.errors import UserError, nearest

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


def checked_config(path: Path = PARAMS) -> Config:
    """Read params.yaml and check it, names too, as every entry point does first. Raises `UserError`."""
    config = load_config(path)
    check_names(config)
    return config


def check_names(config: Config) -> None:
    """Check the values that name things of a simulator. Raises `UserError` with the nearest known name."""
    check_task(config.task)
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


def check_task(task: str) -> str:
    """The task's name without version suffix. Raises `UserError` with the nearest names if unknown."""
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
