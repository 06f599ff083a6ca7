"""Which runs are one setting, what it is called, and its curve."""

from __future__ import annotations

import itertools

import pytest

from prelar.report.variants import aggregate, at_step, common_steps, essential, group, interpolate
from tests.report.run_files import PARAMS, make_run


def test_runs_that_differ_by_task_and_seed_are_one_setting() -> None:
    runs = [
        make_run(f"{task}-{seed}", [0.5], task=task, seed=seed)
        for task in ("reach", "push")
        for seed in (0, 1)
    ]
    (variant,), repeats = group(runs)
    assert variant.label == "PreLAR" and not variant.settings and not repeats
    assert variant.size == "n = 4: 2 tasks, 2 seeds each"
    assert list(variant.tasks) == ["push", "reach"]


def test_what_differs_names_a_setting() -> None:
    runs = [
        make_run("a", [0.5]),
        make_run("b", [0.5], beta_a=0.1),
        make_run("c", [0.5], method="apv", seed=3),
    ]
    variants, _ = group(runs)
    assert [v.label for v in variants] == ["PreLAR", "PreLAR, beta_a = 0.1", "APV"]
    assert variants[1].settings == {"method": "prelar", "beta_a": 0.1}


def test_settings_that_differ_have_names_that_differ() -> None:
    values = itertools.product(("prelar", "apv"), (None, 0.1), (None, 0, 2), ("order", "sign"))
    keys = ("method", "beta_a", "beta_c", "consistency")
    runs = [make_run(str(i), [0.5], **dict(zip(keys, one, strict=True))) for i, one in enumerate(values)]
    for chosen in (runs, runs[::2], runs[::3], runs[:5], runs[:2]):
        labels = [variant.label for variant in group(chosen)[0]]
        assert len(set(labels)) == len(labels) == len(chosen)


@pytest.mark.parametrize(
    "changed",
    [
        {"threads": 7},
        {"device": "cpu"},
        {"scales__paper__pretrain__steps": 3},
        {"demos__seed": 9},
        {"ssv2__workers": 5},
    ],
)
def test_what_a_run_does_not_depend_on_makes_no_setting(changed: dict[str, object]) -> None:
    first, second = make_run("a", [0.5]), make_run("b", [0.5], **changed)
    variants, repeats = group([first, second])
    assert len(variants) == 1 and repeats == [(second, first)]


MIXED = {
    "sources__kitchen__kind": "ssv2",
    "sources__kitchen__source": "/videos",
    "sources__pusht__kind": "demos",
    "sources__other__kind": "demos",
    "mixtures__robots__kitchen": 1,
    "mixtures__robots__all": 2,
    "mixtures__spare__pusht": 1,
    "unions__all": ["/parts/a.zarr"],
    "unions__none": ["/parts/b.zarr"],
}
GROUPS = {"sample.clips", "ssv2.min_frames", "demos.episodes", "unions.all", "unions.none"}
GROUPS |= {"sources.pusht.path", "sources.other.path", "mixtures.spare.pusht", "mixtures.robots.all"}


@pytest.mark.parametrize(
    ("dataset", "read"),
    [
        ("ssv2", {"ssv2.min_frames", "sample.clips"}),
        ("demos", {"demos.episodes"}),
        ("kitchen", {"ssv2.min_frames"}),
        ("pusht", {"demos.episodes", "sources.pusht.path"}),
        ("all", {"unions.all"}),
        ("robots", {"ssv2.min_frames", "unions.all", "mixtures.robots.all"}),
        ("spare", {"demos.episodes", "sources.pusht.path", "mixtures.spare.pusht"}),
    ],
)
def test_what_the_data_set_is_made_from_makes_a_setting_and_no_other_store(
    dataset: str, read: set[str]
) -> None:
    first = make_run("a", [0.5], dataset=dataset, **MIXED)
    for key in GROUPS:
        variants, _ = group(
            [first, make_run("b", [0.5], dataset=dataset, **MIXED | {key.replace(".", "__"): [77]})]
        )
        assert len(variants) == 1 + (key in read), key


def test_a_repeated_run_is_no_further_seed() -> None:
    first = make_run("a", [0.5])
    (variant,), repeats = group([first, make_run("again", [0.9]), make_run("b", [0.7], seed=1)])
    assert [run.name for run in variant.runs] == ["a", "b"]
    assert [(run.name, earlier.name) for run, earlier in repeats] == [("again", "a")]


def test_presets_of_the_chosen_scale_are_compared_by_their_own_name() -> None:
    found = essential(PARAMS)
    assert found["pretrain.steps"] == PARAMS["scales.smoke.pretrain.steps"]
    assert not any(key.startswith(("scales.", "demos.")) for key in found) and "ssv2.source" in found
    assert "sample.clips" in found and "sample.clips" not in essential(PARAMS | {"ssv2.source": "elsewhere"})


def test_a_curve_has_the_steps_that_all_runs_have() -> None:
    runs = [make_run("a", [0.0, 0.5, 1.0]), make_run("b", [0.2, 0.7], seed=1)]
    (variant,), _ = group(runs)
    steps, estimates = aggregate(variant, "success")
    assert steps == [10_000, 20_000] == common_steps(runs, "success")
    assert [e.mean for e in estimates] == pytest.approx([0.1, 0.6]) and estimates[0].n == 2
    assert estimates[0].low == 0 and estimates[0].high == 0.2
    assert aggregate(variant, "return") == ([], [])


def test_a_curve_of_one_seed_has_no_interval() -> None:
    (variant,), _ = group([make_run("a", [0.5, 0.75])])
    assert [(e.low, e.high, e.n) for e in aggregate(variant, "success")[1]] == [(None, None, 1)] * 2


def test_values_between_evaluations_are_interpolated_and_none_are_made_up_beyond() -> None:
    (variant,), _ = group([make_run("a", [0.0, 1.0])])
    found = at_step(variant, "success", 12_500)
    assert found is not None and found.iqm == pytest.approx(0.25)
    assert at_step(variant, "success", 20_001) is None and at_step(variant, "success", 9_999) is None
    assert interpolate(None, 3) is None and interpolate(((1.0,), (5.0,)), 1) == 5
