"""Validation: what is wrong is said in words, and the page asks no other host."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from prelar.store.store import Store
from prelar.store.writer import StoreWriter
from prelar.utils.errors import UserError
from prelar.utils.video_file import ffmpeg_binary
from prelar.validation.suites import (
    Suite,
    as_markdown,
    each_between,
    facts,
    labels_suite,
    repeats,
    store_suites,
    stray_pairs,
    validate,
)
from prelar.videos.decode import Decoder
from prelar.videos.sequential import Part

LENGTHS = (30, 10, 25)
SPLITS = {"0": "train", "1": "train", "2": "validation", "3": "test"}


def build(path: Path, level: int | None = None, width: int | None = None) -> Store:
    """Three good clips and a bad one; `level` paints all frames alike."""
    random = np.random.default_rng(0)
    with StoreWriter(path, arrays={"actions": width} if width else None) as writer:
        for number, length in enumerate(LENGTHS):
            frames = random.integers(0, 256, (length, 64, 64, 3), dtype=np.uint8)
            if level is not None:
                frames[:] = level
            row = {"id": str(number), "split": SPLITS[str(number)], "label": "reach", "label_id": 0}
            arrays = {"actions": np.zeros((length, width), np.float32)} if width else {}
            writer.append(frames, row, **arrays)
        writer.append(None, {"id": "3", "split": "test", "label": "reach", "label_id": 0, "reason": "empty"})
        return writer.finish({})


def run(store: Store, folder: Path, *, min_frames: int = 8, max_bad: float = 0.25, **labels: object) -> dict:
    suites = store_suites(store, min_frames=min_frames, max_bad=max_bad)
    suites.append(labels_suite(store, labels.get("splits", SPLITS), labels.get("names", {"reach": 0})))  # type: ignore[arg-type]
    return validate("x", suites, facts(store), folder)


def test_a_good_store_passes_and_the_page_asks_no_other_host(tmp_path: Path) -> None:
    summary = run(build(tmp_path / "x.zarr", width=4), tmp_path / "reports")
    assert summary["success"]
    assert summary["facts"] == {
        "clips": 3,
        "bad": 1,
        "frames": 65,
        "pairs": 62,
        "clips_of_25": 2,
        "share_of_25": 0.6667,
        "splits": {"train": 2, "validation": 1},
        "reasons": {"empty": 1},
    }
    assert json.loads((tmp_path / "reports/x/summary.json").read_text()) == summary
    page = (tmp_path / "reports/x/index.html").read_text()
    assert "passed" in page
    assert "no pair crosses the border of a clip" in page
    assert not re.search(r"https?:|<script|<link|src=|@import|url\(", page)


def test_the_summary_as_markdown_names_facts_and_every_check(tmp_path: Path) -> None:
    summary = run(build(tmp_path / "x.zarr"), tmp_path / "reports")
    text = as_markdown(summary)
    assert text.startswith("# x: validation passed\n")
    assert "| splits | train: 2, validation: 1 |" in text
    checks = [check for suite in summary["suites"] for check in suite["checks"]]
    assert text.count("| passed | ") == len(checks) > 10
    checks[0].update(success=False, says="a|b", detail="two\nlines")
    assert "| **failed** | a\\|b | two lines |" in as_markdown({**summary, "success": False})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"max_bad": 0.2}, r"at most 20\.00% of the clips are bad.*1 × empty"),
        ({"min_frames": 11}, r"at least 11 frames - 1 of 3 rows are not so, such as 10"),
        ({"splits": {**SPLITS, "9": "train"}}, "all 3 clips of train are in the index - found 1"),
        ({"splits": {"0": "train", "1": "train", "3": "test"}}, "named by the labels files - found 1"),
        ({"splits": {**SPLITS, "2": "train"}}, "all 3 clips of train are in the index - found 1"),
        ({"names": {"reach": 1}}, "with its id - found 3"),
        ({"names": {"push": 0}}, "with its id - found 3"),
    ],
)
def test_what_is_wrong_is_said_in_words(tmp_path: Path, more: dict, message: str) -> None:
    store = build(tmp_path / "x.zarr")
    with pytest.raises(UserError, match=message) as failed:
        run(store, tmp_path / "reports", **more)
    assert "\n" not in str(failed.value)
    assert not json.loads((tmp_path / "reports/x/summary.json").read_text())["success"]
    assert "failed" in (tmp_path / "reports/x/index.html").read_text()


@pytest.mark.parametrize(("level", "message"), [(0, "not black"), (128, "not constant")])
def test_black_and_constant_frames_fail(tmp_path: Path, level: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(build(tmp_path / "x.zarr", level), tmp_path / "reports")


def damage_pairs(store: Store) -> None:
    pairs = store.pairs.copy()
    pairs[29] = 29
    store._readers["pairs"].read = lambda start, length: pairs  # type: ignore[method-assign]


def damage_starts(store: Store) -> None:
    store.clip_start = store.clip_start + 1


def damage_lengths(store: Store) -> None:
    store.clip_length = store.clip_length + np.array([1, -1, 0])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_pairs, "no pair crosses the border of a clip - found 1"),
        (damage_starts, "index and store agree where clips start - 3 of 3"),
        (damage_lengths, "index and store agree how long clips are - 2 of 3"),
    ],
)
def test_a_store_that_contradicts_itself_fails(
    tmp_path: Path, damage: Callable[[Store], None], message: str
) -> None:
    store = build(tmp_path / "x.zarr")
    damage(store)
    with pytest.raises(UserError, match=message):
        run(store, tmp_path / "reports")


def test_a_reader_of_its_own_mind_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = build(tmp_path / "x.zarr")
    read = Store.read
    monkeypatch.setattr(Store, "read", lambda self, start, length: read(self, start, length) ^ 1)
    with pytest.raises(UserError, match="zarr-python reads the same frames"):
        run(store, tmp_path / "reports")


def test_an_empty_store_fails(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "x.zarr") as writer:
        writer.append(None, {"id": "0", "reason": "empty"})
        store = writer.finish({})
    with pytest.raises(UserError, match="at least one clip"):
        validate("x", store_suites(store, min_frames=8, max_bad=1.0), facts(store), tmp_path)


def test_widths_of_actions_are_checked(tmp_path: Path) -> None:
    store = build(tmp_path / "x.zarr", width=4)
    with pytest.raises(UserError, match=r"actions is float32 \[65, 7\]"):
        validate("x", store_suites(store, min_frames=8, max_bad=0.25, width=7), {}, tmp_path)


def test_stray_pairs() -> None:
    starts, lengths = np.array([0, 3, 4]), np.array([3, 1, 2])
    assert stray_pairs(np.array([0, 1, 4]), starts, lengths) == 0
    assert stray_pairs(np.array([0, 1, 2, 3, 4, 5, 6]), starts, lengths, block=2) == 4
    assert stray_pairs(np.array([-1]), starts, lengths) == 1
    assert stray_pairs(np.array([0]), starts[:0], lengths[:0]) == 1


def test_suites_of_other_tables_fit(tmp_path: Path) -> None:
    table = pd.DataFrame({"speed": [1.0, 5.0]})
    suite = Suite(
        "speeds", "How fast it goes", table, (each_between("nothing is faster than 4", "speed", 0, 4),)
    )
    with pytest.raises(UserError, match=r"nothing is faster than 4 - 1 of 2 rows are not so, such as 5\.0"):
        validate("other", [suite], {}, tmp_path)


def test_pictures_that_repeat_the_one_before_are_told_with_the_gap_that_avoids_it(tmp_path: Path) -> None:
    """In the AV1 that lerobot codes by default, and not in what we write, of the same frames."""
    y, x = np.mgrid[0:128, 0:128]
    disc = [(x - 20 - 2 * t) ** 2 + (y - 60) ** 2 < 200 for t in range(24)]
    background = np.stack([x, y, x + y // 2], -1).astype(np.uint8)
    frames = np.stack([np.where(mask[..., None], np.uint8([220, 40, 40]), background) for mask in disc])
    found = {}
    for preset in (8, 12):
        words = [
            "-v",
            "error",
            "-f",
            "rawvideo",
            "-pix_fmt",
            "rgb24",
            "-s",
            "128x128",
            "-r",
            "20",
            "-i",
            "pipe:",
        ]
        words += ["-c:v", "libsvtav1", "-preset", str(preset), "-g", "2", "-crf", "30", "-pix_fmt", "yuv420p"]
        path = tmp_path / f"{preset}.mp4"
        subprocess.run(
            [ffmpeg_binary(), *words, str(path)],
            input=frames.tobytes(),
            env={**os.environ, "SVT_LOG": "1"},
            check=True,
        )
        clip = Decoder().decode_part(Part(path))
        assert clip.frames is not None and len(clip.frames) == 24
        with StoreWriter(tmp_path / f"{preset}.zarr") as writer:
            for number in range(3):
                writer.append(clip.frames, {"id": str(number), "split": "train", "fps": 20.0})
            found[preset] = facts(writer.finish({})).get("repeats")
    assert found[8] is None
    assert found[12].startswith("every second picture repeats the one before in 3 of 3 clips looked at")
    assert found[12].endswith("a frame_gap of 0.1 or more avoids it")


def test_only_every_second_picture_counts_as_repeated() -> None:
    random = np.random.default_rng(0)
    moving = random.integers(0, 256, (12, 64, 64, 3), np.uint8)
    assert not repeats(moving) and not repeats(np.repeat(moving[:1], 12, axis=0))
    doubled = np.repeat(moving[:6], 2, axis=0)
    assert repeats(doubled) and repeats(doubled[1:]) and not repeats(doubled[:6])
    assert not repeats(moving[[0, 0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7]])
