"""Files that lie are read or refused with a reason, in bounded memory."""

import os
import subprocess
import sys
import time

import pytest

from tests.lies import FORMATS


def read(name: str, seed: int, count: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.lies", name, str(seed), str(count)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", FORMATS)
def test_lies_are_read_or_refused(name: str) -> None:
    read(name, 0, 300)


@pytest.mark.long
@pytest.mark.parametrize("name", FORMATS)
def test_many_lies_are_read_or_refused(name: str) -> None:
    read(name, time.time_ns() % 1_000_000, 8_000)
