"""How DVC's command line is run, with a stand-in that says what it was asked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from dvc.utils.cli_parse import to_path_overrides
from dvc.utils.hydra import apply_overrides, to_hydra_overrides
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flows.dvc import Log, dvc, git, overrides
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


TEXTS = st.text("aé日😀 '\"\\${},=[]()#*|~-.:\t\n", max_size=12).filter(lambda text: text != "???")
"""Any but what stands for a missing value in OmegaConf, which DVC reads params with."""
WORDS = st.sampled_from(["null", "true", "1", "1e-05", "hub:org/name@rev", "/data/vidéos", "C:\\videos\\"])
WORDS |= st.text("aNul/.@:-_1e", max_size=6) | st.sampled_from(["NULL", "nan", "inf", "-inf", "~", "on"])
NUMBERS = st.integers() | st.floats(allow_nan=False)
SINGLE = TEXTS | WORDS | NUMBERS | st.booleans() | st.none()


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


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SINGLE | st.lists(SINGLE, max_size=3), st.sampled_from(["seed", "ssv2.source", "ssv2.new"]))
def test_dvc_reads_the_values_that_were_given(value: object, key: str) -> None:
    """Also of a key that params.yaml lacks, and has the default of."""
    Path("params.json").write_text('{"seed": 0, "x": 5, "ssv2": {"source": "data"}}', encoding="utf-8")
    option, word = overrides({key: value})
    assert option == "-S"
    ((path, words),) = to_path_overrides([word]).items()
    assert path == "params.yaml" and not to_hydra_overrides(words)[0].is_sweep_override()
    apply_overrides("params.json", words)
    held = json.loads(Path("params.json").read_text(encoding="utf-8"))
    for name in key.split("."):
        held = held[name]
    assert held == value and type(held) is type(value)


def test_git_tells_its_reasons() -> None:
    with pytest.raises(UserError, match=r"^git clone: fatal: .*nothing-here.* does not exist$"):
        git("clone", "nothing-here", "elsewhere")


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
