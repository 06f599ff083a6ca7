"""The table of sources of demonstrations: what each is called, wants and gives, and what opens it.

A source of one's own is named by an entry point of the group `prelar.sources`, or as `module:Class`:
something that is called with the group `demos` of params.yaml (`prelar.config.Demos`) and returns a `Source`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from collections.abc import Callable

from prelar.config import OWN_SOURCES, Demos
from prelar.demos import apv_npz, lerobot, rlbench_folder
from prelar.demos.episodes import Source
from prelar.demos.metaworld import Metaworld
from prelar.demos.rlbench_live import RlbenchLive
from prelar.envs import gl
from prelar.envs.names import CAMERAS, DEMONSTRATED, RLBENCH_CAMERAS, SEEN_FROM, TASKS, chosen
from prelar.utils import hub
from prelar.utils.own import load_own


@dataclasses.dataclass(frozen=True)
class Kind:
    """A row of the table: what a source wants and gives, in words, and what opens it.

    `open` raises `UserError` where the source cannot be used.
    """

    wants: str
    gives: str
    open: Callable[[Demos], Source]


def _metaworld(settings: Demos) -> Source:
    gl.ensure()
    return Metaworld(
        tasks=chosen(settings.tasks) or (TASKS if settings.tasks else DEMONSTRATED),
        episodes=settings.episodes,
        cameras=chosen(settings.cameras) or (CAMERAS if settings.cameras else SEEN_FROM),
        noise=settings.noise,
        keep_failures=settings.keep_failures,
        seed=settings.seed,
        view=settings.view,
    )


def _rlbench(settings: Demos) -> Source:
    return RlbenchLive(
        tasks=chosen(settings.tasks) or (),
        variations=settings.variations,
        episodes=settings.episodes,
        cameras=chosen(settings.cameras) or RLBENCH_CAMERAS,
        size=settings.image_size,
        renderer=settings.renderer,
        action_mode=settings.action_mode,
        seed=settings.seed,
        timeout=settings.timeout,
    )


def _in_folder(open_folder: Callable[..., Source], settings: Demos, **more: str) -> Source:
    """A source of recorded episodes, of the folder, the tasks and the cameras that the settings name."""
    folder = hub.data_set(str(settings.path))
    return open_folder(folder, tasks=chosen(settings.tasks), cameras=chosen(settings.cameras), **more)


def _rlbench_folder(settings: Demos) -> Source:
    return _in_folder(rlbench_folder.open_folder, settings, action_mode=settings.action_mode)


def _hdf5(settings: Demos) -> Source:
    from prelar.demos import hdf5  # h5py is for those who read such files

    return _in_folder(hdf5.open_folder, settings)


KINDS = {
    "metaworld": Kind("nothing: scripted experts act in MuJoCo", "actions, gripper, success", _metaworld),
    "rlbench": Kind("CoppeliaSim and `make rlbench-setup`", "actions, gripper", _rlbench),
    "apv_npz": Kind(
        "a folder of APV's .npz episodes",
        "actions, gripper, where the files hold them",
        functools.partial(_in_folder, apv_npz.open_folder),
    ),
    "rlbench_folder": Kind("a folder of RLBench's generator", "actions, gripper", _rlbench_folder),
    "lerobot": Kind(
        "the folder of a LeRobotDataset, v2.0 to v3.0",
        "actions, state, where the set has them",
        functools.partial(_in_folder, lerobot.open_folder),
    ),
    "hdf5": Kind("a folder of HDF5 files of robomimic's or LIBERO's layout", "actions", _hdf5),
}


VIDEOS = {
    "Something-Something V2": "the archive's parts and labels, in a folder or as URLs",
    "your own videos": "a folder of them",
    "LeRobotDataset": "its folder; its videos alone are read",
}
"""What `ssv2.source` may lead to; it is known by its content."""


def open_source(settings: Demos) -> Source:
    """The source that the group `demos` names. Raises `UserError` where it cannot be used."""
    kind = KINDS.get(settings.source)
    own = kind.open if kind else load_own("demos.source", settings.source, OWN_SOURCES)
    source: Source = own(settings)
    return source


def listing() -> str:
    """The table in words, the user's own entry points below."""
    lines = [
        f"demos.source: {name}\n  wants: {kind.wants}\n  gives: {kind.gives}" for name, kind in KINDS.items()
    ]
    for point in sorted(importlib.metadata.entry_points(group=OWN_SOURCES), key=lambda point: point.name):
        lines.append(f"demos.source: {point.name}\n  your own: {point.value}")
    for name, wants in VIDEOS.items():
        lines.append(f"ssv2.source: {name}\n  wants: {wants}\n  gives: frames without actions")
    return "\n".join(lines)
