"""Readers of every format from elsewhere refuse what is bad in bounded time and memory: see tests/fuzz.py."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.fuzz import FORMATS, LIMIT


def fuzz(names: list[str], seconds: float, seed: int = 0) -> dict[str, str]:
    """The last line of each format, which is "ok …" where nothing broke the law, and its errors where not."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", ",".join(names), str(seconds), str(seed)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=len(names) * (seconds + LIMIT) + 120,
    )
    told = {}
    for name in names:
        lines = re.findall(rf"^(?:ok {name}: .*|{name} \d+ in .*)$", done.stdout, re.M)
        told[name] = (lines or ["nothing"])[-1]
        if f"{name}: status 0\n" not in done.stderr or not told[name].startswith("ok "):
            told[name] = f"at {told[name]}\n{done.stderr}"
    return told


@pytest.fixture(scope="module")
def tried() -> dict[str, str]:
    return fuzz([*FORMATS], 0.3)


@pytest.mark.parametrize("name", FORMATS)
def test_mutated_files_are_read_or_refused(name: str, tried: dict[str, str]) -> None:
    assert tried[name].startswith("ok "), tried[name]
    assert " 0 of them" not in tried[name] or name == "webm", tried[name]


@pytest.mark.long
@pytest.mark.parametrize("name", FORMATS)
def test_many_mutated_files_are_read_or_refused(name: str) -> None:
    told = fuzz([name], 32, seed=1_000_000)[name]
    assert told.startswith("ok "), told
