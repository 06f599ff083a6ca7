"""Bad episodes of every source end in the index, each with its reason, and good ones in the store."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flows import demos
from prelar.demos import apv_npz, metaworld, rlbench_folder, rlbench_pool
from prelar.demos.episodes import Job, Source
from prelar.demos.metaworld import Metaworld
from prelar.demos.rlbench_folder import LOW_DIM
from prelar.demos.rlbench_live import RlbenchLive
from prelar.store.store import Store
from prelar.store.writer import StoreWriter
from tests.demos import test_rlbench_folder as folders
from tests.demos.test_apv_npz import write
from tests.demos.test_rlbench_live import standin
from tests.flows.inline import work_inline
from tests.rlbench_standin import orders

rlbench_classes = folders.rlbench
__all__ = ["standin"]

LENGTH = 6
STILL = np.zeros((LENGTH, 64, 64, 3), np.uint8)
NO_ACTION = np.full((LENGTH, 8), np.nan, np.float32)
Damage = Callable[[Path], None]


class Hostile:
    """Makes a folder when it is unpickled by pickle itself."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def halved(name: str) -> Damage:
    """What leaves the first half of a file."""

    def halve(episode: Path) -> None:
        path = episode / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return halve


def rewritten(*cameras: str, **changes: Any) -> Damage:
    """What writes the `.npz` of some cameras anew with other content."""

    def rewrite(episode: Path) -> None:
        for camera in cameras:
            write(episode / f"{camera}.npz", LENGTH, **changes)

    return rewrite


def emptied(name: str, content: bytes = b"") -> Damage:
    """What writes something else to a file."""

    def empty(episode: Path) -> None:
        (episode / name).write_bytes(content)

    return empty


def pickled(make: Callable[[Path], Any]) -> Damage:
    """What writes a pickle anew."""
    return lambda episode: emptied(LOW_DIM, pickle.dumps(make(episode)))(episode)


def painted(width: int, length: int) -> Damage:
    """What writes a camera's last pictures anew, or leaves some out."""

    def paint(episode: Path) -> None:
        for number in range(length, LENGTH):
            (episode / f"front_rgb/{number}.png").unlink()
        Image.new("L", (width, 3)).save(episode / f"front_rgb/{length - 1}.png")

    return paint


NPZ: dict[str, tuple[Damage, str]] = {
    "truncated": (halved("front.npz"), "front-6.npz: "),
    "empty": (emptied("front.npz"), "front-6.npz: "),
    "no archive": (emptied("front.npz", b"x" * 99), "front-6.npz: "),
    "camera missing": (lambda episode: (episode / "front.npz").unlink(), "camera front: no frames"),
    "frames missing": (rewritten("front", image=None), "front-6.npz: holds no `image`"),
    "fewer frames": (rewritten("front", image=STILL[:5]), "front-6.npz: 5 frames, its name says 6"),
    "wrong size": (rewritten("front", image=STILL[:, :32]), "camera front: frames are uint8 (6, 32, 64, 3)"),
    "wrong type": (rewritten("front", image=STILL.astype("f4")), "camera front: frames are float32"),
    "objects": (rewritten("front", image=np.array([{}] * 6)), "front-6.npz: Object arrays cannot"),
    "still": (rewritten("front", "wrist", image=STILL), "nothing moves in any camera"),
    "no action": (rewritten("front", action=None), "front-6.npz: holds no `action`"),
    "NaN action": (rewritten("front", "wrist", action=NO_ACTION), "actions: not finite at frame 0"),
    "NaN in one camera": (
        rewritten("wrist", action=NO_ACTION),
        "wrist-6.npz: its action is not that of the other cameras",
    ),
    "fewer actions": (
        rewritten("front", "wrist", action=np.zeros((5, 8), np.float32)),
        "actions: shape (5, 8), expected (6, 8)",
    ),
}

FOLDER: dict[str, tuple[Damage, str]] = {
    "picture truncated": (halved("front_rgb/2.png"), "front_rgb/2.png: "),
    "picture missing": (lambda episode: (episode / "front_rgb/2.png").unlink(), "front_rgb/2.png: missing"),
    "camera cut off": (painted(3, 4), "front_rgb/4.png: missing"),
    "huge picture": (painted(2_000_000, 6), "front_rgb/5.png: 2000000x3 pixels"),
    "pickle truncated": (halved(LOW_DIM), f"{LOW_DIM}: "),
    "pickle missing": (lambda episode: (episode / LOW_DIM).unlink(), f"{LOW_DIM}: missing"),
    "hostile pickle": (
        pickled(lambda episode: Hostile(episode / "made")),
        f"{LOW_DIM}: names posix.mkdir, which no demonstration needs: refused",
    ),
    "objects": (pickled(lambda episode: np.array([None, {}])), f"{LOW_DIM}: dtype 'O8' is refused"),
}

LIVE: dict[str, tuple[str, str]] = {
    "fails": ("fail", "no demo in 1 attempts: 1 × Error in task push_button. Demo was completed, but"),
    "dies": ("die", "no demo in 1 attempts: 1 × the simulator ended by signal 11"),
    "picture missing": ("blind", "no demo in 1 attempts: 1 × camera front: no picture at step 3"),
    "too short": ("short", "1 frames; two are needed"),
    "NaN action": ("nan", "actions: not finite at frame 2"),
}


def rows_of(source: Source, path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The index of a source's store, filled as the flow does it."""
    work_inline(monkeypatch)
    with StoreWriter(path, arrays=source.arrays) as writer:
        demos.fill(writer, source, source.jobs(), 1)
        writer.finish(source.attributes())
    index: list[dict[str, Any]] = Store.open(path).index.to_pylist()
    return index


def check(rows: list[dict[str, Any]], source: Source, told: list[str]) -> None:
    """The first episode is stored; the others are bad under every camera, for the reasons in their order."""
    for row in rows:
        reason = told[row["episode"] - 1] if row["episode"] else None
        assert row["status"] == ("bad" if reason else "ok"), row
        assert (row["reason"] or "").startswith(reason or ""), row
    assert len(rows) == (1 + len(told)) * len(source.cameras)
    assert {row["camera"] for row in rows} == set(source.cameras)


def test_npz_episodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root := tmp_path / "recorded").mkdir()
    for number, damage in enumerate([None, *(damage for damage, _ in NPZ.values())]):
        (episode := tmp_path / str(number)).mkdir()
        for camera in ("front", "wrist"):
            write(episode / f"{camera}.npz", LENGTH)
        if damage:
            damage(episode)
        for path in episode.iterdir():
            path.rename(root / f"lamp_on-v0-e{number}-{path.stem}-{LENGTH}.npz")
    source = apv_npz.open_folder(root)
    rows = rows_of(source, tmp_path / "x.zarr", monkeypatch)
    named = [
        f"lamp_on-v0-e{number}-{reason}" if ".npz: " in reason else reason
        for number, (_, reason) in enumerate(NPZ.values(), 1)
    ]
    check(rows, source, named)


def test_folder_episodes(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = request.getfixturevalue("rlbench_classes")
    damages: dict[str, tuple[Damage, str]] = FOLDER | {
        "NaN action": (
            pickled(lambda _: folders.demo(classes, LENGTH, joint_velocities=np.full(7, np.nan))),
            "actions: not finite at frame 1",
        ),
        "wrong shape": (
            pickled(lambda _: folders.demo(classes, LENGTH, joint_velocities=np.zeros(6))),
            f"{LOW_DIM}: a joint or pose vector has shape (6,), not (7,)",
        ),
        "fewer steps": (
            pickled(lambda _: folders.demo(classes, 4)),
            "left_shoulder_rgb/4.png: left over: the episode has 4 steps",
        ),
    }
    root = tmp_path / "recorded"
    for number, damage in enumerate([None, *(damage for damage, _ in damages.values())]):
        place = root / f"lamp_on/variation0/episodes/episode{number}"
        folders.write_episode(place, folders.demo(classes, LENGTH), LENGTH)
        if damage:
            damage(place)
    source = rlbench_folder.open_folder(root, "joint_velocity")
    check(
        rows_of(source, tmp_path / "x.zarr", monkeypatch), source, [reason for _, reason in damages.values()]
    )
    assert not list(root.rglob("made"))


def test_live_episodes(standin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rlbench_pool, "ATTEMPTS", 1)
    orders(standin, push_button=" ".join(["work", *(word for word, _ in LIVE.values())]))
    source = RlbenchLive(("push_button",), 1, 1 + len(LIVE), ("front", "wrist"))
    rows = rows_of(source, tmp_path / "x.zarr", monkeypatch)
    check(rows, source, [reason for _, reason in LIVE.values()])


def test_episodes_of_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metaworld, "MAX_STEPS", 90)
    source = Metaworld(("reach",), 2, ("corner",), 0.0, False, 0)
    act = Metaworld._act

    def acted(self: Metaworld, simulator: Any, job: Job) -> tuple[Any, bool]:
        actions, solved = act(self, simulator, job)
        return actions, solved and job.episode == 0

    monkeypatch.setattr(Metaworld, "_act", acted)
    rows = rows_of(source, tmp_path / "x.zarr", monkeypatch)
    check(rows, source, ["the expert did not solve the task in "])
    assert [row["success"] for row in rows] == [True, False]


@settings(max_examples=150, deadline=None)
@given(where=st.integers(0, 10**9), flip=st.integers(1, 255))
def test_no_damaged_byte_ends_the_run(
    tmp_path_factory: pytest.TempPathFactory, where: int, flip: int
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    path = folder / f"lamp_on-v0-e0-front-{LENGTH}.npz"
    write(path, LENGTH, image=np.arange(LENGTH * 64 * 64 * 3, dtype=np.uint8).reshape(LENGTH, 64, 64, 3))
    content = bytearray(path.read_bytes())
    content[where % len(content)] ^= flip
    path.write_bytes(content)
    source = apv_npz.open_folder(folder)
    episode = source.collect(source.jobs()[0])
    assert episode.reason or episode.frames["front"].shape[0] == LENGTH
