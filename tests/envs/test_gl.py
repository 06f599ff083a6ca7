"""The choice of OpenGL: a user's setting wins, a card comes first, and a failure names the package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prelar import doctor
from prelar.envs import gl
from prelar.train.checkpoint import save_parts
from prelar.utils.errors import UserError
from tests.conftest import ROOT


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """No OpenGL chosen, mujoco not yet imported, and the environment put back afterwards."""
    for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM", gl.TRIED, *gl.MESA):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "mujoco", raising=False)


@pytest.mark.parametrize(
    ("card", "renderers", "expected"),
    [
        (True, {"egl": "NVIDIA H200/PCIe/SSE2", "osmesa": "llvmpipe"}, "egl"),
        (True, {"egl": "llvmpipe (LLVM 15, 256 bits)", "osmesa": "llvmpipe"}, "osmesa"),
        (False, {"egl": "llvmpipe", "osmesa": "llvmpipe"}, "osmesa"),
        (False, {"egl": "llvmpipe"}, "egl"),
        (True, {}, None),
    ],
)
def test_choice(
    monkeypatch: pytest.MonkeyPatch, card: bool, renderers: dict[str, str], expected: str | None
) -> None:
    monkeypatch.setattr(gl, "has_card", lambda: card)
    monkeypatch.setattr(gl, "probe", renderers.get)
    assert gl.choose() == expected


def test_cards_are_found_by_their_device_files(tmp_path: Path) -> None:
    assert not gl.has_card(tmp_path)
    (tmp_path / "nvidiactl").touch()
    assert not gl.has_card(tmp_path)
    (tmp_path / "nvidia0").touch()
    assert gl.has_card(tmp_path)


def test_users_choice_is_tried_once_and_kept(monkeypatch: pytest.MonkeyPatch, unset: None) -> None:
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setenv("LP_NUM_THREADS", "2")
    monkeypatch.setenv("PYOPENGL_PLATFORM", "glx")
    tried: list[str] = []
    monkeypatch.setattr(gl, "probe", lambda backend: tried.append(backend) or "llvmpipe")
    for _ in range(2):
        assert gl.ensure() == "egl"
    assert tried == ["egl"]
    assert os.environ["LP_NUM_THREADS"] == "2" and "PYOPENGL_PLATFORM" not in os.environ


@pytest.mark.parametrize("chosen", gl.KNOWN)
@pytest.mark.parametrize("working", [*gl.BACKENDS, None])
def test_a_choice_that_cannot_draw_is_refused_and_one_that_can_is_named(
    monkeypatch: pytest.MonkeyPatch, unset: None, chosen: str, working: str | None
) -> None:
    monkeypatch.setenv("MUJOCO_GL", chosen.upper())
    monkeypatch.setattr(gl, "probe", lambda backend: "llvmpipe" if backend == working else None)
    if chosen == working:
        assert gl.ensure() == chosen
        return
    remedy = f"set it to {working}, which can" if working else "run `apt-get install libosmesa6`"
    with pytest.raises(UserError, match=f"^MUJOCO_GL={chosen}: cannot draw here; unset it.*{remedy}"):
        gl.ensure()
    assert doctor.guarded("OpenGL", doctor.opengl).text.startswith(f"MUJOCO_GL={chosen}: cannot draw here")


@pytest.mark.parametrize(
    "command",
    [
        "prelar sample",
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in ("prelar finetune", "prelar evaluate", "flows.demos")
        ),
    ],
)
def test_stages_that_draw_say_so_in_a_line(tmp_path: Path, command: str) -> None:
    """Before any work, where a setting from the shell cannot draw: no display answers here."""
    shutil.copy2(ROOT / "params.yaml", tmp_path)
    save_parts(tmp_path / "data/pretrain", {}, {"model": {"method": "prelar"}})
    save_parts(tmp_path / "data/finetune", {}, {"method": "prelar", "task": "reach", "action_repeat": 4})
    settings = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", gl.TRIED)}
    done = subprocess.run(
        [sys.executable, "-m", *command.split()],
        cwd=tmp_path,
        env=settings | {"MUJOCO_GL": "glfw", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert re.match(r"error: MUJOCO_GL=glfw: cannot draw here; unset it, or set it to (egl|osmesa), ", line)


def test_choice_is_inherited_through_the_environment(monkeypatch: pytest.MonkeyPatch, unset: None) -> None:
    monkeypatch.setattr(gl, "choose", lambda: "osmesa")
    assert gl.ensure() == "osmesa"
    assert os.environ["MUJOCO_GL"] == "osmesa"
    monkeypatch.setattr(gl, "choose", lambda: pytest.fail("probed twice"))
    assert gl.ensure() == "osmesa"


def test_nonsense_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "osmessa")
    with pytest.raises(UserError, match=r"MUJOCO_GL = osmessa: .*egl, osmesa"):
        gl.ensure()


def test_late_choice_is_refused(monkeypatch: pytest.MonkeyPatch, unset: None) -> None:
    monkeypatch.setitem(sys.modules, "mujoco", sys)
    with pytest.raises(UserError, match="MUJOCO_GL"):
        gl.ensure()


def test_no_backend_names_the_package(monkeypatch: pytest.MonkeyPatch, unset: None) -> None:
    monkeypatch.setattr(gl, "choose", lambda: None)
    with pytest.raises(UserError, match="apt-get install libosmesa6"):
        gl.main([])
    assert "MUJOCO_GL" not in os.environ


def test_install_runs_apt_and_probes_again(
    monkeypatch: pytest.MonkeyPatch, unset: None, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []

    def record(command: list[str]) -> bool:
        commands.append(list(command))
        return "libosmesa6" in command

    monkeypatch.setattr(gl, "choose", lambda: "osmesa" if commands else None)
    monkeypatch.setattr(gl, "probe", lambda backend: "llvmpipe")
    monkeypatch.setattr(gl, "_quiet", record)
    monkeypatch.setattr(gl.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(gl.os, "geteuid", lambda: 0)
    gl.main(["--install"])
    assert commands[0] == ["/usr/bin/apt-get", "update"]
    assert commands[1][-1] == "libosmesa6"
    assert len(commands) == 2
    assert "OpenGL for MuJoCo: osmesa" in capsys.readouterr().out


def test_without_rights_nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gl.shutil, "which", lambda name: None if name == "sudo" else "/usr/bin/apt-get")
    monkeypatch.setattr(gl.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(gl, "_quiet", lambda command: pytest.fail("ran apt"))
    assert not gl.install()


def test_command_works_on_this_machine() -> None:
    settings = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"}
    done = subprocess.run(
        [sys.executable, "-m", "prelar.envs.gl"], env=settings, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("OpenGL for MuJoCo: ")


def test_probe_survives_a_backend_that_cannot_draw() -> None:
    assert gl.probe("nonsense") is None
