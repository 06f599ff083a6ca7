"""Results of a sweep that are kept with the project: what is written reads back the same, and is drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prelar.report import compare
from prelar.report.results import COLUMNS, Results
from prelar.utils.errors import UserError
from tests.report.run_files import PARAMS, make_run

NUMBERS = st.floats(-1e6, 1e6, allow_nan=False).map(lambda value: float(f"{value:.6g}"))
CURVES = st.lists(NUMBERS, min_size=1, max_size=4)


def results(values: list[list[float]], figures: dict[str, float]) -> Results:
    found = Results("0" * 40, PARAMS)
    for seed, curve in enumerate(values):
        name = f"run-{seed}"
        found.changes[name] = {"seed": seed, "beta_a": 0.1}
        found.cpu_seconds[name] = 1.5
        steps = tuple(1600.0 * (i + 1) for i in range(len(curve)))
        found.add(replace(make_run(name, []), curves={"return": (steps, tuple(curve))}, metrics=figures))
    found.changes["failed"] = {"seed": 9}
    found.failed["failed"] = "ended with status 1"
    return found


@settings(max_examples=8)
@given(
    st.lists(CURVES, max_size=3),
    st.dictionaries(st.sampled_from(["return", "probe_r2", "success_rate"]), NUMBERS, min_size=1),
)
def test_what_is_written_reads_back(
    tmp_path_factory: pytest.TempPathFactory, values: list[list[float]], figures: dict[str, float]
) -> None:
    path = tmp_path_factory.mktemp("results") / "sweep.csv"
    made = results(values, figures)
    made.write(path)
    read = Results.read(path)
    assert (read.commit, read.params, read.changes) == ("0" * 40, PARAMS, made.changes)
    assert (read.failed, read.cpu_seconds) == (made.failed, made.cpu_seconds)
    assert {name: (dict(run.metrics), dict(run.curves)) for name, run in read.runs.items()} == {
        name: (dict(run.metrics), dict(run.curves)) for name, run in made.runs.items()
    }
    before = path.read_bytes(), path.with_suffix(".json").read_bytes()
    read.write(path)
    assert (path.read_bytes(), path.with_suffix(".json").read_bytes()) == before


def test_the_page_is_drawn_from_the_table_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sweep.csv"
    results([[1.0, 2.0], [3.0, 4.0]], {"probe_r2": 0.5}).write(path)
    assert path.read_text(encoding="utf-8").split("\n")[0].startswith(",".join(COLUMNS))
    compare.run([str(path)], tmp_path / "page.html")
    told = capsys.readouterr().out
    assert "2 runs compared" in told and "failed failed and is not shown: ended with status 1" in told
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "n = 2: 1 task, 2 seeds" in page and "Return during fine-tuning" in page


@pytest.mark.parametrize("output", ["sweep.html", "sweep.csv", "page.csv", "./other/../sweep.html"])
def test_no_page_takes_the_place_of_a_table(tmp_path: Path, output: str) -> None:
    path = tmp_path / "sweep.csv"
    (tmp_path / "other").mkdir()
    results([[1.0, 2.0]], {"probe_r2": 0.5}).write(path)
    before = path.read_bytes()
    with pytest.raises(UserError, match="give another name"):
        compare.run([str(path)], tmp_path / output)
    assert path.read_bytes() == before and not list(tmp_path.glob("page*"))


@pytest.mark.parametrize("broken", ["{}", "[]", '{"commit": "a", "params": []}'])
def test_other_files_end_in_one_line(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "sweep.csv"
    with pytest.raises(UserError, match="missing; it belongs to the results"):
        Results.read(path)
    path.with_suffix(".json").write_text(broken, encoding="utf-8")
    path.write_text("run\n", encoding="utf-8")
    with pytest.raises(UserError, match="not the results of a sweep"):
        Results.read(path)
