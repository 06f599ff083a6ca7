"""The notebook runs, the site renders, and a release is what its tag says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from prelar import __version__
from prelar.utils.errors import UserError
from tests.conftest import ROOT
from tools.release import notes

LOG = "# Changes\n\n## 1.1.0, 2026-01-02\n\n### Added\n\n- This.\n\n## 1.0.0, 2025-01-02\n\n- That.\n"


def test_the_notes_of_a_release_are_its_part_of_the_changelog() -> None:
    assert notes(LOG, "1.1.0") == "### Added\n\n- This.\n" and notes(LOG, "1.0.0") == "- That.\n"
    for version, log in (
        ("1.0", LOG),
        ("2.0.0", LOG),
        ("1.1.0", LOG.replace("2026-01-02", "not yet released")),
    ):
        with pytest.raises(UserError, match=f"has no released part on {re.escape(version)}"):
            notes(log, version)


def test_a_citation_names_this_version() -> None:
    cited = YAML(typ="safe").load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == __version__ and cited["preferred-citation"]["year"] == 2024


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "examples/slurm").iterdir()))
def test_a_batch_script_parses(script: str) -> None:
    subprocess.run(["bash", "-n", ROOT / "examples/slurm" / script], check=True)


@pytest.mark.long
def test_the_notebook_runs(tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient")
    import nbformat

    book = nbformat.read(ROOT / "examples/tour.ipynb", as_version=4)
    assert len(book.cells) == 10 and not any(cell.get("outputs") for cell in book.cells)
    nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    assert sum("image/png" in json.dumps(cell.get("outputs", [])) for cell in book.cells) == 3


@pytest.mark.long
def test_the_site_renders_without_a_warning(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(tmp_path / "site"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site/api/prelar.dream/index.html").read_text(encoding="utf-8")
    assert "One rollout at a time of a trained model" in page
    assert (tmp_path / "site/play.html").stat().st_size > 1_000_000


@pytest.mark.long
def test_a_release_is_refused_under_another_tag(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "tools/release.py", "v9.9.9", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: v9.9.9: ")
