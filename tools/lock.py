"""Write requirements.lock: every package pinned, for Python 3.11 to 3.13 at once.

The CUDA libraries of torch are left out. Torch's CUDA build pins them itself, and its CPU build does without.
What is pinned already stays, unless pyproject.toml forbids it or `--upgrade` is given.
Run through `make lock`.
"""

import re
import subprocess
import sys
from pathlib import Path

CUDA = re.compile(r"(nvidia-|cuda-|triton)")
LOCK = "requirements.lock"
HEAD = "# Written by `make lock` from pyproject.toml. Install with: pip install -r requirements.lock\n"


def main() -> None:
    """Resolve pyproject.toml with uv and write the pins."""
    resolve = "pip compile --universal --python-version 3.11 pyproject.toml --no-header --no-annotate --quiet"
    command = [sys.executable, "-m", "uv", *resolve.split(), "--all-extras", "-o", LOCK, *sys.argv[1:]]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    pins = Path(LOCK).read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in pins if not CUDA.match(line)]
    Path(LOCK).write_text(HEAD + "".join(kept), encoding="utf-8")


if __name__ == "__main__":
    main()
