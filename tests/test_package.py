"""The package on its own: what is in the wheel, and that it works where nothing else of the project is."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prelar import __version__
from prelar.__main__ import main
from tests.conftest import ROOT
from tests.docs import blocks
from tests.test_api import save_pretrained


def uv(*words: str | Path, cwd: Path = ROOT) -> None:
    subprocess.run([sys.executable, "-m", "uv", *words, "--quiet"], cwd=cwd, check=True)


def test_the_version_is_told_once_more() -> None:
    described = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert described["project"]["version"] == __version__


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_completes_every_command(
    shell: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["prelar", "completion", shell])
    main()
    script = capsys.readouterr().out
    assert all(name in script for name in ("finetune", "import-reference", "--checkpoint"))
    if program := shutil.which(shell):
        subprocess.run([program, "-n"], input=script, text=True, check=True)


ACTING = """
from prelar.envs import make_env
with make_env({task!r}, time_limit=4) as simulator:
    simulator.reset(0, 0)
    assert simulator.step([0.0] * simulator.action_dim).reward >= 0
    assert simulator.render().shape == (64, 64, 3)
"""
LOGGING = """
import pathlib
from prelar.train.loggers import open_loggers
(logger,) = open_loggers([{name!r}], "it", "key", 0)
logger.log(1, {{"loss": 0.5}})
logger.close()
assert any(pathlib.Path("reports/loggers/{name}").rglob("*"))
"""
OFFLINE = """
import os
os.environ["HF_HUB_OFFLINE"] = "1"
import prelar
from prelar.utils.errors import UserError
try:
    prelar.load("org/name")
except UserError as told:
    assert "go online" in str(told), told
"""
STAGES = """
import dvc.repo
import prefect
from prelar.report import compare, page
from prelar.validation import suites
"""
EXPORTING = """
from prelar.simulator import demo, page, play, step
assert len(step.export(step.load_step(demo.DEMO))) > 100_000
"""
USES = {
    "sim": ACTING.format(task="reach"),
    "dmc": ACTING.format(task="dmc/walker-walk"),
    "pipeline": STAGES,
    "hub": OFFLINE,
    "simulator": EXPORTING,
    "tensorboard": LOGGING.format(name="tensorboard"),
    "wandb": LOGGING.format(name="wandb"),
    "s3": "import dvc_s3, s3fs",
    "ssh": "import dvc_ssh",
}
"""What each extra is for, as a program that fails where the extra does not bring all of it."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    uv("build", "--wheel", "--out-dir", folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.long
@pytest.mark.parametrize("extra", USES)
def test_an_extra_brings_what_it_is_for(extra: str, wheel: Path, tmp_path: Path) -> None:
    uv("venv", "--python", sys.executable, tmp_path / "env")
    uv("pip", "install", "--python", tmp_path / "env/bin/python", f"prelar[{extra}] @ {wheel.as_uri()}")
    command = [tmp_path / "env/bin/python", "-c", USES[extra]]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_a_wheel_without_extras_loads_a_checkpoint(tmp_path: Path, wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"prelar", f"prelar-{__version__}.dist-info"}
    assert "prelar/report/templates/report.css" in names
    env = tmp_path / "env"
    uv("venv", "--python", sys.executable, env)
    uv("pip", "install", "--python", env / "bin/python", wheel)
    save_pretrained(tmp_path / "data/pretrain")
    np.save(tmp_path / "frames.npy", np.zeros((5, 64, 64, 3), np.uint8))
    (example,) = [
        block.text for block in blocks() if block.language == "python" and block.page == "README.md"
    ]
    script = f"import numpy\nframes = numpy.load('frames.npy')\n{example}\nprint(film.shape)"
    surroundings = {"cwd": tmp_path, "env": {"PATH": "/usr/bin:/bin"}, "capture_output": True, "text": True}
    done = subprocess.run([env / "bin/python", "-c", script], check=True, **surroundings)  # type: ignore[call-overload]
    assert done.stdout == "(4, 64, 64, 3)\n"
    command = env / "bin/prelar"
    told = subprocess.run([command, "--version"], check=True, **surroundings)  # type: ignore[call-overload]
    assert told.stdout == f"prelar {__version__}\n"
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    lacking = subprocess.run([command, "report"], check=False, **surroundings)  # type: ignore[call-overload]
    assert lacking.returncode == 2
    assert lacking.stderr == "error: httpx is not installed; run: pip install 'prelar[pipeline]'\n"
