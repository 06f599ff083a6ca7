"""The evaluation on untrained checkpoints and a small store: what it writes, and that it is repeatable."""

from __future__ import annotations

import functools
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prelar import evaluate, report
from prelar.config import Config, load_config
from prelar.control.actor_critic import Actor
from prelar.control.rollout import Episode
from prelar.evaluation import offline
from prelar.evaluation.controllability import interval
from prelar.evaluation.prediction import Prediction
from prelar.methods import build_model
from prelar.model.spec import ModelSpec
from prelar.store.store import Store
from prelar.store.writer import StoreWriter
from prelar.train.checkpoint import save_parts
from prelar.utils.errors import UserError
from prelar.utils.tables import read_tsv
from tests.conftest import ROOT
from tests.fake_results import moving

SIZES: dict[str, Any] = {
    "cnn_depth": 4,
    "hidden": 16,
    "deter": 16,
    "stoch": 4,
    "discrete": 4,
    "action_dim": 8,
}
UNITS = {"units": 16, "layers": 1}
STARTS = ("pretrained", "scratch")


def make_store(path: Path, *, splits: tuple[str, ...] = ("train", "validation")) -> Store:
    """Seven clips of 4 to 10 frames, and a bad one."""
    with StoreWriter(path) as writer:
        for number, length in enumerate(range(4, 11)):
            row = {"id": str(number), "split": splits[number % len(splits)], "label": f"label {number % 3}"}
            writer.append(np.roll(moving(length), number, axis=2), row | {"fps": 12.0})
        writer.append(None, {"id": "99", "reason": "not a video"})
        return writer.finish({"source": "test"})


def make_checkpoints(method: str, task: str, frame_gap: float | None = None) -> None:
    """Untrained models as the stages before would leave them."""
    torch.manual_seed(0)
    before = build_model(ModelSpec(method=method, frame_gap=frame_gap, **SIZES))
    save_parts(evaluate.PRETRAIN, before.state(), {"stage": "pretrain", "model": before.spec})
    after = build_model(ModelSpec(stage="finetune", method=method, robot_action_dim=4, **SIZES, **UNITS))
    policy = {"features": after.feature_dim, "actions": 4, **UNITS}
    parts = {**after.state(), "actor": Actor(**policy).state_dict()}
    described = {"stage": "finetune", "method": method, "task": task, "model": after.spec}
    save_parts(evaluate.FINETUNE, parts, described)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project folder as the working directory; the probe's episodes are short."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "collect", functools.partial(evaluate.collect, steps=6))
    shutil.copy(ROOT / "params.yaml", tmp_path)
    return tmp_path


def configure(action_repeat: int | None = None, **changes: Any) -> Config:
    """params.yaml at a tiny size."""
    config = load_config()
    finetuning = config.finetune.model_copy(update={"action_repeat": action_repeat})
    evaluation = config.evaluate.model_copy(
        update={
            "episodes": 2,
            "random_episodes": 3,
            "time_limit": 8,
            "clips": 3,
            "observed": 2,
            "length": 6,
            "probe_episodes": 6,
            "probe_updates": 2,
            "offline_episodes": 4,
            "offline_updates": 2,
            "offline_batch": 2,
            "offline_seeds": 1,
        }
    )
    smoke = config.scales.smoke.model_copy(update={"evaluate": evaluation, "finetune": finetuning})
    scales = config.scales.model_copy(update={"smoke": smoke})
    return config.model_copy(
        update={"scales": scales, "device": "cpu", "threads": 1, "task": "reach", **changes}
    )


def contents(root: Path) -> dict[str, bytes]:
    """Every file that the evaluation writes."""
    paths = [root / "metrics.json", *(p for p in (root / "reports").rglob("*") if p.is_file())]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("method", ["prelar", pytest.param("contextwm", marks=pytest.mark.long)])
def test_evaluation_writes_metrics_tables_and_videos_twice_the_same(place: Path, method: str) -> None:
    make_store(place / "data/ssv2.zarr")
    make_checkpoints(method, "reach")
    config = configure(method=method)
    evaluate.run(config)
    metrics = json.loads((place / "reports/evaluate/metrics.json").read_text())
    errors = {
        "prediction_error",
        "prediction_error_copy",
        "prediction_error_policy",
        "prediction_error_policy_copy",
        "prediction_error_late",
        "prediction_error_late_copy",
        "prediction_error_late_median",
        "prediction_error_late_policy",
        "prediction_error_late_policy_copy",
    }
    ends = {"return_low", "return_random_high"}
    decided = {"controllability_db_policy", "controllability_db_policy_low"}
    if method == "prelar":
        decided |= {f"controllability_db{of}{end}" for of in ("", "_untrained") for end in ("", "_low")}
    probed = {"probe_r2", "probe_r2_untrained", "probe_r2_difference"} if method == "prelar" else set()
    fitted = {f"offline_{error}_{start}" for error in ("error", "reward_error") for start in STARTS}
    assert metrics.keys() == {"success_rate", "return"} | ends | errors | decided | probed | fitted
    chief = json.loads((place / "metrics.json").read_text())
    assert chief == {name: metrics[name] for name in evaluate.HEADLINE_METRICS if name in metrics}
    assert all(0 < metrics[name] < 1 for name in errors)
    assert read_tsv(place / "reports/evaluate/prediction.tsv")["step"] == [1, 2, 3, 4]
    played = read_tsv(place / "reports/evaluate/episodes.tsv")
    assert played["steps"] == [8, 8] and np.mean(played["return"]) == pytest.approx(metrics["return"])
    assert metrics["return_low"] == pytest.approx(interval(np.array(played["return"]))[0])
    assert (place / "reports/evaluate/action_swap.png").exists() == (method == "prelar")
    summary = json.loads((place / "reports/evaluate/summary.json").read_text())
    assert summary["prediction"]["latent"] == (method == "prelar")
    policies = summary["episodes"]["policies"]
    assert [(row["name"], row["episodes"]) for row in policies] == [
        ("agent", 2),
        ("random actions", 3),
        ("scripted expert", 2),
    ]
    assert policies[2]["return"] > policies[1]["high"] == pytest.approx(metrics["return_random_high"])
    curves = {start: read_tsv(place / f"reports/evaluate/offline_{start}.tsv") for start in STARTS}
    assert curves["scratch"]["step"] == curves["pretrained"]["step"] == [0, 1, 2]
    assert curves["pretrained"]["error"][0] != curves["scratch"]["error"][0]
    assert curves["scratch"]["error"][-1] == pytest.approx(metrics["offline_error_scratch"])
    dataset = json.loads((place / "reports/evaluate/dataset.json").read_text())
    assert (dataset["clips"], dataset["frames"], dataset["pairs"]) == (7, 49, 42)
    assert dataset["splits"] == {"train": 4, "validation": 3}
    assert dataset["reasons"] == [{"reason": "not a video", "count": 1, "examples": ["99"]}]
    first = contents(place)
    assert str(place).encode() not in b"".join(first.values())
    if method == "prelar":
        evaluate.run(config)
        assert contents(place) == first


@pytest.mark.long
def test_a_method_without_pretraining_and_its_page(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_store(place / "data/ssv2.zarr")
    make_checkpoints("dreamerv2", "reach")
    config = configure(method="dreamerv2")
    moved: list[tuple[Path, Path]] = []
    publish = evaluate.publish
    monkeypatch.setattr(evaluate, "publish", lambda *paths: (moved.append(paths), publish(*paths)))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    evaluate.run(config)
    ((staged, final),) = moved
    assert staged.parent == final.parent, "a rename between folders may cross file systems"
    shown = capsys.readouterr()
    for part in ("the agent", "random actions", "prediction"):
        assert f"evaluate: {part}: 100%" in shown.err
    assert shown.out.startswith("evaluate: success 0%, return ") and shown.out.count("\n") == 1
    assert shown.out.endswith(" -> metrics.json, reports/evaluate\n")
    report.run(config)
    metrics = json.loads((place / "reports/evaluate/metrics.json").read_text())
    assert "prediction_error" not in metrics and metrics["prediction_error_policy"] > 0
    assert metrics["offline_error_scratch"] > 0 and "offline_error_pretrained" not in metrics
    assert "DreamerV2 has no pre-training" in (place / "reports/index.html").read_text()


def test_a_store_without_held_out_clips_is_said(place: Path) -> None:
    make_store(place / "data/ssv2.zarr", splits=("train",))
    make_checkpoints("prelar", "reach")
    store, model = Store.open(place / "data/ssv2.zarr"), evaluate.load_pretrained_model(torch.device("cpu"))
    found = evaluate.evaluate_prediction(configure(), model, store, place)
    assert found.metrics == {} and not list(place.glob("*.mp4"))
    assert "no clip of the validation split has 6 frames" in found.summary["prediction_missing"]


def test_the_closing_line_tells_the_pretrained_models_error_where_there_is_one() -> None:
    metrics = {"success_rate": 1 / 3, "return": 412.345, "prediction_error_policy": 0.5}
    metrics["prediction_error_policy_copy"] = 0.25
    end = "(copying the last frame: 0.25)"
    assert evaluate.headline(metrics) == f"success 33%, return 412.3, prediction error 0.5 {end}"
    metrics |= {"prediction_error": 0.125, "prediction_error_copy": 0.25}
    assert evaluate.headline(metrics) == f"success 33%, return 412.3, prediction error 0.125 {end}"
    assert evaluate.headline({"success_rate": 0, "return": -1}) == "success 0%, return -1"


@pytest.mark.long
def test_everything_follows_the_frames_that_the_model_was_trained_on(place: Path) -> None:
    """Whatever params.yaml says by now: what was trained says how far apart its frames are."""
    store = make_store(place / "data/ssv2.zarr")
    make_checkpoints("prelar", "reach", frame_gap=0.15)
    evaluate.run(configure(method="prelar"))
    folder = place / "reports/evaluate"
    assert not (folder / "prediction.tsv").exists(), "no clip of validation is long enough"
    missing = json.loads((folder / "summary.json").read_text())["prediction_missing"]
    assert missing == "Not measured: no clip of the validation split has 6 frames 0.15 s apart."
    assert json.loads((folder / "probe.json").read_text())["gap"] == 12, "of the simulator's 80 a second"
    gaps, metrics = read_tsv(folder / "probe_gaps.tsv"), json.loads((folder / "metrics.json").read_text())
    assert gaps["step"] == [1, 2, 4, 8, 12]
    for column, metric in (("latent", ""), ("untrained", "_untrained"), ("difference", "_difference")):
        assert gaps[column][-1] == pytest.approx(metrics[f"probe_r2{metric}"])
    found = evaluate.held_out(store, length=4, count=10, seed=3, gap=0.15)
    assert found is not None and found[1].tolist() == [3, 5]
    clips = [store.read(int(store.clip_start[c]), int(store.clip_length[c])) for c in (3, 5)]
    for segment, clip in zip(found[0], clips, strict=True):
        assert any(np.array_equal(segment, clip[start:][:7:2]) for start in range(len(clip) - 6))


def test_checkpoints_of_another_run_are_refused(place: Path) -> None:
    make_checkpoints("prelar", "reach")
    with pytest.raises(
        UserError, match=r"data/finetune: made with task = reach, params.yaml says drawer-open"
    ):
        evaluate.run(configure(task="drawer-open"))
    with pytest.raises(UserError, match=r"data/finetune: made with action_repeat = 1, params.yaml says 2"):
        evaluate.run(configure(action_repeat=2))
    with pytest.raises(UserError, match=r"data/pretrain: made with method = prelar, params.yaml says apv"):
        evaluate.run(configure(method="apv"))


def test_the_figures_of_given_episodes() -> None:
    def played(*returns: float) -> list[Episode]:
        halves = (np.array([total / 2, total / 2], np.float32) for total in returns)
        return [Episode(half, np.zeros((2, 4), np.float32), bool(half[0] > 2), None) for half in halves]

    spread = np.random.default_rng(0).normal(10, 2, 200)
    found = evaluate.summarise_episodes(played(1, 2, 6), played(*spread), played(8, 8), time_limit=2)
    ended = found.summary["episodes"]
    agent, chance, expert = ended["policies"]
    assert found.metrics["success_rate"] == pytest.approx(1 / 3) and found.metrics["return"] == 3
    assert found.metrics["return_low"] == agent["low"] == 1, "one draw in 27 is 1, 1 and 1"
    assert (expert["low"], expert["return"], expert["high"], expert["success"]) == (8, 8, 8, 1)
    error = spread.std(ddof=1) / np.sqrt(len(spread))
    assert chance["return"] == pytest.approx(spread.mean(), rel=1e-5)
    assert found.metrics["return_random_high"] == chance["high"]
    assert chance["high"] - chance["return"] == pytest.approx(1.96 * error, rel=0.1)
    assert (ended["return_min"], ended["return_max"], ended["successes"]) == (1, 6, 1)
    alone = evaluate.summarise_episodes(played(1), played(2), played(3), time_limit=2)
    assert alone.metrics == {"success_rate": 0, "return": 1} and not alone.summary["episodes"]["policies"]


def test_episodes_to_fit_are_as_long_as_a_segment(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def collect(simulator: Any, *, episodes: int, seed: int, steps: int = 10) -> Any:
        numbers = np.zeros((2, steps + 1), np.float32)
        image = np.zeros((*numbers.shape, 64, 64, 3), np.uint8)
        return (offline.Experience(image, np.zeros((*numbers.shape, 4), np.float32), numbers),) * 2

    monkeypatch.setattr(offline, "collect", collect)
    monkeypatch.setattr(offline, "STEPS", 10)
    make_checkpoints("prelar", "reach")
    config = configure(method="prelar")
    for length, steps in ((14, 13), (6, 10)):
        smoke = config.preset.model_copy(
            update={"evaluate": config.evaluate.model_copy(update={"length": length, "offline_updates": 1})}
        )
        scales = config.scales.model_copy(update={"smoke": smoke})
        found = evaluate.evaluate_offline(config.model_copy(update={"scales": scales}), 1, place)
        assert found.summary["offline"]["steps"] == steps
        assert found.summary["offline"]["ahead"] == length - 2


def test_held_out_segments_lie_in_validation_clips(tmp_path: Path) -> None:
    store = make_store(tmp_path / "x.zarr")
    found = evaluate.held_out(store, length=5, count=10, seed=3)
    assert found is not None and found[0].shape == (3, 5, 64, 64, 3) and found[1].tolist() == [1, 3, 5]
    clips = [store.read(int(store.clip_start[c]), int(store.clip_length[c])) for c in (1, 3, 5)]
    for segment, clip in zip(found[0], clips, strict=True):
        windows = [clip[start : start + 5] for start in range(len(clip) - 4)]
        assert any(np.array_equal(segment, window) for window in windows)
    assert evaluate.held_out(store, length=10, count=10, seed=3) is None


def test_the_median_picture_is_that_of_the_training_frames(tmp_path: Path) -> None:
    store = make_store(tmp_path / "x.zarr")
    training = store.clips("train")
    frames = np.concatenate(
        [store.read(int(store.clip_start[c]), int(store.clip_length[c])) for c in training]
    )
    found = evaluate.median_pictures(store, store.clips("validation"))
    assert found is not None and found.shape == (3, 64, 64, 3)
    assert np.abs(found[0] - np.median(frames, axis=0)).mean() < 8, "some moments of each clip are read"
    assert (found == found[0]).all(), "one camera, one picture"


def test_late_errors_are_those_from_the_third_frame_ahead_on() -> None:
    truth = np.full((2, 6, 64, 64, 3), 100, np.uint8)
    errors = np.array([9.0, 9.0, 1.0, 2.0, 3.0])
    late = Prediction(truth, truth, 1, errors, 2 * errors, None).late()
    assert late == {"model": 2.0, "copy": 4.0}
    assert Prediction(truth, truth, 4, errors[:2], errors[:2]).late() == {}


def test_segments_of_episodes_hold_the_action_that_led_to_each_frame() -> None:
    frames = np.arange(11, dtype=np.uint8)[:, None, None, None] * np.ones((64, 64, 3), np.uint8)
    actions = np.arange(1, 11, dtype=np.float32)[:, None]
    episode = Episode(np.zeros(10, np.float32), actions, False, frames)
    cut = evaluate.cut_segments([episode], length=4, count=5)
    assert cut is not None
    images, led = cut
    assert images[:, :, 0, 0, 0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert led[..., 0].tolist() == [[0, 1, 2, 3], [0, 5, 6, 7]]
    assert evaluate.cut_segments([episode], length=12, count=5) is None
