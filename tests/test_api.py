"""`prelar.load`: three lines from a checkpoint to imagined frames, for every method and both stages."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import prelar
from prelar import api
from prelar.methods import METHODS, build_model
from prelar.model.images import first_steps, normalise
from prelar.model.spec import ModelSpec
from prelar.train.checkpoint import save_parts
from prelar.utils.errors import UserError
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
FRAMES = moving(7)


def save_pretrained(folder: Path, method: str = "prelar", **spec: Any) -> Any:
    torch.manual_seed(0)
    model = build_model(ModelSpec(method=method, **(SIZES | spec)))
    save_parts(folder, model.state(), {"stage": "pretrain", "model": model.spec, "step": 0})
    return model.eval()


def save_finetuned(folder: Path, method: str) -> Any:
    torch.manual_seed(0)
    model = build_model(
        ModelSpec(stage="finetune", method=method, **SIZES, robot_action_dim=4, units=8, layers=1)
    )
    actor = {"actor": {"weight": torch.zeros(2)}}
    save_parts(folder, model.state() | actor, {"stage": "finetune", "model": model.spec})
    return model.eval()


@pytest.mark.parametrize("method", METHODS)
def test_a_pretrained_model_encodes_imagines_and_decodes(tmp_path: Path, method: str) -> None:
    save_pretrained(tmp_path / "x", method)
    model = prelar.load(tmp_path / "x")
    seen = model.encode(FRAMES)
    width = model.model.feature_dim
    assert seen.features.shape == (7, width) and seen.features.dtype == np.float32
    assert (seen.actions is not None) == (method == "prelar")
    ahead = model.imagine(seen, 3)
    assert ahead.features.shape == (3, width)
    for imagery, length in ((seen, 7), (ahead, 3)):
        film = model.decode(imagery)
        assert film.shape == (length, 64, 64, 3) and film.dtype == np.uint8
    assert (model.decode(model.imagine(seen, 3)) == model.decode(ahead)).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_finetuned_model_takes_the_actions_of_the_robot(tmp_path: Path, method: str) -> None:
    save_finetuned(tmp_path / "x", method)
    model = prelar.load(tmp_path / "x")
    batch, actions = np.stack([FRAMES] * 2), np.zeros((2, 6, 4))
    seen = model.encode(batch, actions)
    still, moved = (model.decode(model.imagine(seen, np.full((2, 4, 4), size))) for size in (0.0, 1.0))
    assert still.shape == (2, 4, 64, 64, 3) and seen.features.shape[:2] == (2, 7)
    assert np.abs(still[0].astype(int) - still[1]).max() <= 1
    assert (
        model.imagine(seen, np.ones((4, 4))).features == model.imagine(seen, np.ones((2, 4, 4))).features
    ).all()
    assert (still != moved).any() or method == "dreamerv2"
    with pytest.raises(ValueError, match="need the actions between them"):
        model.encode(FRAMES)
    with pytest.raises(ValueError, match="7 frames have 6 actions"):
        model.encode(FRAMES, np.zeros((7, 4)))


def test_it_is_the_open_loop_prediction_of_the_model(tmp_path: Path) -> None:
    model = save_pretrained(tmp_path / "x")
    images, is_first = normalise(torch.from_numpy(FRAMES[None])), first_steps(1, 7)
    expected = model.open_loop(images, is_first, 4)[0, 4:]
    loaded = prelar.load(tmp_path / "x")
    led = loaded.encode(FRAMES).actions
    assert led is not None
    found = loaded.decode(loaded.imagine(loaded.encode(FRAMES[:4]), led[3:]))
    wanted = expected.add(0.5).mul(255).round().clamp(0, 255).byte().movedim(1, -1).numpy()
    assert np.abs(found.astype(int) - wanted).max() <= 1


@pytest.mark.parametrize("window", [2, 3])
def test_long_videos_are_gone_through_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    save_pretrained(tmp_path / "x", action_window=window)
    model = prelar.load(tmp_path / "x")
    whole = model.infer(moving(11))
    monkeypatch.setattr(api, "CHUNK", 4)
    assert whole.shape == (10, 8) and np.allclose(model.infer(moving(11)), whole, atol=1e-5)
    assert model.infer(moving(1)).shape == (0, 8)


def test_methods_without_latent_actions_say_so(tmp_path: Path) -> None:
    save_pretrained(tmp_path / "x", "apv")
    with pytest.raises(UserError, match="method = apv, stage pretrain: infers no actions"):
        prelar.load(tmp_path / "x").infer(FRAMES)


@pytest.mark.parametrize(
    "frames",
    [
        FRAMES.astype(np.float32),
        FRAMES[0],
        FRAMES[:, :32],
        np.zeros((2, 3, 64, 64), np.uint8),
        FRAMES[:0],
        FRAMES[None, :0],
        FRAMES[None][:0],
    ],
)
def test_other_frames_are_refused(tmp_path: Path, frames: np.ndarray) -> None:
    save_pretrained(tmp_path / "x")
    model = prelar.load(tmp_path / "x")
    with pytest.raises(ValueError, match="give uint8"):
        model.encode(frames)
    if frames.ndim == 4:
        with pytest.raises(ValueError, match="give uint8"):
            model.infer(frames, stride=2)


@pytest.mark.filterwarnings("error")
def test_arrays_that_cannot_be_written_to_are_read(tmp_path: Path) -> None:
    save_pretrained(tmp_path / "x")
    model = prelar.load(tmp_path / "x")
    frames, actions = FRAMES.copy(), np.ones((2, 8), np.float32)
    frames.flags.writeable = actions.flags.writeable = False
    seen = model.encode(frames)
    assert (seen.features == model.encode(FRAMES).features).all()
    assert (model.infer(frames) == model.infer(FRAMES)).all()
    assert np.isfinite(model.imagine(seen, actions).features).all()


def test_one_video_is_inferred_at_a_time_with_a_stride(tmp_path: Path) -> None:
    save_pretrained(tmp_path / "x")
    model = prelar.load(tmp_path / "x")
    for count, length in ((5, 2), (3, 3), (1, 7), (7, 1)):
        with pytest.raises(ValueError, match="give one video"):
            model.infer(np.stack([moving(7)[:length]] * count))
    for stride in (0, -1):
        with pytest.raises(ValueError, match="stride of 1 or more"):
            model.infer(FRAMES, stride=stride)


def test_imagination_takes_a_step_or_more(tmp_path: Path) -> None:
    save_pretrained(tmp_path / "x", "apv")
    model = prelar.load(tmp_path / "x")
    seen = model.encode(FRAMES)
    for none in (0, -1, np.zeros((0, model.action_dim))):
        with pytest.raises(ValueError, match="1 or more"):
            model.imagine(seen, none)
    assert (model.imagine(seen, np.int64(2)).features == model.imagine(seen, 2).features).all()


def test_other_actions_are_refused(tmp_path: Path) -> None:
    save_pretrained(tmp_path / "x")
    model = prelar.load(tmp_path / "x")
    with pytest.raises(ValueError, match=r"give \(H, 8\)"):
        model.imagine(model.encode(FRAMES), np.zeros((3, 4)))


def test_what_is_no_model_ends_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint"):
        prelar.load(tmp_path)
    save_parts(tmp_path / "x", {}, {"stage": "sample"})
    with pytest.raises(UserError, match="names no model"):
        prelar.load(tmp_path / "x")
    save_parts(tmp_path / "x", {}, {"stage": "pretrain", "model": {"novel": 1}})
    with pytest.raises(UserError, match="made by another version"):
        prelar.load(tmp_path / "x")


def test_sizes_that_the_weights_do_not_have_build_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = save_pretrained(tmp_path / "x")
    built: list[str] = []

    def counted(spec: ModelSpec) -> Any:
        model = build_model(spec)
        built.append(str(next(model.parameters()).device))
        return model

    monkeypatch.setattr(api, "build_model", counted)
    for change in ({"deter": 60_000}, {"cnn_depth": 4096}, {"action_dim": 4000}, {"action_window": 60_000}):
        save_parts(tmp_path / "x", made.state(), {"stage": "pretrain", "model": replace(made.spec, **change)})
        with pytest.raises(UserError, match="does not fit this architecture"):
            prelar.load(tmp_path / "x")
    assert set(built) == {"meta"}
    whole = {part: {n: v.long() for n, v in state.items()} for part, state in made.state().items()}
    save_parts(tmp_path / "x", whole, {"stage": "pretrain", "model": made.spec})
    with pytest.raises(UserError, match=r"is torch\.int64, expected torch\.float32"):
        prelar.load(tmp_path / "x")


def test_importing_prelar_is_light() -> None:
    heavy = "print({'torch', 'dvc', 'prefect', 'pyarrow', 'mujoco'} & set(__import__('sys').modules))"
    done = subprocess.run(
        [sys.executable, "-c", f"import prelar; {heavy}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert done.stdout.strip() == "set()"


def test_the_example_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    assert "prelar.load(" in example
    save_pretrained(tmp_path / "data/pretrain")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"frames": FRAMES}
    exec(example, names)
    assert names["film"].dtype == np.uint8 and names["film"].shape[1:] == (64, 64, 3)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_checkpoints_from_before_the_spec_load(tmp_path: Path, stage: str) -> None:
    """Their descriptions hold the keywords of one stage only, and not the stage among them."""
    made = (save_pretrained if stage == "pretrain" else save_finetuned)(tmp_path / "x", "contextwm")
    path = tmp_path / "x" / "config.json"
    described = json.loads(path.read_text(encoding="utf-8"))
    others = {"stage", "units", "layers", "naive", "dual_reward", "bonus", "context_augment", "frame_gap"}
    others = (
        others if stage == "pretrain" else {"stage", "action_kind", "action_window", "consistency", "beta_a"}
    )
    for name in others:
        del described["model"][name]
    path.write_text(json.dumps(described), encoding="utf-8")
    loaded = prelar.load(tmp_path / "x").model
    assert loaded.spec.stage == stage and loaded.weights == made.weights
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in made.state_dict().items())


def test_each_part_weights_the_losses_that_it_has(tmp_path: Path) -> None:
    weighted = save_pretrained(tmp_path / "x", beta=2.0, beta_a=3.0, beta_c=4.0)
    assert weighted.weights == {"image": 1.0, "kl": 2.0, "action_kl": 3.0, "consistency": 4.0}
    stacked = save_finetuned(tmp_path / "y", "apv").weights
    assert stacked == {"image": 1.0, "kl": 1.0, "lower_kl": 0.0, "reward": 1.0, "dual_reward": 1.0}
