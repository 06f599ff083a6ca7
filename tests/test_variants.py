"""The table of variants in docs/methods.md: every command is valid, builds its models, and is a variant."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from prelar import finetune, pretrain
from prelar.config import Config, keys, read_yaml
from prelar.methods import find_method
from prelar.train.checkpoint import save_parts
from tests.conftest import ROOT, TINY, merge

PAGE = ROOT / "docs/methods.md"
HEADER = "| variant |"
REQUIRED = {
    "DreamerV2",
    "APV",
    "ContextWM",
    "PreLAR",
    "PreLAR without consistency",
    "PreLAR without consistency and action KL",
    "naive APV",
    "naive PreLAR",
    "APV without bonus",
    "ContextWM without bonus",
    "PreLAR without bonus",
    "APV without dual reward",
    "ContextWM without dual reward",
    "PreLAR without dual reward",
    "context frame first",
    "context frame last",
    "context augmentation",
    "sign consistency",
    "discrete latent action",
    "longer window",
}


def table() -> dict[str, dict[str, str]]:
    """The command of each variant on each data set, as the page has them."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(HEADER))
    rows: dict[str, dict[str, str]] = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        name, _, ssv2, demos = (cell.strip() for cell in line.strip("|").split("|"))
        assert name not in rows
        rows[name] = {"ssv2": ssv2.strip("`"), "demos": demos.strip("`")}
    return rows


COMMANDS = {(name, dataset): command for name, row in table().items() for dataset, command in row.items()}


def settings(command: str) -> dict[str, Any]:
    """The params that a `dvc exp run` sets, their values read as YAML."""
    words = shlex.split(command)
    assert words[:3] == ["dvc", "exp", "run"] and set(words[3::2]) == {"-S"}
    yaml = YAML(typ="safe", pure=True)
    pairs = [word.partition("=") for word in words[4::2]]
    assert len(words[3:]) == 2 * len({key for key, _, _ in pairs})
    return {key: yaml.load(value) for key, _, value in pairs}


def configure(command: str) -> Config:
    """params.yaml at the size of the tests, with what the command sets."""
    params = read_yaml(ROOT / "params.yaml")
    merge(params, TINY)
    merge(params, {"action_dim": 8, "threads": 1, "device": "cpu"})
    changes = settings(command)
    assert changes.keys() <= set(keys())
    return Config.model_validate(params | changes)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_table_has_the_variants_of_the_papers() -> None:
    assert table().keys() >= REQUIRED


def test_no_two_commands_ask_for_the_same() -> None:
    found = [configure(command).model_dump_json() for command in COMMANDS.values()]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(("name", "dataset"), COMMANDS)
def test_a_command_builds_both_models(name: str, dataset: str) -> None:
    cfg = configure(COMMANDS[name, dataset])
    assert cfg.dataset == dataset
    before = pretrain.build(cfg)
    save_parts(finetune.PRETRAINED, before.state(), {"stage": "pretrain", "model": before.spec, "step": 0})
    after = finetune.load_model(cfg)
    row = find_method(cfg.method, cfg.naive)
    bonus = cfg.finetune.bonus if cfg.bonus is None else cfg.bonus
    assert bool(after.bonus_dim) == (bonus > 0 and row.bonus_source is not None)
    assert ("dual_reward" in after.heads) == (cfg.dual_reward and row.dual)
    if cfg.method == "prelar":
        for loss, key in (("consistency", "beta_c"), ("action_kl", "beta_a")):
            given = getattr(cfg, key)
            assert before.weights[loss] == (getattr(cfg.pretrain, key) if given is None else given)
        assert type(before.action.kind).__name__.lower() == cfg.action_kind
        assert before.action.trunk.stem.in_channels == 3 * cfg.action_window
    if cfg.method == "contextwm":
        assert (before.encoder.frame, before.encoder.augment) == (cfg.context_frame, "none")
        assert (after.encoder.frame, after.encoder.augment) == (cfg.context_frame, cfg.context_augment)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("PreLAR without consistency", {"beta_c": 0.0, "beta_a": None, "action_kind": "gaussian"}),
        (
            "PreLAR without consistency and action KL",
            {"beta_c": 0.0, "beta_a": 0.0, "action_kind": "deterministic"},
        ),
        ("naive APV", {"method": "apv", "naive": True}),
        ("naive PreLAR", {"method": "prelar", "naive": True}),
        ("PreLAR without bonus", {"method": "prelar", "bonus": 0.0}),
        ("APV without dual reward", {"method": "apv", "dual_reward": False}),
        ("context frame first", {"method": "contextwm", "context_frame": "first"}),
        ("context frame last", {"method": "contextwm", "context_frame": "last"}),
        ("context augmentation", {"method": "contextwm", "context_augment": "erase"}),
        ("sign consistency", {"method": "prelar", "consistency": "sign"}),
        ("discrete latent action", {"method": "prelar", "action_kind": "discrete"}),
    ],
)
def test_a_command_sets_what_its_name_says(name: str, expected: dict[str, Any]) -> None:
    for dataset in ("ssv2", "demos"):
        cfg = configure(COMMANDS[name, dataset])
        assert {key: getattr(cfg, key) for key in expected} == expected
