"""The embedded sample has the shape of SSv2's archive, shows experts at work, and is the same each time."""

import csv
import dataclasses
import hashlib
import io
import json
import re
import subprocess
import tarfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest

from prelar import sample
from prelar.config import Sample, load_config
from prelar.envs.metaworld import Simulator
from prelar.envs.names import TASKS
from prelar.utils.errors import UserError

CLIPS = 8
ALL: dict[str, Any] = {
    "longest": 80,
    "tasks": None,
    "cameras": None,
    "width": None,
    "pace": None,
    "free": 0.0,
    "parts": 3,
    "seed": 0,
}
"""Settings of a sample of every task, camera and width."""


def plan(clips: int, **changed: Any) -> list[sample.ClipPlan]:
    return sample.plan(Sample(**ALL | changed, clips=clips))


def digest(folder: Path) -> dict[str, str]:
    """Digest of every file of a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def small() -> list[sample.ClipPlan]:
    """A plan of few short clips, two of one task."""
    planned = plan(CLIPS, seed=3)[:4]
    tasks = ["drawer-open", "drawer-open", "window-close", "button-press-topdown"]
    return [
        dataclasses.replace(clip, task=task, frames=8 + number)
        for number, (clip, task) in enumerate(zip(planned, tasks, strict=True))
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, small: list[sample.ClipPlan]) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    make(folder, small, workers=2)
    return folder


def make(folder: Path, clips: list[sample.ClipPlan], workers: int) -> None:
    sample.make_sample(folder, clips, parts=3, workers=workers)


def read_archive(folder: Path) -> dict[str, bytes]:
    """The clips of the byte-split tar.gz."""
    parts = sorted(folder.glob(f"{sample.NAME}-*"))
    with tarfile.open(
        fileobj=io.BytesIO(b"".join(part.read_bytes() for part in parts)), mode="r:gz"
    ) as archive:
        return {
            entry.name: archive.extractfile(entry).read()  # type: ignore[union-attr]
            for entry in archive.getmembers()
            if entry.isfile()
        }


def decode(webm: bytes, width: int, tmp_path: Path) -> np.ndarray:
    path = tmp_path / "clip.webm"
    path.write_bytes(webm)
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path)]
    raw = subprocess.run(
        [*command, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], capture_output=True, check=True
    )
    return np.frombuffer(raw.stdout, np.uint8).reshape(-1, sample.HEIGHT, width, 3)


def test_plan_has_the_promised_spread() -> None:
    planned = plan(80)
    assert planned == plan(80) != plan(80, seed=1)
    frames = [clip.frames for clip in planned]
    assert min(frames) == 8 and max(frames) == 80
    assert sum(length >= 25 for length in frames) >= 64
    assert len({clip.id for clip in planned}) == 80 and all(clip.id.isdecimal() for clip in planned)
    assert {clip.task for clip in planned} == set(sample.SCENES) <= set(TASKS)
    assert len({clip.width for clip in planned}) >= 4 and len({clip.camera for clip in planned}) >= 4
    splits = Counter(clip.split for clip in planned)
    assert splits["train"] > splits["validation"] > splits["test"] > 0
    assert len({(clip.task, clip.episode) for clip in planned}) == 80


@pytest.mark.parametrize("clips", [8, 9, 81, 200])
def test_plans_of_any_size_are_whole(clips: int) -> None:
    planned = plan(clips, seed=1)
    assert len(planned) == len({clip.id for clip in planned}) == clips
    assert {clip.split for clip in planned} == {"train", "validation", "test"}
    assert all(sample.SHORTEST <= clip.frames <= 80 for clip in planned)
    assert sum(clip.frames >= sample.USEFUL for clip in planned) >= 0.8 * clips


@pytest.mark.parametrize("free", [0.0, 0.3, 1.0])
def test_settings_choose_what_the_clips_show(free: float) -> None:
    planned = plan(40, tasks=["reach", "push"], cameras=["corner"], width=240, pace=4, free=free, longest=32)
    assert {clip.task for clip in planned} == {"reach", "push"} and {clip.camera for clip in planned} == {
        "corner"
    }
    assert {clip.width for clip in planned} == {240} and {clip.pace for clip in planned} == {4}
    assert sum(clip.free for clip in planned) == round(40 * free)
    assert {clip.template for clip in planned if clip.free} <= {sample.FREE[0]}
    assert max(clip.frames for clip in planned) == 32


def test_a_task_without_a_scene_is_named() -> None:
    with pytest.raises(UserError, match=r"^sample\.tasks: soccer has no scene; choose of drawer-open, "):
        plan(CLIPS, tasks=["soccer"])


@pytest.mark.parametrize("free", [False, True])
def test_frames_at_a_pace_are_that_many_steps_apart(free: bool) -> None:
    clip = dataclasses.replace(
        plan(CLIPS, pace=3)[0], task="reach", camera="corner", frames=6, free=free, width=240
    )
    with Simulator("reach") as simulator:
        drawn = list(sample.film(simulator, clip))
        episode, actions = sample.move_freely(clip) if free else sample.play(simulator, clip)
        simulator.reset(clip.seed, episode)
        for number in range(clip.frames):
            assert np.array_equal(drawn[number], simulator.draw("corner", 240, sample.HEIGHT))
            for action in actions[3 * number : 3 * number + 3]:
                simulator.step(action)


def test_pieces_are_one_cut_archive(made: Path, small: list[sample.ClipPlan]) -> None:
    parts = sorted(path.name for path in made.glob(f"{sample.NAME}-*"))
    assert parts == [f"{sample.NAME}-{number:02d}" for number in range(3)]
    assert (made / parts[0]).read_bytes()[:2] == b"\x1f\x8b"
    sizes = [(made / part).stat().st_size for part in parts]
    assert sizes[0] == sizes[1] >= sizes[2] > 0
    assert set(read_archive(made)) == {f"{sample.NAME}/{clip.id}.webm" for clip in small}
    assert {path.name for path in made.iterdir()} == {*parts, sample.LABELS}


def test_labels_agree_with_each_other(made: Path, small: list[sample.ClipPlan]) -> None:
    with zipfile.ZipFile(made / sample.LABELS) as archive:
        texts = {name: archive.read(name).decode() for name in archive.namelist()}
    assert set(texts) == {
        f"labels/{name}"
        for name in ("labels.json", "train.json", "validation.json", "test.json", "test-answers.csv")
    }
    numbers = json.loads(texts["labels/labels.json"])
    assert sorted(numbers.values(), key=int) == [str(number) for number in range(len(numbers))]
    for split in ("train", "validation"):
        rows = json.loads(texts[f"labels/{split}.json"])
        assert {row["id"] for row in rows} == {clip.id for clip in small if clip.split == split}
        for row in rows:
            assert set(row) == {"id", "label", "template", "placeholders"}
            assert re.sub(r"[\[\]]", "", row["template"]) in numbers
            assert row["template"].count("[something]") == len(row["placeholders"])
            assert all(placeholder in row["label"] for placeholder in row["placeholders"])
            assert "[" not in row["label"]
    tested = {clip.id for clip in small if clip.split == "test"}
    assert {row["id"] for row in json.loads(texts["labels/test.json"])} == tested
    answers = dict(csv.reader(io.StringIO(texts["labels/test-answers.csv"]), delimiter=";"))
    assert set(answers) == tested and set(answers.values()) <= set(numbers)


def test_clips_are_vp9_with_the_planned_frames(
    made: Path, small: list[sample.ClipPlan], tmp_path: Path
) -> None:
    webms = read_archive(made)
    for clip in small:
        webm = webms[f"{sample.NAME}/{clip.id}.webm"]
        assert webm[:4] == b"\x1a\x45\xdf\xa3" and b"webm" in webm[:64] and b"V_VP9" in webm
        assert decode(webm, clip.width, tmp_path).shape == (clip.frames, sample.HEIGHT, clip.width, 3)
    told = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(tmp_path / "clip.webm")], capture_output=True, text=True
    )
    assert "12 fps" in told.stderr and "vp9" in told.stderr


def test_clips_show_the_drawn_frames_in_motion(
    made: Path, small: list[sample.ClipPlan], tmp_path: Path
) -> None:
    clip = small[0]
    shown = decode(read_archive(made)[f"{sample.NAME}/{clip.id}.webm"], clip.width, tmp_path).astype(int)
    with Simulator(clip.task) as simulator:
        drawn = np.stack(list(sample.film(simulator, clip))).astype(int)
    assert np.abs(shown - drawn).mean() < 6
    assert np.abs(drawn[-1] - drawn[0]).mean() > 3
    assert (np.abs(np.diff(drawn, axis=0)).max(axis=(1, 2, 3)) > 30).all()


def test_narrow_clips_are_the_middle_of_wide_ones() -> None:
    wide = dataclasses.replace(plan(CLIPS)[0], width=426, frames=8)
    narrow = dataclasses.replace(wide, width=240)
    with Simulator(wide.task) as simulator:
        first, second = next(sample.film(simulator, wide)), next(sample.film(simulator, narrow))
    assert np.abs(second.astype(int) - first[:, 93:333].astype(int)).mean() < 0.1


def test_experts_solve_what_the_clip_shows(small: list[sample.ClipPlan]) -> None:
    for clip in small[1:]:
        with Simulator(clip.task) as simulator:
            episode, actions = sample.play(simulator, clip)
            simulator.reset(clip.seed, episode)
            assert any(simulator.step(action).success for action in actions)
            assert len(actions) >= clip.frames


def test_bytes_do_not_depend_on_the_run_or_the_workers(
    made: Path, small: list[sample.ClipPlan], tmp_path: Path
) -> None:
    make(tmp_path / "again", small, workers=1)
    assert digest(tmp_path / "again") == digest(made)


def test_encoder_failure_is_told(tmp_path: Path) -> None:
    frames = [np.zeros((sample.HEIGHT, 64, 3), np.uint8)] * 2
    with pytest.raises(RuntimeError, match=r"ffmpeg, status .*No such file"):
        sample.encode(frames, 64, tmp_path / "absent" / "x.webm")


def test_stage_publishes_whole_folders_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config()
    monkeypatch.chdir(tmp_path)
    sample.STAGING.joinpath("sample", "left over").mkdir(parents=True)

    def fake(folder: Path, planned: list[sample.ClipPlan], **sizes: int) -> None:
        assert not folder.exists() and not sample.OUTPUT.exists()
        folder.mkdir(parents=True)
        (folder / "piece").write_text(f"{len(planned)} {sorted(sizes)}")

    monkeypatch.setattr(sample, "make_sample", fake)
    sample.run(config)
    assert [path.name for path in sample.OUTPUT.iterdir()] == ["piece"]
    assert not (sample.STAGING / "sample").exists()
    sizes = config.sample
    told = f"sample: {sizes.clips} clips in {sizes.parts} parts -> data/sample\n"
    assert capsys.readouterr().out == told
