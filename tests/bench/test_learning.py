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


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def play(config: Config, seeds: int, *, expert: bool) -> np.ndarray:
        return np.array([800.0] if expert else [100.0, 120.0, 140.0])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(learning, "play", play)


def curves(*ends: float) -> list[dict[str, list[float]]]:
    return [{"step": [1000.0, 2000.0], "return": [90.0, end], "success": [0.0, 0.5]} for end in ends]


def test_a_project_of_the_bench_is_valid(tmp_path: Path) -> None:
    config = learning.project(tmp_path / "reach-4", "reach", 4)
    assert isinstance(config, Config) and config.seed == 4
    assert (config.method, config.task) == (learning.SETTINGS["method"], "reach")
    assert config.finetune == config.scales.small.finetune
    assert (tmp_path / "reach-4/data/pretrain/config.json").exists()


def test_the_page_shows_the_curves_where_there_are_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(ROOT / "params.yaml")
    make_results(tmp_path)
    assert 'id="learning"' not in page.render(config, tmp_path)
    learning.report({"reach": curves(400, 500, 600), "push": curves(900, 900, 900)})
    summary = json.loads((tmp_path / LEARNING / "summary.json").read_text())
    assert [row["ends"] for row in summary["tasks"]] == [[245, 295, 345], [495, 495, 495]]
    assert summary["tasks"][1]["interval"] == [495, 495] and summary["tasks"][0]["chance"] == 120
    text = page.render(config, tmp_path)
    assert 'id="learning"' in text and text.count("learning-bench-push") > 0 and "reach 245, 295, 345" in text
    assert "random actions" in text and "<i>push</i>" in text
    (tmp_path / LEARNING / "summary.json").write_text(json.dumps({"task": "reach", "ends": [1]}))
    assert 'id="learning"' not in page.render(config, tmp_path), "a summary of an earlier version"


def test_a_task_no_better_than_chance_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="not above random actions on push; "):
        learning.report({"reach": curves(400, 500), "push": curves(400, 100)})
    assert "push, 2 seeds: return 170 (95%: 95 to 245)" in capsys.readouterr().out


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    place = tmp_path / "work/reach-0"
    (place / "data/finetune").mkdir(parents=True)
    for name in ("return", "success"):
        path = place / f"reports/finetune/plots/metrics/eval/{name}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"step\t{name}\n1000\t5.0\n")
    assert learning.run_task(tmp_path / "work", "reach", 0) == {"step": [1000], "return": [5], "success": [5]}
