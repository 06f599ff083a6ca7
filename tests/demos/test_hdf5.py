"""HDF5 files of robomimic's and LIBERO's layout: what is read, and what is refused for a reason."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from prelar.demos import hdf5
from prelar.demos.episodes import Splits, clips
from prelar.utils.errors import UserError

ENV = {"env_name": "Lift", "env_kwargs": {"control_freq": 20}}
SPOKEN = {"language_instruction": "open the drawer"}


def write_hdf5(path: Path, lengths: list[int], size: int = 128) -> Path:
    """A file as LIBERO writes them, bottom rows first, two cameras an episode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs.update(env_args=json.dumps(ENV), problem_info=json.dumps(SPOKEN))
        data.attrs["macros_image_convention"] = "opengl"
        for number, length in enumerate(lengths):
            random = np.random.default_rng([number, length])
            demo = data.create_group(f"demo_{number}")
            demo["actions"] = random.normal(size=(length, 7))
            for camera in ("agentview_rgb", "eye_in_hand_rgb"):
                pictures = random.integers(0, 256, (length, size, size, 3), np.uint8)
                demo.create_dataset(
                    f"obs/{camera}", data=pictures, chunks=(1, size, size, 3), compression="gzip"
                )
            demo["obs/ee_pos"] = random.normal(size=(length, 3))
    return path


def test_episodes_are_upright_with_their_actions_task_and_rate(tmp_path: Path) -> None:
    for number in (0, 1):
        write_hdf5(tmp_path / f"deep/{number}.hdf5", [6, 8] * 6)
    source = hdf5.open_folder(tmp_path)
    assert source.cameras == ("agentview_rgb", "eye_in_hand_rgb") and source.arrays == {"actions": 7}
    jobs = source.jobs()
    assert [job.episode for job in jobs] == list(range(24)) and {job.task for job in jobs} == {
        "open the drawer"
    }
    with h5py.File(tmp_path / "deep/1.hdf5", locking=False) as file:
        for job in (jobs[14], jobs[22]):
            demo = file["data"][f"demo_{job.episode - 12}"]
            episode = source.collect(job)
            assert episode.reason is None and episode.fps == 20.0
            assert np.array_equal(episode.arrays["actions"][:-1], demo["actions"][:-1].astype(np.float32))
            assert not episode.arrays["actions"][-1].any()
            for camera in source.cameras:
                upright = demo["obs"][camera][:][:, ::-1]
                blocks = upright.reshape(len(upright), 64, 2, 64, 2, 3).mean((2, 4))
                assert np.abs(episode.frames[camera] - blocks).max() <= 0.5
    chosen = hdf5.open_folder(tmp_path, cameras=["eye_in_hand_rgb"], tasks=["open the drawer"])
    assert chosen.cameras == ("eye_in_hand_rgb",) and len(chosen.jobs()) == 24


def test_robomimic_s_pictures_stay_as_they_are_and_tasks_are_environments(tmp_path: Path) -> None:
    with h5py.File(write_hdf5(tmp_path / "x.hdf5", [5], size=64), "a") as file:
        del file["data"].attrs["macros_image_convention"], file["data"].attrs["problem_info"]
        pictures = file["data/demo_0/obs/agentview_rgb"][:]
    source = hdf5.open_folder(tmp_path)
    (job,) = source.jobs()
    assert job.task == "Lift"
    assert np.array_equal(source.collect(job).frames["agentview_rgb"], pictures)


def test_demonstrations_of_any_numbering_are_read_by_their_own_names(tmp_path: Path) -> None:
    """Some writers pad numbers with zeros, some leave gaps."""
    names = ["demo_000", "demo_2", "demo_010", "demo_10"]
    with h5py.File(write_hdf5(tmp_path / "x.hdf5", [5, 6, 7, 8], size=64), "a") as file:
        for number, name in enumerate(names):
            file["data"].move(f"demo_{number}", f"moved/{name}")
        for name in names:
            file["data"].move(f"moved/{name}", name)
        expected = [file["data"][name]["actions"][:-1].astype(np.float32) for name in names]
    source = hdf5.open_folder(tmp_path)
    for job, actions in zip(source.jobs(), expected, strict=True):
        episode = source.collect(job)
        assert episode.reason is None and np.array_equal(episode.arrays["actions"][:-1], actions)


def test_the_largest_chunk_that_is_read_fits_the_cache(tmp_path: Path) -> None:
    """Else the library unpacks the whole chunk anew for each of its pictures."""
    with hdf5._opened(write_hdf5(tmp_path / "x.hdf5", [5])) as file:
        assert file.id.get_access_plist().get_cache()[2] >= hdf5.MAX_CHUNK


Damage = Callable[[h5py.Group, Path], object]


def replaced(name: str, make: Callable[[h5py.Group, str, Path], object]) -> Damage:
    """What puts something else in the place of an array."""

    def replace(demo: h5py.Group, folder: Path) -> None:
        del demo[name]
        make(demo, name, folder)

    return replace


def linked_to(link: Callable[[Path], object]) -> Callable[[h5py.Group, str, Path], object]:
    return lambda demo, name, folder: demo.__setitem__(name, link(folder))


def elsewhere(demo: h5py.Group, name: str, folder: Path) -> None:
    demo.create_dataset(name, (8, 7), "f8", external=[(str(folder / "secret"), 0, 8 * 7 * 8)])


def virtual(demo: h5py.Group, name: str, folder: Path) -> None:
    layout = h5py.VirtualLayout((8, 7), "f8")
    layout[:] = h5py.VirtualSource(str(folder / "other.h5"), "x", (8, 7))
    demo.create_virtual_dataset(name, layout)


def giant_chunks(demo: h5py.Group, name: str, folder: Path) -> None:
    demo.create_dataset(name, (8, 20000, 2000, 3), np.uint8, chunks=(8, 20000, 2000, 3), compression="gzip")


CAMERA = "obs/agentview_rgb"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "an external link": (
        replaced("actions", linked_to(lambda folder: h5py.ExternalLink(str(folder / "other.h5"), "/x"))),
        "actions is a soft or external link",
    ),
    "an external link to pictures": (
        replaced(CAMERA, linked_to(lambda folder: h5py.ExternalLink(str(folder / "other.h5"), "/x"))),
        "agentview_rgb is a soft or external link",
    ),
    "a soft link": (
        replaced("actions", linked_to(lambda folder: h5py.SoftLink("/data/demo_0/actions"))),
        "actions is a soft or external link",
    ),
    "numbers in another file": (replaced("actions", elsewhere), "lies in other files"),
    "a virtual data set": (replaced("actions", virtual), "lies in other files"),
    "chunks too large": (replaced(CAMERA, giant_chunks), "too large to unpack"),
    "no actions": (replaced("actions", lambda *_: None), "holds no actions"),
    "no camera": (replaced(CAMERA, lambda *_: None), "holds no agentview_rgb"),
    "actions of another width": (
        replaced("actions", lambda demo, name, _: demo.__setitem__(name, np.arange(16.0).reshape(8, 2))),
        r"actions: shape \(8, 2\), expected \(8, 7\)",
    ),
    "actions of another length": (
        replaced("actions", lambda demo, name, _: demo.__setitem__(name, np.random.normal(size=(5, 7)))),
        r"actions: shape \(5, 7\), expected \(8, 7\)",
    ),
    "actions that are none": (
        replaced("actions", lambda demo, name, _: demo.__setitem__(name, np.full((8, 7), np.nan))),
        "actions: not finite",
    ),
    "actions that never change": (
        replaced("actions", lambda demo, name, _: demo.__setitem__(name, np.ones((8, 7)))),
        "its actions never change",
    ),
    "texts for actions": (
        replaced("actions", lambda demo, name, _: demo.__setitem__(name, ["a"] * 8)),
        "actions is no array of numbers",
    ),
    "pictures of another kind": (
        replaced(CAMERA, lambda demo, name, _: demo.__setitem__(name, np.zeros((8, 4, 4, 3)))),
        "float64 .* not uint8",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damage_is_the_reason_of_its_episode_alone(name: str, tmp_path: Path) -> None:
    damage, reason = DAMAGES[name]
    (tmp_path / "secret").write_bytes(bytes(1000))
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["x"] = np.random.normal(size=(8, 7))
    path = write_hdf5(tmp_path / "set/x.hdf5", [6, 8, 8, 6])
    with h5py.File(path, "a") as file:
        damage(file["data/demo_1"], tmp_path)
    source = hdf5.open_folder(tmp_path / "set")
    reasons = []
    for job in source.jobs():
        records = list(clips(source.collect(job), source, 0, Splits([job], [])))
        reasons.append({row["reason"] for _, row, _ in records})
    assert re.search(reason, str(*reasons[1])) and reasons[0] == reasons[2] == reasons[3] == {None}


def test_a_file_that_is_none_is_one_row(tmp_path: Path) -> None:
    write_hdf5(tmp_path / "a.hdf5", [6])
    (tmp_path / "b.hdf5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(200))
    source = hdf5.open_folder(tmp_path)
    reasons = {job.task: source.collect(job).reason for job in source.jobs()}
    assert reasons["open the drawer"] is None and str(reasons["b"]).startswith("b.hdf5, demo_0: ")


def test_a_folder_without_pictures_is_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no \.hdf5 file"):
        hdf5.open_folder(tmp_path)
    with h5py.File(write_hdf5(tmp_path / "x.hdf5", [6]), "a") as file:
        del file["data/demo_0/obs/agentview_rgb"], file["data/demo_0/obs/eye_in_hand_rgb"]
    with pytest.raises(UserError, match="holds pictures"):
        hdf5.open_folder(tmp_path)
