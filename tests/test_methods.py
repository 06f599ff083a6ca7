"""The table of methods: parameter counts at the paper's sizes, and what fine-tuning loads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from prelar.methods import METHODS, NAIVE, build_model, find_method, load_pretrained, loads
from prelar.model.layers import MLP
from prelar.model.spec import ModelSpec
from prelar.model.world_model import WorldModel
from prelar.utils.errors import UserError

PAPER = {"cnn_depth": 48, "hidden": 1024, "deter": 1024, "stoch": 32, "discrete": 32}
TINY = {"cnn_depth": 2, "hidden": 8, "deter": 8, "stoch": 4, "discrete": 4, "action_dim": 8}


def count(module: nn.Module) -> int:
    """Parameters, without position embeddings, which the published tables leave out."""
    return sum(p.numel() for name, p in module.named_parameters() if "position" not in name)


def paper_pretrain(method: str) -> WorldModel:
    with torch.device("meta"):
        return build_model(ModelSpec(method=method, **PAPER))


def paper_finetune(method: str, **changes: Any) -> WorldModel:
    with torch.device("meta"):
        return build_model(
            ModelSpec(
                stage="finetune", method=method, robot_action_dim=4, units=400, layers=4, **PAPER, **changes
            )
        )


@pytest.mark.parametrize(
    ("method", "part", "expected"),
    [
        ("dreamerv2", "encoder", 1_551_312),
        ("dreamerv2", "decoder", 11_152_275),
        ("dreamerv2", "dynamics", 13_125_632),
        ("apv", "encoder", 1_562_112),
        ("apv", "decoder", 7_519_227),
        ("apv", "dynamics", 14_745_600),
        ("apv", "", 23_826_939),
        ("contextwm", "encoder", 3_124_224),
        ("contextwm", "decoder", 7_705_275),
        ("contextwm", "dynamics", 14_745_600),
        ("contextwm", "", 25_575_099),
        ("prelar", "encoder", 1_562_112),
        ("prelar", "decoder", 7_519_227),
        ("prelar", "dynamics", 14_759_936),
        ("prelar", "action", 4_841_360),
        ("prelar", "", 28_682_635),
    ],
)
def test_pretraining_parameters(method: str, part: str, expected: int) -> None:
    assert count(paper_pretrain(method).get_submodule(part)) == expected


@pytest.mark.parametrize(
    ("method", "part", "expected"),
    [
        ("dreamerv2", "dynamics", 13_125_632),
        ("dreamerv2", "heads.reward", 1_301_201),
        ("apv", "dynamics.lower", 14_745_600),
        ("apv", "dynamics.upper", 13_697_024),
        ("apv", "heads.reward", 1_301_201),
        ("apv", "heads.dual_reward", 1_301_201),
        ("contextwm", "dynamics.lower", 14_745_600),
        ("contextwm", "dynamics.upper", 13_697_024),
        ("prelar", "dynamics", 14_759_936),
        ("prelar", "action", 70_720),
    ],
)
def test_finetuning_parameters(method: str, part: str, expected: int) -> None:
    assert count(paper_finetune(method).get_submodule(part)) == expected


def test_actor_and_critic_parameters() -> None:
    with torch.device("meta"):
        assert count(MLP(2048, 1, units=400, layers=4)) == 1_301_201
        assert count(MLP(2048, 2 * 4, units=400, layers=4)) == 1_304_008


def test_naive_variants_have_one_rssm_and_no_bonus() -> None:
    apv = paper_finetune("apv", naive=True)
    assert count(apv.dynamics) == 14_745_600
    assert apv.weights == {"image": 1.0, "kl": 1.0, "reward": 1.0}
    prelar = paper_finetune("prelar", naive=True)
    assert set(prelar.weights) == {"image", "kl", "reward"}
    assert prelar.bonus_dim == apv.bonus_dim == 0
    assert count(prelar.action) == 70_720


def test_weights_are_the_published_ones() -> None:
    assert paper_pretrain("apv").weights == {"image": 1.0, "kl": 1.0}
    assert paper_pretrain("prelar").weights == {"image": 1.0, "kl": 1.0, "action_kl": 1.0, "consistency": 1.0}
    stacked = {"image": 1.0, "kl": 1.0, "reward": 1.0, "lower_kl": 0.0, "dual_reward": 1.0}
    assert paper_finetune("contextwm").weights == stacked


def test_bonus_features() -> None:
    widths = {method: paper_finetune(method).bonus_dim for method in METHODS}
    assert widths == {"dreamerv2": 0, "apv": 2048, "contextwm": 2048, "prelar": 3072}


def test_unknown_methods_are_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="method = dreamerv3: no such method; choose one of dreamerv2, apv"):
        find_method("dreamerv3")
    with pytest.raises(UserError, match="naive"):
        find_method("dreamerv2", naive=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("naive", [False, True])
def test_finetuning_loads_what_the_table_says(method: str, naive: bool) -> None:
    if naive and method not in NAIVE:
        with pytest.raises(UserError):
            loads(method, naive)
        return
    torch.manual_seed(0)
    source = build_model(ModelSpec(method=method, **TINY))
    model = build_model(
        ModelSpec(stage="finetune", method=method, naive=naive, robot_action_dim=4, units=8, layers=1, **TINY)
    )
    before = {key: value.clone() for key, value in model.state_dict().items()}
    parts = {name: state for name, state in source.state().items() if name in loads(method, naive)}
    assert set(parts) == (set() if method == "dreamerv2" else {"encoder", "decoder", "dynamics"})
    load_pretrained(model, parts)
    after = model.state_dict()
    stacked = method in ("apv", "contextwm") and not naive
    place = {
        "encoder": "encoder",
        "decoder": "decoder",
        "dynamics": "dynamics.lower" if stacked else "dynamics",
    }
    loaded = {
        f"{place[part]}.{name}": value for part, state in parts.items() for name, value in state.items()
    }
    for name, value in after.items():
        assert torch.equal(value, loaded.get(name, before[name])), name


def test_a_checkpoint_of_another_size_or_method_is_refused() -> None:
    source = build_model(ModelSpec(method="apv", **TINY)).state()
    model = build_model(
        ModelSpec(
            stage="finetune", method="apv", robot_action_dim=4, units=8, layers=1, **(TINY | {"hidden": 6})
        )
    )
    with pytest.raises(UserError, match=r"checkpoint part decoder|checkpoint part dynamics: does not fit"):
        load_pretrained(model, source)
    model = build_model(
        ModelSpec(stage="finetune", method="contextwm", robot_action_dim=4, units=8, layers=1, **TINY)
    )
    with pytest.raises(UserError, match="checkpoint part encoder: does not fit"):
        load_pretrained(model, source)
    with pytest.raises(UserError, match="checkpoint part encoder: missing"):
        load_pretrained(model, {})


def test_robot_with_too_many_joints_for_the_slot() -> None:
    with pytest.raises(UserError, match="robot_action_dim = 51"):
        build_model(ModelSpec(stage="finetune", method="apv", robot_action_dim=51, units=8, layers=1, **TINY))
