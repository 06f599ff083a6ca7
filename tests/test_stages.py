"""A stage's fingerprint follows what dvc.yaml says that the stage follows from, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prelar import stages
from prelar.config import load_config
from prelar.stages import Stages, code_digest, stage_fingerprint
from prelar.utils.errors import UserError

ROOT = Path(__file__).parents[1]
PIPELINE = """
stages:
  first:
    cmd: exec python -m prelar first
    deps: [prelar/loop.py, prelar/model]
    params: [beta, 'scales.${scale}.first']
    outs: [data/first]
  second:
    cmd: exec python -m prelar second
    deps: [data/first, prelar/other.py]
    params: [seed]
    metrics:
      - metrics.json: {cache: false}
"""
VALUES = {"beta": 1.0, "seed": 0, "scale": "a", "scales": {"a": {"first": 1}, "b": {"first": 2}}, "idle": 0}
FILES = {"prelar/loop.py": "a", "prelar/model/nets.py": "b", "prelar/other.py": "c", "prelar/idle.py": "d"}


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small project in the current folder, whose code is the one that runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stages, "PROJECT", tmp_path)
    for name, text in {**FILES, "dvc.yaml": PIPELINE}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def changed_by(name: str, **changes: Any) -> bool:
    return stage_fingerprint(name, VALUES | changes) != stage_fingerprint(name, VALUES)


def test_it_follows_the_stage_s_params() -> None:
    assert changed_by("first", beta=2.0) and changed_by("first", scale="b")
    assert changed_by("first", scales={"a": {"first": 3}, "b": {"first": 2}})
    assert not changed_by("first", seed=1) and not changed_by("first", idle=1)
    assert not changed_by("first", scales={"a": {"first": 1}, "b": {"first": 9}})
    assert changed_by("second", seed=1) and not changed_by("second", beta=2.0)


@pytest.mark.parametrize("path", FILES)
def test_it_follows_the_stage_s_code(path: str) -> None:
    before = Stages().fingerprint("first", VALUES)
    Path(path).write_text("changed")
    assert (Stages().fingerprint("first", VALUES) != before) == (
        path not in ("prelar/other.py", "prelar/idle.py")
    )
    Path(path).write_text(FILES[path])
    assert Stages().fingerprint("first", VALUES) == before


def test_code_is_what_stages_read_and_none_makes() -> None:
    assert Stages().code() == ["prelar/loop.py", "prelar/model", "prelar/other.py"]
    Path("dvc.yaml").write_text(
        PIPELINE + "  third: {cmd: x, deps: [metrics.json, params.yaml, prelar/model]}\n"
    )
    assert Stages().code() == ["prelar/loop.py", "prelar/model", "prelar/other.py"]


def test_it_follows_the_command_and_names_of_files() -> None:
    before = stage_fingerprint("first", VALUES)
    Path("dvc.yaml").write_text(PIPELINE.replace("prelar first", "prelar first --twice"))
    assert stage_fingerprint("first", VALUES) != before
    Path("dvc.yaml").write_text(PIPELINE)
    Path("prelar/model/nets.py").rename("prelar/model/net.py")
    assert stage_fingerprint("first", VALUES) != before


@pytest.mark.parametrize("text", [None, "stages: {}", "stages: {third: {cmd: x}}"])
def test_without_the_stage_it_follows_all_params_and_code(text: str | None) -> None:
    Path("dvc.yaml").unlink()
    if text is not None:
        Path("dvc.yaml").write_text(text)
    assert changed_by("first", seed=1) and changed_by("first", idle=1)
    before = stage_fingerprint("first", VALUES)
    assert stage_fingerprint("second", VALUES) != before
    Path("prelar/idle.py").write_text("changed")
    assert stage_fingerprint("first", VALUES) != before


def test_those_of_a_pipeline_follow_the_stages_before() -> None:
    before, pipeline = Stages().fingerprints(VALUES), Stages()
    assert pipeline.upstream(VALUES) == {"first": set(), "second": {"first"}}
    assert before.keys() == {"first", "second"}

    def differ(**changes: Any) -> set[str]:
        after = pipeline.fingerprints(VALUES | changes)
        return {name for name in before if after[name] != before[name]}

    assert (
        differ(beta=2.0) == {"first", "second"} and differ(seed=1) == {"second"} and differ(idle=1) == set()
    )


EACH = """
stages:
  store:
    foreach: ${stores}
    do:
      cmd: exec make ${key} ${item.kind}
      deps: [prelar/loop.py]
      params: ['stores.${key}']
      outs: ['data/${key}.zarr']
  mix:
    foreach: ${mixtures.mix}
    do:
      cmd: note ${key}
      deps: ['data/${key}.zarr']
      params: [mixtures.mix]
      outs: ['data/notes/${key}.json']
  join: {cmd: join, deps: [data/notes], params: [mixtures], outs: [data/mix.zarr]}
"""


def test_stages_for_each_entry_follow_their_own_entry() -> None:
    Path("dvc.yaml").write_text(EACH)
    stores = {"a": {"kind": "x"}, "b": {"kind": "x"}, "c": {"kind": "y"}}
    values = {"stores": stores, "mixtures": {"mix": {"a": 1, "b": 2}}}
    pipeline = Stages()
    assert pipeline.resolved(values)["store@c"]["cmd"] == "exec make c y"
    above = pipeline.upstream(values)
    assert above["join"] == {"mix@a", "mix@b"} and above["mix@b"] == {"store@b"} and above["store@c"] == set()
    before = pipeline.fingerprints(values)
    changed = pipeline.fingerprints(values | {"stores": stores | {"b": {"kind": "y"}}})
    differ = {name for name in before if changed[name] != before[name]}
    assert differ == {"store@b", "mix@b", "join"}
    assert pipeline.code() == ["data/notes", "prelar/loop.py"]


@pytest.mark.parametrize("text", ["[]", "stages: 3", "stages: {first: 3}"])
def test_a_pipeline_without_stages_is_named(text: str) -> None:
    Path("dvc.yaml").write_text(text)
    with pytest.raises(UserError, match=r"dvc\.yaml: has no stages"):
        Stages()


def test_the_project_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "PROJECT", ROOT)
    values = load_config(ROOT / "params.yaml").model_dump(mode="json")
    pipeline = Stages(ROOT / "dvc.yaml")
    before = pipeline.fingerprints(values)
    after = pipeline.fingerprints(values | {"task": "push"})
    assert {name for name in before if before[name] != after[name]} == {
        "finetune",
        "evaluate",
        "simulator",
        "report",
    }
    assert code_digest(["prelar/model"]) != code_digest(["prelar/train"])


def test_another_frame_gap_trains_anew_and_makes_no_data_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "PROJECT", ROOT)
    values = load_config(ROOT / "params.yaml").model_dump(mode="json")
    pipeline = Stages(ROOT / "dvc.yaml")
    before, after = pipeline.fingerprints(values), pipeline.fingerprints(values | {"frame_gap": 0.25})
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"pretrain", "finetune", "evaluate", "simulator", "report"}
    made = {name for name in before if name not in changed}
    assert made == {"sample", "ssv2", "demos"}
    own = {name for name in before if "frame_gap" in pipeline.stages[name].get("params", [])}
    assert own == {"pretrain"}
