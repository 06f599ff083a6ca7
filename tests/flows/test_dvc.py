"""How DVC's command line is run, with a stand-in that says what it was asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from flows.dvc import Log, dvc, overrides
from flows.version import snapshots
from prelar.utils.errors import UserError
from tests.conftest import ROOT

STAND_IN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # also in the background of a shell
print(sys.argv[1:], flush=True)
if "left" in sys.argv:
    print(subprocess.Popen(["sleep", "60"], start_new_session=True).pid)
if "sleep" in sys.argv:
    time.sleep(600)
if "locked" in sys.argv:
    sys.exit("ERROR: Unable to acquire lock")
"""


@pytest.fixture(autouse=True)
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dvc").mkdir()
    (tmp_path / "dvc/__init__.py").touch()
    (tmp_path / "dvc/__main__.py").write_text(STAND_IN, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.chdir(tmp_path)


def test_what_dvc_leaves_running_holds_nothing_up() -> None:
    seen: list[str] = []
    lines = dvc("exp", "left", on_line=seen.append)
    assert lines == seen and len(lines) == 2 and lines[0] == "['--wait-for-lock', '--cd', '.', 'exp', 'left']"
    os.kill(int(lines[1]), signal.SIGKILL)  # fails where it had to end first


def test_a_failure_tells_the_reasons_of_dvc() -> None:
    with pytest.raises(UserError, match="dvc exp run ended with status 1: ERROR: Unable to acquire lock"):
        dvc("exp", "run", *overrides({"task": "locked", "beta_a": 0.1}), "locked")


def test_a_log_gives_whole_lines_once(tmp_path: Path) -> None:
    log, path = Log(), tmp_path / "log"
    assert log.fresh(path) == []
    path.write_text("10%\r20%\nhalf")
    assert log.fresh(path) == ["10%", "20%"] and log.fresh(path) == []
    path.write_text("10%\r20%\nhalf a line\n\n")
    assert log.fresh(path) == ["half a line"]


def test_it_ends_with_the_process_that_started_it() -> None:
    words = "from flows.dvc import dvc; dvc('exp', 'sleep', on_line=lambda line: print(line, flush=True))"
    with subprocess.Popen([sys.executable, "-c", words], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and "sleep" in process.stdout.readline()
        (child,) = psutil.Process(process.pid).children()
        process.kill()
    child.wait(timeout=60)


def test_what_sets_stop_interrupts_it() -> None:
    stop, before = threading.Event(), psutil.Process().children(recursive=True)
    with pytest.raises(UserError, match="dvc exp sleep was interrupted"):
        dvc("exp", "sleep", on_line=lambda _: stop.set(), stop=stop)
    assert set(psutil.Process().children(recursive=True)) <= set(before)


def test_snapshots_stay_until_a_run_succeeds() -> None:
    with pytest.raises(UserError), snapshots("a-1") as given:
        folder = Path(given["PRELAR_RESUME"])
        (folder / "pretrain-1").mkdir(parents=True)
        raise UserError("killed")
    assert folder.is_absolute() and (folder / "pretrain-1").is_dir()
    with snapshots("a-1") as again, snapshots("b-2") as other:
        assert again == given != other
    assert not folder.exists()
