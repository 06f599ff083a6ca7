"""The simulator: repeatable to the bit, exact replay, upright images, helpful errors."""

import gc
import hashlib
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from prelar.envs.metaworld import ACTION_DIM, GRIPPER_DIM, MAX_STEPS, Simulator
from prelar.envs.names import CAMERAS, TASKS, check_task
from prelar.utils.errors import UserError


@pytest.fixture(scope="module")
def drawer() -> Iterator[Simulator]:
    with Simulator("drawer-open") as simulator:
        yield simulator


def rollout(simulator: Simulator, seed: int, episode: int, steps: int) -> tuple[str, list[np.ndarray]]:
    """Digest of every observation and reward of an expert's episode, and its actions."""
    digest = hashlib.sha256()
    answer = simulator.reset(seed, episode)
    digest.update(answer.observation.tobytes())
    actions = []
    for _ in range(steps):
        actions.append(simulator.expert())
        answer = simulator.step(actions[-1])
        digest.update(answer.observation.tobytes() + np.float64(answer.reward).tobytes())
    return digest.hexdigest(), actions


@pytest.mark.parametrize("task", ["drawer-open", "door-lock", "reach", "pick-place", "hammer"])
def test_used_simulator_equals_fresh_one(task: str) -> None:
    with Simulator(task) as used, Simulator(task) as fresh:
        rollout(used, 0, 1, 45)
        first, _ = rollout(used, 0, 7, 60)
        again, _ = rollout(used, 0, 7, 60)
        assert first == again == rollout(fresh, 0, 7, 60)[0]


@pytest.mark.long
@pytest.mark.parametrize("task", TASKS)
def test_every_task_repeats(task: str) -> None:
    with Simulator(task) as used, Simulator(task) as fresh:
        rollout(used, 3, 1, 45)
        assert rollout(used, 3, 2, 200)[0] == rollout(fresh, 3, 2, 200)[0]


def test_goals_follow_seed_and_episode(drawer: Simulator) -> None:
    goals = {
        (seed, episode): drawer.reset(seed, episode).observation[-3:].tobytes()
        for seed in range(3)
        for episode in range(3)
    }
    assert len(set(goals.values())) == 9
    assert drawer.reset(1, 2).observation[-3:].tobytes() == goals[1, 2]


def test_replay_restores_the_exact_state_and_picture(drawer: Simulator) -> None:
    _, actions = rollout(drawer, 5, 0, 50)
    picture, gripper = drawer.render(), drawer.gripper
    with Simulator("drawer-open") as other:
        other.replay(5, 0, actions)
        assert np.array_equal(other.render(), picture)
        assert np.array_equal(other.gripper, gripper)
        assert other.steps == 50


def test_drawing_does_not_disturb_the_episode(drawer: Simulator) -> None:
    plain, _ = rollout(drawer, 2, 0, 30)
    answer = drawer.reset(2, 0)
    digest = hashlib.sha256(answer.observation.tobytes())
    for _ in range(30):
        drawer.render("topview")
        answer = drawer.step(drawer.expert())
        digest.update(answer.observation.tobytes() + np.float64(answer.reward).tobytes())
    assert digest.hexdigest() == plain


def test_expert_solves_the_task(drawer: Simulator) -> None:
    answer = drawer.reset(0, 0)
    assert not answer.success and answer.reward == 0.0
    rewards = []
    while not (answer.success or answer.done):
        action = drawer.expert()
        assert action.shape == (ACTION_DIM,) and action.dtype == np.float32 and np.abs(action).max() <= 1
        answer = drawer.step(action)
        rewards.append(answer.reward)
    assert answer.success
    assert rewards[-1] > rewards[0]
    assert min(rewards) >= 0 and max(rewards) <= 10


def test_actions_are_clipped_and_rounded_as_they_are_stored(drawer: Simulator) -> None:
    wild = np.array([0.1, 3.0, -7.0, 1.0], dtype=np.float64)
    drawer.reset(0, 0)
    first = drawer.step(wild).observation
    drawer.reset(0, 0)
    assert np.array_equal(first, drawer.step(np.clip(wild, -1, 1).astype(np.float32)).observation)


@pytest.mark.parametrize("action", [[0.0, 0.0, 0.0], [0.0, 0.0, np.nan, 0.0], np.zeros((1, 4))])
def test_bad_actions_are_refused(drawer: Simulator, action: object) -> None:
    drawer.reset(0, 0)
    with pytest.raises(ValueError, match="4 finite numbers"):
        drawer.step(action)  # type: ignore[arg-type]


def test_time_limit_ends_the_episode() -> None:
    with Simulator("reach", time_limit=3) as simulator:
        with pytest.raises(RuntimeError, match="reset"):
            simulator.step(np.zeros(4))
        simulator.reset(0, 0)
        assert [simulator.step(np.zeros(4)).done for _ in range(3)] == [False, False, True]
        with pytest.raises(RuntimeError, match="reset"):
            simulator.step(np.zeros(4))


@pytest.mark.parametrize("repeat", [pytest.param(1, marks=pytest.mark.long), 4, 20])
def test_a_repeated_action_is_the_same_action_step_after_step(repeat: int) -> None:
    """Straight through the goal and beyond: success counts where only steps in between have it."""
    limit = 50
    with Simulator("reach", time_limit=limit, action_repeat=repeat) as held, Simulator("reach") as plain:
        start = held.reset(0, 1).observation
        way = start[-3:] - start[:3]
        action = np.append(way / np.abs(way).max(), 0).astype(np.float32)
        plain.reset(0, 1)
        taken, solved = [], []
        while held.steps < limit:
            step = held.step(action)
            each = [plain.step(action) for _ in range(min(repeat, limit - plain.steps))]
            assert step.reward == pytest.approx(sum(one.reward for one in each), rel=1e-12)
            assert step.observation.tobytes() == each[-1].observation.tobytes()
            assert step.success == any(one.success for one in each)
            assert step.done == (plain.steps == limit) and held.steps == plain.steps
            taken.append(action)
            solved.append((step.success, each[-1].success))
        assert np.array_equal(held.render(), plain.render())
        assert any(whole for whole, _ in solved) and len(taken) == -(-limit // repeat)
        assert ((True, False) in solved) == (repeat > 1)
        assert held.replay(0, 1, taken).observation.tobytes() == step.observation.tobytes()


def test_longest_time_limit_can_be_reached() -> None:
    with Simulator("reach") as simulator:
        simulator.reset(0, 0)
        answers = [simulator.step(np.zeros(4)) for _ in range(MAX_STEPS)]
    assert answers[-1].done and not answers[-2].done


def test_gripper_state(drawer: Simulator) -> None:
    answer = drawer.reset(0, 0)
    start = drawer.gripper
    assert start.shape == (GRIPPER_DIM,) and start.dtype == np.float32
    assert np.linalg.norm(start[3:7]) == pytest.approx(1, abs=1e-5)
    for _ in range(15):
        answer = drawer.step([0, 0, 1, 1])
    assert drawer.gripper[2] > start[2] + 0.05
    assert drawer.gripper[7] == pytest.approx(answer.observation[3])
    assert drawer.gripper[7] < start[7]


@pytest.mark.parametrize("camera", CAMERAS)
@pytest.mark.parametrize(("width", "height"), [(64, 64), (97, 50)])
def test_pictures_have_the_asked_size(drawer: Simulator, camera: str, width: int, height: int) -> None:
    drawer.reset(0, 0)
    picture = drawer.render(camera, width, height)
    assert picture.shape == (height, width, 3) and picture.dtype == np.uint8
    assert picture.flags.c_contiguous
    assert picture.std() > 10


@pytest.mark.parametrize("camera", CAMERAS)
@pytest.mark.parametrize(("width", "height"), [(64, 64), (97, 50)])
def test_a_pixel_is_the_mean_of_four_drawn_ones(
    drawer: Simulator, camera: str, width: int, height: int
) -> None:
    """Halves are rounded up."""
    drawer.reset(0, 0)
    drawn = drawer.draw(camera, 2 * width, 2 * height).astype(int)
    total = drawn[::2, ::2] + drawn[::2, 1::2] + drawn[1::2, ::2] + drawn[1::2, 1::2]
    assert np.array_equal(drawer.render(camera, width, height), (total + 2) // 4)


@pytest.mark.parametrize(
    ("task", "camera"),
    [("drawer-open", "corner"), pytest.param("push", "topview", marks=pytest.mark.long)],
)
def test_edges_move_gradually(task: str, camera: str) -> None:
    """Under a slow motion, frames are and change as pictures drawn much larger and brought to their size."""
    seen: dict[str, list[np.ndarray]] = {"jagged": [], "rendered": [], "ideal": []}
    with Simulator(task, camera=camera) as simulator:
        simulator.reset(0, 0)
        for _ in range(12):
            simulator.step([0.1, 0.2, -0.2, 0])
            seen["jagged"].append(simulator.draw(camera, 64, 64))
            seen["rendered"].append(simulator.render())
            large = simulator.draw(camera, 512, 512).reshape(64, 8, 64, 8, 3)
            seen["ideal"].append(large.mean((1, 3)))
    frames = {name: np.stack(found).astype(float) for name, found in seen.items()}
    wrong = {name: (np.abs(found - frames["ideal"]) > 40).any(-1).mean() for name, found in frames.items()}
    assert wrong["rendered"] < 0.001 and wrong["rendered"] < wrong["jagged"] / 10
    changes = {name: np.diff(found, axis=0) for name, found in frames.items()}
    noise = {name: np.square(found - changes["ideal"]).mean() for name, found in changes.items()}
    assert noise["rendered"] < noise["jagged"] / 3
    jumps = {name: (np.abs(found) > 40).any(-1).sum() for name, found in changes.items()}
    assert jumps["rendered"] < jumps["jagged"] / 2


def test_large_pictures_are_possible(drawer: Simulator) -> None:
    drawer.reset(0, 0)
    assert drawer.render("corner", 800, 600).shape == (600, 800, 3)


@pytest.mark.parametrize("camera", ["corner", "corner2", "corner3", "corner4"])
def test_pictures_are_upright(drawer: Simulator, camera: str) -> None:
    """The red arm rises when the hand is lifted, and the picture is not mirrored."""

    def red(picture: np.ndarray) -> np.ndarray:
        colour = picture.astype(int)
        return (colour[..., 0] > 90) & (colour[..., 1] < 60) & (colour[..., 2] < 60)

    drawer.reset(0, 0)
    for _ in range(15):
        drawer.step([0, 0, -1, 0])
    low = red(drawer.render(camera, 160, 160))
    for _ in range(40):
        drawer.step([0, 0, 1, 0])
    high = red(drawer.render(camera, 160, 160))
    assert np.nonzero(high)[0].mean() < np.nonzero(low)[0].mean() - 3

    right = _right_of(drawer, camera)
    columns = []
    for direction in (-1, 1):
        for _ in range(40):
            drawer.step([*(direction * np.sign(right[:2]) * (np.abs(right[:2]) > 0.3)), 0, 0])
        columns.append(np.nonzero(red(drawer.render(camera, 160, 160)))[1].mean())
    assert columns[1] > columns[0] + 2


def _right_of(simulator: Simulator, camera: str) -> np.ndarray:
    """The world's direction that an upright view through `camera` shows to the right: forward x up."""
    pose = simulator._env.data.camera(camera).xmat.reshape(3, 3)
    return np.cross(-pose[:, 2], [0, 0, 1])


def test_pictures_repeat_in_a_fresh_simulator(drawer: Simulator) -> None:
    drawer.reset(4, 4)
    drawer.render("corner", 80, 60)
    with Simulator("drawer-open") as other:
        other.reset(4, 4)
        for camera in CAMERAS:
            assert np.array_equal(drawer.render(camera), other.render(camera))


def test_closing_a_simulator_leaves_others_alone(drawer: Simulator) -> None:
    drawer.reset(4, 4)
    before = drawer.render()
    closed, dropped = Simulator("reach"), Simulator("reach")
    for other in (closed, dropped):
        other.reset(0, 0)
        other.render()
        other.render("topview", 32, 32)
    drawer.render()
    closed.close()
    del dropped, other
    gc.collect()
    assert np.array_equal(drawer.render(), before)
    drawer.reset(4, 5)
    assert not np.array_equal(drawer.render(), before)


def test_names_with_and_without_version() -> None:
    assert check_task("drawer-open-v3") == check_task("drawer-open") == "drawer-open"


def test_known_names_are_those_of_meta_world(drawer: Simulator) -> None:
    import metaworld

    assert {name.removesuffix("-v3") for name in metaworld.ALL_V3_ENVIRONMENTS} == set(TASKS)
    model = drawer._env.model
    assert {model.camera(number).name for number in range(model.ncam)} == set(CAMERAS)


def test_mistyped_names_suggest_near_ones(drawer: Simulator) -> None:
    with pytest.raises(UserError, match=r"task = 'drawr-open': .*drawer-open"):
        Simulator("drawr-open")
    with pytest.raises(UserError, match=r"camera = 'cornr': .*corner"):
        Simulator("drawer-open", camera="cornr")
    with pytest.raises(UserError, match=r"camera = 'front': "):
        drawer.render("front")
    with pytest.raises(UserError, match=r"time_limit = 501"):
        Simulator("drawer-open", time_limit=501)
    with pytest.raises(UserError, match=r"action_repeat = 0"):
        Simulator("drawer-open", action_repeat=0)


def test_open_simulator_ends_before_its_opengl() -> None:
    """What ends EGL is registered with atexit when the first context is made."""
    code = """
import atexit, weakref
from prelar.envs.metaworld import Simulator
kept = set()
weakref.finalize(kept, int)
atexit.register(print, "OpenGL ended")
simulator = Simulator("reach")
import mujoco
free = mujoco.GLContext.free
mujoco.GLContext.free = lambda context: (print("context freed"), free(context))
simulator.reset(0, 0)
simulator.render()
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (told.returncode, told.stdout.split("\n")) == (0, ["context freed", "OpenGL ended", ""]), (
        told.stderr
    )
