"""Readers of every format from elsewhere refuse what is bad in bounded time and memory: see tests/fuzz.py."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.fuzz import FORMATS, LIMIT


def fuzz(name: str, seconds: int, seed: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", name, str(seconds), str(seed)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=seconds + LIMIT + 120,
    )
    last = (done.stdout.splitlines() or ["nothing"])[-1]
    assert done.returncode == 0 and last.startswith("ok "), (
        f"status {done.returncode} at {last}\n{done.stderr}"
    )
    return last


@pytest.mark.parametrize("name", FORMATS)
def test_mutated_files_are_read_or_refused(name: str) -> None:
    told = fuzz(name, 1)
    assert " 0 of them" not in told or name == "webm", told


@pytest.mark.long
@pytest.mark.parametrize("name", FORMATS)
def test_many_mutated_files_are_read_or_refused(name: str) -> None:
    fuzz(name, 32, seed=1_000_000)
