"""The commands of docs/rlbench.md give the keys of demos values that they take, together."""

from __future__ import annotations

import itertools

import pytest
from ruamel.yaml import YAML

from prelar.config import Config, read_yaml
from prelar.envs.names import check_names
from tests.conftest import ROOT, merge
from tests.docs import Command, commands

COMMANDS = [each for each in commands() if each.page == "docs/rlbench.md" and each.words[0] == "dvc"]


def configured(command: Command) -> Config:
    """The params under which a command runs."""
    params = read_yaml(ROOT / "params.yaml")
    for flag, setting in itertools.pairwise(command.words):
        if flag == "-S":
            key, _, value = setting.partition("=")
            group, _, leaf = key.rpartition(".")
            given = YAML(typ="safe", pure=True).load(value)
            merge(params, {group: {leaf: given}} if group else {leaf: given})
    return Config.model_validate(params)


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_commands_are_valid(command: Command) -> None:
    config = configured(command)
    check_names(config)
    assert config.dataset == "demos"


def test_every_source_has_a_command() -> None:
    sources = {configured(command).demos.source for command in COMMANDS}
    assert sources == {"metaworld", "rlbench", "apv_npz", "rlbench_folder"}


def test_data_of_apv_are_ten_demos_of_every_task_from_five_cameras() -> None:
    apv = next(configured(each) for each in COMMANDS if "method=apv" in each.words).demos
    assert (apv.tasks, apv.episodes, apv.variations, len(apv.cameras)) == (["all"], 10, 1, 5)
