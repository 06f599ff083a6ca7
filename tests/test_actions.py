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
from prelar.store.writer import StoreWriter
from prelar.utils.errors import UserError
from prelar.utils.frames import Frames
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
def wide(tmp_path: Path) -> Path:
    """A model of frames 0.2 s apart, which looks at three of them."""
    save_pretrained(tmp_path / "wide", frame_gap=0.2, action_window=3)
    return tmp_path / "wide"


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
    assert table["next"].to_pylist() == [1, 2, 3, 4, 1, 2]
    assert table.schema.field("action").type == pa.list_(pa.float32(), 8)
    found = np.array(table["action"].to_pylist(), np.float32)
    expected = prelar.load(checkpoint).infer(moving(5))
    assert np.allclose(found[:4], expected, atol=1e-6) and (found[4:] != found[:2]).any()
    about = table.schema.metadata
    assert json.loads(about[b"prelar.model"])["action_dim"] == 8 and len(about[b"prelar.action_sha256"]) == 64


def test_pairs_of_a_store_are_as_far_apart_as_in_pretraining(wide: Path, tmp_path: Path) -> None:
    """By each clip's rate; a clip too short for a pair has no row, and one without a rate is refused."""
    with StoreWriter(tmp_path / "x.zarr") as writer:
        for name, length, fps in (("a", 9, 10.0), ("b", 9, 15.0), ("c", 3, 20.0)):
            writer.append(moving(length), {"id": name, "split": "train", "fps": fps})
        writer.finish({})
    actions.run([tmp_path / "x.zarr"], tmp_path / "out.parquet", checkpoint=wide)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["clip"].to_pylist() == ["a"] * 7 + ["b"] * 6
    assert table["frame"].to_pylist() == [*range(7), *range(6)]
    assert table["next"].to_pylist() == [*range(2, 9), *range(3, 9)]
    found, model = np.array(table["action"].to_pylist(), np.float32), prelar.load(wide)
    assert np.allclose(found[0:7:2], model.infer(moving(9)[::2]), atol=1e-6)
    assert np.allclose(found[8:13:3], model.infer(moving(9)[1::3]), atol=1e-6)
    with StoreWriter(tmp_path / "y.zarr") as writer:
        writer.append(moving(9), {"id": "a", "split": "train"})
        writer.finish({})
    with pytest.raises(UserError, match="1 of 1 clips tell no rate"):
        actions.run([tmp_path / "y.zarr"], tmp_path / "none.parquet", checkpoint=wide)


def test_pairs_of_a_video_are_as_far_apart_as_in_pretraining(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actions, "SECONDS", 0.7)
    write_mp4(tmp_path / "x.mp4", moving(23), 10)
    actions.run([tmp_path / "x.mp4"], tmp_path / "out.parquet", checkpoint=wide)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["frame"].to_pylist() == list(range(21)) and table["next"].to_pylist() == list(range(2, 23))
    (whole,) = [clip.frames for clip in Decoder().decode_parts([Part(tmp_path / "x.mp4")])]
    assert whole is not None
    expected = prelar.load(wide).infer(whole, stride=2)
    assert np.allclose(np.stack(table["action"].to_numpy()), expected, atol=1e-5)


def test_a_video_that_tells_no_rate_is_left_out_where_one_is_needed(
    wide: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_mp4(tmp_path / "x.mp4", moving(6), 10)
    monkeypatch.setattr(actions, "read_video", lambda path, decoder: iter([(moving(6), None)]))
    with pytest.raises(UserError, match="nothing is written"):
        actions.run([tmp_path / "x.mp4"], tmp_path / "out.parquet", checkpoint=wide)
    assert "x.mp4: left out (tells no rate" in capsys.readouterr().err
    actions.run([tmp_path / "x.mp4"], tmp_path / "out.parquet", checkpoint=checkpoint)
    assert len(pq.read_table(tmp_path / "out.parquet")) == 5


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


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("window", [2, 3, 5])
def test_pieces_are_led_by_what_the_model_looks_at(window: int, stride: int) -> None:
    """Told by a model whose action is the sum of the frames that it saw."""

    class Summing:
        def __init__(self) -> None:
            self.spec = SimpleNamespace(action_window=window)

        def infer(self, frames: Frames, stride: int) -> np.ndarray:
            means = frames.mean(axis=(1, 2, 3), dtype=np.float64)
            padded = np.concatenate([np.zeros((window - 2) * stride), means])
            seen = np.lib.stride_tricks.sliding_window_view(padded, (window - 1) * stride + 1)
            return seen[:, ::stride].sum(axis=1)[:, None]

    frames = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    pieces = np.split(frames, [1, 2, 9, 10, 24])
    found = np.concatenate(list(actions.infer_pieces(Summing(), pieces, stride)))  # type: ignore[arg-type]
    assert np.allclose(found, Summing().infer(frames, stride)) and len(found) == 40 - stride


def test_nothing_readable_leaves_no_file(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match="nothing is written"):
        actions.run([tmp_path / "bad.mp4"], tmp_path / "out.parquet", checkpoint=checkpoint)
    assert not list(tmp_path.glob("*.parquet*"))


def test_sources_that_do_not_fit_end_in_one_line(
    store: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.parquet"
    with pytest.raises(UserError, match="a store is read by itself"):
        actions.run([store, store], output, checkpoint=checkpoint)
    (tmp_path / "first.mp4").write_bytes(b"no video")
    for later in (tmp_path / "none.mp4", tmp_path):
        with monkeypatch.context() as patch, pytest.raises(UserError, match=r"No such file|Is a directory"):
            patch.setattr(actions, "read_video", lambda *_: pytest.fail("decoded before all are looked at"))
            actions.run([tmp_path / "first.mp4", later], output, checkpoint=checkpoint)
    save_pretrained(checkpoint, "apv")
    with pytest.raises(UserError, match="infers no actions"):
        actions.run([store], output, checkpoint=checkpoint)
    assert not output.exists()
