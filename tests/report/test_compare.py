"""The page that compares: complete, self-contained, honest about what does not compare."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from prelar.report import compare
from prelar.report.catalog import EVALUATE
from prelar.report.published import TASKS
from prelar.report.runs import workspace_files
from prelar.utils.files import write_text
from tests.report.run_files import make_run
from tests.report.test_page import ADDRESSES, Page

REAL = {"scale": "paper", "dataset": "demos"}


def real_runs(tasks: tuple[str, ...] = TASKS, seeds: int = 2, steps: int = 25) -> list[compare.Run]:
    return [
        make_run(
            f"{method}-{task}-{seed}",
            [min(1.0, 0.04 * k + 0.02 * seed) for k in range(steps)],
            method=method,
            task=task,
            seed=seed,
            **REAL,
        )
        for method in ("dreamerv2", "prelar")
        for task in tasks
        for seed in range(seeds)
    ]


def test_the_page_parses_stands_alone_and_repeats(tmp_path: Path) -> None:
    for name in ("open_loop.mp4", "action_swap.png"):
        write_text(tmp_path / EVALUATE / name, "content")
    runs = [make_run("a", [0.1, 0.2], files=workspace_files(tmp_path))]
    runs.append(make_run("<b>", [0.3, 0.4], beta_a=0.1))
    text = compare.render(runs)
    parsed = Page(text)
    for _, attributes in parsed.elements:
        for name in ADDRESSES & attributes.keys():
            assert re.match(r"(data:|#)", attributes[name] or ""), f"{name} leaves the page"
    identifiers = [a["id"] for _, a in parsed.elements if "id" in a]
    assert len(identifiers) == len(set(identifiers))
    assert not parsed.all("script") and "http:" not in text and "https:" not in text
    assert "<b>" not in text and "&lt;b&gt;" in text
    assert len(parsed.all("video")) == 1 and len(parsed.all("img")) == 1
    assert compare.render(runs) == text


def test_one_seed_has_no_interval_and_smoke_no_published_results() -> None:
    text = compare.render([make_run("a", [0.1, 0.2]), make_run("b", [0.3, 0.4], beta_a=0.1)])
    assert "no interval from one seed" in text and 'class="band' not in text
    assert "far too small and too short" in text and "(published)" not in text
    assert text.count("not reached") == 4 and "n = 1: 1 task, 1 seed" in text
    assert '<td class="mono">0.1</td>' in text


def test_real_runs_stand_before_published_ones() -> None:
    text = compare.render(real_runs())
    assert "n = 12: 6 tasks, 2 seeds each" in text and text.count('class="band s') == 6
    assert text.count('class="band behind') == 2, "the published ones, DreamerV2 and APV"
    assert "APV on RLBench (published)" in text and "PreLAR without its action loss (published)" in text
    assert "mean 58.2%" in text and "not ours" in text and "Seo et al., ICML 2022" in text
    (row,) = re.findall(r"<tr><th scope=\"row\">DreamerV2</th><td>n = 12.*?</tr>", text)
    assert "37% [" in row and "not reached" not in row


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ([replace(r, curves={"success": ((4e3,), (0.1,))}) for r in real_runs()], "the runs end at 4,000"),
        (real_runs()[:-2], "not run on the same tasks"),
    ],
)
def test_published_results_that_do_not_compare_are_left_out(runs: list[compare.Run], expected: str) -> None:
    text = compare.render(runs)
    assert "(published)" not in text and expected in text


def test_many_settings_take_several_charts() -> None:
    runs = [make_run(str(k), [0.1, 0.2], beta_a=k / 10) for k in range(8)]
    assert compare.render(runs).count('id="success-') == 4


def test_losses_and_fits_lie_over_one_another_and_a_setting_keeps_its_line() -> None:
    updates, first = (10.0, 20.0), make_run("a", [0.1])
    scratch = {"offline_scratch_error": (updates, (0.5, 0.4))}
    fitted = [
        scratch | {"pretrain_kl": (updates, (9.0, k)), "offline_pretrained_error": (updates, (0.4, 0.1 * k))}
        for k in (1, 2)
    ]
    runs = [
        replace(first, curves={}),
        *(replace(make_run("b", [0.1], beta_a=0.1 * k), curves=fitted[k]) for k in range(2)),
    ]
    text = compare.render(runs)
    (kl,) = [chart for chart in text.split("<svg")[1:] if 'id="pretrain-kl-0-t"' in chart]
    (error,) = [chart for chart in text.split("<svg")[1:] if 'id="offline-pretrained-error-0-t"' in chart]
    for chart in (kl, error):
        assert 'class="line s1"' in chart and 'class="line s2"' in chart and 'class="line s0"' not in chart
    assert error.split("</svg>")[0].count(">from scratch</text>") == 1 and "nats" in kl
    runs[2] = replace(runs[2], curves=fitted[1] | {"offline_scratch_error": (updates, (0.5, 0.3))})
    assert "PreLAR, beta_a = 0.1, from scratch</text>" in compare.render(runs)


def test_runs_without_curves_say_so() -> None:
    text = compare.render([replace(make_run("a", []), curves={})])
    assert text.count("No curves: no run") == 2 and "No chart" in text
    assert "No learning curves" in text and "no common step" in text and "No step at which" in text


def test_commands_and_dirt_of_each_run_are_shown() -> None:
    runs = [
        make_run("a", [0.1], beta_a=0.1),
        replace(make_run("b", [0.2]), modified=("prelar/train/loop.py",)),
    ]
    text = compare.render(runs)
    assert f"git checkout {'b' * 40}\nmake setup\n.venv/bin/dvc exp run -S beta_a=0.1" in text
    assert "Changed besides the parameters: prelar/train/loop.py" in text and "aa.dir" in text


def test_nothing_private_is_shown() -> None:
    text = compare.render([make_run("a", [0.1]), make_run("b", [0.1], ssv2__source="/home/hush/parts")])
    assert "hush" not in text and "…/parts" in text


def test_every_seed_and_step_is_exported() -> None:
    runs = real_runs(("reach",), seeds=2, steps=3)
    header, *rows = [line.split(",") for line in compare.export(runs).splitlines()]
    assert header == ["run", "setting", "method", "task", "seed", "step", "success", "return"]
    assert len(rows) == 2 * 2 * 3
    assert rows[4][2:] == ["dreamerv2", "reach", "1", "20000", "0.06", ""]


def test_settings_are_held_against_each_other_beyond_means() -> None:
    text = compare.render(real_runs())
    assert "Probability of improvement" in text and "2000 stratified bootstrap draws" in text
    assert "Performance profile at 250,000 steps" in text


def test_tasks_without_success_are_compared_by_return() -> None:
    runs = [replace(run, curves={"return": run.curves["success"]}) for run in real_runs(("dmc/hopper-hop",))]
    text = compare.render(runs)
    assert "DreamerV2, its authors’ runs (published)" in text and "Return of each setting by step" in text
    assert "APV on locomotion (published)" in text and "PreLAR without" not in text


def test_the_file_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "find_runs", lambda names, root: [make_run(name, [0.5]) for name in names])
    compare.run(["a"], tmp_path / "compare.html")
    assert (tmp_path / "compare.html").read_text().startswith("<!DOCTYPE html>")
    assert "1 run compared" in capsys.readouterr().out
