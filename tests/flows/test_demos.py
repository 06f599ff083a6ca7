"""The flow `demos`: every source into one store, the same bytes however it ran or was interrupted."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import random
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows import demos, staging
from prelar.config import load_config
from prelar.demos import apv_npz, episodes, hdf5, lerobot, rlbench_worker
from prelar.demos.episodes import Episode, Job, Source, staging_key
from prelar.demos.metaworld import Metaworld
from prelar.demos.rlbench_folder import RlbenchFolder
from prelar.demos.rlbench_live import RlbenchLive
from prelar.demos.sources import open_source
from prelar.envs import metaworld
from prelar.store.schema import checks_path
from prelar.store.store import Store
from prelar.store.writer import StoreWriter
from prelar.utils import files
from prelar.utils.errors import UserError
from tests.conftest import ROOT, Project
from tests.demos.test_hdf5 import write_hdf5
from tests.demos.test_lerobot import GOLDEN, write_image_set
from tests.flows.inline import work_inline
from tests.flows.kills import FlowProcess, kill_until_done, tree

EPISODES = 7


def digest(*paths: Path) -> dict[str, str]:
    """Digest of files, and of every file of folders."""
    found = {}
    for path in paths:
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.is_file():
                found[str(file.relative_to(path.parent))] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


@pytest.fixture
def recorded(tmp_path: Path) -> apv_npz.ApvNpz:
    """A source that reads quickly: episodes of two cameras, one of them broken."""
    folder = tmp_path / "recorded"
    folder.mkdir()
    for task, episode, camera in [
        (task, episode, camera)
        for task in ("lamp_on", "slide_block")
        for episode in range(EPISODES)
        for camera in ("front", "wrist")
    ]:
        random = np.random.default_rng([len(task), episode, len(camera)])
        length = 5 + episode
        np.savez_compressed(
            folder / f"{task}-v0-e{episode}-{camera}-{length}.npz",
            image=random.integers(0, 256, (length, 64, 64, 3), np.uint8),
            action=random.normal(size=(length, 8)).astype(np.float32),
        )
    (folder / "lamp_on-v0-e3-wrist-8.npz").write_bytes(b"broken")
    return apv_npz.open_folder(folder)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks run on plain threads, without Prefect's engine."""
    pool = ThreadPoolExecutor(3)
    monkeypatch.setattr(demos.collect, "submit", lambda *given: pool.submit(demos.collect.fn, *given))


def fill(path: Path, source: Source, workers: int, fps: float | None = None) -> None:
    """What the flow does with a store in staging."""
    with StoreWriter(path, arrays=source.arrays) as writer:
        demos.fill(writer, source, source.jobs(), workers, fps)
        writer.finish(source.attributes())


def test_store_is_the_source_in_order(tmp_path: Path, recorded: apv_npz.ApvNpz, threads: None) -> None:
    fill(tmp_path / "x.zarr", recorded, 2)
    store = Store.open(tmp_path / "x.zarr")
    rows = store.index.to_pylist()
    assert [row["id"] for row in rows] == [
        job.clip_id(camera) for job in recorded.jobs() for camera in ("front", "wrist")
    ]
    bad = [row for row in rows if row["status"] == "bad"]
    assert [row["id"] for row in bad] == ["lamp_on-v0-e3-front", "lamp_on-v0-e3-wrist"]
    assert all(row["reason"].startswith("lamp_on-v0-e3-wrist-8.npz: ") for row in bad)
    assert {(row["label"], row["label_id"]) for row in rows} == {("lamp_on", 0), ("slide_block", 1)}
    held = {row["id"] for row in rows if row["split"] == "validation"}
    assert held == {
        f"{task}-v0-e0-{camera}" for task in ("lamp_on", "slide_block") for camera in ("front", "wrist")
    }
    clip = store.clip_index.to_pylist()[5]
    raw = np.load(recorded.folder / f"{clip['id']}-{clip['frames']}.npz", allow_pickle=False)
    assert np.array_equal(store.read(clip["start"], clip["frames"]), raw["image"])
    actions = store.array("actions")[clip["start"] : clip["start"] + clip["frames"]]
    assert np.array_equal(actions[:-1], raw["action"][1:]) and not actions[-1].any()
    assert store.attrs["source"] == {"name": "apv_npz"} and "actions[t]" in store.attrs["alignment"]

    def validated(max_bad: float) -> dict[str, Any]:
        checks = functools.partial(demos.suites, source=recorded, max_bad=max_bad)
        return staging.validate.fn("demos", tmp_path / "x.zarr", checks)

    assert (validated(0.1)["clips"], validated(0.1)["bad"]) == (26, 2)
    with pytest.raises(UserError, match=r"at most 1\.00% of the clips are bad"):
        validated(0.01)


def test_the_rate_of_a_source_that_tells_none_is_that_of_params(
    tmp_path: Path, recorded: apv_npz.ApvNpz, threads: None
) -> None:
    fill(tmp_path / "x.zarr", recorded, 1)
    with pytest.raises(UserError, match="26 of 26 clips tell no rate"):
        Store.open(tmp_path / "x.zarr").strides(0.1)
    fill(tmp_path / "y.zarr", recorded, 1, fps=20.0)
    assert set(Store.open(tmp_path / "y.zarr").strides(0.1)) == {2}
    assert staging_key(recorded, recorded.jobs(), 20.0) != staging_key(recorded, recorded.jobs())


def test_bytes_do_not_depend_on_workers_batches_or_interruption(
    tmp_path: Path, recorded: apv_npz.ApvNpz, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "a" / "x.zarr", recorded, 2)
    monkeypatch.setattr(demos, "BATCH", 3)
    jobs = recorded.jobs()
    for stop in (4, 9):
        with (
            pytest.raises(InterruptedError),
            StoreWriter(tmp_path / "b/x.zarr", arrays=recorded.arrays) as writer,
        ):
            commit = writer.commit

            def failing(
                commit: Callable[[], None] = commit, writer: StoreWriter = writer, stop: int = stop
            ) -> None:
                commit()
                if writer.count >= 2 * stop:
                    raise InterruptedError

            monkeypatch.setattr(writer, "commit", failing)
            demos.fill(writer, recorded, jobs, 1)
    with StoreWriter(tmp_path / "b/x.zarr", arrays=recorded.arrays) as writer:
        assert 18 <= writer.count < 2 * len(jobs)
    fill(tmp_path / "b" / "x.zarr", recorded, 1)
    first, second = (digest(tmp_path / name / "x.zarr", tmp_path / name / "x.parquet") for name in "ab")
    assert first == second


def test_episodes_of_shared_files_are_collected_in_turn(
    tmp_path: Path, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = lerobot.open_folder(GOLDEN / "v30_deleted/set")
    monkeypatch.setattr(demos, "BATCH", 1)
    seen = []
    collect = lerobot.Lerobot.collect

    def noted(self: lerobot.Lerobot, job: Job) -> Episode:
        seen.append(job)
        return collect(self, job)

    monkeypatch.setattr(lerobot.Lerobot, "collect", noted)
    fill(tmp_path / "a/x.zarr", shared, 3)
    assert seen == shared.jobs()
    fill(tmp_path / "b/x.zarr", shared, 1)
    first, second = (digest(tmp_path / name / "x.zarr", tmp_path / name / "x.parquet") for name in "ab")
    assert first == second


def test_a_failure_in_turn_leaves_no_task_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flow would wait for it, and so not end."""
    shared = lerobot.open_folder(GOLDEN / "v30_deleted/set")
    jobs = shared.jobs()
    collect = lerobot.Lerobot.collect

    def failing(self: lerobot.Lerobot, job: Job) -> Episode:
        time.sleep(0.1)
        if job == jobs[0]:
            raise OSError("once")
        return collect(self, job)

    monkeypatch.setattr(lerobot.Lerobot, "collect", failing)
    tasks: list[Future[Any]] = []

    def submit(*given: Any) -> Future[Any]:
        tasks.append(pool.submit(demos.collect.fn, *given))
        return tasks[-1]

    pool = ThreadPoolExecutor(3)
    monkeypatch.setattr(demos.collect, "submit", submit)
    monkeypatch.setattr(demos, "BATCH", 2)
    with (
        pytest.raises(OSError, match="once"),
        StoreWriter(tmp_path / "x.zarr", arrays=shared.arrays) as writer,
    ):
        demos.fill(writer, shared, jobs, 3)
    assert len(tasks) > 1 and not wait(tasks, timeout=20).not_done


def test_dead_worker_is_told_in_one_line(
    tmp_path: Path, recorded: apv_npz.ApvNpz, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Deadly(apv_npz.ApvNpz):
        __reduce__ = _die

    deadly = Deadly(recorded.folder, recorded.cameras, recorded.widths)
    with (
        StoreWriter(tmp_path / "x.zarr", arrays=recorded.arrays) as writer,
        pytest.raises(UserError, match="a worker process died; run again, the work so far is kept"),
    ):
        demos.fill(writer, deadly, recorded.jobs(), 1)


def _die(self: object) -> tuple[object, ...]:
    """Pickle as something that ends the process which unpickles it."""
    import os

    return os._exit, (9,)


def test_staging_key_follows_what_decides_the_result(recorded: apv_npz.ApvNpz) -> None:
    jobs = recorded.jobs()
    key = staging_key(recorded, jobs)
    assert key == staging_key(apv_npz.open_folder(recorded.folder), jobs)
    shutil.copy(recorded.folder / "lamp_on-v0-e1-front-6.npz", recorded.folder / "lamp_on-v0-e3-wrist-8.npz")
    assert staging_key(recorded, jobs) != key
    experts = Metaworld(("reach",), 2, ("corner",), 0.1, False, 0)
    noisier = Metaworld(("reach",), 2, ("corner",), 0.2, False, 0)
    assert staging_key(experts, experts.jobs()) != staging_key(noisier, noisier.jobs())


def test_work_that_other_code_drew_is_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = Metaworld(("reach",), 2, ("corner",), 0.1, False, 0)
    key = staging_key(experts, experts.jobs())
    for module in (metaworld, episodes):
        with monkeypatch.context() as patch:
            (tmp_path / "other.py").write_text(Path(str(module.__file__)).read_text(encoding="utf-8") + "\n")
            patch.setattr(module, "__file__", str(tmp_path / "other.py"))
            assert staging_key(experts, experts.jobs()) != key
    assert staging_key(experts, experts.jobs()) == key


def test_recorded_episodes_need_no_simulator(
    recorded: apv_npz.ApvNpz, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The extra `sim` may be absent, as it is for Python 3.14."""

    def version(name: str) -> str:
        if name in ("mujoco", "metaworld"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert staging_key(recorded, recorded.jobs())
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        experts = Metaworld(("reach",), 2, ("corner",), 0.1, False, 0)
        staging_key(experts, experts.jobs())


def test_live_demos_are_continued_unless_what_records_them_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their module's date, which a reinstallation changes, does not count."""
    live, jobs = RlbenchLive(("push_button",), 1, 2), [Job("push_button", 0, 0)]
    key = staging_key(live, jobs)
    for end, same in (("", True), ("\n", False)):
        other = tmp_path / f"other{same}.py"
        with monkeypatch.context() as patch:
            source = Path(str(rlbench_worker.__file__)).read_text(encoding="utf-8")
            other.write_text(source + end, encoding="utf-8")
            patch.setattr(rlbench_worker, "__file__", str(other))
            assert (staging_key(live, jobs) == key) is same


def test_params_choose_the_source(recorded: apv_npz.ApvNpz) -> None:
    settings = load_config().demos
    made = open_source(settings)
    assert isinstance(made, Metaworld)
    assert (made.tasks, made.cameras) == (("drawer-open", "reach", "dial-turn"), ("corner",))
    every = open_source(settings.model_copy(update={"tasks": ["all"], "cameras": ["all"]}))
    assert isinstance(every, Metaworld) and (len(every.tasks), len(every.cameras)) == (50, 7)
    folder = str(recorded.folder)
    asked: dict[str, Any] = {"source": "apv_npz", "path": folder}
    assert open_source(settings.model_copy(update=asked)) == recorded
    few = asked | {"tasks": ["lamp_on"], "cameras": ["wrist"]}
    assert open_source(settings.model_copy(update=few)) == dataclasses.replace(
        recorded, cameras=("wrist",), tasks=("lamp_on",)
    )
    episode = recorded.folder / "push_button/variation0/episodes/episode0"
    for camera in ("front", "wrist"):
        (episode / f"{camera}_rgb").mkdir(parents=True)
    changes = {"source": "rlbench_folder", "path": folder, "action_mode": "gripper_pose"}
    expected = RlbenchFolder(recorded.folder, ("wrist", "front"), "gripper_pose")
    assert open_source(settings.model_copy(update=changes)) == expected
    live = open_source(settings.model_copy(update={"source": "rlbench", "tasks": ["push_button"]}))
    assert isinstance(live, RlbenchLive) and (live.tasks, len(live.cameras)) == (("push_button",), 5)


@pytest.mark.long
def test_experts_give_the_same_bytes_for_any_number_of_workers(
    tmp_path: Path, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two, and where they are asked for."""
    experts = Metaworld(("reach", "drawer-close"), 1, ("corner",), 0.1, False, 0)
    fill(tmp_path / "2/x.zarr", experts, 2)
    work_inline(monkeypatch)
    fill(tmp_path / "0/x.zarr", experts, 1)
    first, second = (digest(tmp_path / name / "x.zarr", tmp_path / name / "x.parquet") for name in "02")
    assert first == second


@pytest.mark.long
def test_flow_runs_as_a_user_runs_it(
    tmp_path: Path, make_project: Callable[[Path], Project], recorded: apv_npz.ApvNpz
) -> None:
    project = make_project(tmp_path / "project")
    project.edit(demos={"cameras": ["corner", "topview"], "noise": 0.05})
    told = project.run("python", "-m", "flows.demos")
    assert "data/demos.zarr: 4 clips of 2 cameras, " in told.stdout
    store = Store.open(project.root / "data/demos.zarr")
    assert store.has("actions") and store.has("gripper")
    assert store.clip_index["split"].to_pylist() == ["validation"] * 2 + ["train"] * 2
    assert store.clip_index["success"].to_pylist() == [True] * 4
    assert (project.root / "reports/validation/demos/index.html").is_file()
    assert not list((project.root / "data/.staging").iterdir())


def test_recorded_source_without_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    assert text.count("  source: metaworld ") == 1
    (tmp_path / "params.yaml").write_text(text.replace("source: metaworld ", "source: apv_npz "))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["flows.demos"])
    with pytest.raises(UserError, match=r"params\.yaml: demos: path is null; name the folder"):
        demos.main()


@pytest.mark.long
def test_recorded_source_runs_as_a_user_runs_it(
    tmp_path: Path, make_project: Callable[[Path], Project], recorded: apv_npz.ApvNpz
) -> None:
    project = make_project(tmp_path / "project")
    project.edit(demos={"source": "apv_npz", "path": str(recorded.folder), "tasks": None, "max_bad": 0.1})
    told = project.run("python", "-m", "flows.demos")
    assert "26 clips of 2 cameras" in told.stdout and "2 clips left out" in told.stdout
    assert Store.open(project.root / "data/demos.zarr").attrs["source"] == {"name": "apv_npz"}


def work_once(source: Source) -> None:
    """What the flow does, but for Prefect, worker processes and validation."""
    staging.clear_leftovers("demos")
    folder = files.STAGING / "demos-key"
    if not (folder / "built").is_file():
        fill(folder / "demos.zarr", source, 1)
        files.write_text(folder / "built", "")
    files.write_text(checks_path(folder / "demos.zarr"), "{}")
    staging.publish("demos", folder)


def kills_survived(source: Source, folder: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often the work was killed until it had the same bytes as without."""
    work_inline(monkeypatch)
    fill(folder / "wanted/demos.zarr", source, 1)
    (folder / "work").mkdir()
    monkeypatch.chdir(folder / "work")
    wanted = tree(folder / "wanted", "demos")
    return kill_until_done("demos", functools.partial(work_once, source), wanted, seed, monkeypatch)


@pytest.fixture
def images(tmp_path: Path) -> Source:
    """A LeRobotDataset whose pictures lie in its rows."""
    return lerobot.open_folder(write_image_set(tmp_path / "set", [5, 9, 6, 7]))


@pytest.fixture
def tables(tmp_path: Path) -> Source:
    """An HDF5 file of demonstrations."""
    write_hdf5(tmp_path / "files/x.hdf5", [5, 9, 6, 7])
    return hdf5.open_folder(tmp_path / "files")


@pytest.mark.long
@pytest.mark.parametrize("kind", ["recorded", "images", "tables"])
def test_killed_at_many_operations_and_still_the_same_bytes(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kills_survived(request.getfixturevalue(kind), tmp_path, 0, monkeypatch) >= 20


@pytest.mark.long
def test_killed_with_other_seeds_and_still_the_same(
    tmp_path: Path, recorded: apv_npz.ApvNpz, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(1, 12):
        (folder := tmp_path / str(seed)).mkdir()
        assert kills_survived(recorded, folder, seed, monkeypatch) >= 10


@pytest.mark.long
def test_processes_killed_at_random_moments_and_still_the_same_bytes(
    tmp_path: Path, make_project: Callable[[Path], Project]
) -> None:
    """A worker or the flow itself, twenty times; what runs out of work is started anew."""
    wanted, killed = (make_project(tmp_path / name) for name in ("wanted", "killed"))
    for project in (wanted, killed):
        project.edit(demos={"tasks": ["reach", "drawer-close", "coffee-pull"], "episodes": 20})
    wanted.run("python", "-m", "flows.demos")
    random_ = random.Random(0)
    kills = 0
    while kills < 20:
        process = FlowProcess(killed.root, "flows.demos")
        if process.wait_for(functools.partial(process.descendants, "spawn_main")):
            time.sleep(6 * random_.random())
            if random_.random() < 0.5:
                kills += process.kill()
            elif process.kill_one("spawn_main", random_):
                assert process.end() == 2
                kills += 1
        process.kill()
    assert not (killed.root / "data/demos.parquet").exists() or (killed.root / "data/demos.zarr").exists()
    killed.run("python", "-m", "flows.demos")
    first, second = (tree(project.root / "data", "demos") for project in (wanted, killed))
    assert first == second
    assert not list((killed.root / "data/.staging").iterdir())
