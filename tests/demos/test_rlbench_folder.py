"""RLBench's own folders: layout, pictures, and pickles that cannot do anything."""

import os
import pickle
import pickletools
import shutil
import struct
import sys
import types
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from prelar.demos.episodes import Splits, clips, fault
from prelar.demos.rlbench_folder import (
    FPS,
    LOW_DIM,
    VARIATION,
    RlbenchFolder,
    open_folder,
    read_low_dim,
    read_pictures,
    read_variation,
)
from prelar.envs.names import RLBENCH_CAMERAS
from prelar.utils import pickles
from prelar.utils.errors import UserError
from tests.memory import growth

LENGTH = 5


class Foreign:
    """Something that RLBench's pickles never hold."""


@pytest.fixture
def rlbench(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Classes that pickle under RLBench's names, while a test writes its files."""
    made = {}
    for package in ("rlbench", "rlbench.backend"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    for module, *names in (
        ("rlbench.demo", "Demo"),
        ("rlbench.backend.observation", "Observation", "UnimanualObservation", "BimanualObservation"),
    ):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
        for name in names:
            made[name] = type(name, (), {"__module__": module})
            setattr(sys.modules[module], name, made[name])
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
    for camera in RLBENCH_CAMERAS:
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
    return collected.reason or fault(collected, source) or ""


def test_episode_is_read_whole(tmp_path: Path, episode: Path) -> None:
    source = RlbenchFolder(tmp_path)
    (job,) = source.jobs()
    assert (job.task, job.variation, job.episode) == ("push_button", 2, 3)
    collected = source.collect(job)
    assert fault(collected, source) is None
    picture = np.asarray(Image.open(episode / "wrist_rgb" / "4.png"))
    assert np.array_equal(collected.frames["wrist"][4], picture)
    actions = collected.arrays["actions"]
    assert np.allclose(actions[1], [*(np.arange(7) / 10 + 2), 1.0]) and not actions[-1].any()
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
    assert fault(whole, source) is None
    assert lacking.reason == "wrist_rgb/0.png: missing"


def test_given_tasks_and_cameras_are_kept(
    tmp_path: Path, episode: Path, rlbench: types.SimpleNamespace
) -> None:
    write_episode(tmp_path / "lamp_on/variation0/episodes/episode0", demo(rlbench))
    source = open_folder(tmp_path, "joint_velocity", ["lamp_on"], ["front", "wrist"])
    assert source.cameras == ("wrist", "front") and [job.task for job in source.jobs()] == ["lamp_on"]
    assert fault(source.collect(source.jobs()[0]), source) is None
    with pytest.raises(UserError, match=r"demos\.tasks: nothing recorded of 'lamp_off'; there is lamp_on"):
        open_folder(tmp_path, "joint_velocity", ["lamp_off"])
    shutil.rmtree(tmp_path / "lamp_on/variation0/episodes/episode0/front_rgb")
    with pytest.raises(UserError, match=r"demos\.cameras: nothing recorded of 'front'"):
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


def test_larger_pictures_become_means(tmp_path: Path, rlbench: types.SimpleNamespace) -> None:
    folder = write_episode(tmp_path / "a/variation0/episodes/episode0", demo(rlbench), size=256)
    assert reason_of(tmp_path) == ""
    source = RlbenchFolder(tmp_path)
    frames = source.collect(source.jobs()[0]).frames["front"]
    recorded = np.asarray(Image.open(folder / "front_rgb/3.png")).astype(int)
    assert np.array_equal(frames[3], (recorded.reshape(64, 4, 64, 4, 3).sum((1, 3)) + 8) // 16)


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_any_protocol_and_numpy_say_the_same(
    tmp_path: Path, rlbench: types.SimpleNamespace, core: str, protocol: int
) -> None:
    changed = np.arange(7, dtype=">f4")
    changed.flags.writeable = False
    held = demo(
        rlbench, joint_velocities=changed, gripper_open=np.float32(0), joint_positions=np.arange(14.0)[::2]
    )
    held._observations[3].misc["columns"] = np.asfortranarray(np.eye(3)[:, :2])
    if protocol >= 4:
        held._observations[3].misc |= {"handles": {1, (2, 3)}, 7: frozenset({4})}
    raw = pickle.dumps(held, protocol=protocol)
    for module in ("multiarray", "numeric"):
        here, there = (f"{name}.{module}" for name in (np._core.__name__, core))
        if protocol >= 4:
            here, there = (f"{chr(len(name))}{name}" for name in (here, there))
        raw = raw.replace(here.encode(), there.encode())
    path = tmp_path / LOW_DIM
    path.write_bytes(without_frames(raw))
    read = read_low_dim(path)
    assert read["actions"].shape == (LENGTH, 8)
    assert np.array_equal(read["actions"][1], [*range(7), 0.0])
    assert np.allclose(read["actions"][2, :7], np.arange(7) / 10 + 3)
    assert np.array_equal(read_low_dim(path, "joint_position")["actions"][1], [*range(0, 14, 2), 0.0])


def without_frames(raw: bytes) -> bytes:
    """A pickle whose lengths of frames, which may have changed, are left out."""
    frames = [place for opcode, _, place in pickletools.genops(raw) if opcode.name == "FRAME"]
    for place in reversed([place for place in frames if place is not None]):
        raw = raw[:place] + raw[place + 9 :]
    return raw


def test_observations_of_forks_and_bare_lists_are_read(
    tmp_path: Path, rlbench: types.SimpleNamespace
) -> None:
    path = tmp_path / LOW_DIM
    path.write_bytes(pickle.dumps(demo(rlbench)))
    wanted = read_low_dim(path)
    path.write_bytes(pickle.dumps(demo(rlbench)._observations))
    assert np.array_equal(read_low_dim(path)["actions"], wanted["actions"])
    rlbench.Observation = rlbench.UnimanualObservation
    path.write_bytes(pickle.dumps(demo(rlbench, perception_data={}, task_low_dim_state=None)))
    assert np.array_equal(read_low_dim(path)["gripper"], wanted["gripper"])
    rlbench.Observation = rlbench.BimanualObservation
    path.write_bytes(pickle.dumps(demo(rlbench)))
    with pytest.raises(ValueError, match=r"observation\.BimanualObservation, which no demonstration needs"):
        read_low_dim(path)


@pytest.mark.parametrize(
    ("held", "reason"),
    [
        ({"_observations": []}, "holds no Demo"),
        (3, "holds no Demo"),
        ([1, 2], "step 0 is no observation"),
        ([[]], "step 0 is no observation"),
        ([], "no step"),
    ],
)
def test_pickles_of_other_things_are_reasons_in_words(tmp_path: Path, held: object, reason: str) -> None:
    path = tmp_path / LOW_DIM
    path.write_bytes(pickle.dumps(held))
    with pytest.raises(ValueError, match=f"{LOW_DIM}: {reason}"):
        read_low_dim(path)


def test_fields_that_lack_are_named(tmp_path: Path, rlbench: types.SimpleNamespace) -> None:
    held, path = demo(rlbench), tmp_path / LOW_DIM
    del held._observations[1].gripper_pose
    path.write_bytes(pickle.dumps(held))
    with pytest.raises(ValueError, match="step 1 holds no gripper_pose"):
        read_low_dim(path)


@pytest.mark.parametrize("mode", ["joint_velocity", "joint_position", "gripper_pose"])
def test_actions_lead_from_each_frame_to_the_next(
    tmp_path: Path, rlbench: types.SimpleNamespace, mode: str
) -> None:
    """Steps as a simulator makes them: it moves with the velocities that it then tells."""
    length, random = 40, np.random.default_rng(0)
    velocities = np.cumsum(random.normal(size=(length, 7)), axis=0)
    positions = np.cumsum(velocities / FPS, axis=0)
    held = demo(rlbench, length)
    for number, step in enumerate(held._observations):
        step.joint_velocities, step.joint_positions = velocities[number], positions[number]
    path = tmp_path / LOW_DIM
    path.write_bytes(pickle.dumps(held))
    read = read_low_dim(path, mode)
    actions = read["actions"][:-1, :7]
    wanted = read["gripper"][1:, :7] if mode == "gripper_pose" else positions[1:]
    reached = positions[:-1] + actions / FPS if mode == "joint_velocity" else actions
    assert np.allclose(reached, wanted, atol=1e-4)


HUGE = struct.pack("<I", 1 << 31)
STEPS = {
    "a memo of 2**31": b"\x80\x04Nr" + HUGE + b".",
    "bytes of 2 GB that are not there": b"\x80\x04B" + HUGE + b"x.",
    "bytes of 8 EB that are not there": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"x.",
    "a frame of 8 EB": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"N.",
    "state for a name": b"\x80\x04cnumpy.core.multiarray\nscalar\nN}V__init__\nI1\ns\x86b.",
    "state for the name of a dict": b"\x80\x04cnumpy\ndtype\n}V_CODES\nNsb.",
    "a name from outside": b"\x80\x04cos\nsystem\n(X\x04\x00\x00\x00true\x85R.",
    "a name behind a dot": b"\x80\x04\x8c\x0crlbench.demo\x8c\x0eDemo.__class__\x93.",
    "an extension": b"\x80\x04\x82\x01.",
    "a buffer from outside": b"\x80\x05\x97.",
    "a persistent id": b"\x80\x04NQ.",
    "a digit too many": b"I" + b"9" * 5_000 + b"\n.",
    "no stack": b"\x80\x04\x85\x85b.",
    "bytes of a long text, over and over": b"\x80\x04c_codecs\nencode\n\x94X\x40\x42\x0f\x00"
    + b"x" * 1_000_000
    + b"\x94"
    + b"h\x00h\x01\x8c\x06latin1\x86R" * 300
    + b".",
}


@pytest.mark.parametrize("content", STEPS.values(), ids=STEPS.keys())
def test_hostile_pickles_cost_nothing_and_change_nothing(
    tmp_path: Path, rlbench: types.SimpleNamespace, content: bytes
) -> None:
    path = tmp_path / LOW_DIM
    with growth() as grown:
        for name, read in ((LOW_DIM, read_low_dim), (VARIATION, read_variation)):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match=f"^{name}: "):
                read(tmp_path / name)
        assert grown() < 30
    path.write_bytes(pickle.dumps(demo(rlbench)))
    assert read_low_dim(path)["actions"].shape == (LENGTH, 8)


def test_pickles_are_read_to_their_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, read in ((LOW_DIM, read_low_dim), (VARIATION, read_variation)):
        with (tmp_path / name).open("wb") as handle:
            handle.truncate(1 << 40)
        with pytest.raises(ValueError, match=f"{name}: 1099511627776 bytes, more than"):
            read(tmp_path / name)
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}: not a regular file"):
            read(tmp_path / name)
        (tmp_path / name).unlink()
    monkeypatch.setattr(pickles, "MAX_STEPS", 1000)
    (tmp_path / LOW_DIM).write_bytes(b"\x80\x04" + b"}" * 2000 + b".")
    with pytest.raises(ValueError, match="takes more than 1000 steps"):
        read_low_dim(tmp_path / LOW_DIM)


def test_keys_that_take_long_to_compare_are_passed_over(tmp_path: Path) -> None:
    """A tuple of itself twice, sixty times over: its hash would take for ever."""
    doubled = b"N" + b"".join(b"\x94h" + bytes([level]) + b"\x86" for level in range(60))
    (tmp_path / LOW_DIM).write_bytes(b"\x80\x04}" + doubled + b"Ns.")
    with pytest.raises(ValueError, match="holds no Demo"):
        read_low_dim(tmp_path / LOW_DIM)


def test_a_variation_of_a_folder_that_the_index_cannot_hold_is_a_bad_row(
    tmp_path: Path, rlbench: types.SimpleNamespace
) -> None:
    odd = "push\udcff_button"
    for place in ("good/variation0/episodes/episode0", f"{odd}/variation99999999999/episodes/episode1"):
        write_episode(tmp_path / place, demo(rlbench))
    source = open_folder(tmp_path, "joint_velocity")
    rows = [
        row
        for job in source.jobs()
        for _, row, _ in clips(source.collect(job), source, 0, Splits(source.jobs(), []))
        if row["camera"] == "front"
    ]
    assert [(row["task"], row["reason"]) for row in rows] == [
        ("good", None),
        ("push\\udcff_button", "its variation, 99999999999, is more than the index holds"),
    ]


@pytest.mark.parametrize("number", [2**31, 2**40, -1, 1.5, float("nan"), 10**400])
def test_variations_beyond_the_index_are_reasons(tmp_path: Path, number: float) -> None:
    (tmp_path / VARIATION).write_bytes(pickle.dumps(number))
    with pytest.raises(ValueError, match=f"{VARIATION}: the variation is"):
        read_variation(tmp_path / VARIATION)


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
    assert reason_of(tmp_path) == "actions: not finite at frame 1"


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


def png(width: int, height: int, *more: tuple[bytes, bytes]) -> bytes:
    """The beginning of a PNG that tells a size, without its pixels, and more chunks."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), *more, (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    packed = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (png(100_000, 100_000), "10000000000|100000x100000|exceeds"),
        (png(4_000, 4_000), "4000x4000 pixels, more than"),
        (png(64, 64), "truncated|cannot|broken|image file"),
        (png(64, 64, (b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(200 << 20)))), "."),
    ],
    ids=["header", "pixels", "data", "text"],
)
def test_pictures_that_unpack_to_too_much_are_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "0.png").write_bytes(content)
    with growth() as grown:
        with pytest.raises(ValueError, match=rf"/0\.png: .*({reason})"):
            read_pictures(tmp_path, 1)
        assert grown() < 30


def test_pictures_under_other_names(tmp_path: Path) -> None:
    for number in range(3):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(tmp_path / f"rgb_{number:04d}.png")
    assert read_pictures(tmp_path, 3)[:, 0, 0, 0].tolist() == [0, 1, 2]
    (tmp_path / "1.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1\.png: there under two names"):
        read_pictures(tmp_path, 3)
    (tmp_path / "1.png").unlink()
    (tmp_path / "rgb_0001.png").unlink()
    os.mkfifo(tmp_path / "1.png")
    with pytest.raises(ValueError, match=r"1\.png: not a regular file"):
        read_pictures(tmp_path, 3)


def test_folders_without_episodes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no <task>"):
        RlbenchFolder(tmp_path).jobs()
    with pytest.raises(UserError, match="no such folder"):
        RlbenchFolder(tmp_path / "absent").jobs()
