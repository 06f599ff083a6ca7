"""The probe on features whose worth is known, the episodes it is fitted on, and the action swap."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prelar.envs.metaworld import Simulator
from prelar.evaluation import probe
from prelar.evaluation.probe import HELD, Episodes, collect, demonstrations, ridge_r2, run_probe, swap_actions
from prelar.methods import build_model
from prelar.model.spec import ModelSpec
from prelar.store.store import Store
from prelar.store.writer import StoreWriter
from tests.fake_results import moving
from tests.test_evaluate import SIZES

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def test_what_determines_the_target_scores_one_and_noise_nothing(random: np.random.Generator) -> None:
    groups = np.repeat(np.arange(12), 40)
    x = random.normal(size=(480, 6))
    targets = np.stack([x @ random.normal(size=6), random.normal(size=480), np.full(480, 3.0)], 1)
    r2 = ridge_r2(x, targets, groups, groups % 3 == 1)
    assert r2[0] > 0.999
    assert abs(r2[1]) < 0.1
    assert r2[2] == 0


def test_more_features_than_rows_are_solved_alike(random: np.random.Generator) -> None:
    groups = np.repeat(np.arange(9), 20)
    x = random.normal(size=(180, 3))
    wide = np.concatenate([x] + [x * 0] * 99, axis=1).astype(np.float32)
    targets = x @ random.normal(size=(3, 2)) + 0.1 * random.normal(size=(180, 2))
    assert ridge_r2(wide, targets, groups, groups % 3 == 1) == pytest.approx(
        ridge_r2(x, targets, groups, groups % 3 == 1), abs=1e-3
    )


def test_test_rows_do_not_help_the_fit(random: np.random.Generator) -> None:
    groups = np.repeat(np.arange(9), 20)
    x, y = random.normal(size=(180, 3)), random.normal(size=(180, 1))
    test = groups % 3 == 1
    y[test] = (x[test] @ [[1], [2], [3]]) * 100
    assert ridge_r2(x, y, groups, test)[0] < 0.2


def test_episodes_hold_each_action_and_tell_what_moved() -> None:
    with Simulator("reach") as simulator:
        found = collect(simulator, episodes=2, seed=5, steps=2 * HELD)
        again = collect(simulator, episodes=2, seed=5, steps=2 * HELD)
        start = simulator.reset(5, 1)
        places = [simulator.gripper[:3]]
        for action in np.random.default_rng([5, 1]).uniform(-1, 1, (2, 4)).repeat(HELD, 0):
            simulator.step(action)
            places.append(simulator.gripper[:3])
    assert start.reward == 0
    assert found.frames.shape == (2, 11, 64, 64, 3) and found.change.shape == (2, 10, 4)
    assert np.array_equal(found.frames, again.frames) and np.array_equal(found.change, again.change)
    assert np.array_equal(found.change[1, :, :3], np.diff(np.stack(places).astype(np.float64), axis=0))
    assert not np.array_equal(found.frames[0, -1], found.frames[1, -1])
    with Simulator("reach") as simulator:
        wide = collect(simulator, episodes=2, seed=5, steps=2 * HELD - 2, gap=3)
    assert wide.gap == 3 and np.array_equal(wide.frames, found.frames), "so many pairs, and two frames more"


@settings(max_examples=30, deadline=None)
@given(gap=st.integers(1, 9), length=st.integers(10, 24), seed=st.integers(0, 9))
def test_a_pair_is_of_two_frames_a_gap_apart_and_of_what_happened_between(
    gap: int, length: int, seed: int
) -> None:
    """Told by a model whose action is the two frames that it saw, the first frame of a sequence by itself."""
    random = np.random.default_rng(seed)
    frames = np.zeros((2, length, 64, 64, 3), np.uint8)
    frames[:, :, 0, 0, 0] = np.arange(length) + 100 * np.arange(2)[:, None]
    episodes = Episodes(frames, random.normal(size=(2, length - 1, 4)), np.array([False, True]), gap)

    def infer(images: torch.Tensor, is_first: torch.Tensor) -> torch.Tensor:
        assert is_first[0].tolist() == [True] + [False] * (images.shape[1] - 1)
        number = (images[:, :, 0, 0, 0] + 0.5) * 255
        return torch.stack([number[:, :-1], number[:, 1:]], -1)

    found = probe._latent(infer, frames, gap, CPU).reshape(2, length - gap, 2)
    first = np.arange(length - gap) + 100 * np.arange(2)[:, None]
    assert np.abs(found - np.stack([first, first + gap], -1)).max() < 1e-3
    path = np.pad(episodes.change.cumsum(1), ((0, 0), (1, 0), (0, 0)))
    assert np.allclose(episodes.moved(gap), path[:, gap:] - path[:, :-gap])


def test_the_curve_has_the_gap_of_pretraining_and_its_values(random: np.random.Generator) -> None:
    model = build_model(ModelSpec(method="prelar", **SIZES))
    plain = squares(random)
    wide = Episodes(plain.frames, plain.change, plain.held_out, 3)
    found = run_probe(model, wide, updates=1, seed=0, device=CPU)
    assert found["gap"] == 3 and found["gaps"]["step"] == [1, 2, 3, 4, 8]
    assert (found["train"], found["test"]) == (6 * 6, 3 * 6)
    for column, row in zip(("latent", "untrained", "difference"), found["rows"], strict=False):
        assert found["gaps"][column][2] == row["mean"]
    near = run_probe(model, plain, updates=1, seed=0, device=CPU)
    assert near["gaps"]["step"] == [1, 2, 4, 8] and near["gap"] == 1
    for column in ("latent", "untrained", "difference"):
        assert near["gaps"][column] == [
            v for s, v in zip(*(found["gaps"][k] for k in ("step", column)), strict=True) if s != 3
        ]


def make_demonstrations(path: Path, *, arrays: dict[str, int], fps: float | None = None) -> Store:
    """Twelve episodes of 4 to 9 frames, each seen by two cameras; every third episode is for validation."""
    with StoreWriter(path, arrays=arrays) as writer:
        for episode in range(12):
            length = 4 + episode % 6
            gripper = np.random.default_rng(episode).normal(size=(length, 8)).astype(np.float32)
            for camera in ("side", "front"):
                row = {
                    "id": f"{episode}-{camera}",
                    "split": "validation" if episode % 3 == 0 else "train",
                    "label": "reach",
                    "camera": camera,
                    "episode": episode,
                    "fps": fps,
                }
                frames = np.full((length, 64, 64, 3), 20 * episode + (camera == "front"), np.uint8)
                writer.append(frames, row, **({"gripper": gripper} if arrays else {}))
        return writer.finish({"source": "test"})


def test_recorded_episodes_are_of_one_camera_and_held_out_by_split(tmp_path: Path) -> None:
    store = make_demonstrations(tmp_path / "x.zarr", arrays={"gripper": 8})
    found = demonstrations(store, episodes=9, seed=4, steps=4)
    again = demonstrations(store, episodes=9, seed=4, steps=4)
    assert found is not None and again is not None
    assert np.array_equal(found.frames, again.frames) and np.array_equal(found.change, again.change)
    numbers, views = np.divmod(found.frames[:, 0, 0, 0, 0], 20)
    assert (views == 1).all(), "the first camera by name"
    assert sorted(numbers[found.held_out]) == [3, 9] and len(set(numbers[~found.held_out])) == 6
    assert not (numbers[~found.held_out] % 3 == 0).any()
    for number, change in zip(numbers, found.change, strict=True):
        whole = np.random.default_rng(number).normal(size=(4 + number % 6, 8)).astype(np.float32)
        steps = np.diff(whole.astype(np.float64)[:, [0, 1, 2, 7]], axis=0)
        assert any(np.array_equal(change, steps[at : at + 4]) for at in range(len(steps) - 3))


def test_recorded_pairs_are_as_far_apart_as_in_pretraining(tmp_path: Path) -> None:
    store = make_demonstrations(tmp_path / "x.zarr", arrays={"gripper": 8}, fps=20.0)
    found = demonstrations(store, episodes=9, seed=4, steps=4, gap=0.1)
    assert found is not None and found.gap == 2
    assert found.frames.shape[1] == 6 and found.moved(2).shape[1] == 4, "four pairs"
    same = demonstrations(store, episodes=9, seed=4, steps=5)
    assert same is not None and same.gap == 1 and np.array_equal(same.change, found.change)


def test_a_store_that_does_not_tell_where_the_hand_was_gives_no_episodes(tmp_path: Path) -> None:
    assert demonstrations(make_demonstrations(tmp_path / "x.zarr", arrays={}), episodes=9, seed=0) is None
    long = make_demonstrations(tmp_path / "y.zarr", arrays={"gripper": 8})
    assert demonstrations(long, episodes=9, seed=0, steps=9) is None


def squares(random: np.random.Generator) -> Episodes:
    """A bright square that moves by the labels: what an encoder can be taught to see."""
    change = random.integers(-6, 7, size=(9, 8, 4)).astype(np.float64)
    places = np.cumsum(np.concatenate([np.full((9, 1, 4), 24.0), change], 1), 1).clip(0, 52).astype(int)
    frames = np.zeros((9, 9, 64, 64, 3), np.uint8)
    for e in range(9):
        for t in range(9):
            x, y = places[e, t, :2]
            frames[e, t, y : y + 12, x : x + 12] = 255
    return Episodes(frames, np.diff(places, axis=1).astype(np.float64), np.arange(9) % 3 == 1)


@pytest.mark.long
def test_an_encoder_trained_with_labels_beats_shuffled_pairs(random: np.random.Generator) -> None:
    torch.manual_seed(1)
    model = build_model(ModelSpec(method="prelar", **SIZES))
    found = run_probe(model, squares(random), updates=60, seed=0, device=CPU)
    means = [row["mean"] for row in found["rows"]]
    assert len(means) == 5 and found["test"] == 24 and found["train"] == 48
    r2 = {row["name"]: row["r2"] for row in found["rows"]}
    assert np.mean(r2["encoder trained with labels"][:2]) > np.mean(r2["shuffled pairs"][:2]) + 0.2


def test_frames_of_a_pair_are_shifted_alike() -> None:
    frames = np.zeros((40, 2, 64, 64, 3), np.uint8)
    frames[:, 0, 30, 20] = frames[:, 1, 33, 25] = 255
    shifted = probe._shift(frames, np.random.default_rng(0))
    places = np.array([[np.argwhere(frame[..., 0])[0] for frame in pair] for pair in shifted])
    assert (places[:, 1] - places[:, 0] == [3, 5]).all()
    assert {tuple(np.ptp(places[:, 0, axis], keepdims=True)) for axis in (0, 1)} == {(2 * probe.SHIFT,)}


def test_the_probe_is_repeatable() -> None:
    model = build_model(ModelSpec(method="prelar", **SIZES))
    first, second = (
        run_probe(model, squares(np.random.default_rng(0)), updates=2, seed=0, device=CPU) for _ in "ab"
    )
    assert first == second


def test_the_encoder_with_labels_learns_under_autocast_too() -> None:
    model = build_model(ModelSpec(method="prelar", **SIZES))
    episodes = squares(np.random.default_rng(0))
    plain = run_probe(model, episodes, updates=2, seed=0, device=CPU)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = run_probe(model, episodes, updates=2, seed=0, device=CPU)
    assert under == plain


def test_swapped_actions_show_donors_states_and_what_follows() -> None:
    torch.manual_seed(0)
    model = build_model(ModelSpec(method="prelar", **SIZES))
    clips = np.stack([np.repeat(moving(1), 6, 0), moving(6), moving(6)[::-1]])
    picture = swap_actions(model, clips, observed=2, device=CPU)
    assert picture is not None and picture.shape == (5 * 66 - 2, 4 * 66 - 2, 3)
    donor = picture[:64, 66:130], picture[66:130, 66:130]
    assert any(
        np.array_equal(donor[0], a) and np.array_equal(donor[1], b)
        for a, b in zip(clips[1], clips[1][1:], strict=False)
    )
    columns = [picture[132:196, 66 * c : 66 * c + 64] for c in range(4)]
    assert not np.array_equal(columns[1], columns[2])
    assert swap_actions(model, clips[:1], observed=2, device=CPU) is None
