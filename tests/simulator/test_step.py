"""One step of imagination: what training's own code gives under the same noise, in torch and as ONNX."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from prelar.model.images import denormalise
from prelar.model.losses import straight_through
from prelar.simulator.step import Look, export, export_look, gumbel_noise, load_step
from prelar.simulator.world import World, read_world
from prelar.utils.errors import UserError
from tests.simulator.small import KINDS, make_checkpoint, make_world


@pytest.mark.parametrize(("method", "stage"), KINDS)
def test_a_step_is_the_model_s_own(tmp_path: Path, method: str, stage: str) -> None:
    make_checkpoint(tmp_path / "it", method, stage)
    step = load_step(tmp_path / "it")
    world = make_world(step)
    stoch, deter = world.start(1, 2, 4)
    action, noise = torch.rand(1, step.action_dim), torch.from_numpy(gumbel_noise(1, 1, (1, 4, 4)))
    with torch.no_grad():
        found = step(stoch, deter, action, noise, *world.context(1))
        before = {"logit": noise, "stoch": stoch, "deter": deter}
        prior = step.model.imagine_step(before, action, sample=False)
        drawn = straight_through(prior["logit"], noise)
        feature = step.model.feature({"stoch": drawn, "deter": prior["deter"]})
        picture = step.model.decode(feature[:, None], world.context(1))[:, 0]
    assert torch.equal(found[0], drawn) and torch.equal(found[1], prior["deter"])
    assert torch.equal(found[2], denormalise(picture))
    assert len(found) == (6 if stage == "finetune" else 3)
    if stage == "finetune":
        assert found[5].shape == (1, 4) and found[5].abs().max() <= 1


def test_the_state_of_a_start_is_what_filtering_the_frames_gives(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "it", "prelar", "pretrain")
    step = load_step(tmp_path / "it")
    world = make_world(step)
    images = torch.from_numpy(world.arrays["frames"]).movedim(-1, -3).float() / 255 - 0.5
    first = torch.zeros(images.shape[:2])
    first[:, 0] = 1
    post = step.model.observe(images, first, sample=False).post
    for clip, frame in ((0, 0), (1, 5)):
        stoch, deter = world.start(clip, frame, 4)
        assert torch.equal(stoch[0], post["stoch"][clip, frame].round())
        assert torch.equal(deter[0], post["deter"][clip, frame])
    inferred = step.model.infer_actions(images, first)
    assert inferred is not None
    neighbours = world.arrays["pairs"][:, np.arange(5), np.arange(1, 6)]
    np.testing.assert_allclose(neighbours, inferred.detach().numpy(), atol=1e-5)


@pytest.mark.parametrize(("method", "stage"), KINDS)
def test_a_picture_is_taken_for_what_a_clip_that_begins_with_it_starts_from(
    tmp_path: Path, method: str, stage: str
) -> None:
    make_checkpoint(tmp_path / "it", method, stage)
    step = load_step(tmp_path / "it")
    world = make_world(step)
    with torch.no_grad():
        stoch, deter, *rest = Look(step)(torch.from_numpy(world.arrays["frames"][1:, 0]))
    expected = world.start(1, 0, 4)
    assert torch.equal(stoch, expected[0])
    torch.testing.assert_close(deter, expected[1])
    judged = [world.arrays[name][1, 0] for name in ("reward", "value", "policy") if stage == "finetune"]
    for found, wanted in zip(rest, judged, strict=False):
        np.testing.assert_allclose(found[0].numpy(), wanted, atol=1e-5)
    assert [value.shape for value in rest[len(judged) :]] == [value.shape for value in world.context(1)]


@pytest.mark.long
@pytest.mark.parametrize(("method", "stage"), KINDS)
def test_its_graph_computes_the_same(tmp_path: Path, method: str, stage: str) -> None:
    """In onnxruntime; test_page.py compares two of them where a browser runs them."""
    make_checkpoint(tmp_path / "it", method, stage)
    step = load_step(tmp_path / "it")
    world = make_world(step)
    graph = export(step, world.context(0))
    assert str(Path.cwd()).encode() not in graph and b"site-packages" not in graph
    session = onnxruntime.InferenceSession(graph)
    (stoch, deter), random = world.start(0, 1, 4), np.random.default_rng(2)
    for number in range(20):
        action = torch.from_numpy(random.uniform(-1, 1, (1, step.action_dim)).astype(np.float32))
        noise = torch.from_numpy(gumbel_noise(5, number, (1, 4, 4)))
        inputs = [stoch, deter, action, noise, *world.context(0)]
        names = ["stoch", "deter", "action", "noise", "context0", "context1"]
        feeds = {name: value.numpy() for name, value in zip(names, inputs, strict=False)}
        asked = {given.name for given in session.get_inputs()}
        found = session.run(None, {name: value for name, value in feeds.items() if name in asked})
        with torch.no_grad():
            expected = step(*inputs)
        assert np.array_equal(found[0], expected[0].numpy())
        np.testing.assert_allclose(found[1], expected[1].numpy(), atol=1e-5)
        assert np.abs(found[2].astype(int) - expected[2].numpy()).max() <= 1
        for one, other in zip(found[3:], expected[3:], strict=True):
            np.testing.assert_allclose(one, other.numpy(), atol=1e-4)
        stoch, deter = expected[0], expected[1]
    frames = torch.from_numpy(world.arrays["frames"][:1, 3])
    found = onnxruntime.InferenceSession(export_look(step, world.context(0))).run(
        None, {"frame": frames.numpy()}
    )
    with torch.no_grad():
        expected = Look(step)(frames)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other.numpy(), atol=1e-4)


@pytest.mark.long
def test_the_same_step_gives_the_same_bytes(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "it", "prelar", "finetune")
    graphs = [export(load_step(tmp_path / "it")) for _ in range(2)]
    assert graphs[0] == graphs[1]


def test_noise_is_gumbel_and_a_function_of_seed_and_step() -> None:
    noise = gumbel_noise(3, 4, (100_000,)).astype(np.float64)
    assert abs(noise.mean() - 0.5772) < 0.02 and abs(noise.var() - np.pi**2 / 6) < 0.04
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 0.02
    assert np.array_equal(gumbel_noise(3, 4, (10,)), noise[:10].astype(np.float32))
    for other in ((3, 5), (4, 4), (4, 3), (2**32 - 1, 4)):
        assert abs(np.corrcoef(noise, gumbel_noise(*other, (100_000,)))[0, 1]) < 0.02
        assert np.isfinite(gumbel_noise(*other, (1000,))).all()


def test_a_world_is_read_as_it_was_written(tmp_path: Path) -> None:
    world = World({"labels": ["a <b>"]}, {"frames": np.arange(6, dtype=np.uint8).reshape(2, 3)})
    file = tmp_path / "world.safetensors"
    file.write_bytes(world.content())
    found = read_world(file)
    assert found.about == world.about and np.array_equal(found.arrays["frames"], world.arrays["frames"])
    file.write_bytes(world.content()[:-3])
    with pytest.raises(UserError, match="holds no starts"):
        read_world(file)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint"):
        load_step(tmp_path / "none")
    make_checkpoint(tmp_path / "it", "prelar", "finetune")
    (tmp_path / "it/critic.safetensors").unlink()
    with pytest.raises(UserError, match="critic is missing"):
        load_step(tmp_path / "it")
