"""The ssv2 flow over many clips: its memory is that of a few."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prelar.store.store import Store
from prelar.utils import files
from tests import archives, memory
from tests.conftest import ROOT

CLIPS = 20_000
DISTINCT = 240
CURVE = ROOT / "tests/output/memory_20k.tsv"


@pytest.mark.long
def test_twenty_thousand_clips_in_the_memory_of_a_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The curve over the clips is kept in tests/output; its last tenth lies not above its second."""
    monkeypatch.chdir(tmp_path)
    archives.source(tmp_path / "data/sample", many())
    shutil.copy(ROOT / "params.yaml", tmp_path)
    readings = watched_run()
    CURVE.parent.mkdir(exist_ok=True)
    lines = ["seconds\tclips\tflow_mb\tserver_mb", *("\t".join(f"{x:.1f}" for x in row) for row in readings)]
    files.write_text(CURVE, "\n".join(lines) + "\n")
    store = Store.open("data/ssv2.zarr")
    assert store.num_clips == CLIPS
    early, late = between(readings, 0.1, 0.2), between(readings, 0.9, 1.0)
    most = max(row[2] for row in readings)
    print(f"{early:.0f} MB at a tenth, {late:.0f} MB at the end, {most:.0f} MB at most")
    assert late < 1.25 * early
    assert most < 1000


def many() -> dict[str, bytes]:
    """Clips of 8 to 12 small frames: a few hundred, each under many ids."""
    distinct = [
        archives.clip(8 + number % 5, (48, 64, 56)[number % 3], 48, filters=f"hue=h={number}")
        for number in range(DISTINCT)
    ]
    return {str(number): distinct[number % DISTINCT] for number in range(CLIPS)}


def watched_run() -> list[tuple[float, int, float, float]]:
    """Run the flow; returns seconds, committed clips, and the MB of its processes and its server, in time."""
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.ssv2"], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    begun, readings, journal, offset, clips = time.monotonic(), [], None, 0, 0
    while process.poll() is None:
        journal = journal or next(files.STAGING.glob("ssv2-*/ssv2.journal"), None)
        if journal is not None and journal.is_file():
            with journal.open("rb") as handle:
                handle.seek(offset)
                content = handle.read()
            offset, clips = offset + len(content), clips + content.count(b'"status"')
        readings.append((time.monotonic() - begun, clips, *memory.held(process.pid)))
        time.sleep(0.5)
    assert process.returncode == 0
    return readings


def between(readings: list[tuple[float, int, float, float]], low: float, high: float) -> float:
    """The median of the flow's MB while it held from `low` to `high` of the clips, before it ended."""
    return statistics.median(row[2] for row in readings if low * CLIPS <= row[1] < high * CLIPS)
