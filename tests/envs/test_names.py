"""Names in params.yaml are checked without any simulator."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from prelar.config import Config, load_config
from prelar.envs.names import DMC, METAWORLD, among, check_names, suite_of
from prelar.utils.errors import UserError

ROOT = Path(__file__).parents[2]


def changed(**values: object) -> Config:
    """params.yaml with other values in group demos."""
    present = load_config(ROOT / "params.yaml")
    return present.model_copy(update={"demos": present.demos.model_copy(update=values)})


def test_names_belong_to_the_simulator_that_is_asked() -> None:
    check_names(changed())
    check_names(changed(tasks=["all"], cameras=["all"]))
    check_names(changed(source="rlbench", tasks=["all"], cameras=["wrist", "front"]))
    check_names(changed(source="apv_npz", path="/data", tasks=["any"], cameras=["any"]))
    with pytest.raises(UserError, match=r"camera = 'wrist': Meta-World has none of this name; did you mean"):
        check_names(changed(cameras=["wrist"]))
    with pytest.raises(UserError, match=r"camera = 'frnt': RLBench has none .* did you mean front"):
        check_names(changed(source="rlbench", cameras=["frnt"]))


def test_a_version_belongs_to_the_suite_that_has_it() -> None:
    assert suite_of("reach") is suite_of("reach-v3") is METAWORLD and suite_of("dmc/walker-walk") is DMC
    assert METAWORLD.spec("reach-v3") is METAWORLD.spec("reach")
    with pytest.raises(
        UserError, match=r"DeepMind Control has none of this name; did you mean dmc/walker-walk"
    ):
        suite_of("dmc/walker-walk-v3")


def test_recorded_names_are_chosen_from() -> None:
    recorded = ("lamp_on", "lamp_off", "push_button")
    assert among("demos.tasks", None, recorded) == recorded
    assert among("demos.tasks", ["push_button", "lamp_on"], recorded) == ("lamp_on", "push_button")
    told = r"demos\.tasks: nothing recorded of 'lamp_in'; there is lamp_on, lamp_off; or say \[all\]"
    with pytest.raises(UserError, match=told):
        among("demos.tasks", ["lamp_on", "lamp_in"], recorded)


def test_checking_imports_no_simulator() -> None:
    code = "import prelar.envs.names, sys; print({'mujoco', 'metaworld', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
