"""The suites' tasks in gymnasium's registry: `prelar/metaworld-drawer-open-v0`, `prelar/dmc-walker-walk-v0`.

Gymnasium finds them by the entry point of its plugins where prelar is installed; elsewhere importing this
module registers them, as `gymnasium.make("prelar.envs.registration:prelar/dmc-walker-walk-v0")` does.
"""

from __future__ import annotations

import gymnasium

from prelar.config import PLAIN, View
from prelar.envs import make_env
from prelar.envs.names import DMC, METAWORLD
from prelar.envs.pixels import PixelEnv

GROUPS = {"metaworld": METAWORLD, "dmc": DMC}


def make(
    task: str,
    *,
    render_mode: str = "rgb_array",
    seed: int = 0,
    time_limit: int | None = None,
    action_repeat: int | None = None,
    view: View = PLAIN,
) -> PixelEnv:
    """A task from pixels; arguments as of `prelar.envs.make_env`, seed as of `PixelEnv`."""
    simulator = make_env(task, time_limit=time_limit, action_repeat=action_repeat, view=view)
    return PixelEnv(simulator, seed=seed)


def register() -> None:
    """Register every task of every suite, once."""
    for group, suite in GROUPS.items():
        for name in suite.tasks:
            known = f"prelar/{group}-{name}-v0"
            if known not in gymnasium.registry:
                gymnasium.register(known, f"{__name__}:make", kwargs={"task": suite.prefix + name})


register()
