"""What the stand-ins for RLBench, PyRep, CoppeliaSim and Xvfb need around them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

STANDINS = Path(__file__).parent / "standins"
XVFB = f"""#!{sys.executable}
import os, signal, sys, time
count = os.environ["XVFB_COUNT"]
with open(count, "a") as handle:
    handle.write("started\\n")
os.write(int(sys.argv[sys.argv.index("-displayfd") + 1]), b"4321\\n")
time.sleep(600)
"""


def standin_env(folder: Path) -> dict[str, str | None]:
    """Environment variables under which the stand-ins take the place of the real ones; None: not set."""
    root, programs, orders = (folder / name for name in ("coppelia", "programs", "orders"))
    for path in (root, programs, orders):
        path.mkdir(parents=True)
    for name in ("libcoppeliaSim.so.1", "libqxcb.so", "libsimExtOMPL.so", "simAddOnScript_PyRep.lua"):
        (root / name).touch()
    (programs / "Xvfb").write_text(XVFB)
    (programs / "Xvfb").chmod(0o755)
    return {
        "COPPELIASIM_ROOT": str(root),
        "DISPLAY": None,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(STANDINS),
        "RLBENCH_ORDERS": str(orders),
        "XVFB_COUNT": str(folder / "xvfb"),
    }


def use_standins(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the stand-ins take the place of the real ones, in this process and in those that it starts."""
    for name, value in standin_env(folder).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(str(STANDINS))


def orders(folder: Path, **lines: str) -> None:
    """Say what becomes of the next attempts at tasks, words apart by spaces."""
    for task, words in lines.items():
        (folder / "orders" / task).write_text("".join(f"{word}\n" for word in words.split()))
