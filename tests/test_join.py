"""Two sources to a mixture: made, validated, pre-trained on, killed, resumed, and always the same bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from flows import demos, ssv2, staging
from prelar import join
from prelar.__main__ import run_check
from prelar.evaluate import evaluate_sources
from prelar.pretrain import build
from prelar.stages import Stages
from prelar.store.store import Store
from prelar.store.writer import StoreWriter
from prelar.train.sampler import SegmentSampler
from prelar.utils.errors import UserError
from tests import archives
from tests.conftest import ROOT, Project
from tests.demos.test_hdf5 import write_hdf5
from tests.docs import MEMBER
from tests.flows.inline import work_inline
from tests.test_pretrain import config, disc, outputs, run

MIXTURE = {"clips": 1.0, "hands": 2.0}


def params(folder: Path, **changes: Any) -> dict[str, Any]:
    """What params.yaml says of two further sources, whose files lie in `folder`, and of their mixtures."""
    clips = {"kind": "ssv2", "source": str(folder / "archive"), "batch": 4}
    own = {"tasks": ["all"], "cameras": ["agentview_rgb"]}
    hands = {"kind": "demos", "source": "hdf5", "path": str(folder / "files"), **own}
    mixtures = {"both": MIXTURE, "alone": {"clips": 1.0}}
    return {"sources": {"clips": clips, "hands": hands}, "mixtures": mixtures, "frame_gap": None, **changes}


def test_a_further_source_is_the_group_of_its_kind_with_its_own_keys(tmp_path: Path) -> None:
    cfg = config().model_validate(config().model_dump() | params(tmp_path, dataset="both"))
    clips, hands = cfg.source("clips"), cfg.source("hands")
    assert clips == cfg.ssv2.model_copy(update={"source": str(tmp_path / "archive"), "batch": 4})
    assert (hands.source, hands.path, hands.seed) == ("hdf5", str(tmp_path / "files"), cfg.demos.seed)
    assert ssv2.settings_of(cfg, "clips") is not None and demos.settings_of(cfg, "hands") is not None
    with pytest.raises(UserError, match=r"hands: no source of videos; run `python -m flows\.demos hands`"):
        ssv2.settings_of(cfg, "hands")
    with pytest.raises(UserError, match=r"clip: no source of params\.yaml; did you mean clips"):
        cfg.source("clip")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stores of both sources in `data`, the second ingested from a file of HDF5."""
    folder = tmp_path_factory.mktemp("sources")
    write_hdf5(folder / "files/x.hdf5", [7, 9, 8, 12, 9, 8])
    cfg = config().model_validate(config().model_dump() | params(folder, dataset="both"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        work_inline(patch)
        plan = demos.planned(demos.settings_of(cfg, "hands"), "hands")
        with StoreWriter(plan.store, arrays=plan.source.arrays) as writer:
            demos.fill(writer, plan.source, plan.jobs, 1)
            writer.finish(plan.source.attributes())
        (folder / "data/hands.json").write_text("{}")
        (plan.store.with_suffix(".json")).write_text("{}")
        staging.publish("hands", plan.folder)
        with StoreWriter(Path("data/clips.zarr")) as writer:
            for number in range(9):
                split = "validation" if number % 3 == 0 else "train"
                writer.append(disc(number, 7 + number), {"id": str(number), "split": split, "fps": 12.0})
            writer.finish({"source": {"name": "discs"}})
    return folder


def test_joined_validated_pretrained_killed_and_resumed(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"threads": 1, "device": "cpu"}
    cfg = config(**changes)
    cfg = cfg.model_validate(cfg.model_dump() | params(made, dataset="both"))
    shutil.copytree(made / "data", tmp_path / "a/data")
    monkeypatch.chdir(tmp_path / "a")
    join.run(cfg, "both")
    join.run(cfg, "both", "hands")
    noted = json.loads(Path("data/members/both/hands.json").read_text())
    assert noted == {"store": "data/hands.zarr", "digest": Store.open("data/hands.zarr").digest()}
    told = json.loads(Path("data/both.json").read_text())
    assert told["success"] and {suite["name"] for suite in told["suites"]} >= {"members", "frames"}
    with pytest.raises(UserError, match="neither a mixture nor a union"):
        join.run(cfg, "clips")
    monkeypatch.chdir(tmp_path)
    assert run(tmp_path / "b", tmp_path / "a/data", cfg) == 0
    assert run(tmp_path / "c", tmp_path / "a/data", cfg, kill_at=3) != 0
    assert run(tmp_path / "c", tmp_path / "a/data", cfg) == 0
    assert outputs(tmp_path / "b") == outputs(tmp_path / "c")


@pytest.mark.long
def test_a_mixture_of_one_source_gives_the_weights_of_that_source(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(threads=1, device="cpu")
    cfg = cfg.model_validate(cfg.model_dump() | params(made, dataset="both"))
    shutil.copytree(made / "data", tmp_path / "a/data")
    monkeypatch.chdir(tmp_path / "a")
    for name in ("both", "alone"):
        join.run(cfg, name)
    found = {}
    for name in ("alone", "clips", "both"):
        assert run(tmp_path / name, tmp_path / "a/data", cfg.model_copy(update={"dataset": name})) == 0
        found[name] = outputs(tmp_path / name)
    assert found["alone"] == found["clips"] != found["both"]


def test_a_union_of_what_was_made_otherwise_or_twice_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, first, ffmpeg in (("a", 0, "7"), ("b", 4, "7"), ("c", 8, "8")):
        with StoreWriter(tmp_path / f"{name}.zarr") as writer:
            for number in range(first, first + 5 - (name == "a")):
                writer.append(disc(number, 9), {"id": str(number), "split": "train", "fps": 12.0})
            writer.finish({"source": {"name": "discs"}, "ffmpeg": ffmpeg})
    of = lambda *names: {"unions": {"u": [str(tmp_path / f"{name}.zarr") for name in names]}}  # noqa: E731
    cfg = lambda *names: config().model_validate(config().model_dump() | of(*names))  # noqa: E731
    join.run(cfg("a", "b"), "u")
    assert Store.open(Path("data/u.zarr")).clip_index["id"].to_pylist() == [str(n) for n in range(9)]
    with pytest.raises(UserError, match="no id comes twice"):
        join.run(cfg("b", "c"), "u")
    with pytest.raises(UserError, match="the stores were made alike"):
        join.run(cfg("a", "c"), "u")
    assert not Path("data/u.zarr").exists()


def test_prediction_and_probe_are_told_of_each_source(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(device="cpu")
    cfg = cfg.model_validate(cfg.model_dump() | params(made, dataset="both"))
    shutil.copytree(made / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    join.run(cfg, "both")
    model = build(cfg).eval()
    found = evaluate_sources(cfg, model, Store.open(cfg.store))
    assert [row["source"] for row in found.summary["sources"]] == ["clips", "hands"]
    assert [row["weight"] for row in found.summary["sources"]] == [1.0, 2.0]
    assert found.metrics.keys() >= {"prediction_error@clips", "prediction_error@hands"}
    of_one = evaluate_sources(cfg, model, Store.open(Path("data/clips.zarr")))
    assert of_one.metrics == {} and of_one.summary == {}


def test_check_names_the_stage_that_a_mixture_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config().model_validate(config().model_dump() | params(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    with pytest.raises(UserError, match=r"dvc\.yaml: lacks the stage both"):
        run_check(cfg)
    text = Path("dvc.yaml").read_text()
    text = text.replace(
        "\nplots:", "".join(MEMBER.format(name=name) for name in ("both", "alone")) + "\nplots:"
    )
    Path("dvc.yaml").write_text(text)
    run_check(cfg)
    above = Stages().upstream(cfg.model_dump(mode="json") | {"dataset": "both"})
    assert above["pretrain"] == {"mixture@both"} and above["mixture@both"] == {"both@clips", "both@hands"}
    assert above["both@clips"] == {"source@clips"} and above["mixture@alone"] == {"alone@clips"}


@pytest.mark.long
def test_dvc_makes_a_mixture_and_again_only_what_follows_from_a_change(
    tmp_path: Path, make_project: Callable[[Path], Project]
) -> None:
    archives.source(tmp_path / "archive", archives.clips(12, shortest=9))
    write_hdf5(tmp_path / "files/x.hdf5", [9, 9, 12, 9, 8, 8])
    project = make_project(tmp_path / "project")
    pipeline = project.root / "dvc.yaml"
    text = pipeline.read_text()
    pipeline.write_text(text.replace("\nplots:", MEMBER.format(name="both") + "\nplots:"))
    values = YAML(typ="safe", pure=True).load((project.root / "params.yaml").read_text())
    values |= params(tmp_path, mixtures={"both": MIXTURE}, dataset="both")
    with (project.root / "params.yaml").open("w") as file:
        YAML(typ="safe", pure=True).dump(values, file)
    project.run("python", "-m", "prelar", "check")
    project.run("git", "commit", "-qam", "mix")
    project.run("dvc", "repro", "pretrain")
    store = Store.open(project.root / "data/both.zarr")
    assert [member.name for member in store.members] == ["clips", "hands"]
    assert len(SegmentSampler(store, length=6, batch=3, seed=0).segments(0)[0]) == 3
    assert "are up to date" in project.run("dvc", "repro", "pretrain").stdout
    told = project.run("dvc", "exp", "run", "-S", "+sources.hands.fps=9", "pretrain").stdout
    assert "Running stage 'source@hands'" in told and "Running stage 'pretrain'" in told
    assert "Stage 'source@clips' didn't change" in told and "Stage 'both@clips' didn't change" in told
    told = project.run("dvc", "exp", "run", "--temp", "-S", "mixtures.both.hands=5", "pretrain").stdout
    assert "Running stage 'source@" not in told and "Running stage 'pretrain'" in told
    told = project.run("dvc", "exp", "run", "-S", "dataset=clips", "pretrain").stdout
    assert "mixture@both" not in told and "Running stage 'pretrain'" in told
    assert "recorded with DVC" in project.run("python", "-m", "flows.demos", "hands").stdout
