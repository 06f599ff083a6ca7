"""Episode files of APV's format: grouping by name, alignment, broken files in words."""

import hashlib
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest

from prelar.demos import episodes
from prelar.demos.apv_npz import ApvNpz, open_folder, read_npz
from prelar.demos.episodes import Splits, clips, fault
from prelar.store.writer import StoreWriter
from prelar.utils.errors import UserError


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
        assert fault(episode, source) is None
        assert len(episode.frames["front"]) == 6 + job.episode


def test_given_tasks_and_cameras_are_kept(folder: Path) -> None:
    (folder / "reach_target-v1-e1-front-7.npz").write_bytes(b"of a task and a camera that are not wanted")
    source = open_folder(folder, ["open_drawer"], ["left_shoulder"])
    assert source.cameras == ("left_shoulder",) and source.arrays == {"actions": 8, "gripper": 8}
    assert [(job.task, len(job.files)) for job in source.jobs()] == [("open_drawer", 1)] * 2
    for job in source.jobs():
        episode = source.collect(job)
        assert set(episode.frames) == {"left_shoulder"}
        assert fault(episode, source) is None
    with pytest.raises(
        UserError, match=r"demos\.tasks: nothing recorded of 'open_door'; there is open_drawer"
    ):
        open_folder(folder, ["open_door"])
    with pytest.raises(
        UserError, match=r"demos\.cameras: nothing recorded of 'overhead'; there is front, left"
    ):
        open_folder(folder, None, ["overhead"])


def test_content_is_kept_and_actions_stand_at_the_frame_before(folder: Path) -> None:
    source = open_folder(folder)
    episode = source.collect(source.jobs()[0])
    raw = np.load(folder / "open_drawer-v1-e0-front-6.npz", allow_pickle=False)
    assert np.array_equal(episode.frames["front"], raw["image"])
    assert np.array_equal(episode.arrays["actions"][:-1], raw["action"][1:])
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
    assert fault(source.collect(source.jobs()[1]), source) is None


def test_files_without_actions_are_videos(tmp_path: Path) -> None:
    write(tmp_path / "x-6.npz", action=None, gripper_pose=None)
    source = open_folder(tmp_path)
    assert source.arrays == {}
    assert fault(source.collect(source.jobs()[0]), source) is None


def test_a_missing_camera_is_a_fault(folder: Path) -> None:
    (folder / "reach_target-v1-e1-front-7.npz").unlink()
    source = open_folder(folder)
    episode = source.collect(source.jobs()[-1])
    assert fault(episode, source) == "camera front: no frames"


def reason_of(folder: Path) -> str:
    """The reason of the first episode, by either way."""
    source = open_folder(folder)
    episode = source.collect(source.jobs()[0])
    return episode.reason or fault(episode, source) or ""


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
    assert fault(source.collect(job), source) == "actions: shape (7, 3), expected (7, 8)"
    write(path, 7, action=None)
    assert source.collect(job).reason == f"{path.name}: holds no `action`"


def test_pickled_content_is_never_loaded(tmp_path: Path) -> None:
    write(tmp_path / "a-v0-e0-front-6.npz")
    path = tmp_path / "a-v0-e1-front-6.npz"
    np.savez(path, image=np.array([{"any": "object"}] * 6, dtype=object))
    source = open_folder(tmp_path)
    assert "pickle" in str(source.collect(source.jobs()[1]).reason).lower()


def test_actions_lead_from_each_frame_to_the_next(tmp_path: Path) -> None:
    """A replay file tells with a frame how it was reached, and begins with a dummy; so do velocities."""
    moved = np.random.default_rng(0).normal(size=(10, 2)).astype(np.float32)
    moved[0] = 0
    place = np.cumsum(moved, axis=0)
    write(tmp_path / "reach" / "20220101T000000-abc-10.npz", 10, action=moved, gripper_pose=place)
    source = open_folder(tmp_path)
    arrays = source.collect(source.jobs()[0]).arrays
    assert np.allclose(arrays["gripper"][:-1] + arrays["actions"][:-1], arrays["gripper"][1:], atol=1e-5)
    assert source.attributes()["alignment"] != episodes.ALIGNMENT


@pytest.mark.parametrize(
    "names",
    [
        ("a/pick/pick-v0-e0-front-6.npz", "b/pick/pick-v0-e0-front-6.npz"),
        ("pick-v0-e0-front-6.npz", "pick-v0-e0-front-7.npz"),
        ("pick-v0-e0-front-6.npz", "pick-v00-e000-front-6.npz"),
    ],
)
def test_two_files_of_one_episode_and_camera_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        write(tmp_path / name)
    with pytest.raises(UserError, match=f"{names[0]} and {names[1]} are the same episode; leave one"):
        open_folder(tmp_path)


def test_files_of_one_name_in_two_folders_are_told_apart(tmp_path: Path) -> None:
    for name in ("a/pick/x-6.npz", "b/pick/x-6.npz", "b/pick/y-6.npz"):
        write(tmp_path / name)
    jobs = open_folder(tmp_path).jobs()
    assert [(job.task, job.episode, job.files[0][1]) for job in jobs] == [
        ("pick", 0, "a/pick/x-6.npz"),
        ("pick", 1, "b/pick/x-6.npz"),
        ("pick", 2, "b/pick/y-6.npz"),
    ]


def test_an_odd_name_spoils_no_other_episode(tmp_path: Path) -> None:
    for name in ("pick-v0-e0-front-6.npz", "pick-v0-e1-front-6.npz", "pick/odd-6.npz"):
        write(tmp_path / name)
    source = open_folder(tmp_path)
    jobs = source.jobs()
    assert source.cameras == ("front",) and [job.episode for job in jobs] == [0, 1, 2]
    reasons = [source.collect(job).reason for job in jobs]
    assert reasons == [None, None, "pick/odd-6.npz: is of camera camera, not of front"]
    for number in range(2):
        write(tmp_path / f"reach/{number}-6.npz")
    write(tmp_path / "reach/2-6.npz")
    source = open_folder(tmp_path)
    assert source.cameras == ("camera",)
    assert sum(source.collect(job).reason is None for job in source.jobs()) == 4
    assert open_folder(tmp_path, None, ["front"]).cameras == ("front",)


def member(path: Path, name: str, content: bytes) -> None:
    """Put a member into an episode file."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, content)


def header(shape: str, dtype: str = "<f4") -> bytes:
    """The beginning of an array in a file, without its numbers."""
    told = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(told).to_bytes(2, "little") + told


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"no array", "."),
        (b"", "."),
        (header("(1099511627776, 8)"), "tells of 35184372088832 bytes"),
        (header("(-6, 8)"), "tells of"),
        (header("(6, 8)"), "tells of 192 bytes and has"),
        (header("(6, 8)", "|O"), "pickle"),
        (header("9" * 5000), "."),
        (b"\x93NUMPY\x09\x00" + bytes(100), "unknown version"),
    ],
    ids=["text", "nothing", "too long", "negative", "cut", "objects", "digits", "version"],
)
def test_an_array_that_is_none_is_the_reason_of_its_file(folder: Path, content: bytes, reason: str) -> None:
    path = folder / "open_drawer-v1-e0-front-6.npz"
    write(path, action=None)
    member(path, "action.npy", content)
    source = open_folder(folder)
    assert source.arrays == {"actions": 8, "gripper": 8}
    reasons = [source.collect(job).reason for job in source.jobs()]
    assert re.search(f"^{path.name}: .*{reason}", str(reasons[0]))
    assert reasons[1:] == [None] * 3


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_odd_files_are_reasons_and_other_episodes_come_in(folder: Path, tmp_path: Path) -> None:
    path = folder / "open_drawer-v1-e0-front-6.npz"
    member(path, "action.npy", b"again")
    source = open_folder(folder)
    assert source.collect(source.jobs()[0]).reason == f"{path.name}: a name stands twice in its directory"
    path.unlink()
    os.mkfifo(path)
    assert source.collect(source.jobs()[0]).reason == f"{path.name}: not a regular file"
    path.unlink()
    with path.open("wb") as handle:
        handle.truncate(1 << 40)
    assert str(source.collect(source.jobs()[0]).reason).startswith(f"{path.name}: 1099511627776 bytes, more")
    write(path, action=np.zeros((6, 3), np.float32))
    write(folder / "open_drawer-v1-e0-left_shoulder-6.npz", action=np.zeros((6, 3), np.float32))
    source = open_folder(folder)
    assert source.arrays["actions"] == 8
    faults = [fault(source.collect(job), source) for job in source.jobs()]
    assert faults == ["actions: shape (6, 3), expected (6, 8)", None, None, None]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (b"pick-v99999999999-e3-front-6.npz", "its variation, 99999999999, is more than the index holds"),
        (b"pick-v1-e2147483648-front-6.npz", "its episode, 2147483648, is more than the index holds"),
        (b"pi\xffck-v0-e0-front-6.npz", None),
        (b"a\xff/pi\x1bck-v0-e0-front-6.npz", None),
    ],
)
def test_what_the_index_cannot_hold_is_a_row_with_its_reason(
    tmp_path: Path, name: bytes, reason: str | None
) -> None:
    write(tmp_path / "good-v0-e0-front-6.npz")
    odd = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name)))  # noqa: PTH118
    write(odd)
    source = open_folder(tmp_path)
    with StoreWriter(tmp_path / "x.zarr", arrays=source.arrays) as writer:
        for job in source.jobs():
            for frames, row, arrays in clips(source.collect(job), source, 0, Splits(source.jobs(), [])):
                writer.append(frames, row, **arrays)
        store = writer.finish({})
    rows = {row["task"]: row for row in store.index.to_pylist()}
    assert rows.pop("good")["status"] == "ok"
    ((task, row),) = rows.items()
    assert row["reason"] == reason and task.isprintable() and row["id"].isprintable()
    assert row["status"] == ("bad" if reason else "ok")


def test_oversized_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a-6.npz")
    monkeypatch.setattr("prelar.demos.apv_npz.MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="more than 1000"):
        read_npz(tmp_path / "a-6.npz")


def test_folders_without_episodes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \.npz episode"):
        open_folder(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        open_folder(tmp_path / "absent")
    with pytest.raises(UserError, match="no such folder"):
        ApvNpz(tmp_path / "absent", (), ()).jobs()
