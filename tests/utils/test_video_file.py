"""Videos: what is written is what is played, and the same frames give the same bytes."""

from __future__ import annotations

from pathlib import Path

import imageio_ffmpeg
import numpy as np
import numpy.typing as npt
import pytest

from prelar.utils import video_file
from prelar.utils.errors import UserError
from prelar.utils.video_file import enlarge, side_by_side, write_mp4


def read(path: Path) -> tuple[dict[str, object], npt.NDArray[np.uint8]]:
    reader = imageio_ffmpeg.read_frames(str(path))
    about = next(reader)
    width, height = about["size"]
    return about, np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])


def stripes(length: int = 6, height: int = 32, width: int = 48) -> npt.NDArray[np.uint8]:
    """Red left of a moving border, blue right of it."""
    frames = np.zeros((length, height, width, 3), dtype=np.uint8)
    for t in range(length):
        frames[t, :, : 8 + 4 * t] = (220, 20, 20)
        frames[t, :, 8 + 4 * t :] = (20, 20, 220)
    return frames


def test_a_video_plays_its_frames(tmp_path: Path) -> None:
    write_mp4(tmp_path / "x.mp4", stripes(), 12)
    about, played = read(tmp_path / "x.mp4")
    assert played.shape == (6, 32, 48, 3)
    assert about["codec"] == "h264" and about["fps"] == 12 and "yuv420p" in str(about["pix_fmt"])
    assert np.abs(played.astype(int) - stripes()).mean() < 6


def test_the_same_frames_give_the_same_bytes_without_a_date(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        write_mp4(tmp_path / name, stripes(), 12)
    data = (tmp_path / "a.mp4").read_bytes()
    assert data == (tmp_path / "b.mp4").read_bytes()
    assert str(tmp_path).encode() not in data
    header = data.index(b"mvhd") + 4
    assert data[header + 4 : header + 12] == bytes(8), "creation and modification time"


def test_odd_sides_are_padded_by_their_edge(tmp_path: Path) -> None:
    write_mp4(tmp_path / "x.mp4", stripes(height=31, width=45), 12)
    _, played = read(tmp_path / "x.mp4")
    assert played.shape == (6, 32, 46, 3)
    assert played[:, :, -1, 2].min() > 150


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((2, 4, 4), np.uint8),
        np.zeros((2, 4, 4, 3), np.float32),
        np.zeros((0, 4, 4, 3), np.uint8),
        np.zeros((2, 4, 4, 4), np.uint8),
    ],
)
def test_what_is_no_video_is_refused(tmp_path: Path, frames: npt.NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError, match="not uint8"):
        write_mp4(tmp_path / "x.mp4", frames, 12)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_encoder_leaves_the_old_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.mp4").write_bytes(b"old")
    monkeypatch.setattr(video_file, "ffmpeg_binary", lambda: "/bin/false")
    with pytest.raises(UserError, match=r"x\.mp4: ffmpeg failed \(exit status 1\)"):
        write_mp4(tmp_path / "x.mp4", stripes(), 12)
    assert [path.name for path in tmp_path.iterdir()] == ["x.mp4"]
    assert (tmp_path / "x.mp4").read_bytes() == b"old"


@pytest.mark.parametrize("name", ["a:b.mp4", "-x/a.mp4", "a%d b'.mp4", "file:x.mp4"])
def test_a_video_may_have_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_mp4(Path(name), stripes(), 12)
    write_mp4(Path("plain.mp4"), stripes(), 12)
    assert Path(name).read_bytes() == Path("plain.mp4").read_bytes()


def test_enlarging_repeats_pixels() -> None:
    small = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    large = enlarge(small, 3)
    assert large.shape == (6, 6, 3)
    assert (large[:3, 3:] == small[0, 1]).all() and (large[3:, :3] == small[1, 0]).all()


def test_truth_prediction_and_error_stand_side_by_side() -> None:
    truth = np.full((2, 4, 8, 8, 3), 100, np.uint8)
    predicted = truth.copy()
    predicted[1, 3] = 40
    canvas = side_by_side(truth, predicted, observed=2, factor=2)
    assert canvas.shape == (4, 8 + 2 * (16 + 4), 3 * 16 + 2 * 4, 3)
    second = canvas[:, 8 + 4 + 16 + 4 :]
    assert (second[:, :, :16] == 100).all()
    assert (second[3, :, 20:36] == 40).all() and (second[2, :, 20:36] == 100).all()
    assert (second[3, :, 40:] == 60).all() and (second[2, :, 40:] == 0).all()
    observed, predicting = canvas[1, 0, 20], canvas[2, 0, 20]
    assert observed.tolist() != predicting.tolist()
    assert (canvas[0, 0, 20:36] == observed).all() and (canvas[3, 0, 20:36] == predicting).all()
