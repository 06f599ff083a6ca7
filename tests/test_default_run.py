"""What a newcomer's first run shows: the claims of the default params, each against its control."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, Project

SEEDS = (0, 1, 2)


@pytest.mark.long
def test_the_default_run_beats_its_controls(tmp_path: Path, make_project: Callable[[Path], Project]) -> None:
    """Predictions, latent actions and the agent in each of three seeds."""
    project = make_project(tmp_path)
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    for seed in SEEDS:
        project.edit(seed=seed, device="cpu")
        project.run("dvc", "repro", timeout=3600)
        found = json.loads((tmp_path / "reports/evaluate/metrics.json").read_text(encoding="utf-8"))
        assert found["prediction_error_late"] < found["prediction_error_late_copy"]
        assert found["prediction_error_late"] < found["prediction_error_late_median"]
        assert found["prediction_error_late_policy"] < found["prediction_error_late_policy_copy"]
        assert found["controllability_db_low"] >= 0.5 > found["controllability_db_untrained"]
        shown = json.loads((tmp_path / "reports/evaluate/summary.json").read_text(encoding="utf-8"))
        measured = shown["controllability"]
        assert measured["clips"] >= 20 and measured["pairs"] >= 200
        assert measured["changed"] < measured["changed_swapped"]
        assert shown["episodes"]["count"] >= 10
        assert found["return_low"] > found["return_random_high"]
