"""Episode files of APV's format: grouping by name, alignment, broken files in words."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from prelar.data.apv_npz import ApvNpz, open_folder, read_npz
from prelar.data.demonstrations import Splits, clips, fault
from prelar.errors import UserError


def write(path: Path, length: int = 6, **changes: object) -> None:
    """An episode file; a change to None leaves a key out."""
    random = np.random.default_rng(length)
    content = {
        "image": random.integers(0, 256, (length, 64, 64, 3), np.uint8),
        "action": random.normal(size=(length, 8)).astype(np.float32),
        "gripper_pose": random.normal(size=(length, 8)).astype(np.float32),
        "reward": np.zeros(length, np.float32),
        "is_first": np.arange(length) == 0,
        "is_last": np.arange(length) == length - 1,
        "is_terminal": np.zeros(length, bool),
    } | changes
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **{key: value for key, value in content.items() if value is not None})  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for task, episode, camera in [
        (task, episode, camera)
        for task in ("open_drawer", "reach_target")
        for episode in range(2)
        for camera in ("front", "left_shoulder")
    ]:
        write(tmp_path / f"{task}-v1-e{episode}-{camera}-{6 + episode}.npz", 6 + episode)
    return tmp_path


def test_files_of_one_episode_are_grouped(folder: Path) -> None:
    source = open_folder(folder)
    assert source.cameras == ("front", "left_shoulder")
    assert source.arrays == {"actions": 8, "gripper": 8}
    assert [(job.task, job.variation, job.episode) for job in source.jobs()] == [
        ("open_drawer", 1, 0),
        ("open_drawer", 1, 1),
        ("reach_target", 1, 0),
        ("reach_target", 1, 1),
    ]
    for job in source.jobs():
        episode = source.collect(job)
        assert fault(episode, source.cameras, source.arrays) is None
        assert len(episode.frames["front"]) == 6 + job.episode


def test_given_tasks_and_cameras_are_kept(folder: Path) -> None:
    (folder / "reach_target-v1-e1-front-7.npz").write_bytes(b"of a task and a camera that are not wanted")
    source = open_folder(folder, ["open_drawer"], ["left_shoulder"])
    assert source.cameras == ("left_shoulder",) and source.arrays == {"actions": 8, "gripper": 8}
    assert [(job.task, len(job.files)) for job in source.jobs()] == [("open_drawer", 1)] * 2
    for job in source.jobs():
        episode = source.collect(job)
        assert set(episode.frames) == {"left_shoulder"}
        assert fault(episode, source.cameras, source.arrays) is None
    with pytest.raises(
        UserError, match=r"rlbench\.tasks: nothing recorded of 'open_door'; there is open_drawer"
    ):
        open_folder(folder, ["open_door"])
    with pytest.raises(
        UserError, match=r"rlbench\.cameras: nothing recorded of 'overhead'; there is front, left"
    ):
        open_folder(folder, None, ["overhead"])


def test_content_is_kept_and_the_last_action_dropped(folder: Path) -> None:
    source = open_folder(folder)
    episode = source.collect(source.jobs()[0])
    raw = np.load(folder / "open_drawer-v1-e0-front-6.npz", allow_pickle=False)
    assert np.array_equal(episode.frames["front"], raw["image"])
    assert np.array_equal(episode.arrays["actions"][:-1], raw["action"][:-1])
    assert not episode.arrays["actions"][-1].any()
    assert np.array_equal(episode.arrays["gripper"], raw["gripper_pose"])


def test_clips_carry_the_digests_of_their_files(folder: Path) -> None:
    broken = folder / "open_drawer-v1-e0-left_shoulder-6.npz"
    broken.write_bytes(b"broken")
    source = open_folder(folder)
    bad, good = (source.collect(job) for job in source.jobs()[:2])
    assert bad.digests["left_shoulder"] == hashlib.sha256(b"broken").hexdigest()
    rows = [row for _, row, _ in clips(good, source, 0, Splits(source.jobs(), []))]
    for row, camera in zip(rows, source.cameras, strict=True):
        content = (folder / f"open_drawer-v1-e1-{camera}-7.npz").read_bytes()
        assert row["sha256"] == hashlib.sha256(content).hexdigest()


def test_other_names_are_episodes_of_their_folder(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / "lamp_on" / f"20220101T00000{number}-abc-6.npz", gripper_pose=None)
    source = open_folder(tmp_path)
    assert source.cameras == ("camera",) and source.arrays == {"actions": 8}
    assert [(job.task, job.episode) for job in source.jobs()] == [("lamp_on", number) for number in range(3)]
    assert fault(source.collect(source.jobs()[1]), source.cameras, source.arrays) is None


def test_files_without_actions_are_videos(tmp_path: Path) -> None:
    write(tmp_path / "x-6.npz", action=None, gripper_pose=None)
    source = open_folder(tmp_path)
    assert source.arrays == {}
    assert fault(source.collect(source.jobs()[0]), source.cameras, source.arrays) is None


def test_a_missing_camera_is_a_fault(folder: Path) -> None:
    (folder / "reach_target-v1-e1-front-7.npz").unlink()
    source = open_folder(folder)
    episode = source.collect(source.jobs()[-1])
    assert fault(episode, source.cameras, source.arrays) == "camera front: no frames"


def reason_of(folder: Path) -> str:
    """The reason of the first episode, by either way."""
    source = open_folder(folder)
    episode = source.collect(source.jobs()[0])
    return episode.reason or fault(episode, source.cameras, source.arrays) or ""


def test_broken_files_name_their_trouble(folder: Path) -> None:
    path = folder / "open_drawer-v1-e0-front-6.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert reason_of(folder).startswith("open_drawer-v1-e0-front-6.npz: ")
    path.write_bytes(b"")
    assert reason_of(folder).startswith("open_drawer-v1-e0-front-6.npz: ")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    path.write_bytes(flipped)
    assert reason_of(folder).startswith("open_drawer-v1-e0-front-6.npz: ")
    write(path, image=None)
    assert reason_of(folder) == "open_drawer-v1-e0-front-6.npz: holds no `image`"
    write(path, 5)
    assert reason_of(folder) == "open_drawer-v1-e0-front-6.npz: 5 frames, its name says 6"
    endless = np.full((6, 8), np.inf, np.float32)
    write(path, action=endless)
    other = folder / "open_drawer-v1-e0-left_shoulder-6.npz"
    assert reason_of(folder) == f"{other.name}: its action is not that of the other cameras"
    write(other, action=endless)
    assert reason_of(folder) == "actions: not finite at frame 0"
    write(path, action=endless, image=np.zeros((6, 32, 32, 3), np.uint8))
    assert "not uint8 (T, 64, 64, 3)" in reason_of(folder)


def test_actions_unlike_those_of_the_first_file_are_a_fault(folder: Path) -> None:
    path = folder / "open_drawer-v1-e1-front-7.npz"
    for camera in ("front", "left_shoulder"):
        write(folder / f"open_drawer-v1-e1-{camera}-7.npz", 7, action=np.zeros((7, 3), np.float32))
    source = open_folder(folder)
    job = source.jobs()[1]
    assert (
        fault(source.collect(job), source.cameras, source.arrays) == "actions: shape (7, 3), expected (7, 8)"
    )
    write(path, 7, action=None)
    assert source.collect(job).reason == f"{path.name}: holds no `action`"


def test_pickled_content_is_never_loaded(tmp_path: Path) -> None:
    write(tmp_path / "a-v0-e0-front-6.npz")
    path = tmp_path / "a-v0-e1-front-6.npz"
    np.savez(path, image=np.array([{"any": "object"}] * 6, dtype=object))
    source = open_folder(tmp_path)
    assert "pickle" in str(source.collect(source.jobs()[1]).reason).lower()


def test_oversized_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a-6.npz")
    monkeypatch.setattr("prelar.data.apv_npz.MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="more than 1000"):
        read_npz(tmp_path / "a-6.npz")


def test_folders_without_episodes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \.npz episode"):
        open_folder(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        open_folder(tmp_path / "absent")
    with pytest.raises(UserError, match="no such folder"):
        ApvNpz(tmp_path / "absent", (), ()).jobs()
