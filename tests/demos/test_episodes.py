"""Demonstrations: repeatable experts, the alignment of actions, faults in words, splits, suites."""

import dataclasses
import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prelar.config import View
from prelar.demos import episodes, metaworld
from prelar.demos.episodes import Episode, Job, Splits, at_size, clips, fault
from prelar.demos.metaworld import Metaworld
from prelar.envs.metaworld import Simulator
from prelar.store.store import Store
from prelar.store.writer import StoreWriter
from prelar.utils.errors import UserError
from prelar.utils.frames import SIZE
from prelar.validation.demonstrations import changed_share, demonstration_suites
from prelar.validation.suites import facts, validate

SOURCE = Metaworld(
    tasks=("drawer-close", "reach"),
    episodes=2,
    cameras=("corner", "topview"),
    noise=0.1,
    keep_failures=False,
    seed=0,
)


@pytest.fixture(scope="module")
def episode() -> Episode:
    return SOURCE.collect(SOURCE.jobs()[0])


def build(path: Path, collected_episodes: list[Episode], source: episodes.Source = SOURCE) -> Store:
    """A store of the given episodes."""
    splits = Splits([episode.job for episode in collected_episodes], [])
    with StoreWriter(path, arrays=source.arrays) as writer:
        for episode in collected_episodes:
            for frames, row, arrays in clips(episode, source, 0, splits):
                writer.append(frames, row, **arrays)
        return writer.finish({})


def synthetic(job: Job, *, length: int = 12, seed: int = 0) -> Episode:
    """An episode of noise that passes every check."""
    random = np.random.default_rng([seed, job.episode])
    actions = random.uniform(-1, 1, (length, 4)).astype(np.float32)
    actions[-1] = 0
    return Episode(
        job,
        {camera: random.integers(0, 256, (length, SIZE, SIZE, 3), np.uint8) for camera in SOURCE.cameras},
        {"actions": actions, "gripper": np.zeros((length, 8), np.float32)},
        success=True,
        fps=80.0,
    )


def test_clips_made_by_us_carry_the_digests_of_their_frames(tmp_path: Path) -> None:
    job = SOURCE.jobs()[0]
    first, other = (build(tmp_path / f"{seed}.zarr", [synthetic(job, seed=seed)]) for seed in (0, 1))
    for clip in first.clip_index.to_pylist():
        frames = first.read(clip["start"], clip["frames"])
        assert clip["sha256"] == hashlib.sha256(frames.tobytes()).hexdigest()
    assert first.attrs["index_sha256"] != other.attrs["index_sha256"]


@pytest.mark.parametrize(
    ("height", "width"), [(64, 64), (128, 128), (192, 320), (64, 4096), (100, 90), (480, 640), (40, 128)]
)
def test_pictures_are_brought_to_size_by_area(height: int, width: int) -> None:
    """Fine stripes become grey whatever the size, and a wide picture of noise its mean, block by block."""
    rows, columns = np.mgrid[:height, :width]
    for stripes in (rows, columns, rows + columns):
        if min(height, width) >= 2 * SIZE:
            picture = np.repeat((stripes % 2 * 255).astype(np.uint8)[..., None], 3, axis=-1)
            grey = np.asarray(at_size(Image.fromarray(picture)))[2:-2, 2:-2]
            assert np.ptp(grey) <= 86 and abs(grey.mean() - 127.5) <= 3
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    brought = np.asarray(at_size(Image.fromarray(noise)))
    assert brought.shape == (SIZE, SIZE, 3) and abs(brought.mean() - noise.mean()) < 3
    if not (height % SIZE or width % SIZE):
        blocks = noise.reshape(SIZE, height // SIZE, SIZE, width // SIZE, 3)
        assert np.abs(brought - blocks.mean((1, 3))).max() <= 1


# --- Meta-World ---------------------------------------------------------------------------------------------


def test_frames_are_means_of_what_is_drawn_twice_as_large(episode: Episode) -> None:
    with Simulator(episode.job.task) as simulator:
        simulator.reset(SOURCE.seed, metaworld.FIRST_EPISODE + episode.job.episode)
        for camera in SOURCE.cameras:
            drawn = simulator.draw(camera, 2 * SIZE, 2 * SIZE).astype(int)
            total = drawn.reshape(SIZE, 2, SIZE, 2, 3).sum((1, 3))
            assert np.array_equal(episode.frames[camera][0], (total + 2) // 4)


def test_episode_is_whole_and_sound(episode: Episode) -> None:
    length = len(episode.frames["corner"])
    assert episode.success and episode.reason is None and episode.fps == 80
    assert fault(episode, SOURCE) is None
    assert {camera: frames.shape for camera, frames in episode.frames.items()} == {
        "corner": (length, SIZE, SIZE, 3),
        "topview": (length, SIZE, SIZE, 3),
    }
    assert episode.arrays["actions"].shape == (length, 4) and episode.arrays["gripper"].shape == (length, 8)
    assert 20 < length < 200


def test_actions_stand_before_the_frame_they_lead_to(episode: Episode) -> None:
    actions, gripper = episode.arrays["actions"], episode.arrays["gripper"]
    with Simulator(episode.job.task) as simulator:
        simulator.reset(SOURCE.seed, metaworld.FIRST_EPISODE + episode.job.episode)
        for moment, action in enumerate(actions):
            assert np.array_equal(simulator.render("corner", SIZE, SIZE), episode.frames["corner"][moment])
            assert np.array_equal(simulator.gripper, gripper[moment])
            answer = simulator.step(action)
    assert not actions[-1].any()
    assert answer.success


def test_episode_ends_some_steps_after_its_success(episode: Episode) -> None:
    with Simulator(episode.job.task) as simulator:
        simulator.reset(SOURCE.seed, metaworld.FIRST_EPISODE + episode.job.episode)
        solved = [simulator.step(action).success for action in episode.arrays["actions"][:-1]]
    assert solved.index(True) + 1 == len(solved) - metaworld.TAIL


def test_collecting_is_a_pure_function_of_the_job(episode: Episode) -> None:
    dataclasses.replace(SOURCE, cameras=("corner",)).collect(SOURCE.jobs()[1])
    again = pickle.loads(pickle.dumps(SOURCE)).collect(episode.job)  # noqa: S301
    for name in ("frames", "arrays"):
        for key, values in getattr(episode, name).items():
            assert np.array_equal(values, getattr(again, name)[key])


def test_noise_changes_the_actions_within_their_range(episode: Episode) -> None:
    plain, loud = (
        dataclasses.replace(SOURCE, noise=noise, cameras=("corner",)).collect(episode.job).arrays["actions"]
        for noise in (0.0, 0.5)
    )
    assert np.abs(plain[0] - episode.arrays["actions"][0]).max() > 0.01
    assert np.abs(loud).max() == 1.0


def test_failures_are_named_and_kept_only_if_asked() -> None:
    hopeless = dataclasses.replace(SOURCE, noise=50.0, tasks=("peg-insert-side",), cameras=("corner",))
    failed = hopeless.collect(hopeless.jobs()[0])
    assert failed.success is False and not failed.frames
    assert failed.reason == "the expert did not solve the task in 500 steps"
    ((frames, row, arrays),) = clips(failed, hopeless, 0, Splits(hopeless.jobs(), []))
    assert frames is None and not arrays and row["reason"] == failed.reason and row["success"] is False


def test_kept_failures_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metaworld, "MAX_STEPS", 15)
    kept = dataclasses.replace(SOURCE, tasks=("peg-insert-side",), keep_failures=True)
    failed = kept.collect(kept.jobs()[0])
    assert failed.success is False and failed.reason is None
    assert len(failed.frames["corner"]) == 16
    assert fault(failed, kept) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tasks": ("reech",)}, "task = 'reech'.*reach"),
        ({"cameras": ("conrer",)}, "camera = 'conrer'.*corner"),
        ({"tasks": ("reach", "reach-v3")}, r"demos.tasks = \['reach', 'reach'\]: name each one once"),
        ({"cameras": ("corner", "corner")}, "demos.cameras"),
    ],
)
def test_mistyped_sources_are_refused(change: dict[str, tuple[str, ...]], words: str) -> None:
    with pytest.raises(UserError, match=words):
        dataclasses.replace(SOURCE, **change)


def test_jobs_come_task_by_task() -> None:
    assert [(job.task, job.episode) for job in SOURCE.jobs()] == [
        ("drawer-close", 0),
        ("drawer-close", 1),
        ("reach", 0),
        ("reach", 1),
    ]


# --- Faults and splits --------------------------------------------------------------------------------------


def without(episode: Episode, camera: str) -> Episode:
    frames = {name: values for name, values in episode.frames.items() if name != camera}
    return dataclasses.replace(episode, frames=frames)


def with_frames(episode: Episode, camera: str, frames: np.ndarray) -> Episode:
    return dataclasses.replace(episode, frames={**episode.frames, camera: frames})


def with_array(episode: Episode, name: str, values: np.ndarray) -> Episode:
    return dataclasses.replace(episode, arrays={**episode.arrays, name: values})


def test_faults_are_named() -> None:
    sound = synthetic(Job("reach", 0, 0))
    broken = sound.arrays["actions"].copy()
    broken[7, 2] = np.nan
    wild = sound.arrays["actions"].copy()
    wild[3, 1] = -2.5
    constant = np.concatenate([np.ones((11, 4), np.float32), np.zeros((1, 4), np.float32)])
    still = {camera: np.zeros((12, SIZE, SIZE, 3), np.uint8) for camera in SOURCE.cameras}
    short = {camera: frames[:1] for camera, frames in sound.frames.items()}
    cases = {
        "camera topview: no frames": without(sound, "topview"),
        "camera corner: frames are uint8 (12, 32, 32, 3), not uint8 (T, 64, 64, 3)": with_frames(
            sound, "corner", np.zeros((12, 32, 32, 3), np.uint8)
        ),
        "camera corner: frames are float64 (12, 64, 64, 3), not uint8 (T, 64, 64, 3)": with_frames(
            sound, "corner", np.zeros((12, 64, 64, 3))
        ),
        "camera topview: 11 frames where another camera has 12": with_frames(
            sound, "topview", sound.frames["topview"][1:]
        ),
        "actions: not finite at frame 7": with_array(sound, "actions", broken),
        "actions: shape (11, 4), expected (12, 4)": with_array(sound, "actions", broken[1:]),
        "gripper: shape None, expected (12, 8)": dataclasses.replace(
            sound, arrays={"actions": sound.arrays["actions"]}
        ),
        "gripper: float64, expected float32": with_array(sound, "gripper", np.zeros((12, 8))),
        "actions: 2.5 at frame 3, larger than 1": with_array(sound, "actions", wild),
        "its actions never change": with_array(sound, "actions", constant),
        "nothing moves in any camera": dataclasses.replace(sound, frames=still),
        "1 frames; two are needed": dataclasses.replace(sound, frames=short),
    }
    for words, episode in cases.items():
        assert fault(episode, SOURCE) == words
    assert fault(sound, SOURCE) is None


def test_faulty_episode_gives_a_bad_row_for_every_camera() -> None:
    job = Job("reach", 3, 5)
    rows = list(clips(without(synthetic(job), "topview"), SOURCE, 1, Splits([job], [])))
    assert [(frames, row["id"], row["reason"]) for frames, row, _ in rows] == [
        (None, f"reach-v3-e5-{camera}", "camera topview: no frames") for camera in SOURCE.cameras
    ]


def test_splits_hold_out_the_first_and_every_tenth_stored_episode() -> None:
    jobs = [Job("a", 0, number) for number in range(12)] + [Job("b", 0, 0)]
    splits = Splits(jobs, [])
    dealt = [splits.deal("a") for _ in range(12)]
    assert dealt == ["validation", *["train"] * 9, "validation", "train"]
    assert splits.deal("b") == "train"


def test_tasks_of_few_episodes_take_turns_to_hold_one_out() -> None:
    jobs = [Job(str(task), 0, number) for task in range(11) for number in range(2)]
    splits = Splits(jobs, [])
    held = [job for job in jobs if splits.deal(job.task) == "validation"]
    assert [(job.task, job.episode) for job in held] == [("0", 0), ("5", 0), ("10", 0)]


def test_splits_continue_after_stored_rows() -> None:
    jobs = [Job("a", 0, number) for number in range(3)]
    rows = [
        {"task": "a", "variation": 0, "episode": 0, "camera": camera, "status": status}
        for camera, status in (("x", "ok"), ("y", "ok"))
    ]
    assert Splits(jobs, rows).deal("a") == "train"
    assert Splits(jobs, [{**row, "status": "bad"} for row in rows]).deal("a") == "validation"


# --- Suites -------------------------------------------------------------------------------------------------


def failures(store: Store, tmp_path: Path, max_bad: float = 0.0, **changes: bool) -> str:
    """The sentences that fail, joined; empty where all hold."""
    source = dataclasses.replace(SOURCE, **changes)
    try:
        validate(
            "demos",
            demonstration_suites(store, source, max_bad=max_bad),
            facts(store),
            tmp_path / "reports",
        )
    except UserError as error:
        return str(error)
    return ""


def jobs_of(task: str, count: int) -> list[Job]:
    return [Job(task, 0, number) for number in range(count)]


def test_sound_store_passes(tmp_path: Path) -> None:
    collected_episodes = [synthetic(job) for job in jobs_of("reach", 3)]
    failed = Episode(
        Job("reach", 0, 3), success=False, reason="the expert did not solve the task in 500 steps"
    )
    store = build(tmp_path / "x.zarr", [*collected_episodes, failed])
    assert store.num_clips == 6 and store.index.num_rows == 8
    assert failures(store, tmp_path) == ""
    assert sorted(set(store.clip_index["split"].to_pylist())) == ["train", "validation"]
    summary = (tmp_path / "reports" / "demos" / "summary.json").read_text()
    assert "the expert did not solve the task" in summary


def test_faulty_episodes_count_as_bad(tmp_path: Path) -> None:
    collected_episodes = [synthetic(job) for job in jobs_of("reach", 3)]
    store = build(tmp_path / "x.zarr", [*collected_episodes[:2], without(collected_episodes[2], "corner")])
    assert "at most 0.00% of the clips are bad" in failures(store, tmp_path)
    assert failures(store, tmp_path, max_bad=0.5) == ""


def test_one_odd_episode_does_not_spoil_the_others_of_its_store(tmp_path: Path) -> None:
    """Whatever is odd in an episode's arrays, it alone is bad, and `max_bad` decides about the store."""
    sound = [synthetic(job) for job in jobs_of("reach", 4)]
    actions = sound[0].arrays["actions"]
    odd = [actions * 3, np.zeros_like(actions), actions.astype(np.float64), actions[:, :2], actions[:-1]]
    for number, values in enumerate(odd):
        store = build(tmp_path / f"{number}.zarr", [with_array(sound[0], "actions", values), *sound[1:]])
        assert store.num_clips == 6 and failures(store, tmp_path, max_bad=0.25) == ""
        assert "at most 24.00% of the clips are bad" in failures(store, tmp_path, max_bad=0.24)


def test_actions_that_no_episode_may_have_are_found_in_a_store(tmp_path: Path) -> None:
    """By validation too, whatever wrote the store."""
    sound = synthetic(Job("reach", 0, 0))
    for number, (actions, told) in enumerate(
        [
            (sound.arrays["actions"] * 3, ["no action is larger than 1"]),
            (
                np.ones((12, 4), np.float32),
                ["no action after a clip's last frame", "the actions of a clip vary"],
            ),
        ]
    ):
        with StoreWriter(tmp_path / f"{number}.zarr", arrays=SOURCE.arrays) as writer:
            for frames, row, arrays in clips(sound, SOURCE, 0, Splits([sound.job], [])):
                writer.append(frames, row, **{**arrays, "actions": actions})
            store = writer.finish({})
        assert all(words in failures(store, tmp_path) for words in told)


def test_episodes_without_a_task_are_found(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "x.zarr", arrays=SOURCE.arrays) as writer:
        for job in jobs_of("reach", 2):
            for frames, row, arrays in clips(synthetic(job), SOURCE, 0, Splits([job], [])):
                writer.append(frames, row | {"task": None} if job.episode else row, **arrays)
        store = writer.finish({})
    assert "every episode names its task" in failures(store, tmp_path)


def test_unsolved_episodes_are_found_unless_kept(tmp_path: Path) -> None:
    unsolved = dataclasses.replace(synthetic(Job("reach", 0, 0)), success=False)
    store = build(tmp_path / "x.zarr", [unsolved])
    assert "every episode solves its task" in failures(store, tmp_path)
    assert failures(store, tmp_path, keep_failures=True) == ""


def test_missing_cameras_and_missing_validation_are_found(tmp_path: Path) -> None:
    path = tmp_path / "x.zarr"
    with StoreWriter(path, arrays=SOURCE.arrays) as writer:
        for job in jobs_of("reach", 4):
            for frames, row, arrays in clips(synthetic(job), SOURCE, 0, Splits([job], [])):
                if row["camera"] != "topview":
                    writer.append(frames, row, **arrays)
        store = writer.finish({})
    told = failures(store, tmp_path)
    assert "every episode is shown by the cameras corner, topview" in told
    assert "every task with 4 or more episodes has one in validation" in told


def test_still_clips_are_found(tmp_path: Path) -> None:
    def half_still(job: Job) -> Episode:
        return with_frames(synthetic(job), "corner", np.full((12, SIZE, SIZE, 3), 90, np.uint8))

    store = build(tmp_path / "x.zarr", [half_still(job) for job in jobs_of("reach", 2)])
    assert "in at least 90% of the clips something moves" in failures(store, tmp_path)


def test_changed_share_counts_pixels() -> None:
    frames = np.zeros((3, 10, 10, 3), np.uint8)
    assert changed_share(frames) == 0
    frames[2, 0, :5, 1] = 100
    frames[1, 1, 0] = episodes.MOTION
    assert changed_share(frames) == pytest.approx(0.05)


@pytest.mark.long
def test_distractions_change_the_pictures_alone_and_are_told() -> None:
    plain = dataclasses.replace(SOURCE, tasks=("reach",), cameras=("corner",))
    shaken = dataclasses.replace(plain, view=View(distract="camera"))
    one, other = (source.collect(source.jobs()[0]) for source in (plain, shaken))
    assert all(np.array_equal(one.arrays[name], other.arrays[name]) for name in one.arrays)
    assert one.success == other.success and one.fps == other.fps
    assert (one.frames["corner"] != other.frames["corner"]).any(axis=(1, 2, 3)).all()
    assert "view" not in plain.attributes()["source"]
    assert shaken.attributes()["source"]["view"]["distract"] == "camera"
    keys = {episodes.staging_key(source, source.jobs()) for source in (plain, shaken)}
    assert len(keys) == 2, "neither goes on with the other's work"
