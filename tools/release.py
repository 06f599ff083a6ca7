"""Build what a release consists of: the wheel, the source, SHA256SUMS and notes.md, of the tag `v1.2.3`.

Run by .github/workflows/release.yml: python tools/release.py v1.2.3 dist
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from prelar import __version__  # noqa: E402
from prelar.utils.errors import UserError, run_main  # noqa: E402
from prelar.utils.files import digest  # noqa: E402


def notes(changelog: str, version: str) -> str:
    """The part of CHANGELOG.md on a version. Raises `UserError` where it has none, or not yet."""
    found = re.search(
        rf"^## {re.escape(version)}(?![\w.])(.*)\n((?:(?!^## ).*\n?)*)", changelog, re.MULTILINE
    )
    if found is None or "not yet released" in found[1]:
        raise UserError(
            f"CHANGELOG.md: has no released part on {version}; give it the heading `## {version}, DATE`"
        )
    return found[2].strip() + "\n"


def main() -> None:
    """Check the tag against version and changelog, and build."""
    tag, folder = sys.argv[1], Path(sys.argv[2])
    if tag != f"v{__version__}":
        raise UserError(f"{tag}: prelar/__init__.py and pyproject.toml say {__version__}; tag v{__version__}")
    told = notes((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), __version__)
    subprocess.run(
        [sys.executable, "-m", "uv", "build", "--quiet", "--out-dir", folder], cwd=ROOT, check=True
    )
    built = sorted([*folder.glob("*.whl"), *folder.glob("*.tar.gz")])
    (folder / "SHA256SUMS").write_text(
        "".join(f"{digest(path)}  {path.name}\n" for path in built), encoding="utf-8"
    )
    (folder / "notes.md").write_text(told, encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
