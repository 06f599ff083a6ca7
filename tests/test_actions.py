"""Latent actions as Parquet: of a store, of videos good and bad."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import prelar
from prelar import actions
from prelar.store.store import Frames, StoreWriter
from prelar.utils.errors import UserError
from prelar.utils.video_file import write_mp4
from prelar.videos import decode
from prelar.videos.decode import Decoder, Part
from tests.fake_results import moving
from tests.test_api import save_pretrained


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_pretrained(tmp_path / "pretrain")
    return tmp_path / "pretrain"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    with StoreWriter(tmp_path / "x.zarr") as writer:
        writer.append(moving(5), {"id": "7", "split": "train"})
        writer.append(None, {"id": "8", "reason": "not a video"})
        writer.append(moving(1), {"id": "9", "split": "train"})
        writer.append(moving(3)[::-1].copy(), {"id": "10", "split": "train"})
        writer.finish({})
    return tmp_path / "x.zarr"


def test_a_store_becomes_a_row_a_pair(store: Path, checkpoint: Path, tmp_path: Path) -> None:
    actions.run([store], tmp_path / "out.parquet", checkpoint=checkpoint)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["clip"].to_pylist() == ["7"] * 4 + ["10"] * 2
    assert table["frame"].to_pylist() == [0, 1, 2, 3, 0, 1]
    assert table.schema.field("action").type == pa.list_(pa.float32(), 8)
    found = np.array(table["action"].to_pylist(), np.float32)
    expected = prelar.load(checkpoint).infer(moving(5))
    assert np.allclose(found[:4], expected, atol=1e-6) and (found[4:] != found[:2]).any()
    about = table.schema.metadata
    assert json.loads(about[b"prelar.model"])["action_dim"] == 8 and len(about[b"prelar.action_sha256"]) == 64


def test_videos_are_decoded_and_a_broken_one_is_left_out(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_mp4(tmp_path / "good.mp4", moving(6), 10)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    sources = [tmp_path / "bad.mp4", tmp_path / "good.mp4"]
    actions.run(sources, tmp_path / "out.parquet", checkpoint=checkpoint)
    table = pq.read_table(tmp_path / "out.parquet")
    assert set(table["clip"].to_pylist()) == {str(tmp_path / "good.mp4")} and len(table) == 5
    told = capsys.readouterr()
    assert "bad.mp4: left out" in told.err and "5 of 1 clips" in told.out


def test_a_long_video_is_gone_through_piece_by_piece(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a row for every pair of frames, those between the pieces included."""
    monkeypatch.setattr(actions, "SECONDS", 0.5)
    monkeypatch.setattr(decode, "MAX_FRAMES", 20)
    write_mp4(tmp_path / "long.mp4", moving(47), 10)
    actions.run([tmp_path / "long.mp4"], tmp_path / "out.parquet", checkpoint=checkpoint)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["frame"].to_pylist() == list(range(46))
    (whole,) = [clip.frames for clip in Decoder().decode_parts([Part(tmp_path / "long.mp4")])]
    assert whole is None, "of so many frames at once nothing comes"
    monkeypatch.undo()
    (whole,) = [clip.frames for clip in Decoder().decode_parts([Part(tmp_path / "long.mp4")])]
    assert whole is not None
    expected = prelar.load(checkpoint).infer(whole)
    assert np.allclose(np.stack(table["action"].to_numpy()), expected, atol=1e-5)


@pytest.mark.parametrize("window", [2, 3, 5])
def test_pieces_are_led_by_what_the_model_looks_at(window: int) -> None:
    """Told by a model whose action is the sum of the frames that it saw."""

    class Summing:
        def __init__(self) -> None:
            self.spec = SimpleNamespace(action_window=window)

        def infer(self, frames: Frames) -> np.ndarray:
            means = frames.mean(axis=(1, 2, 3), dtype=np.float64)
            padded = np.concatenate([np.zeros(window - 2), means])
            return np.lib.stride_tricks.sliding_window_view(padded, window).sum(axis=1)[:, None]

    frames = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    pieces = np.split(frames, [1, 2, 9, 10, 24])
    found = np.concatenate(list(actions.infer_pieces(Summing(), pieces)))  # type: ignore[arg-type]
    assert np.allclose(found, Summing().infer(frames))


def test_nothing_readable_leaves_no_file(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match="nothing is written"):
        actions.run([tmp_path / "bad.mp4"], tmp_path / "out.parquet", checkpoint=checkpoint)
    assert not list(tmp_path.glob("*.parquet*"))


def test_sources_that_do_not_fit_end_in_one_line(store: Path, checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.parquet"
    with pytest.raises(UserError, match="a store is read by itself"):
        actions.run([store, store], output, checkpoint=checkpoint)
    with pytest.raises(UserError, match="No such file"):
        actions.run([tmp_path / "none.mp4"], output, checkpoint=checkpoint)
    save_pretrained(checkpoint, "apv")
    with pytest.raises(UserError, match="infers no actions"):
        actions.run([store], output, checkpoint=checkpoint)
    assert not output.exists()
