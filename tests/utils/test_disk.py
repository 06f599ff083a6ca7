"""Estimates of what long jobs write, and their refusal where there is clearly too little room."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from prelar import __main__, doctor
from prelar.config import Config, load_config
from prelar.utils import disk
from prelar.utils.errors import UserError
from tests.conftest import ROOT


@pytest.fixture
def config() -> Config:
    return load_config(ROOT / "params.yaml")


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (122.1e9, "122 GB"), (2.5e12, "2.5 TB")],
)
def test_sizes_are_read_at_a_glance(size: float, text: str) -> None:
    assert disk.format_bytes(size) == text


def test_room_is_measured_where_a_folder_will_lie(tmp_path: Path) -> None:
    free, total = disk.free_bytes(tmp_path / "not/yet"), shutil.disk_usage(tmp_path).total
    assert 0 < free <= total


def test_clearly_too_little_room_ends_in_one_line(tmp_path: Path) -> None:
    free = disk.free_bytes(tmp_path)
    disk.require(tmp_path, free, "a job")
    with pytest.raises(UserError, match=r"free, but a job takes about .*; free space"):
        disk.require(tmp_path, 2 * free, "a job")


def test_a_stage_is_refused_before_it_starts(
    config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    with pytest.raises(UserError, match="1 MB free, but pretrain at scale smoke takes about"):
        __main__.run_stage("pretrain", config)
    assert not (tmp_path / "data/pretrain").exists()


def test_the_published_size_has_its_published_weights(config: Config) -> None:
    paper = config.model_copy(update={"scale": "paper"})
    assert doctor.weights(paper) == 28_682_635
    found = doctor.estimates(paper)
    assert found["pretrain"] == 10 * 4 * 28_682_635
    assert 3e9 < found["finetune"] < 8e9, "a replay buffer of 250,000 frames and three snapshots"


def test_an_archive_is_known_by_its_labels_or_by_its_bytes() -> None:
    assert disk.archive_bytes(220_847, None) == 220_847 * 45 * 12_288
    assert disk.archive_bytes(220_847, 1_000) == 6_000
