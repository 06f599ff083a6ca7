"""RLBench's own folders: layout, pictures, and pickles that cannot do anything."""

import os
import pickle
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from prelar.data.demonstrations import fault
from prelar.data.rlbench_folder import CAMERAS, LOW_DIM, VARIATION, RlbenchFolder, open_folder, read_low_dim
from prelar.errors import UserError

LENGTH = 5


class Foreign:
    """Something that RLBench's pickles never hold."""


@pytest.fixture
def rlbench(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Classes that pickle under RLBench's names, while a test writes its files."""
    made = {}
    for package in ("rlbench", "rlbench.backend"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    for module, name in (("rlbench.demo", "Demo"), ("rlbench.backend.observation", "Observation")):
        made[name] = type(name, (), {"__module__": module})
        stand_in = types.ModuleType(module)
        setattr(stand_in, name, made[name])
        monkeypatch.setitem(sys.modules, module, stand_in)
    return types.SimpleNamespace(**made)


def demo(rlbench: types.SimpleNamespace, length: int = LENGTH, **changes: Any) -> Any:
    """A demonstration as RLBench holds it; `changes` replace attributes of step 2."""
    steps = []
    for number in range(length):
        step = rlbench.Observation()
        step.__dict__ |= {
            "front_rgb": None,
            "joint_velocities": np.arange(7) / 10 + number,
            "joint_positions": np.arange(7) - number,
            "gripper_open": 1.0,
            "gripper_pose": np.array([0.1, 0.2, 0.3, 0, 0, 0, 1]) * (number + 1),
            "misc": {"front_camera_intrinsics": np.eye(3), "near": np.float64(0.01)},
        }
        if number == 2:
            step.__dict__ |= changes
        steps.append(step)
    whole = rlbench.Demo()
    whole.__dict__ |= {"_observations": steps, "random_seed": None, "num_reset_attempts": 1}
    return whole


def write_episode(folder: Path, content: Any, length: int = LENGTH, size: int = 64) -> Path:
    """An episode's folder, with pictures of noise."""
    random = np.random.default_rng(3)
    for camera in CAMERAS:
        (folder / f"{camera}_rgb").mkdir(parents=True)
        for number in range(length):
            noise = random.integers(0, 256, (size, size, 3), np.uint8)
            Image.fromarray(noise).save(folder / f"{camera}_rgb" / f"{number}.png")
    (folder / LOW_DIM).write_bytes(pickle.dumps(content))
    return folder


@pytest.fixture
def episode(tmp_path: Path, rlbench: types.SimpleNamespace) -> Path:
    return write_episode(tmp_path / "push_button/variation2/episodes/episode3", demo(rlbench))


def reason_of(root: Path) -> str:
    source = RlbenchFolder(root)
    collected = source.collect(source.jobs()[0])
    return collected.reason or fault(collected, source.cameras, source.arrays) or ""


def test_episode_is_read_whole(tmp_path: Path, episode: Path) -> None:
    source = RlbenchFolder(tmp_path)
    (job,) = source.jobs()
    assert (job.task, job.variation, job.episode) == ("push_button", 2, 3)
    collected = source.collect(job)
    assert fault(collected, source.cameras, source.arrays) is None
    picture = np.asarray(Image.open(episode / "wrist_rgb" / "4.png"))
    assert np.array_equal(collected.frames["wrist"][4], picture)
    actions = collected.arrays["actions"]
    assert np.allclose(actions[1], [*(np.arange(7) / 10 + 1), 1.0]) and not actions[-1].any()
    assert np.allclose(collected.arrays["gripper"][1], [0.2, 0.4, 0.6, 0, 0, 0, 2, 1])


def test_action_mode_decides_what_the_actions_are(episode: Path) -> None:
    moved = {
        mode: read_low_dim(episode / LOW_DIM, mode)["actions"] for mode in ("joint_position", "gripper_pose")
    }
    assert np.allclose(moved["joint_position"][1], [*(np.arange(7) - 2), 1.0])
    assert np.allclose(moved["gripper_pose"][1], [0.3, 0.6, 0.9, 0, 0, 0, 3, 1])
    assert all(not actions[-1].any() for actions in moved.values())


def test_cameras_are_those_that_any_episode_has(
    tmp_path: Path, episode: Path, rlbench: types.SimpleNamespace
) -> None:
    other = write_episode(tmp_path / "push_button/variation2/episodes/episode4", demo(rlbench))
    for path in (episode, other):
        shutil.rmtree(path / "overhead_rgb")
    shutil.rmtree(other / "wrist_rgb")
    source = open_folder(tmp_path, "joint_velocity")
    assert source.cameras == ("left_shoulder", "right_shoulder", "wrist", "front")
    whole, lacking = map(source.collect, source.jobs())
    assert fault(whole, source.cameras, source.arrays) is None
    assert lacking.reason == "wrist_rgb/0.png: missing"


def test_given_tasks_and_cameras_are_kept(
    tmp_path: Path, episode: Path, rlbench: types.SimpleNamespace
) -> None:
    write_episode(tmp_path / "lamp_on/variation0/episodes/episode0", demo(rlbench))
    source = open_folder(tmp_path, "joint_velocity", ["lamp_on"], ["front", "wrist"])
    assert source.cameras == ("wrist", "front") and [job.task for job in source.jobs()] == ["lamp_on"]
    assert fault(source.collect(source.jobs()[0]), source.cameras, source.arrays) is None
    with pytest.raises(UserError, match=r"rlbench\.tasks: nothing recorded of 'lamp_off'; there is lamp_on"):
        open_folder(tmp_path, "joint_velocity", ["lamp_off"])
    shutil.rmtree(tmp_path / "lamp_on/variation0/episodes/episode0/front_rgb")
    with pytest.raises(UserError, match=r"rlbench\.cameras: nothing recorded of 'front'"):
        open_folder(tmp_path, "joint_velocity", ["lamp_on"], ["front"])


def test_variations_together_are_told_apart_by_their_numbers(
    tmp_path: Path, rlbench: types.SimpleNamespace
) -> None:
    root = tmp_path / "push_button/all_variations/episodes"
    numbers = [
        pickle.dumps(3),
        pickle.dumps(np.int64(0)),
        pickle.dumps(Exploit(tmp_path / "made")),
        b"",
        None,
    ]
    numbers += [pickle.dumps("two"), pickle.dumps(-1)]
    for number, content in enumerate(numbers):
        place = write_episode(root / f"episode{number}", demo(rlbench))
        (place / "variation_descriptions.pkl").write_bytes(pickle.dumps(Exploit(tmp_path / "made")))
        if content is not None:
            (place / VARIATION).write_bytes(content)
    source = open_folder(tmp_path, "joint_velocity")
    jobs = source.jobs()
    assert [(job.variation, job.episode) for job in jobs] == [(0, n) for n in (1, 2, 3, 4, 5, 6)] + [(3, 0)]
    reasons = [source.collect(job).reason for job in jobs]
    assert reasons[0] is None and reasons[-1] is None
    assert all(str(reason).startswith(f"{VARIATION}: ") for reason in reasons[1:-1])
    assert reasons[3] == f"{VARIATION}: missing" and str(reasons[1]).endswith(": refused")
    assert not (tmp_path / "made").exists()
    write_episode(tmp_path / "push_button/variation3/episodes/episode0", demo(rlbench))
    with pytest.raises(UserError, match="push_button/variation3/episodes/episode0 are the same episode"):
        source.jobs()


def test_other_sizes_are_resized(tmp_path: Path, rlbench: types.SimpleNamespace) -> None:
    write_episode(tmp_path / "a/variation0/episodes/episode0", demo(rlbench), size=128)
    assert reason_of(tmp_path) == ""


@pytest.mark.parametrize("core", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_arrays_of_numpy_1_and_2_are_read(tmp_path: Path, rlbench: types.SimpleNamespace, core: str) -> None:
    raw = pickle.dumps(demo(rlbench), protocol=3)
    here = b"numpy._core.multiarray" if b"numpy._core" in raw else b"numpy.core.multiarray"
    path = tmp_path / LOW_DIM
    path.write_bytes(raw.replace(here, core.encode()))
    assert read_low_dim(path)["actions"].shape == (LENGTH, 8)


@pytest.mark.parametrize("opening", [1, 1.0, np.float64(1), np.float32(1)])
def test_gripper_opening_of_any_number_type(
    tmp_path: Path, rlbench: types.SimpleNamespace, opening: Any
) -> None:
    path = tmp_path / LOW_DIM
    path.write_bytes(pickle.dumps(demo(rlbench, gripper_open=opening)))
    assert read_low_dim(path)["gripper"][2, 7] == 1


class Exploit:
    """Runs a command when it is unpickled by pickle itself."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_foreign_pickles_do_nothing(tmp_path: Path, episode: Path, rlbench: types.SimpleNamespace) -> None:
    target = tmp_path / "made by the pickle"
    for attack in (Exploit(target), demo(rlbench, misc=Exploit(target)), [Foreign()]):
        (episode / LOW_DIM).write_bytes(pickle.dumps(attack))
        assert reason_of(tmp_path).startswith(f"{LOW_DIM}: names ")
        assert reason_of(tmp_path).endswith(": refused")
    assert not target.exists()


def test_odd_pickles_are_reasons(tmp_path: Path, episode: Path, rlbench: types.SimpleNamespace) -> None:
    whole = (episode / LOW_DIM).read_bytes()
    contents: list[bytes] = [
        b"",
        whole[: len(whole) // 2],
        b"not a pickle",
        pickle.dumps({"_observations": []}),
        pickle.dumps(demo(rlbench, 0)),
        pickle.dumps(demo(rlbench, joint_velocities=None)),
        pickle.dumps(demo(rlbench, joint_velocities=np.zeros(6))),
        pickle.dumps(demo(rlbench, gripper_open="open")),
        pickle.dumps(demo(rlbench, gripper_pose=np.array([None] * 7))),
    ]
    for content in contents:
        (episode / LOW_DIM).write_bytes(content)
        assert reason_of(tmp_path).startswith(f"{LOW_DIM}: "), content[:60]
    (episode / LOW_DIM).unlink()
    assert reason_of(tmp_path) == f"{LOW_DIM}: missing"


def test_velocities_that_are_not_finite_are_a_fault(
    tmp_path: Path, episode: Path, rlbench: types.SimpleNamespace
) -> None:
    (episode / LOW_DIM).write_bytes(pickle.dumps(demo(rlbench, joint_velocities=np.full(7, np.nan))))
    assert reason_of(tmp_path) == "actions: not finite at frame 2"


def test_bad_pictures_are_reasons(tmp_path: Path, episode: Path) -> None:
    picture = episode / "front_rgb" / "2.png"
    whole = picture.read_bytes()
    picture.write_bytes(whole[: len(whole) // 2])
    assert reason_of(tmp_path).startswith("front_rgb/2.png: ")
    assert str(tmp_path) not in reason_of(tmp_path)
    picture.write_bytes(b"")
    assert reason_of(tmp_path).startswith("front_rgb/2.png: cannot identify")
    picture.unlink()
    assert reason_of(tmp_path) == "front_rgb/2.png: missing"
    picture.write_bytes(whole)
    (episode / "front_rgb" / "5.png").write_bytes(whole)
    assert reason_of(tmp_path) == "front_rgb/5.png: left over: the episode has 5 steps"
    (episode / "front_rgb" / "5.png").unlink()
    assert reason_of(tmp_path) == ""


def test_folders_without_episodes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no <task>"):
        RlbenchFolder(tmp_path).jobs()
    with pytest.raises(UserError, match="no such folder"):
        RlbenchFolder(tmp_path / "absent").jobs()
