"""Live demonstrations of RLBench tasks, planned and recorded in CoppeliaSim.

RLBench, PyRep and CoppeliaSim are the user's to install: `make rlbench-setup` says what is missing, and so
does every run before it starts. None of them is imported here: the simulators of `prelar.demos.rlbench_pool`
run in processes of their own. `python -m prelar.demos.rlbench_live` says whether live demos are possible.

Path planning in CoppeliaSim has random numbers that nobody can seed, so that two runs give different
demos.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prelar.demos import rlbench_worker
from prelar.demos.episodes import RESIZE, Episode, Job
from prelar.demos.rlbench_folder import ALIGNMENT, RlbenchDemonstrations
from prelar.demos.rlbench_pool import ROOT, SimulatorPool, count_variations, given_display, simulator_env
from prelar.envs.names import RLBENCH_CAMERAS, check_name
from prelar.utils.errors import UserError, run_main
from prelar.utils.frames import SIZE

LIBRARY = "libcoppeliaSim.so.1"
PLUGINS = {"libsimExtOMPL.so": ("",), "libqxcb.so": ("", "platforms")}  # and the folders where they may lie
SCRIPT = "simAddOnScript_PyRep.lua"
SETUP = "run `make rlbench-setup`"


@dataclasses.dataclass(frozen=True)
class RlbenchLive(RlbenchDemonstrations):
    """Demos of `tasks`, named by their files; none: all tasks that RLBench has.

    variations: how many of each task, from the first on, or as many as it has; None: all that it has.
    episodes: of each variation. size: pixels of a drawn picture's side, brought to 64. renderer: "opengl",
    or "opengl3" with shadows, which is several times slower. action_mode: what counts as an action, as
    `prelar.demos.rlbench_folder` says. timeout: seconds after which an attempt hangs.
    """

    tasks: tuple[str, ...]
    variations: int | None
    episodes: int
    cameras: tuple[str, ...] = RLBENCH_CAMERAS
    size: int = 2 * SIZE
    renderer: str = "opengl"
    action_mode: str = "joint_velocity"
    seed: int = 0
    timeout: float = dataclasses.field(default=600.0, repr=False)
    code = (rlbench_worker.__name__,)

    def __post_init__(self) -> None:
        for key, names in (("tasks", self.tasks), ("cameras", self.cameras)):
            if len(set(names)) < len(names):
                raise UserError(f"demos.{key} = {list(names)}: name each one once")
        for camera in self.cameras:
            check_name("demos.cameras", camera, RLBENCH_CAMERAS, "RLBench")

    def jobs(self) -> list[Job]:
        """Every demo of every variation, task after task. Raises `UserError` where RLBench cannot be used.

        RLBench is asked how many variations the tasks have if more than one may be wanted.
        """
        check()
        known = task_names()
        tasks = [check_name("demos.tasks", task, known, "RLBench") for task in self.tasks] or known
        counts = dict.fromkeys(tasks, 1) if self.variations == 1 else count_variations(tasks)
        if self.variations is not None:
            counts = {task: min(count, self.variations) for task, count in counts.items()}
        return [
            Job(task, variation, episode)
            for task in tasks
            for variation in range(counts[task])
            for episode in range(self.episodes)
        ]

    def pool(self, jobs: Sequence[Job], workers: int, folder: Path) -> SimulatorPool:
        """Simulators that collect all jobs; finished demos wait in `folder`."""
        shown = {"cameras": list(self.cameras), "size": self.size, "renderer": self.renderer}
        settings = {**shown, "action_mode": self.action_mode}
        return SimulatorPool(jobs, workers, folder, settings=settings, seed=self.seed, timeout=self.timeout)

    def collect(self, job: Job) -> Episode:
        """Collect one episode with a simulator for it alone, in a temporary folder."""
        with tempfile.TemporaryDirectory() as folder, self.pool([job], 1, Path(folder)) as pool:
            return pool.result(job)

    def files(self, job: Job) -> list[Path]:
        """None."""
        return []

    def attributes(self) -> dict[str, Any]:
        """The source and how it was asked."""
        asked = ("renderer", "size", "action_mode", "seed")
        source = {"name": "rlbench", **{name: getattr(self, name) for name in asked}}
        resize = f"drawn at {self.size}x{self.size}, {RESIZE}"
        return {"source": source, "resize": resize, "alignment": ALIGNMENT}


# --- What must be there -------------------------------------------------------------------------------------


def package_folder(name: str) -> Path | None:
    """Where an installed package lies, found without importing it."""
    found = importlib.util.find_spec(name)
    places = list(found.submodule_search_locations or []) if found else []
    return Path(places[0]) if places else None


def task_names() -> list[str]:
    """File names of the tasks that the installed RLBench has."""
    folder = package_folder("rlbench")
    return (
        sorted(path.stem for path in (folder / "tasks").glob("*.py") if path.stem != "__init__")
        if folder
        else []
    )


def check() -> None:
    """Raise `UserError` with all that is missing for live demos, in one line."""
    missing = [*_missing_packages(), *_missing_simulator(), *_missing_display()]
    if missing:
        raise UserError(f"demos.source = rlbench: {'; '.join(missing)}")


def _missing_packages() -> list[str]:
    absent = [name for name in ("rlbench", "pyrep") if package_folder(name) is None]
    if absent:
        return [f"the package{'s' * (len(absent) > 1)} {' and '.join(absent)} not installed, {SETUP}"]
    if not (Path(str(package_folder("pyrep"))) / "backend").is_dir():
        return [f"the installed pyrep is an unrelated package of that name, {SETUP}"]
    return []


def _missing_simulator() -> list[str]:
    root = os.environ.get(ROOT)
    if not root:
        return [f"{ROOT} not set, install CoppeliaSim 4.1.0 and set it to that folder"]
    if not Path(root).is_dir():
        return [f"{ROOT} = {root} is no folder, set it to the one of CoppeliaSim 4.1.0"]
    library = Path(root) / LIBRARY
    if not library.exists():
        plain = library.with_suffix("")
        remedy = (
            f"run `ln -s {plain.name} {library}`"
            if plain.exists()
            else "set it to CoppeliaSim 4.1.0's folder"
        )
        return [f"{ROOT} = {root} lacks {LIBRARY}, {remedy}"]
    if not (Path(root) / SCRIPT).exists():
        return [f"{ROOT} = {root} lacks PyRep's {SCRIPT}, {SETUP}"]
    plugins = {
        name: [path for place in places if (path := Path(root, place, name)).exists()]
        for name, places in PLUGINS.items()
    }
    if lacking := [name for name, paths in plugins.items() if not paths]:
        return [f"{ROOT} = {root} lacks {' and '.join(lacking)}, unpack CoppeliaSim 4.1.0 there anew"]
    absent = sorted(set().union(*map(_missing_libraries, [library, *itertools.chain(*plugins.values())])))
    return [f"CoppeliaSim lacks the libraries {', '.join(absent)}, install them"] if absent else []


def _missing_libraries(library: Path) -> set[str]:
    """Shared libraries that a library needs and the loader does not find."""
    if shutil.which("ldd") is None:
        return set()
    try:
        output = subprocess.run(
            ["ldd", str(library)],
            env=simulator_env(None),
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        ).stdout
    except subprocess.TimeoutExpired:
        return set()
    return set(re.findall(r"^\s*(\S+) => not found", output, flags=re.MULTILINE))


def _missing_display() -> list[str]:
    if given_display() or shutil.which("Xvfb"):
        return []
    shown = os.environ.get("DISPLAY")
    state = f"DISPLAY = {shown} does not answer" if shown else "no DISPLAY"
    return [f"{state} and no Xvfb, run `apt-get install xvfb`"]


def main() -> None:
    """Entry point of `python -m prelar.demos.rlbench_live`."""
    parser = argparse.ArgumentParser(
        prog="python -m prelar.demos.rlbench_live",
        description="Check whether live RLBench demos are possible.",
    )
    parser.parse_args()
    check()
    display = given_display()
    print(f"RLBench: {len(task_names())} tasks, {f'display {display}' if display else 'Xvfb'}")


if __name__ == "__main__":
    run_main(main)
