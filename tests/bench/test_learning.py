"""The learning bench, but for the hour that it takes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from prelar.config import Config, load_config
from prelar.report import page
from prelar.report.catalog import LEARNING
from prelar.utils.errors import UserError
from tests.bench import learning
from tests.conftest import ROOT
from tests.fake_results import make_results

CHANCE = np.array([100.0, 120.0, 140.0])


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(learning, "play", lambda seed, *, expert: np.array([800.0]))


def curves(*ends: float) -> list[dict[str, list[float]]]:
    return [{"step": [1000.0, 2000.0], "return": [90.0, end], "success": [0.0, 0.5]} for end in ends]


def test_a_project_of_the_bench_is_valid(tmp_path: Path) -> None:
    config = learning.project(tmp_path / "seed-4", 4)
    assert isinstance(config, Config) and config.seed == 4
    assert (config.method, config.task) == (learning.SETTINGS["method"], learning.SETTINGS["task"])
    assert config.finetune.model_dump() == learning.PRESET
    assert (tmp_path / "seed-4/data/pretrain/config.json").exists()


def test_the_page_shows_the_curves_where_there_are_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(ROOT / "params.yaml")
    make_results(tmp_path)
    assert 'id="learning"' not in page.render(config, tmp_path)
    learning.report(curves(400, 500, 600), CHANCE)
    summary = json.loads((tmp_path / LEARNING / "summary.json").read_text())
    assert summary["ends"] == [245, 295, 345] and summary["chance"] == 120
    text = page.render(config, tmp_path)
    assert 'id="learning"' in text and "n = 3 seeds" in text and "reach 245, 295, 345" in text
    assert "random actions" in text


def test_a_seed_no_better_than_chance_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="did not rise above random actions"):
        learning.report(curves(400, 100), CHANCE)
    assert "2 seeds: return 170 (95 to 245)" in capsys.readouterr().out


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "work/seed-0"
    (place / "data/finetune").mkdir(parents=True)
    for name in ("return", "success"):
        path = place / f"reports/finetune/plots/metrics/eval/{name}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"step\t{name}\n1000\t5.0\n")
    assert learning.run_seed(tmp_path / "work", 0) == {"step": [1000], "return": [5], "success": [5]}
