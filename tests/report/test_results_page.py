"""The page of results: what it says follows from the committed tables, and from nothing else."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace

import pytest

from flows.sweep import PRESETS, plan_in
from prelar.report.results import Results
from tests.conftest import ROOT
from tests.report.run_files import PARAMS, make_run
from tools import results_page

FIRST = "small-comparison"
STEPS = (800.0, 1600.0, 2400.0, 3200.0)


def results(monkeypatch: pytest.MonkeyPatch, seeds: int, best: str, preset: str = FIRST) -> Results:
    """Results of some seeds, in which runs of the setting `best` alone reach what the expert does."""
    monkeypatch.chdir(ROOT)
    found = Results("c" * 40, PARAMS)
    for one in plan_in(ROOT, PRESETS[preset][1], "code"):
        found.changes[one.name] = one.changes
    for setting, runs in results_page.runs_of(found).items():
        for run in runs:
            if run.params["seed"] < seeds:
                top = 800.0 if setting == best else 200.0 + run.params["seed"]
                made = make_run(run.name, [])
                metrics = {"return": top, "return_low": top, "return_expert": 800.0}
                metrics |= {"return_random": 100.0, "return_random_high": 201.0}
                found.add(replace(made, metrics=metrics, curves={"return": (STEPS, (100.0, top, top, top))}))
                found.cpu_seconds[run.name] = 60.0
    return found


def test_the_better_setting_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_page, "probe", lambda scores: "")
    found = results(monkeypatch, seeds=2, best="APV")
    name = next(iter(found.changes))
    found.failed[name] = "ended with status 1"
    text, figures = results_page.page({FIRST: found})
    assert "42 of 105 runs are done" in text and "of the 2 seeds" in text and "1.0 minutes of a core" in text
    assert "| APV | 0.750 (0.750 to 0.750) | 1 (1 to 1) |" in text
    beaten = re.findall(r"\| (.*?) \| (.*?) \| ([01]) \(\3 to \3\) \| (first|second) \|", text)
    assert len(beaten) == 6 and all((row[0] == "APV") == (row[3] == "first") for row in beaten)
    assert f"| APV |{' 800 (800 to 800); 2 of 2 |' * 3}" in text
    assert f"| PreLAR |{' 200 (200 to 201); 0 of 2 |' * 3}" in text
    assert f"| random actions |{' at most 201 |' * 3}" in text
    assert "| random actions | 100 | 100 | 100 |" in text and "800, 800" in text
    assert f"- `{name}`: ended with status 1" in text
    assert all(svg.startswith('<svg xmlns="http') and "APV" in svg for svg in list(figures.values())[:1])


def test_an_incomplete_seed_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_page, "probe", lambda scores: "")
    whole, partly = results(monkeypatch, 1, "PreLAR"), results(monkeypatch, 2, "PreLAR")
    last = [name for name in partly.runs if partly.runs[name].params["seed"] == 1][-1]
    del partly.runs[last]
    assert "41 of 105 runs are done" in results_page.page({FIRST: partly})[0]
    tables = [
        re.findall(r"^\| (?!random|scripted).*", results_page.page({FIRST: r})[0], re.M)
        for r in (whole, partly)
    ]
    assert tables[0] == tables[1] and "one seed" in "".join(tables[0])
    empty, figures = results_page.page({FIRST: results(monkeypatch, 0, "")})
    assert "0 of 105 runs are done" in empty and figures == {} and "## Learning" not in empty


@pytest.mark.parametrize(
    ("preset", "best", "done", "charts"),
    [
        ("small-comparison-rlbench", "ContextWM", "30 of 75", {"methods-2", "ablations-2"}),
        ("small-causes", "PreLAR, held", "24 of 60", {"causes"}),
    ],
)
def test_a_later_sweep_is_compared_with_settings_of_the_first(
    preset: str, best: str, done: str, charts: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results_page, "probe", lambda scores: "")
    first = results(monkeypatch, seeds=2, best="APV")
    later = results(monkeypatch, seeds=2, best=best, preset=preset)
    text, figures = results_page.page({FIRST: first, preset: later})
    alone, drawn = results_page.page({FIRST: first})
    told = text.split("\n## ")
    assert told[1] == alone.split("\n## ")[1] and drawn.items() < figures.items()
    assert set(figures) - set(drawn) == {f"{name}.svg" for name in {*charts, f"probe-{preset}"}}
    assert f"{done} runs are done" in told[2] and f"{preset} --code cccccccccc\n" in told[2]
    areas = dict(re.findall(r"^\| (.*?) \| ([\d.]+) \(.*?\) \| [\d.]+ \(", told[2], re.M))
    own = set(results_page.runs_of(later))
    assert len(areas) == 7 and own < set(areas)
    assert {name for name, area in areas.items() if area == "0.750"} == {best} | ({"APV"} - own)
    hypotheses = "**PreLAR, held**, whose"
    assert alone.count(hypotheses) == text.count(hypotheses) == 1
    assert ("None of these runs is done" in text) == (preset != "small-causes")


def test_the_committed_page_is_that_of_the_committed_table() -> None:
    text, figures = results_page.page(results_page.tables())
    assert (ROOT / results_page.PAGE).read_text(encoding="utf-8") == text
    committed = {path.name: path.read_text("utf-8") for path in (ROOT / results_page.FIGURES).glob("*.svg")}
    assert committed == figures


def test_a_clone_can_go_on_with_every_table() -> None:
    for path in sorted((ROOT / "results").glob("*.csv")):
        commit = Results.read(path).commit
        known = subprocess.run(["git", "merge-base", "--is-ancestor", commit, "HEAD"], cwd=ROOT, check=False)
        assert known.returncode == 0, (
            f"{path.name}: {commit} is not in this history, so `--code` cannot name it"
        )
