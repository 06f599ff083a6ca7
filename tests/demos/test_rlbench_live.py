"""Live RLBench demos through stand-ins that plan, fail, hang and die: what comes, and what is told."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from prelar.config import load_config
from prelar.demos import rlbench_live, rlbench_pool, rlbench_worker
from prelar.demos.episodes import Episode, Job, fault
from prelar.demos.rlbench_live import RlbenchLive
from prelar.utils.errors import UserError
from tests.rlbench_standin import STANDINS, orders, use_standins

SOURCE = RlbenchLive(
    tasks=("push_button", "open_drawer"), variations=1, episodes=2, cameras=("front", "wrist"), timeout=60.0
)

FAILED = "Error in task {}. Demo was completed, but was not successful."


@pytest.fixture
def standin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the stand-ins, which are in place of the real ones."""
    use_standins(tmp_path / "standin", monkeypatch)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "standin"


def collect(source: RlbenchLive, folder: Path, workers: int = 1) -> list[Episode]:
    """All episodes of a source."""
    jobs = source.jobs()
    with source.pool(jobs, workers, folder) as pool:
        return [pool.result(job) for job in jobs]


def reasons(episodes: list[Episode]) -> list[str | None]:
    return [episode.reason for episode in episodes]


# --- Demos --------------------------------------------------------------------------------------------------


def test_demos_are_whole_aligned_and_in_order(standin: Path, tmp_path: Path) -> None:
    episodes = collect(SOURCE, tmp_path / "demos", workers=2)
    assert [(episode.job.task, episode.job.episode) for episode in episodes] == [
        ("push_button", 0),
        ("push_button", 1),
        ("open_drawer", 0),
        ("open_drawer", 1),
    ]
    for episode in episodes:
        assert episode.reason is None and episode.success and episode.fps == 20
        assert fault(episode, SOURCE) is None
        assert set(episode.frames) == {"front", "wrist"} and episode.frames["front"].shape == (8, 64, 64, 3)
        assert (episode.frames["front"][0, -1, -1] == 80).all() and (
            episode.frames["wrist"][0, -1, -1] == 60
        ).all()
        actions, gripper = episode.arrays["actions"], episode.arrays["gripper"]
        first = actions[0, :7] / np.cos(1)
        assert np.allclose(actions[:-1, :7], first * np.cos(np.arange(1, 8))[:, None], atol=1e-5)
        assert actions[:-1, 7].tolist() == [1, 1, 1, 0, 0, 0, 0] and not actions[-1].any()
        assert np.allclose(gripper[:, 0], np.arange(8) / 10) and gripper[:, 7].tolist() == [1] * 4 + [0] * 4
    first, second = (episode.arrays["actions"] for episode in episodes[:2])
    assert not np.array_equal(first, second)


def test_simulators_are_launched_once_each_on_one_display(
    standin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    launch = rlbench_pool.Simulator.launch
    monkeypatch.setattr(
        rlbench_pool.Simulator,
        "launch",
        lambda self, *rest: (started.append(self), launch(self, *rest))[1],
    )
    collect(SOURCE, tmp_path / "demos", workers=2)
    assert len(started) == 2 and not any(simulator.alive for simulator in started)
    assert (standin / "xvfb").read_text() == "started\n"
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # such as of one that has just ended
            assert "Xvfb" not in " ".join(child.cmdline())


def test_variations_are_asked_of_rlbench(
    standin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planned(variations: int | None) -> dict[str, int]:
        source = replace(SOURCE, variations=variations, episodes=1)
        return {task: sum(job.task == task for job in source.jobs()) for task in SOURCE.tasks}

    assert planned(None) == {"push_button": 3, "open_drawer": 1}
    assert planned(2) == {"push_button": 2, "open_drawer": 1}
    every = replace(SOURCE, tasks=(), episodes=1).jobs()
    assert [job.task for job in every] == ["open_drawer", "push_button", "reach_target", "weighing_scales"]
    lengths = [
        len(episode.arrays["actions"])
        for episode in collect(replace(SOURCE, variations=None), tmp_path / "x")
    ]
    assert lengths == [8, 8, 9, 9, 10, 10, 8, 8]
    with pytest.raises(UserError, match="RLBench cannot be imported: the simulator ended with status 1"):
        monkeypatch.setenv("PYTHONPATH", "")
        planned(None)


@pytest.mark.parametrize("size", [32, 64, 96, 128])
def test_pictures_of_any_size_are_brought_to_64(standin: Path, tmp_path: Path, size: int) -> None:
    source = replace(SOURCE, tasks=("push_button",), episodes=1, size=size)
    with source.pool(source.jobs(), 1, tmp_path / "demos") as pool:
        episode = pool.result(source.jobs()[0])
    with np.load(tmp_path / "demos/push_button-v0-e0.npz") as content:
        drawn = content["front"]
    assert drawn.shape == (8, size, size, 3)
    assert fault(episode, SOURCE) is None
    if size == 128:
        total = sum(drawn[:, y::2, x::2].astype(int) for y in (0, 1) for x in (0, 1))
        assert np.array_equal(episode.frames["front"], (total + 2) // 4)


def test_pictures_are_drawn_large_unless_asked_otherwise() -> None:
    assert SOURCE.size == load_config().demos.image_size == 128


def test_action_mode_decides_what_is_written_down(standin: Path, tmp_path: Path) -> None:
    one = replace(SOURCE, tasks=("push_button",), episodes=1)
    for action_mode, column, first in (("joint_position", 1, 1.1), ("gripper_pose", 0, 0.1)):
        episode = collect(replace(one, action_mode=action_mode), tmp_path / action_mode)[0]
        assert fault(episode, SOURCE) is None
        actions = episode.arrays["actions"]
        assert np.allclose(actions[:-1, column], first + np.arange(7) / 10) and not actions[-1].any()
        assert actions[:-1, 7].tolist() == [1, 1, 1, 0, 0, 0, 0]


def test_one_episode_alone(standin: Path) -> None:
    assert SOURCE.collect(Job("push_button", 0, 0)).success


# --- Failures -----------------------------------------------------------------------------------------------


def test_failed_planning_is_tried_ten_times(standin: Path, tmp_path: Path) -> None:
    orders(standin, push_button=" ".join(["fail"] * 9), open_drawer=" ".join(["work"] + ["fail"] * 10))
    assert reasons(collect(SOURCE, tmp_path / "demos")) == [
        None,
        None,
        None,
        f"no demo in 10 attempts: 10 × {FAILED.format('open_drawer')}",
    ]


def test_spoilt_scene_costs_one_attempt(standin: Path, tmp_path: Path) -> None:
    orders(standin, push_button="spoil", open_drawer="work spoil work")
    assert reasons(collect(SOURCE, tmp_path / "demos")) == [None] * 4


def launches(standin: Path) -> int:
    """How many simulators were launched."""
    return (standin / "orders" / "asked").read_text().split().count("launch")


def test_task_that_cannot_be_loaded_is_tried_once_by_a_new_simulator(standin: Path, tmp_path: Path) -> None:
    orders(standin, load_open_drawer="missing " * 20)
    source = replace(SOURCE, tasks=("push_button", "open_drawer"), episodes=3)
    told = "the task cannot be loaded: The following is not a valid task .ttm file: open_drawer.ttm"
    assert reasons(collect(source, tmp_path / "demos")) == [None, None, None, told, told, told]
    assert launches(standin) == 2
    assert (standin / "orders" / "load_open_drawer").read_text().count("missing") == 18


def test_task_that_cannot_be_loaded_is_given_up_in_all_variations(standin: Path, tmp_path: Path) -> None:
    orders(standin, load_push_button="missing " * 20)
    source = replace(SOURCE, tasks=("push_button",), variations=None)
    told = "the task cannot be loaded: The following is not a valid task .ttm file: push_button.ttm"
    assert reasons(collect(source, tmp_path / "demos")) == [told] * 6
    assert launches(standin) == 1


def test_task_that_a_used_simulator_fails_to_load_is_loaded_by_a_new_one(
    standin: Path, tmp_path: Path
) -> None:
    orders(standin, load_open_drawer="missing")
    assert reasons(collect(SOURCE, tmp_path / "demos")) == [None] * 4
    assert launches(standin) == 2


@pytest.mark.long
def test_third_unexpected_error_of_a_demo_is_its_last(standin: Path, tmp_path: Path) -> None:
    orders(standin, push_button="spoil fail spoil spoil spoil")
    source = replace(SOURCE, tasks=("push_button",), episodes=1)
    spoilt = "3 × Expected to be resetting 8 objects, but there were 7."
    assert reasons(collect(source, tmp_path / "demos")) == [
        f"no demo in 4 attempts: {spoilt}; 1 × {FAILED.format('push_button')}"
    ]


@pytest.mark.long
def test_unexpected_errors_leave_their_traceback_in_the_log(standin: Path, tmp_path: Path) -> None:
    orders(standin, launch="fail", push_button="work spoil", open_drawer="fail")
    collect(SOURCE, tmp_path / "demos")
    log = (tmp_path / "demos/simulator0.log").read_text()
    assert log.count("Traceback (most recent call last):") == 2
    launch, attempt = log.split('attempt {"task": "push_button", "variation": 0, ')
    assert "in launch" in launch and launch.rstrip().endswith("RuntimeError: no licence")
    assert "in _reset" in attempt
    assert "RuntimeError: Expected to be resetting 8 objects, but there were 7." in attempt


@pytest.mark.long
def test_worn_simulator_is_replaced(standin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rlbench_pool, "SERVICE", 2)
    launched = []
    launch = rlbench_pool.Simulator.launch
    monkeypatch.setattr(
        rlbench_pool.Simulator,
        "launch",
        lambda self, *rest: (launched.append(self), launch(self, *rest))[1],
    )
    assert reasons(collect(replace(SOURCE, episodes=3), tmp_path / "demos")) == [None] * 6
    assert len(launched) == 3


def test_crash_is_seen_though_a_helper_lives_on(
    standin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rlbench_pool, "ATTEMPTS", 2)
    orders(standin, launch="helper", push_button="die die")
    source = replace(SOURCE, tasks=("push_button",), episodes=1, timeout=20.0)
    assert reasons(collect(source, tmp_path / "demos")) == [
        "no demo in 2 attempts: 2 × the simulator ended by signal 11"
    ]
    assert "Fatal Python error: Segmentation fault" in (tmp_path / "demos" / "simulator0.log").read_text()


def test_task_that_always_fails_is_given_up_and_the_others_go_on(standin: Path, tmp_path: Path) -> None:
    told = f"no demo in 10 attempts: 10 × {FAILED.format('weighing_scales')}"
    episodes = collect(replace(SOURCE, tasks=("weighing_scales", "push_button")), tmp_path / "demos")
    assert reasons(episodes) == [told, f"not tried after episode 0: {told}", None, None]
    assert [episode.success for episode in episodes] == [False, False, True, True]


def test_task_that_always_fails_stays_given_up_in_the_next_run(standin: Path, tmp_path: Path) -> None:
    source = replace(SOURCE, tasks=("weighing_scales",), episodes=3)
    told = f"no demo in 10 attempts: 10 × {FAILED.format('weighing_scales')}"
    for done in (1, 2):
        with source.pool(jobs := source.jobs()[:done], 1, tmp_path / "demos") as pool:
            assert pool.result(jobs[-1]).success is False
    assert reasons(collect(source, tmp_path / "demos")) == [told, *[f"not tried after episode 0: {told}"] * 2]


def test_crash_costs_the_attempt_in_progress(standin: Path, tmp_path: Path) -> None:
    orders(standin, push_button="work die die work", open_drawer="die")
    assert reasons(collect(SOURCE, tmp_path / "demos", workers=2)) == [None] * 4


@pytest.mark.long
def test_endless_crashes_end_in_words(standin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rlbench_pool, "ATTEMPTS", 3)
    orders(standin, push_button="die fail die")
    source = replace(SOURCE, tasks=("push_button",))
    assert reasons(collect(source, tmp_path / "demos")) == [
        f"no demo in 3 attempts: 2 × the simulator ended by signal 11; 1 × {FAILED.format('push_button')}",
        None,
    ]


def test_hang_is_killed_and_tried_again(standin: Path, tmp_path: Path) -> None:
    orders(standin, push_button="hang")
    began = time.monotonic()
    assert reasons(collect(replace(SOURCE, timeout=2.0), tmp_path / "demos")) == [None] * 4
    assert 2 < time.monotonic() - began < 30


def test_cpu_activity_tells_waiting_from_an_endless_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rlbench_pool, "IDLE_SECONDS", 1.5)
    codes = ("import time; time.sleep(600)", "while True: pass", "while True: pass")
    running = [subprocess.Popen([sys.executable, "-c", code]) for code in codes]
    try:
        running[1].send_signal(signal.SIGSTOP)
        waiting, stopped, turning = (rlbench_pool.CpuActivity(process.pid) for process in running)
        idle, end = set[rlbench_pool.CpuActivity](), time.monotonic() + 60
        while not {waiting, stopped} <= idle and time.monotonic() < end:
            idle |= {activity for activity in (waiting, stopped, turning) if activity.idle()}
            time.sleep(0.1)
        assert idle == {waiting, stopped}
    finally:
        for process in running:
            process.kill()
            process.wait()


@pytest.mark.long
def test_stopped_simulator_is_noticed_before_its_time_is_up(
    standin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rlbench_pool, "IDLE_SECONDS", 2.0)
    monkeypatch.setattr(rlbench_pool, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(rlbench_pool, "UNEXPECTED", 1)
    orders(standin, push_button="stop")
    source = replace(SOURCE, tasks=("push_button",), episodes=1, timeout=600.0)
    assert reasons(collect(source, tmp_path / "demos")) == [
        "no demo in 1 attempts: 1 × the simulator stood still for 2 s"
    ]


@pytest.mark.long
def test_simulator_that_turns_in_circles_has_its_time(standin: Path, tmp_path: Path) -> None:
    orders(standin, push_button="spin")
    source = replace(SOURCE, tasks=("push_button",), episodes=1, timeout=2.0)
    assert reasons(collect(source, tmp_path / "demos")) == [None]


@pytest.mark.long
def test_third_hang_of_a_demo_is_its_last(standin: Path, tmp_path: Path) -> None:
    orders(standin, push_button="work hang hang hang")
    source = replace(SOURCE, tasks=("push_button",), timeout=1.0)
    assert reasons(collect(source, tmp_path / "demos")) == [
        None,
        "no demo in 3 attempts: 3 × no answer from the simulator within 1 s",
    ]


@pytest.mark.long
def test_killed_simulators_and_display_are_replaced(standin: Path, tmp_path: Path) -> None:
    source = replace(SOURCE, episodes=4, timeout=4.0)
    stop = threading.Event()

    def kill_children() -> None:
        for _ in range(3):
            if stop.wait(1.0):
                return
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    command = " ".join(child.cmdline())
                    if "rlbench_simulator" in command or "Xvfb" in command:
                        child.kill()

    killer = threading.Thread(target=kill_children)
    killer.start()
    try:
        orders(standin, push_button="hang work hang work", open_drawer="work hang")
        assert reasons(collect(source, tmp_path / "demos", workers=2)) == [None] * 8
    finally:
        stop.set()
        killer.join()
    assert (standin / "xvfb").read_text().count("started") > 1


@pytest.mark.long
def test_simulator_that_never_starts_stops_the_run(
    standin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rlbench_pool, "LAUNCHES", 2)
    orders(standin, launch="fail fail fail fail")
    with pytest.raises(
        UserError, match=r"CoppeliaSim does not start: RuntimeError: no licence; .*simulator0\.log"
    ):
        collect(SOURCE, tmp_path / "demos")


def test_reasons_name_no_folders() -> None:
    told = rlbench_worker.as_line("No such file:\n '/home/me/RLBench/task_ttms/x.ttm'")
    assert told == "No such file: 'x.ttm'"
    assert rlbench_worker.as_line("in m/s, 3 / 4: none") == "in m/s, 3 / 4: none"


def test_full_disk_is_no_failure_of_the_task(standin: Path, tmp_path: Path) -> None:
    (tmp_path / "demos").mkdir()
    (tmp_path / "demos" / "push_button-v0-e0.partial").mkdir()
    with pytest.raises(OSError, match=r"push_button-v0-e0\.npz"):
        collect(SOURCE, tmp_path / "demos")


def test_interrupted_pool_leaves_finished_demos_to_the_next(standin: Path, tmp_path: Path) -> None:
    orders(standin, open_drawer="work hang")
    jobs = SOURCE.jobs()
    began = time.monotonic()
    with pytest.raises(InterruptedError), SOURCE.pool(jobs, 1, tmp_path / "demos") as pool:
        before = [pool.result(job) for job in jobs[:3]]
        pool.discard(jobs[0])
        waiter = ThreadPoolExecutor(1)
        waiting = waiter.submit(pool.result, jobs[3])
        raise InterruptedError
    with pytest.raises(RuntimeError, match="closed"):
        waiting.result(timeout=10)
    waiter.shutdown()
    assert time.monotonic() - began < 30
    orders(standin, push_button="work die", open_drawer="die")
    with SOURCE.pool(jobs[1:], 2, tmp_path / "demos") as pool:
        after = [pool.result(job) for job in jobs[1:]]
    assert (standin / "orders" / "push_button").read_text() == "work\ndie\n"
    for old, new in zip(before[1:], after, strict=False):
        assert np.array_equal(old.frames["front"], new.frames["front"])
    assert reasons(after) == [None] * 3


def test_simulators_end_with_a_killed_parent(standin: Path, tmp_path: Path) -> None:
    orders(standin, push_button="hang")
    script = (
        "from pathlib import Path\nfrom tests.demos.test_rlbench_live import SOURCE, collect\n"
        f"collect(SOURCE, Path({str(tmp_path / 'demos')!r}), 1)\n"
    )
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), str(STANDINS)])
    with psutil.Popen(
        [sys.executable, "-c", script], cwd=root, env=os.environ | {"PYTHONPATH": paths}
    ) as parent:
        end = time.monotonic() + 60
        while (standin / "orders" / "push_button").read_text() and time.monotonic() < end:
            time.sleep(0.1)
        family = parent.children(recursive=True)
        parent.kill()
    assert len(family) >= 2
    assert not psutil.wait_procs(family, timeout=20)[1]


# --- The check ----------------------------------------------------------------------------------------------


def test_check_passes_where_nothing_is_missing(standin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rlbench_live.check()
    assert rlbench_live.task_names() == ["open_drawer", "push_button", "reach_target", "weighing_scales"]


def missing() -> str:
    """What the check says."""
    with pytest.raises(UserError) as raised:
        rlbench_live.check()
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_check_names_all_that_is_missing(
    standin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert missing().endswith("no DISPLAY and no Xvfb, run `apt-get install xvfb`")
    monkeypatch.setenv("DISPLAY", ":4999")
    assert "DISPLAY = :4999 does not answer and no Xvfb" in missing()
    monkeypatch.setattr(
        rlbench_live, "package_folder", lambda name: None if name == "rlbench" else STANDINS / name
    )
    assert "the package rlbench not installed, run `make rlbench-setup`" in missing()
    monkeypatch.setattr(rlbench_live, "package_folder", lambda name: tmp_path)
    assert "the installed pyrep is an unrelated package of that name" in missing()
    monkeypatch.delenv("COPPELIASIM_ROOT")
    assert "COPPELIASIM_ROOT not set" in missing()


def test_check_looks_into_coppeliasim(standin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = standin / "coppelia" / "libcoppeliaSim.so.1"
    programs = standin / "programs"
    (programs / "ldd").write_text(
        "#!/bin/sh\necho '\tlibQt5Core.so.5 => not found'\necho '\tlibc.so.6 => /lib/x (0)'\n"
    )
    (programs / "ldd").chmod(0o755)
    assert missing().endswith("CoppeliaSim lacks the libraries libQt5Core.so.5, install them")
    (programs / "ldd").write_text("#!/bin/sh\n")
    for name in ("libsimExtOMPL.so", "libqxcb.so"):
        plugin = library.with_name(name)
        plugin.rename(plugin.with_suffix(".away"))
        assert missing().endswith(f"lacks {name}, unpack CoppeliaSim 4.1.0 there anew")
        plugin.with_suffix(".away").rename(plugin)
    (standin / "coppelia/platforms").mkdir()
    library.with_name("libqxcb.so").rename(standin / "coppelia/platforms/libqxcb.so")
    rlbench_live.check()
    library.rename(library.with_suffix(""))
    assert f"lacks libcoppeliaSim.so.1, run `ln -s libcoppeliaSim.so {library}`" in missing()
    library.with_suffix("").unlink()
    assert "lacks libcoppeliaSim.so.1, set it to CoppeliaSim 4.1.0's folder" in missing()
    monkeypatch.setenv("COPPELIASIM_ROOT", str(tmp_path / "nowhere"))
    assert "nowhere is no folder" in missing()


@pytest.fixture
def x_server() -> Iterator[str]:
    """A socket that answers like a local X server's."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0/tmp/.X11-unix/X4877")
        server.listen()
        yield ":4877.0"


def test_display_that_answers_is_used(
    standin: Path, tmp_path: Path, x_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISPLAY", x_server)
    assert rlbench_pool.given_display() == x_server
    collect(replace(SOURCE, tasks=("push_button",), episodes=1), tmp_path / "demos")
    assert not (standin / "xvfb").exists()


@pytest.mark.long
def test_display_on_which_nothing_starts_is_left_for_an_xvfb(
    standin: Path, tmp_path: Path, x_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISPLAY", x_server)
    orders(standin, launch="fail")
    assert reasons(collect(SOURCE, tmp_path / "demos")) == [None] * 4
    assert (standin / "xvfb").read_text() == "started\n"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"tasks": ("push_buton",)},
            "demos.tasks = 'push_buton': RLBench has none of this name; did you mean push_button",
        ),
        ({"tasks": ("push_button", "push_button")}, "name each one once"),
        ({"cameras": ("corner",)}, "demos.cameras = 'corner': RLBench has none of this name"),
    ],
)
def test_mistyped_sources_are_refused(standin: Path, change: dict[str, tuple[str, ...]], words: str) -> None:
    with pytest.raises(UserError, match=words):
        replace(SOURCE, **change).jobs()
