"""How DVC's command line is run, with a stand-in that says what it was asked."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from flows.dvc import Log, dvc, overrides
from prelar.utils.errors import UserError

STAND_IN = """
import subprocess, sys
print(sys.argv[1:], flush=True)
if sys.argv[1:] == ["queue", "start"]:
    print(subprocess.Popen(["sleep", "60"], start_new_session=True).pid)
if "locked" in sys.argv:
    sys.exit("ERROR: Unable to acquire lock")
"""


@pytest.fixture(autouse=True)
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dvc").mkdir()
    (tmp_path / "dvc/__init__.py").touch()
    (tmp_path / "dvc/__main__.py").write_text(STAND_IN, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def test_what_dvc_leaves_running_holds_nothing_up() -> None:
    told: list[str] = []
    lines = dvc("queue", "start", tell=told.append)
    assert lines == told and lines[0] == "['queue', 'start']"
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
