"""The world model's verbs, for every method: losses with gradients, acting, imagination and prediction."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from prelar.methods import METHODS, build_model
from prelar.model.losses import squared_error
from prelar.model.spec import ModelSpec
from prelar.model.world_model import WorldModel
from prelar.utils.errors import UserError

SIZES = {"cnn_depth": 2, "hidden": 8, "deter": 8, "stoch": 4, "discrete": 4, "action_dim": 8}
STATE = {"logit": (4, 4), "stoch": (4, 4), "deter": (8,)}
TOLERANCE = {"eager": 1e-4, "aot_eager": 1e-4, "inductor": 0.05}
ROBOT = 3
BATCH, TIME = 2, 4


def pretrain(method: str, **changes: Any) -> WorldModel:
    torch.manual_seed(0)
    return build_model(ModelSpec(method=method, robot_action_dim=ROBOT, **(SIZES | changes)))


def finetune(method: str, **changes: Any) -> WorldModel:
    torch.manual_seed(0)
    heads = {"robot_action_dim": ROBOT, "units": 8, "layers": 1}
    return build_model(ModelSpec(stage="finetune", method=method, **(SIZES | heads | changes)))


@functools.cache
def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(BATCH, TIME, 3, 64, 64, generator=generator) - 0.5
    is_first = torch.zeros(BATCH, TIME)
    is_first[:, 0] = 1
    action = torch.rand(BATCH, TIME, ROBOT, generator=generator)
    reward = torch.rand(BATCH, TIME, generator=generator)
    return images, action, reward, is_first


def without_gradient(model: WorldModel) -> set[str]:
    """The names of the parameters that a backward pass left without any gradient."""
    return {name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0}


@pytest.mark.parametrize("method", METHODS)
def test_pretraining_reaches_every_parameter(method: str) -> None:
    model = pretrain(method)
    images, _, _, is_first = batch()
    losses, outputs = model.pretrain_losses(images, is_first)
    assert all(loss.shape == () and loss.isfinite() for loss in losses.values())
    model.total(losses).backward()
    assert without_gradient(model) == set()
    assert outputs["feature"].shape == (BATCH, TIME, model.feature_dim)
    assert outputs["embed"].shape == (BATCH, TIME, model.embed_dim)
    assert not any(value.requires_grad for value in outputs["metrics"].values())
    assert not any(value.requires_grad for value in outputs["post"].values())


def test_a_share_of_the_frames_is_decoded_each_as_often() -> None:
    model, (images, _, _, is_first) = pretrain("prelar", decoded=0.5), batch()
    seen: list[Tensor] = []
    model.decoder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    losses, outputs = model.pretrain_losses(images, is_first)
    model.total(losses).backward()
    assert without_gradient(model) == set()
    counts = torch.zeros(TIME)
    for _ in range(40):
        _, outputs = model.pretrain_losses(images, is_first)
        given = (seen[-1][:, :, None] == outputs["feature"][:, None]).all(-1).all(0)
        assert given.shape == (TIME // 2, TIME) and given.sum() == TIME // 2
        counts += given.sum(0)
    assert (counts / 40 - 0.5).abs().max() < 0.25


@pytest.mark.parametrize("kind", ["deterministic", "discrete"])
@pytest.mark.parametrize("window", [2, 3])
def test_pretraining_with_other_latent_actions(kind: str, window: int) -> None:
    model = pretrain("prelar", action_kind=kind, action_window=window)
    images, _, _, is_first = batch()
    losses, _ = model.pretrain_losses(images, is_first)
    model.total(losses).backward()
    assert without_gradient(model) == set()
    assert (losses["action_kl"] == 0) == (kind == "deterministic")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("naive", [False, True])
def test_finetuning_reaches_every_parameter(method: str, naive: bool) -> None:
    if naive and method == "dreamerv2":
        with pytest.raises(UserError, match="naive = true: dreamerv2"):
            finetune(method, naive=True)
        return
    model = finetune(method, naive=naive)
    images, action, reward, is_first = batch()
    bonus = (lambda feature: feature.mean(-1)[:, :-1]) if model.bonus_dim else None
    losses, outputs = model.finetune_losses(images, action, reward, is_first, bonus)
    model.total(losses).backward()
    assert ("bonus" in outputs) == (bonus is not None)
    silent = without_gradient(model)
    assert all(name.startswith("dynamics.lower.prior") for name in silent)
    assert bool(silent) == (model.weights.get("lower_kl") == 0.0)


def test_weights_of_another_set_of_losses_are_refused() -> None:
    model = pretrain("apv")
    with pytest.raises(AssertionError):
        model.total({"image": torch.tensor(1.0)})


def test_total_is_the_weighted_sum() -> None:
    model = pretrain("prelar", beta=2.0, beta_a=3.0, beta_c=0.5)
    losses = {"image": 1.0, "kl": 10.0, "action_kl": 100.0, "consistency": 1000.0}
    assert model.total({name: torch.tensor(value) for name, value in losses.items()}) == 1 + 20 + 300 + 500


@pytest.mark.parametrize(("method", "width"), [("prelar", 128), ("apv", 24), ("contextwm", 24)])
def test_bonus_sees_its_feature_and_moves_the_reward_target(method: str, width: int) -> None:
    model = finetune(method)
    images, action, reward, is_first = batch()
    seen: list[Tensor] = []

    def bonus(feature: Tensor) -> Tensor:
        seen.append(feature)
        return torch.full((*feature.shape[:1], TIME - 1), 5.0)

    torch.manual_seed(0)
    losses, outputs = model.finetune_losses(images, action, reward, is_first, bonus)
    assert seen[0].shape == (BATCH, TIME, width) == (BATCH, TIME, model.bonus_dim)
    assert not seen[0].requires_grad
    predicted = model.predict_reward(outputs["feature"][:, : TIME - 1])
    torch.testing.assert_close(losses["reward"], squared_error(predicted, reward[:, : TIME - 1] + 5))
    dual = model.predict_dual_reward(outputs["feature"])
    torch.testing.assert_close(losses["dual_reward"], squared_error(dual, reward))
    torch.testing.assert_close(outputs["metrics"]["reward_mean"], (reward[:, : TIME - 1] + 5).mean())


def test_prelar_looks_at_the_embedding_and_apv_at_the_action_free_feature() -> None:
    images, action, reward, is_first = batch()
    for method, name in (("prelar", "embed"), ("apv", "lower")):
        model = finetune(method)
        seen: list[Tensor] = []
        _, outputs = model.finetune_losses(
            images,
            action,
            reward,
            is_first,
            lambda feature, seen=seen: seen.append(feature) or feature[..., 0],
        )
        expected = outputs["embed"] if name == "embed" else model.dynamics.lower_feature(outputs["post"])
        assert torch.equal(seen[0], expected)


def test_a_bonus_of_zero_weight_and_naive_models_have_none() -> None:
    assert finetune("apv", bonus=0.0).bonus_dim == 0
    assert finetune("prelar", naive=True).bonus_dim == 0
    assert finetune("dreamerv2").bonus_dim == 0
    model = finetune("apv", bonus=0.0)
    images, action, reward, is_first = batch()
    with pytest.raises(AssertionError, match="no exploration bonus"):
        model.finetune_losses(images, action, reward, is_first, lambda feature: feature[..., 0])


def test_dual_reward_can_be_left_out() -> None:
    model = finetune("prelar", dual_reward=False)
    assert "dual_reward" not in model.weights
    with pytest.raises(KeyError):
        model.predict_dual_reward(torch.zeros(1, model.feature_dim))


@pytest.mark.parametrize("method", METHODS)
def test_acting_equals_filtering_whatever_the_mode(method: str) -> None:
    """Step by step with the same actions, in training mode, gives the states of the whole sequence."""
    model = finetune(method).train()
    images, action, _, is_first = batch()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    whole = model.observe(images, is_first, action, sample=False).post
    state = None
    for step in range(TIME):
        state = model.act_state(state, images[:, step], action[:, step], is_first[:, step], sample=False)
    assert state is not None
    assert not any(value.requires_grad for value in state.values())
    for key, value in state.items():
        torch.testing.assert_close(value, whole[key][:, -1])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_imagination_is_differentiable_in_the_action(method: str) -> None:
    model = finetune(method)
    images, action, _, is_first = batch()
    start = model.start(model.observe(images, is_first, action).post)
    assert start["deter"].shape == (BATCH * TIME, SIZES["deter"])
    assert not any(value.requires_grad for value in start.values())
    move = torch.zeros(BATCH * TIME, ROBOT, requires_grad=True)
    state = model.imagine_step(model.imagine_step(start, move), move)
    assert state.keys() == start.keys()
    model.predict_reward(model.feature(state)).sum().backward()
    assert move.grad is not None
    assert (move.grad.abs().sum(-1) > 0).all()


def test_pretrained_prelar_imagines_under_latent_actions_and_apv_under_none() -> None:
    images, _, _, is_first = batch()
    model = pretrain("prelar")
    start = model.start(model.observe(images, is_first).post)
    one, other = (model.imagine_step(start, torch.full((8, 8), v), sample=False)["deter"] for v in (0.0, 1.0))
    assert not torch.allclose(one, other)
    model = pretrain("apv")
    one, other = (model.imagine_step(start, torch.full((8, 8), v), sample=False)["deter"] for v in (0.0, 1.0))
    assert torch.equal(one, other)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("build", [pretrain, finetune])
def test_open_loop_observes_first_and_then_predicts_alone(method: str, build: Any) -> None:
    """The later frames change nothing of the prediction but what the latent actions tell."""
    model = build(method)
    images, action, _, is_first = batch()
    robot = action if build is finetune else None
    video = model.open_loop(images, is_first, 2, robot)
    assert video.shape == images.shape
    assert not video.requires_grad
    torch.testing.assert_close(
        video[:, :2],
        model.reconstruct(images[:, :2], is_first[:, :2], None if robot is None else robot[:, :2]),
    )
    changed = images.clone()
    changed[:, 2:] = 0.5
    infers = model.infer_actions(images, is_first) is not None
    assert torch.equal(model.open_loop(changed, is_first, 2, robot), video) != infers
    assert torch.equal(
        model.open_loop(images, is_first, TIME, robot), model.reconstruct(images, is_first, robot)
    )


def test_open_loop_follows_the_robots_actions() -> None:
    model = finetune("prelar")
    images, action, _, is_first = batch()
    other = action.clone()
    other[:, 3] += 1
    one, two = (model.open_loop(images, is_first, 2, a) for a in (action, other))
    assert torch.equal(one[:, :3], two[:, :3])
    assert not torch.equal(one[:, 3], two[:, 3])


def test_infer_actions_only_where_there_are_latent_ones() -> None:
    images, _, _, is_first = batch()
    inferred = pretrain("prelar").infer_actions(images, is_first)
    assert inferred is not None
    assert inferred.shape == (BATCH, TIME - 1, SIZES["action_dim"])
    for model in (pretrain("apv"), finetune("prelar"), pretrain("dreamerv2")):
        assert model.infer_actions(images, is_first) is None


def test_encode_gives_what_decode_takes() -> None:
    images, _, _, _ = batch()
    for method, maps in (("contextwm", 2), ("prelar", 0)):
        model = pretrain(method)
        embed, context = model.encode(images)
        assert embed.shape == (BATCH, TIME, model.embed_dim)
        assert len(context) == maps
        assert model.decode(torch.randn(BATCH, TIME, model.feature_dim), context).shape == images.shape


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_losses(method: str) -> None:
    model = pretrain(method).eval()
    images, _, _, is_first = batch()
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append(model.total(model.pretrain_losses(images, is_first)[0]).item())
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("method", METHODS)
def test_bf16_losses_are_float32_and_near_the_full_precision_ones(method: str) -> None:
    model = finetune(method)
    images, action, reward, is_first = batch()
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses, outputs = model.finetune_losses(images, action, reward, is_first)
            loss = model.total(losses)
        assert all(value.dtype == torch.float32 and value.isfinite() for value in losses.values())
        assert all(value.dtype == torch.float32 for value in outputs["post"].values())
        found.append(losses)
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(found[1]["image"], found[0]["image"], rtol=0.03, atol=0)
    torch.testing.assert_close(found[1]["kl"], found[0]["kl"], rtol=0.25, atol=0.05)


def test_bf16_pretraining_and_imagination() -> None:
    model = pretrain("prelar")
    images, _, _, is_first = batch()
    with torch.autocast("cpu", torch.bfloat16):
        losses, outputs = model.pretrain_losses(images, is_first)
        state = model.imagine_step(
            model.start(outputs["post"]), torch.zeros(BATCH * TIME, SIZES["action_dim"])
        )
    assert all(value.dtype == torch.float32 and value.isfinite() for value in losses.values())
    assert all(value.dtype == torch.float32 for value in state.values())


@pytest.mark.parametrize("method", METHODS)
def test_groups_split_all_parameters_once(method: str) -> None:
    model = finetune(method)
    groups = model.groups()
    numbers = [id(p) for group in groups.values() for p in group]
    assert len(numbers) == len(set(numbers)) == len(list(model.parameters()))
    frozen = {id(p) for p in groups["frozen"]}
    names = {name for name, p in model.named_parameters() if id(p) in frozen}
    prefixes = {"dreamerv2": (), "prelar": ("encoder.", "dynamics.")}.get(
        method, ("encoder.", "dynamics.lower.")
    )
    assert names == {name for name, _ in model.named_parameters() if prefixes and name.startswith(prefixes)}


@pytest.mark.parametrize("method", METHODS)
def test_state_goes_round_by_parts(method: str) -> None:
    model, other = finetune(method), finetune(method, dual_reward=True)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    other.load_state(model.state())
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())
    covered = {f"{part}.{name}" for part, state in model.state().items() for name in state}
    assert covered == set(model.state_dict())


def test_misfits_are_named() -> None:
    model = pretrain("apv")
    state = model.state()
    with pytest.raises(UserError, match="checkpoint part decoder: missing"):
        model.load_state({name: part for name, part in state.items() if name != "decoder"})
    with pytest.raises(UserError, match=r"part dynamics: does not fit .*input\.weight"):
        pretrain("prelar").load_state(state | {"action": {}})
    with pytest.raises(UserError, match=r"part dynamics: does not fit .*\(no lower\.input\.weight\)"):
        finetune("apv").load_state(state | {"heads": {}})


def test_spec_rebuilds_the_model() -> None:
    model = pretrain("prelar", action_kind="discrete", action_window=3)
    twin = build_model(model.spec)
    assert {k: v.shape for k, v in twin.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    model = finetune("contextwm", context_augment="erase")
    twin = build_model(model.spec)
    assert {k: v.shape for k, v in twin.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    assert twin.encoder.augment == "erase"


@pytest.mark.parametrize("method", METHODS)
def test_every_tensor_is_made_on_the_models_device(method: str) -> None:
    """On the meta device any tensor made elsewhere, or read on the host, raises."""
    images, action, reward, is_first = (tensor.to("meta") for tensor in batch())
    model = pretrain(method, action_window=3).to("meta")
    losses, outputs = model.pretrain_losses(images, is_first)
    assert model.total(losses).device.type == "meta"
    model = finetune(method, context_augment="erase").to("meta")
    losses, outputs = model.finetune_losses(images, action, reward, is_first)
    assert model.total(losses).device.type == "meta"
    state = model.imagine_step(model.start(outputs["post"]), action.flatten(0, 1))
    assert state["deter"].device.type == "meta"
    state = model.act_state(None, images[:, 0], action[:, 0], is_first[:, 0])
    assert state["deter"].device.type == "meta"
    assert model.open_loop(images, is_first, 2, action).shape == images.shape


def _pass(model: WorldModel) -> dict[str, Tensor]:
    """Losses and gradients of one pass, and batch statistics after it."""
    torch.manual_seed(2)
    images, _, _, is_first = batch()
    losses, _ = model.pretrain_losses(images, is_first)
    model.total(losses).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses | gradients | dict(model.named_buffers())


def _imagined(model: WorldModel) -> dict[str, Tensor]:
    """A state two steps ahead, and the gradient that it sends to the action, where the model heeds one."""
    torch.manual_seed(3)
    start = model.start({key: torch.zeros(1, BATCH, *value) for key, value in STATE.items()})
    action = torch.full((BATCH, SIZES["action_dim"]), 0.1, requires_grad=True)
    state = model.imagine_step(model.imagine_step(start, action), action)
    if state["deter"].requires_grad:
        model.feature(state).square().sum().backward()
    return state if action.grad is None else state | {"action": action.grad}


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("method", "backend"),
    [
        ("prelar", "eager"),
        pytest.param("prelar", "aot_eager", marks=pytest.mark.long),
        pytest.param("contextwm", "aot_eager", marks=pytest.mark.long),
        pytest.param("prelar", "inductor", marks=pytest.mark.long),
        pytest.param("contextwm", "inductor", marks=pytest.mark.long),
    ],
)
def test_compiled_training_finds_the_same(fresh_compiler: None, method: str, backend: str) -> None:
    torch.manual_seed(1)
    plain, compiled = pretrain(method), pretrain(method)
    compiled.load_state_dict(plain.state_dict())
    compiled.compile_training(backend=backend, dynamic=False)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    for measure in (_pass, _imagined):
        expected, found = measure(plain), measure(compiled)
        assert found.keys() == expected.keys()
        for name in expected:
            error = (found[name] - expected[name]).abs().max()
            assert error <= TOLERANCE[backend] * expected[name].abs().max().clamp_min(0.01), name


@pytest.mark.parametrize(
    "method", ["prelar", *(pytest.param(name, marks=pytest.mark.long) for name in ("apv", "contextwm"))]
)
def test_each_compiled_part_is_one_graph_that_later_steps_use_again(
    fresh_compiler: None, method: str
) -> None:
    """No part falls back to Python in its middle, and no step after the first two compiles anything."""
    model = pretrain(method)
    model.compile_training(backend="eager", dynamic=False)
    compiled = []
    for _ in range(4):
        _pass(model)
        _imagined(model)
        compiled.append(counters["stats"]["unique_graphs"])
    assert not counters["graph_break"]
    assert compiled[0] > 0 and compiled[1:] == [compiled[1]] * 3
