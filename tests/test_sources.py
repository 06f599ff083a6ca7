"""Every source of demonstrations into one store, validated, and pre-trained on: small, but the whole way."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows import demos
from prelar import pretrain
from prelar.demos.sources import open_source
from prelar.envs import gl
from prelar.envs.names import RLBENCH_CAMERAS
from prelar.store.store import Store
from prelar.store.writer import StoreWriter
from prelar.train.checkpoint import load_parts
from prelar.validation import suites
from tests.demos import test_rlbench_folder as folders
from tests.demos.test_hdf5 import write_hdf5
from tests.demos.test_lerobot import GOLDEN, write_image_set
from tests.flows.inline import work_inline
from tests.rlbench_standin import use_standins
from tests.test_pretrain import config

EPISODES, LENGTH = 2, 8
Settings = dict[str, Any]


def metaworld(tmp_path: Path, request: pytest.FixtureRequest) -> Settings:
    """Scripted experts."""
    gl.ensure()
    return {"source": "metaworld", "tasks": ["reach"], "cameras": ["corner", "topview"]}


def live(tmp_path: Path, request: pytest.FixtureRequest) -> Settings:
    """Live demos, from the stand-in for RLBench."""
    monkeypatch: pytest.MonkeyPatch = request.getfixturevalue("monkeypatch")
    use_standins(tmp_path / "standin", monkeypatch)
    return {"source": "rlbench", "tasks": ["push_button"], "cameras": ["front", "wrist"], "variations": 1}


def rlbench_folder(tmp_path: Path, request: pytest.FixtureRequest) -> Settings:
    """RLBench's own folders."""
    classes = request.getfixturevalue("rlbench_classes")
    for episode in range(EPISODES):
        place = tmp_path / f"recorded/push_button/variation0/episodes/episode{episode}"
        folders.write_episode(place, folders.demo(classes, length=LENGTH), length=LENGTH)
    return {"source": "rlbench_folder", "path": str(tmp_path / "recorded")}


def apv_npz(tmp_path: Path, request: pytest.FixtureRequest) -> Settings:
    """APV's episode files."""
    (tmp_path / "recorded").mkdir()
    random = np.random.default_rng(0)
    for episode in range(EPISODES):
        action = random.normal(size=(LENGTH, 8)).astype(np.float32)
        for camera in RLBENCH_CAMERAS:
            np.savez(
                tmp_path / f"recorded/push_button-v0-e{episode}-{camera}-{LENGTH}.npz",
                image=random.integers(0, 256, (LENGTH, 64, 64, 3), np.uint8),
                action=action,
            )
    return {"source": "apv_npz", "path": str(tmp_path / "recorded"), "fps": 20.0}


def lerobot_videos(tmp_path: Path, request: pytest.FixtureRequest) -> Settings:
    """A LeRobotDataset of v2.1 with two cameras, without its longest episode."""
    place = shutil.copytree(GOLDEN / "v21_two_cameras_av1/set", tmp_path / "recorded")
    lines = (place / "meta/episodes.jsonl").read_text(encoding="utf-8").splitlines()
    (place / "meta/episodes.jsonl").write_text(f"{lines[0]}\n{lines[2]}\n", encoding="utf-8")
    return {"source": "lerobot", "path": str(place)}


def lerobot_images(tmp_path: Path, request: pytest.FixtureRequest) -> Settings:
    """A LeRobotDataset whose pictures lie in its rows."""
    return {"source": "lerobot", "path": str(write_image_set(tmp_path / "recorded", [LENGTH] * EPISODES))}


def hdf5(tmp_path: Path, request: pytest.FixtureRequest) -> Settings:
    """A file of LIBERO's layout."""
    write_hdf5(tmp_path / "recorded/x.hdf5", [LENGTH] * EPISODES)
    return {"source": "hdf5", "path": str(tmp_path / "recorded")}


rlbench_classes = folders.rlbench


@pytest.mark.long
@pytest.mark.parametrize(
    "prepare",
    [
        pytest.param(metaworld, marks=pytest.mark.long),
        *(live, rlbench_folder, apv_npz, lerobot_videos, lerobot_images, hdf5),
    ],
)
def test_source_becomes_a_store_that_is_pretrained_on(
    prepare: Callable[[Path, pytest.FixtureRequest], Settings],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = prepare(tmp_path, request)
    monkeypatch.chdir(tmp_path)
    cfg = config(dataset="demos", demos={"episodes": EPISODES, "workers": 1, "tasks": None, **chosen})
    source = open_source(cfg.demos)
    jobs = source.jobs()
    work_inline(monkeypatch)
    with StoreWriter(Path("data/demos.zarr"), arrays=source.arrays) as writer:
        assert demos.fill(writer, source, jobs, 1, cfg.demos.fps) == len(jobs) == EPISODES
        writer.finish(source.attributes())
    store = Store.open(Path("data/demos.zarr"))
    suites.validate("demos", demos.suites(store, source, 0.0), suites.facts(store))
    assert store.num_clips == EPISODES * len(source.cameras) and store.has("actions")
    pretrain.run(cfg)
    assert load_parts(pretrain.OUTPUT)[0]
