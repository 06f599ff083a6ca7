"""Open-loop prediction against copying, with models whose error is known; pictures; tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from prelar.evaluation.panels import contact_sheet, error_image, grid, strip, tile_horizontally
from prelar.evaluation.prediction import measure, psnr, write_prediction
from prelar.utils.errors import UserError
from prelar.utils.tables import read_tsv, write_tsv
from tests.fake_results import moving

CPU = torch.device("cpu")


def test_errors_of_a_model_that_is_off_by_a_tenth_and_of_copying() -> None:
    truth = np.full((20, 5, 64, 64, 3), 51, np.uint8)
    truth[:, 3:] = 102

    def off(images: Tensor, is_first: Tensor, observed: int, action: Tensor | None) -> Tensor:
        assert is_first.sum(1).tolist() == [1] * len(images) and is_first[:, 0].all()
        return images + 0.1

    found = measure(off, truth, observed=2, device=CPU)
    assert found.model == pytest.approx([0.01] * 3, rel=1e-4)
    assert found.copy == pytest.approx([0, 0.04, 0.04], abs=1e-7)
    assert found.predicted[0, :, 0, 0, 0].tolist() == [76, 76, 76, 128, 128]
    assert psnr(0.01) == pytest.approx(20) and psnr(0) == 100


def test_what_the_model_draws_does_not_depend_on_what_was_drawn_before() -> None:
    truth = moving(6)[None]

    def noisy(images: Tensor, is_first: Tensor, observed: int, action: Tensor | None) -> Tensor:
        return images + torch.randn_like(images)

    first = measure(noisy, truth, observed=2, device=CPU, seed=1)
    torch.randn(7)
    assert np.array_equal(first.predicted, measure(noisy, truth, observed=2, device=CPU, seed=1).predicted)
    assert not np.array_equal(
        first.predicted, measure(noisy, truth, observed=2, device=CPU, seed=2).predicted
    )


@pytest.mark.parametrize("observed", [0, 6])
def test_there_must_be_frames_to_see_and_to_predict(observed: int) -> None:
    with pytest.raises(ValueError, match="observed"):
        measure(lambda images, *_: images, moving(6)[None], observed=observed, device=CPU)


def test_what_is_written_of_a_prediction(tmp_path: Path) -> None:
    truth = np.stack([np.repeat(moving(1), 6, 0), moving(6)])
    found = measure(lambda images, *_: images, truth, observed=2, device=CPU)
    write_prediction(tmp_path, "table", "clips", found)
    table = read_tsv(tmp_path / "table.tsv")
    assert table["step"] == [1, 2, 3, 4] and table["model"] == pytest.approx([0] * 4, abs=1e-9)
    assert all(a < b for a, b in zip(table["copy_psnr"][1:], table["copy_psnr"], strict=False))
    assert (tmp_path / "clips.mp4").stat().st_size > 1000 and (tmp_path / "clips_poster.png").exists()
    liveliest = np.asarray(Image.open(tmp_path / "clips.png"))
    assert np.array_equal(liveliest[:64, :64], truth[1, 0])


def test_panels_put_frames_where_they_belong() -> None:
    frames = moving(5)
    cells = grid(np.stack([frames[:2], frames[2:4]]), gap=3)
    assert cells.shape == (131, 131, 3)
    assert np.array_equal(cells[:64, 67:], frames[1]) and np.array_equal(cells[67:, :64], frames[2])
    picture = strip(frames, frames[::-1], observed=2, columns=5)
    assert np.array_equal(picture[66:130, :64], frames[4])
    assert not error_image(frames, frames).any()
    sheet = contact_sheet(frames, columns=4)
    assert sheet.shape == (130, 262, 3) and np.array_equal(sheet[66:, :64], frames[4])
    video = tile_horizontally([frames, frames[:3]], [False, True])
    assert video.shape == (5, 68, 130, 3) and np.array_equal(video[4, :64, 66:], frames[2])
    assert (video[0, 66, 70] != video[0, 66, 3]).any()


def test_tables_come_back_as_written(tmp_path: Path) -> None:
    columns = {"step": [1, 2], "value": [0.1, 1e-12]}
    write_tsv(tmp_path / "a.tsv", columns)
    assert (tmp_path / "a.tsv").read_text() == "step\tvalue\n1\t0.1\n2\t1e-12\n"
    assert read_tsv(tmp_path / "a.tsv") == columns


@pytest.mark.parametrize(("line", "told"), [("1", "1 cells under 2"), ("1\tx", "'x' is not a number")])
def test_broken_tables_name_their_line(tmp_path: Path, line: str, told: str) -> None:
    (tmp_path / "a.tsv").write_text(f"step\tvalue\n{line}\n")
    with pytest.raises(UserError, match=f"a.tsv:2: {told}"):
        read_tsv(tmp_path / "a.tsv")
