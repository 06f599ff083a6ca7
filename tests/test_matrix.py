"""All four methods on both data sets and suites through all training and evaluation, at a tiny size."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prelar import evaluate, finetune, pretrain, report
from prelar.config import Config, read_yaml
from prelar.evaluation import offline
from prelar.methods import METHODS
from prelar.store.writer import StoreWriter
from prelar.train.checkpoint import load_config as load_description
from tests.conftest import ROOT, TINY, merge
from tests.control.toy_run import TINY as TINY_FINETUNE
from tests.fake_results import moving

DATASETS = ("ssv2", "demos")
DMC = "dmc/cartpole-swingup"
STEPS = 2


def make_store(dataset: str) -> None:
    """Six clips of 6 to 8 frames; demonstrations carry actions and the gripper's pose besides."""
    random = np.random.default_rng(0)
    arrays = {"actions": 4, "gripper": 8} if dataset == "demos" else {}
    with StoreWriter(Path(f"data/{dataset}.zarr"), arrays=arrays) as writer:
        for number in range(6):
            length = 6 + number % 3
            row: dict[str, Any] = {
                "id": str(number),
                "split": ("train", "train", "validation")[number % 3],
                "label": "slide",
                "fps": 20.0,
            }
            if arrays:
                row |= {"task": "reach", "variation": 0, "camera": "corner", "episode": number}
                row |= {"success": True}
            per_frame = {
                name: random.normal(size=(length, width)).astype(np.float32) for name, width in arrays.items()
            }
            writer.append(np.roll(moving(length), 7 * number, axis=2), row, **per_frame)
        writer.finish({"source": dataset})


def config(method: str, dataset: str, task: str) -> Config:
    """params.yaml at a size at which a stage takes about a second."""
    params = read_yaml(ROOT / "params.yaml")
    merge(params, TINY)
    smoke = params["scales"]["smoke"]
    smoke["pretrain"] |= {"steps": STEPS, "log_every": 1, "video_every": STEPS, "checkpoint_every": STEPS}
    smoke["finetune"] = TINY_FINETUNE | {
        "env_steps": 16,
        "prefill": 8,
        "envs": 1,
        "eval_every": 16,
        "checkpoint_every": 16,
    }
    smoke["evaluate"] |= {"episodes": 1, "random_episodes": 2, "time_limit": 8, "probe_updates": 1}
    if task == DMC:
        smoke["finetune"] |= {"time_limit": 10, "prefill": 10, "train_every": 2}
        smoke["evaluate"] |= {"time_limit": 10}
    changes = {"method": method, "dataset": dataset, "task": task, "device": "cpu", "action_dim": 8}
    return Config.model_validate(params | changes | {"scale": "smoke", "threads": 1})


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty folder as the working directory; the probe's episodes are short."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "collect", functools.partial(evaluate.collect, steps=6))
    monkeypatch.setattr(evaluate, "demonstrations", functools.partial(evaluate.demonstrations, steps=4))
    monkeypatch.setattr(offline, "collect", functools.partial(offline.collect, steps=6))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


DEFAULT = {("dreamerv2", "ssv2", DMC), ("apv", "ssv2", "reach"), ("contextwm", "ssv2", "reach")}
"""The default method goes this way in test_end_to_end.py."""
CELLS = [(method, dataset, "reach") for dataset in DATASETS for method in METHODS]
CELLS += [(method, "ssv2", DMC) for method in METHODS]


@pytest.mark.parametrize(
    ("method", "dataset", "task"),
    [pytest.param(*cell, marks=[] if cell in DEFAULT else pytest.mark.long) for cell in CELLS],
)
def test_a_method_runs_through_every_stage(method: str, dataset: str, task: str) -> None:
    make_store(dataset)
    cfg = config(method, dataset, task)
    pretrain.run(cfg)
    finetune.run(cfg)
    evaluate.run(cfg)
    report.run(cfg)
    pretrains = METHODS[method].pretrains
    before, after = load_description(pretrain.OUTPUT), load_description(finetune.OUTPUT)
    assert before["step"] == (STEPS if pretrains else 0)
    assert before["model"]["method"] == after["method"] == method
    assert after["updates"] == finetune.updates_after(16, cfg.finetune) > 0
    metrics = json.loads((evaluate.REPORT / evaluate.METRICS.name).read_text(encoding="utf-8"))
    assert metrics["prediction_error_policy"] > 0
    succeeds = task == "reach"
    assert metrics["success_rate"] in (0, 1) if succeeds else "success_rate" not in metrics
    assert (finetune.LOGS / "plots/metrics/eval/success.tsv").exists() == succeeds
    shown = report.page.PAGE.read_text(encoding="utf-8")
    assert ("reports no success" in shown) == (not succeeds)
    assert ("prediction_error" in metrics) == pretrains
    assert ("probe_r2" in metrics) == (method == "prelar" and succeeds)
    assert ("probe_demonstrations_r2" in metrics) == (method == "prelar" and dataset == "demos")
    assert ("offline_error_pretrained" in metrics) == pretrains and metrics["offline_error_scratch"] > 0
    assert after["action_repeat"] == (1 if succeeds else 2)
    assert all(math.isfinite(value) for value in metrics.values())
    described = json.loads((evaluate.REPORT / "dataset.json").read_text(encoding="utf-8"))
    assert (described["clips"], described["attributes"]["source"]) == (6, dataset)
