"""The stage pretrain: checkpoint, log and video of every method, the same bytes however often it stopped."""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from ruamel.yaml import YAML

from prelar import pretrain
from prelar.config import Config, load_config, read_yaml
from prelar.demos.episodes import Episode, Splits, clips
from prelar.demos.metaworld import Metaworld
from prelar.methods import build_model
from prelar.model.spec import ModelSpec
from prelar.model.world_model import WorldModel
from prelar.store.writer import StoreWriter
from prelar.train import loop
from prelar.train.checkpoint import Snapshots, load_parts
from prelar.train.loop import descend
from prelar.utils.errors import UserError
from prelar.utils.files import remove
from tests.conftest import ROOT, TINY, Spy, merge

PROCESSES = multiprocessing.get_context("forkserver")


def config(**changes: Any) -> Config:
    """The project's params at the size of the tests."""
    params = read_yaml(ROOT / "params.yaml")
    merge(params, TINY)
    merge(params, {"threads": 1, **changes})
    return Config.model_validate(params)


def disc(number: int, length: int) -> np.ndarray:
    """A coloured disc that moves over a plain ground, uint8 (length, 64, 64, 3)."""
    generator = np.random.default_rng(number)
    place, speed = generator.uniform(20, 44, 2), generator.uniform(-2, 2, 2)
    ground, colour = generator.integers(0, 256, (2, 3))
    grid = np.stack(np.mgrid[:64, :64], -1)
    inside = [((grid - place - speed * t) ** 2).sum(-1, keepdims=True) < 80 for t in range(length)]
    return np.where(inside, colour, ground).astype(np.uint8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "data"
    folder.mkdir()
    with StoreWriter(folder / "ssv2.zarr") as writer:
        for number in range(12):
            split = "validation" if number % 3 == 0 else "train"
            row = {"id": str(number), "split": split, "fps": 12.0 if number % 2 else 24.0}
            writer.append(disc(number, 5 + number), row)
        writer.finish({"source": {}, "resize": "rule", "ffmpeg": "7"})
    return folder


def stage(folder: Path, cfg: Config, kill_at: int | None = None) -> None:
    """Run the stage in `folder`; die before the descent number `kill_at`, with snapshots written."""
    os.chdir(folder)
    calls = 0
    kept: list[Snapshots] = []

    def keeping(*arguments: Any) -> Snapshots:
        kept.append(Snapshots(*arguments))
        return kept[-1]

    def counted(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls - 1 == kill_at:
            kept[0].wait()
            os.kill(os.getpid(), signal.SIGKILL)
        return descend(*arguments)

    pretrain.descend = counted  # type: ignore[assignment]
    pretrain.Snapshots = keeping  # type: ignore[assignment,misc]
    pretrain.run(cfg)


def run(folder: Path, data: Path, cfg: Config, target: Callable[..., None] = stage, **settings: Any) -> int:
    """Exit status of the stage in a process of its own, in a folder that holds `data`."""
    if not folder.exists():
        shutil.copytree(data, folder / "data")
    process = PROCESSES.Process(target=target, args=(folder, cfg), kwargs=settings)
    process.start()
    process.join(300)
    assert process.exitcode is not None
    return int(process.exitcode)


def outputs(folder: Path) -> dict[str, bytes]:
    places = (folder / "data/pretrain", folder / "reports")
    return {str(f.relative_to(folder)): f.read_bytes() for p in places for f in p.rglob("*") if f.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run(folder, data, config()) == 0
    assert not any((folder / "data/.resume").iterdir()), "a finished run leaves nothing to resume"
    return outputs(folder)


@pytest.mark.parametrize("method", ["dreamerv2", "apv", "contextwm", "prelar"])
def test_every_method_leaves_a_checkpoint_a_log_and_a_video(tmp_path: Path, data: Path, method: str) -> None:
    cfg = config(method=method, action_dim=8)
    assert run(tmp_path / "run", data, cfg) == 0
    parts, about = load_parts(tmp_path / "run/data/pretrain")
    steps = 0 if method == "dreamerv2" else 4
    assert about["stage"] == "pretrain" and about["model"]["method"] == method and about["step"] == steps
    model = build_model(ModelSpec(**about["model"]))
    model.load_state(parts)
    start = pretrain.build(cfg).state()
    moved = {
        name for name in parts if any(not torch.equal(parts[name][k], start[name][k]) for k in start[name])
    }
    assert moved == (set() if steps == 0 else set(parts))
    video = next(imageio_ffmpeg.read_frames(str(tmp_path / "run/reports/pretrain/open_loop.mp4")))
    assert video["size"] == (584, 596), "three clips of 192 and a gap of 4, below a bar of 8"
    logged = {path.stem for path in (tmp_path / "run/reports/pretrain/plots/metrics/loss").glob("*.tsv")}
    assert logged == ({"total", *model.weights} if steps else set())
    error = (tmp_path / "run/reports/pretrain/plots/metrics/validation/prediction_error.tsv").read_text()
    assert [row.split("\t")[0] for row in error.splitlines()] == ["step", str(steps)]


def test_the_same_params_give_the_same_bytes(
    tmp_path: Path, data: Path, undisturbed: dict[str, bytes]
) -> None:
    assert run(tmp_path / "run", data, config()) == 0
    assert outputs(tmp_path / "run") == undisturbed
    assert run(tmp_path / "other", data, config(seed=1)) == 0
    other = outputs(tmp_path / "other")
    assert other.keys() == undisturbed.keys()
    assert other["data/pretrain/encoder.safetensors"] != undisturbed["data/pretrain/encoder.safetensors"]


def replayed(folder: Path, cfg: Config) -> None:
    """The stage as with CUDA graphs: a step writes over what the last returned; nothing is read between."""
    os.chdir(folder)
    given: list[torch.Tensor] = []
    losses_of = WorldModel.pretrain_losses

    def compile_training(model: WorldModel, **options: Any) -> None:
        assert options == {"dynamic": False, "mode": "reduce-overhead"}

    def pretrain_losses(*arguments: Any) -> Any:
        losses, outputs = losses_of(*arguments)
        given.extend([*losses.values(), *outputs["metrics"].values()])
        return losses, outputs

    def begin() -> None:
        for tensor in given:
            tensor.detach().fill_(math.nan)
        given.clear()

    WorldModel.compile_training = compile_training  # type: ignore[method-assign]
    WorldModel.pretrain_losses = pretrain_losses  # type: ignore[method-assign]
    torch.compiler.cudagraph_mark_step_begin = begin
    pretrain.compiles = lambda choice, fabric: choice == "graphs"
    loop._Run.check = lambda self: None  # type: ignore[method-assign]
    pretrain.run(cfg)
    assert given, "the last step's"


def test_graphs_may_write_over_what_the_last_step_returned(
    tmp_path: Path, data: Path, undisturbed: dict[str, bytes]
) -> None:
    seldom = {"smoke": {"pretrain": {"log_every": 4, "checkpoint_every": 4}}}  # the log averages over steps
    assert run(tmp_path / "run", data, config(compile="graphs", scales=seldom), target=replayed) == 0
    weights = {name: values for name, values in undisturbed.items() if name.endswith(".safetensors")}
    assert weights and weights.items() <= outputs(tmp_path / "run").items()


def test_mixed_precision_rounds_and_no_more(
    tmp_path: Path, data: Path, undisturbed: dict[str, bytes]
) -> None:
    def losses(files: dict[str, bytes]) -> list[float]:
        text = files["reports/pretrain/plots/metrics/loss/image.tsv"].decode()
        return [float(row.split("\t")[1]) for row in text.splitlines()[1:]]

    assert run(tmp_path / "run", data, config(precision="bf16")) == 0
    mixed, exact = losses(outputs(tmp_path / "run")), losses(undisturbed)
    assert mixed != exact and mixed == pytest.approx(exact, rel=0.05)


def test_a_killed_run_ends_as_it_would_have(
    tmp_path: Path, data: Path, undisturbed: dict[str, bytes]
) -> None:
    folder = tmp_path / "run"
    assert run(folder, data, config(), kill_at=3) == -signal.SIGKILL
    assert not (folder / "data/pretrain").exists()
    assert run(folder, data, config(seed=1), kill_at=1) == -signal.SIGKILL
    remove(folder / "reports")
    assert run(folder, data, config(), kill_at=1) == -signal.SIGKILL, "it went on from step 2"
    assert run(folder, data, config(), kill_at=2) == 0, "it went on from step 2, of 4"
    assert outputs(folder) == undisturbed


@pytest.mark.long
def test_a_killed_run_with_a_gap_ends_as_it_would_have(
    tmp_path: Path, data: Path, undisturbed: dict[str, bytes]
) -> None:
    """Its frames are 0.08 s apart: one or two frames by the clip. The checkpoint says so."""
    folder, cfg = tmp_path / "run", config(frame_gap=0.08)
    assert run(tmp_path / "whole", data, cfg) == 0
    assert run(folder, data, cfg, kill_at=3) == -signal.SIGKILL
    assert run(folder, data, cfg, kill_at=2) == 0, "it went on from step 2, of 4"
    whole, weights = outputs(tmp_path / "whole"), "data/pretrain/encoder.safetensors"
    assert outputs(folder) == whole and whole[weights] != undisturbed[weights]
    assert load_parts(folder / "data/pretrain")[1]["model"]["frame_gap"] == 0.08


def test_the_video_is_there_while_training_goes_on(tmp_path: Path, data: Path) -> None:
    folder = tmp_path / "run"
    cfg = config(scales={"smoke": {"pretrain": {"video_every": 1}}})
    assert run(folder, data, cfg, kill_at=2) == -signal.SIGKILL
    assert next(imageio_ffmpeg.read_frames(str(folder / "reports/pretrain/open_loop.mp4")))["duration"] > 0
    error = folder / "reports/pretrain/plots/metrics/validation/prediction_error.tsv"
    assert [row.split("\t")[0] for row in error.read_text().splitlines()] == ["step", "1", "2"]


def command(folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "prelar", "pretrain"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def project(folder: Path, data: Path, *, devices: int = 1, **pretrain_preset: Any) -> Config:
    """A folder with data and params.yaml, and those params."""
    shutil.copytree(data, folder / "data")
    cfg = config(devices=devices, scales={"smoke": {"pretrain": pretrain_preset}})
    YAML().dump(cfg.model_dump(), folder / "params.yaml")
    return cfg


def test_the_command_keeps_a_snapshot_when_it_is_terminated(tmp_path: Path, data: Path) -> None:
    folder = tmp_path / "run"
    cfg = project(folder, data, steps=30, checkpoint_every=2, log_every=7, video_every=25)
    process = command(folder)
    until = time.monotonic() + 120
    while not list(folder.glob("data/.resume/*/step-*.pt")):
        assert time.monotonic() < until and process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[1] == "", "quiet without a terminal"
    assert process.returncode == 143
    assert not (folder / "data/pretrain").exists()
    assert run(folder, data, cfg, kill_at=cfg.pretrain.steps - 1) == 0, "it went on, with fewer steps to do"
    assert run(tmp_path / "whole", data, cfg) == 0
    assert outputs(folder) == outputs(tmp_path / "whole")


@pytest.mark.long
def test_many_kills_end_as_without_them(tmp_path: Path, data: Path) -> None:
    moments = random.Random(0)
    folder = tmp_path / "run"
    cfg = project(folder, data, steps=40, checkpoint_every=3, log_every=4, video_every=7)
    for _ in range(8):
        process = command(folder)
        try:
            process.wait(moments.uniform(4, 12))
        except subprocess.TimeoutExpired:
            process.kill()
        process.wait()
    process = command(folder)
    assert process.wait(300) == 0
    assert run(tmp_path / "whole", data, cfg) == 0
    assert outputs(folder) == outputs(tmp_path / "whole")


def test_short_clips_are_named_before_training(tmp_path: Path, data: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        with pytest.raises(UserError, match="no clip has 40 frames"):
            pretrain.run(config(scales={"smoke": {"pretrain": {"length": 40}}}))
        told = (
            r"no clip has 6 frames 0\.5 s apart; \d of 8 clips have 6 frames at a gap of .* lower frame_gap"
        )
        with pytest.raises(UserError, match=told):
            pretrain.run(config(frame_gap=0.5))
    assert not (tmp_path / "reports").exists()


def test_a_run_is_not_continued_on_other_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Demonstrations of the same names and lengths: each index says by sha256 what its clips are."""
    source = Metaworld(
        tasks=("reach",), episodes=1, cameras=("corner",), noise=0.0, keep_failures=False, seed=0
    )
    job = source.jobs()[0]
    arrays = {name: np.zeros((9, width), np.float32) for name, width in source.arrays.items()}
    arrays["actions"][0] = 1

    def key(name: str, number: int, place: int, sha256: str | None = None) -> str:
        frames = disc(7, 9)
        frames[number, place, 0, 0] += 1
        digests = {} if sha256 is None else {"corner": sha256}
        episode = Episode(job, {"corner": frames}, arrays, fps=12.0, digests=digests)
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        with StoreWriter(Path("demos.zarr"), arrays=source.arrays) as writer:
            for images, row, values in clips(episode, source, 0, Splits([job], [])):
                writer.append(images, row, **values)
            return pretrain.run_key(config(), writer.finish(source.attributes()))

    first = key("a", 5, 0)
    assert key("b", 5, 0) == first
    assert key("c", 5, 1) != first, "another frame"
    assert key("d", 0, 0, "of a file") != key("e", 0, 1, "of a file"), "the same file, read otherwise"


def test_weights_are_the_scale_s_own_unless_the_file_says_otherwise() -> None:
    changed = {"method": "prelar", "beta": None, "beta_a": 0.25, "beta_c": None}
    cfg = load_config(ROOT / "params.yaml").model_copy(update=changed)
    for scale in ("smoke", "paper"):
        chosen = cfg.model_copy(update={"scale": scale})
        with torch.device("meta"):
            found = pretrain.build(chosen).weights
        assert (found["kl"], found["action_kl"], found["consistency"]) == (
            chosen.pretrain.beta,
            0.25,
            chosen.pretrain.beta_c,
        )


def test_the_stage_reads_the_params_that_its_key_and_dvc_track(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(data, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    spy = Spy(config(method="dreamerv2"))
    pretrain.run(spy)  # type: ignore[arg-type]
    tracked = set(read_yaml(ROOT / "dvc.yaml")["stages"]["pretrain"]["params"])
    of_preset_and_store = {"dataset", "scale", "scales.${scale}.pretrain"}
    assert tracked >= of_preset_and_store
    assert spy.read - {"model_dump", "pretrain", "store"} == tracked - of_preset_and_store
