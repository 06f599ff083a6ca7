"""`make setup` where no Python fits: uv fetches one, and where it cannot, one line says what to do."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

UNFIT = "#!/bin/sh\nexit 1\n"
FIT = """#!/bin/sh
echo "fit $@" >> {log}
if [ "$1 $2" = "-m venv" ]; then
    mkdir -p "$3/bin"
    for name in pip python uv; do printf '#!/bin/sh\\necho "%s $@" >> {log}\\n' $name > "$3/bin/$name"; done
    chmod +x "$3"/bin/*
fi
"""
UV = """#!/bin/sh
echo "uv $@" >> {log}
case "$*" in *install*) exit {status};; *find*) echo {python};; esac
"""


def set_up(folder: Path, status: int, **settings: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run tools/setup.sh where each python3 is unfit and uv ends so; returns what was run too."""
    log, bare = folder / "log", folder / "bin"
    bare.mkdir()
    (folder / "requirements.lock").write_text("torch==9\nuv==1\n", encoding="utf-8")
    scripts = dict.fromkeys(("python3", "python3.11", "python3.12", "python3.13"), UNFIT)
    scripts |= {"uv": UV.format(log=log, status=status, python=folder / "fit")}
    for name in ("sh", "rm", "mktemp", "mkdir", "touch", "grep", "chmod", "id"):
        (bare / name).symlink_to(str(shutil.which(name)))
    for path, text in {
        **{bare / name: text for name, text in scripts.items()},
        folder / "fit": FIT.format(log=log),
    }.items():
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
    done = subprocess.run(
        ["sh", ROOT / "tools/setup.sh"],
        cwd=folder,
        env={"PATH": str(bare), "TMPDIR": str(folder), **settings},
        capture_output=True,
        text=True,
    )
    return done, log.read_text(encoding="utf-8").splitlines() if log.exists() else []


def test_a_python_is_fetched_where_none_fits(tmp_path: Path) -> None:
    done, ran = set_up(tmp_path, 0)
    assert done.returncode == 0 and (tmp_path / ".venv/.ready").is_file(), done.stderr
    assert done.stderr == "setup: no Python 3.11, 3.12 or 3.13 found; fetching 3.12 with uv\n"
    assert "uv python install --quiet 3.12" in ran and "fit -m venv .venv" in ran
    assert any(line.startswith("pip install") and "-r requirements.lock" in line for line in ran)


def test_it_ends_in_one_line_where_none_can_be_had(tmp_path: Path) -> None:
    done, _ = set_up(tmp_path, 1)
    assert done.returncode == 2 and not (tmp_path / ".venv").exists()
    assert done.stderr.splitlines()[-1].startswith("error: no Python 3.11, 3.12 or 3.13 found; install one")


@pytest.mark.parametrize("uv", ["", "1"])
def test_uv_installs_the_lock_where_it_is_asked_to(tmp_path: Path, uv: str) -> None:
    done, ran = set_up(tmp_path, 0, UV=uv)
    assert done.returncode == 0, done.stderr
    chosen = [line for line in ran if "-r requirements.lock" in line]
    wanted = "uv pip install --quiet --python .venv/bin/python --torch-backend=auto -r requirements.lock"
    assert (chosen == [wanted]) == bool(uv) and len(chosen) == 1
    assert any("uv==1" in line for line in ran) == bool(uv)
