"""`python -m prelar doctor`: a line for each thing, its remedy, and the exit status."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from prelar import doctor
from prelar.config import load_config
from prelar.doctor import Finding
from prelar.envs import gl
from tests.conftest import ROOT


def test_this_machine_is_looked_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    status = doctor.run()
    lines = capsys.readouterr().out.splitlines()
    names = [line[8:].split("  ")[0].strip() for line in lines]
    assert names == [
        "Python",
        "packages",
        "params.yaml",
        "ffmpeg",
        "OpenGL",
        "GPU",
        "compiler",
        "disk",
        "git",
        "DVC",
        "Prefect",
        "CoppeliaSim",
    ]
    assert status == any(line.startswith("MISSING") for line in lines)
    assert "drew a frame" in lines[4] and lines[3].startswith("ok")


@pytest.mark.parametrize(("state", "status"), [("ok", 0), ("note", 0), ("MISSING", 1)])
def test_the_exit_status(state: doctor.State, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: iter([Finding("a", "ok", "b"), Finding("c", state, "d")]))
    assert doctor.run() == status


def test_outside_of_a_project_everything_is_still_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("MUJOCO_GL", gl.TRIED):
        monkeypatch.setenv(name, "")
    monkeypatch.delitem(sys.modules, "mujoco", raising=False)
    monkeypatch.setattr(gl, "probe", lambda backend: None)
    found = {finding.name: finding for finding in doctor.examine()}
    assert {name for name, f in found.items() if f.state == "MISSING"} == {
        "packages",
        "params.yaml",
        "OpenGL",
        "git",
        "DVC",
    }
    assert "libosmesa6" in found["OpenGL"].text and "top of the project" in found["DVC"].text


def test_packages_are_held_against_the_lock(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.write_text("# by hand\nnumpy==0.0.1\npydantic-none==1 ; sys_platform == 'win32'\n")
    found = doctor.packages(lock)
    assert found.state == "note" and "not 0.0.1" in found.text and "win32" not in found.text
    lock.write_text("no-such-package==1.0\n")
    assert doctor.packages(lock) == Finding(
        "packages", "MISSING", "no-such-package not installed; run `make setup`"
    )


def test_a_card_that_params_ask_for_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor.gpu("cuda").state == "MISSING" and doctor.gpu("auto").state == "note"


def test_a_compiler_is_needed_where_params_say_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    assert doctor.compiler("always").state == "ok", "this machine has one"
    for name in ("/nonexistent", "false"):
        monkeypatch.setenv("CXX", name)
        found = doctor.compiler("always")
        assert found.state == "MISSING" and name in found.text and "install g++" in found.text
        assert doctor.compiler("auto").state == doctor.compiler("never").state == "note"


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.disk, "free_bytes", lambda path: 1000)
    found = doctor.disk_space(load_config(ROOT / "params.yaml"))
    assert found.state == "MISSING" and found.text.startswith("1 kB free")


def test_changes_in_git_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    for command in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=t", "-c", "user.email=t@e", "commit", "-qm", "x"],
    ):
        subprocess.run(["git", *command], check=True)
    assert doctor.git().state == "ok"
    (tmp_path / "a.txt").write_text("b")
    assert doctor.git().state == "note" and "changed: a.txt" in doctor.git().text


class Healthy(http.server.BaseHTTPRequestHandler):
    """Answers as a Prefect server does."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/api/health" else 404)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


def test_a_server_is_asked() -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Healthy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://me:hush@127.0.0.1:{server.server_port}/api"
        found = doctor.prefect(url)
        assert found.state == "ok" and "hush" not in found.text
        server.shutdown()
    assert doctor.prefect(url).state == "note" and doctor.prefect("http://[").state == "note"


def test_a_proxy_that_prefect_cannot_use_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks://127.0.0.1:9")
    found = doctor.guarded("Prefect", lambda: doctor.prefect(doctor.SERVER))
    assert found.state == "MISSING" and "socks://" in found.text


def test_the_simulator_is_needed_where_params_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COPPELIASIM_ROOT", raising=False)
    assert doctor.coppeliasim(needed=True).state == "MISSING"
    assert doctor.coppeliasim(needed=False).state == "note"
