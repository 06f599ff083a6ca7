"""Checkpoints appear whole or not at all, and say in one line what is wrong with them."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prelar.train.checkpoint import Snapshots, load_config, load_parts, resume_key, save_parts
from prelar.utils.errors import UserError


def net(width: int = 3) -> nn.Module:
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "data/pretrain"
    save_parts(
        folder, {"encoder": net().state_dict(), "decoder": net(4).state_dict()}, {"method": "apv", "step": 7}
    )
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_parts_come_back_as_they_were(saved: Path) -> None:
    parts, config = load_parts(saved)
    assert config == {"schema": 1, "parts": ["decoder", "encoder"], "method": "apv", "step": 7}
    for name, width in (("encoder", 3), ("decoder", 4)):
        expected = net(width).state_dict()
        assert parts[name].keys() == expected.keys()
        assert all(torch.equal(parts[name][key], expected[key]) for key in expected)
    assert set(load_parts(saved, ["encoder"])[0]) == {"encoder"}


def test_the_same_weights_give_the_same_bytes_and_replace_the_old_ones(saved: Path) -> None:
    before = contents(saved)
    apart = {
        name: tensor.clone(memory_format=torch.preserve_format) for name, tensor in net().state_dict().items()
    }
    parts = {"decoder": net(4).state_dict(), "encoder": dict(reversed(apart.items()))}
    save_parts(saved, parts, {"step": 7, "method": "apv"})
    assert contents(saved) == before
    save_parts(saved, {"encoder": net(5).state_dict()}, {"step": 8})
    assert set(contents(saved)) == {"encoder.safetensors", "config.json"}
    assert [path.name for path in saved.parent.iterdir()] == ["pretrain"]


def test_weights_laid_out_channels_last_are_saved_alike(tmp_path: Path) -> None:
    weight = torch.randn(4, 3, 2, 2)
    for name, tensor in (("a", weight), ("b", weight.to(memory_format=torch.channels_last))):
        save_parts(tmp_path / name, {"x": {"w": tensor}}, {})
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_failed_save_leaves_the_old_checkpoint(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(saved)
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.name.startswith("decoder"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(
        UserError, match=r"pretrain: cannot be written \(No space left on device\); free space"
    ):
        save_parts(saved, {"encoder": net(5).state_dict(), "decoder": net(5).state_dict()}, {})
    assert contents(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["pretrain"]


def corrupt(folder: Path, what: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    match what:
        case "absent":
            (folder / "config.json").unlink()
        case "newer":
            (folder / "config.json").write_text(json.dumps({**config, "schema": 2}))
        case "text":
            (folder / "config.json").write_text("{")
        case "list":
            (folder / "config.json").write_text("[]")
        case "missing":
            (folder / "encoder.safetensors").unlink()
        case "cut":
            data = (folder / "encoder.safetensors").read_bytes()
            (folder / "encoder.safetensors").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("absent", r"pretrain: no checkpoint; run `dvc repro pretrain`"),
        ("newer", r"config.json: schema 2 is newer than 1, the newest known here; update prelar"),
        ("text", r"config.json: unreadable \(.*\); run `dvc repro -f pretrain`"),
        ("list", r"config.json: not a checkpoint's description"),
        ("missing", r"part encoder is missing \(it lists: decoder, encoder\)"),
        ("cut", r"encoder.safetensors: unreadable \(.*\); run `dvc repro -f pretrain`"),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_line(saved: Path, what: str, message: str) -> None:
    corrupt(saved, what)
    with pytest.raises(UserError, match=message) as caught:
        load_parts(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"parts": [1]},
        {"parts": ["../decoder"]},
        {"parts": ["x" * 10_000]},
        {"parts": ["encoder", "encoder"]},
        {"parts": "encoder"},
        {"schema": True},
        {"schema": 0},
        {"stage": []},
        {"model": []},
        {"model": {"deter": 100_000}},
        {"model": {"deter": 64.0}},
        {"model": {"deter": "64"}},
        {"model": {"cnn_depth": 10**30}},
        {"model": {"method": ["prelar"]}},
        {"model": {"action_kind": "x"}},
        {"model": {"beta": [[]] * 10**5}},
        {"model": {"beta": None}},
        {"model": {"beta_a": None}},
        {"model": {"action_dim": None}},
        {"model": {"bonus": None}},
        {"model": {"layers": 10**6}},
        {"model": {"robot_action_dim": -1}},
        {"imported": 3},
    ],
)
def test_a_description_that_lies_is_refused_in_one_line(saved: Path, change: dict[str, Any]) -> None:
    held = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(held | change))
    with pytest.raises(UserError, match=r"config\.json: ") as caught:
        load_parts(saved)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_description_may_hold_what_params_yaml_may(saved: Path) -> None:
    held = json.loads((saved / "config.json").read_text())
    model = {"action_dim": 50, "beta": 0.0, "bonus": 0.0, "frame_gap": None}
    (saved / "config.json").write_text(json.dumps(held | {"model": model}))
    assert load_config(saved)["model"] == model


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b"\xff", b"9" * 5000, b" " * (2 << 20), b'{"schema": 1, "schema": 1}']
)
def test_a_description_that_is_none_is_refused_in_one_line(saved: Path, content: bytes) -> None:
    (saved / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json: unreadable") as caught:
        load_parts(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e39])
def test_weights_that_are_not_finite_are_refused(saved: Path, number: float) -> None:
    """Nor those that only float64 has as finite: models are of float32."""
    weights = net().state_dict() | {"0.bias": torch.tensor([1.0, number, 0.0], dtype=torch.float64)}
    save_parts(saved, {"encoder": weights}, {})
    with pytest.raises(UserError, match=r"encoder\.safetensors: .*0\.bias has numbers that are not finite"):
        load_parts(saved)


def test_an_absent_checkpoint_and_an_unknown_part_are_named(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="finetune: no checkpoint; run `dvc repro finetune`"):
        load_config(tmp_path / "data/finetune")
    with pytest.raises(UserError, match=r"mine: no checkpoint; name another$"):
        load_config(tmp_path / "mine")
    with pytest.raises(UserError, match="part heads is missing"):
        load_parts(saved, ["heads"])


def test_snapshots_lie_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a run in a copy of the project that goes away leaves them to the next."""
    copies = [tmp_path / "first copy", tmp_path / "second copy"]
    for copy in copies:
        copy.mkdir()
    monkeypatch.setenv("PRELAR_RESUME", str(tmp_path / "kept"))
    monkeypatch.chdir(copies[0])
    snapshots = Snapshots("pretrain-1")
    snapshots.save(1, state(1))
    snapshots.wait()
    monkeypatch.chdir(copies[1])
    found = Snapshots("pretrain-1").latest()
    assert found is not None and found[0] == 1
    assert not any(copies[0].iterdir())
    monkeypatch.delenv("PRELAR_RESUME")
    assert Snapshots("pretrain-1").folder == Path("data/.resume/pretrain-1")


def test_the_key_of_a_run_follows_its_fingerprint_and_inputs(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "x").write_text("d")

    def key(stage: str = "pretrain", fingerprint: str = "a", **known: Any) -> str:
        return resume_key(stage, fingerprint, known={"processes": 1, **known}, inputs=[data])

    first = key()
    assert first.startswith("pretrain-") and key() == first
    different = {first, key(processes=2), key("finetune"), key(fingerprint="b")}
    (data / "x").write_text("d!")
    different.add(key())
    (data / "x").write_text("d")
    (data / "y").write_text("")
    different.add(key())
    (data / "y").unlink()
    assert len(different) == 6
    assert key() == first


def state(step: int) -> dict[str, Any]:
    return {"w": torch.full((3,), float(step)), "nested": [1, (2.5, None, "text"), {"on": True}]}


def test_the_newest_snapshots_are_kept_and_read_back(tmp_path: Path) -> None:
    snapshots = Snapshots("k", root=tmp_path, keep=2)
    assert snapshots.latest() is None
    for step in (5, 10, 1_000_000_005):
        snapshots.save(step, state(step))
    snapshots.wait()
    assert len(list(snapshots.folder.iterdir())) == 2
    found = Snapshots("k", root=tmp_path).latest()
    assert found is not None and found[0] == 1_000_000_005
    assert found[1]["nested"] == state(0)["nested"] and torch.equal(found[1]["w"], state(1_000_000_005)["w"])
    assert Snapshots("other", root=tmp_path).latest() is None
    snapshots.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_takes_those_with_it_that_never_ended(tmp_path: Path) -> None:
    for name in ("pretrain-1", "pretrain-2", "finetune-1"):
        (tmp_path / name).mkdir()
    snapshots = Snapshots("pretrain-2", root=tmp_path)
    snapshots.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["finetune-1"]


def test_the_newest_snapshot_is_that_of_the_last_step_whatever_the_clock_said(tmp_path: Path) -> None:
    """The clock goes back a day before each write."""
    snapshots = Snapshots("k", root=tmp_path, keep=2)
    for days, step in enumerate((9, 10, 11)):
        snapshots.save(step, state(step))
        snapshots.wait()
        os.utime(snapshots.folder / f"step-{step:09d}.pt", (time.time() - days * 86_400,) * 2)
    assert {path.name for path in snapshots.folder.iterdir()} == {"step-000000010.pt", "step-000000011.pt"}
    found = snapshots.latest()
    assert found is not None and found[0] == 11


def test_a_snapshot_holds_the_state_of_its_moment(tmp_path: Path) -> None:
    weights = torch.zeros(1000)
    snapshots = Snapshots("k", root=tmp_path)
    snapshots.save(1, {"w": weights})
    weights += 1
    snapshots.wait()
    found = snapshots.latest()
    assert found is not None and found[1]["w"].sum() == 0


def test_an_unreadable_snapshot_is_passed_over_aloud(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshots = Snapshots("k", root=tmp_path)
    for step in (1, 2):
        snapshots.save(step, state(step))
    snapshots.wait()
    newest = snapshots.folder / "step-000000002.pt"
    newest.write_bytes(newest.read_bytes()[:300])
    (snapshots.folder / ".step-000000003.pt.0.partial").write_bytes(b"half")
    found = snapshots.latest()
    assert found is not None and found[0] == 1
    assert "step-000000002.pt: unreadable" in capsys.readouterr().err
    assert not list(snapshots.folder.glob(".*"))


def test_a_snapshot_runs_no_code_when_it_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "k").mkdir()
    torch.save({"x": Path("/")}, tmp_path / "k/step-000000001.pt")
    assert Snapshots("k", root=tmp_path).latest() is None
    assert "unreadable" in capsys.readouterr().err


def test_a_full_disk_is_told_and_leaves_earlier_snapshots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots = Snapshots("k", root=tmp_path)
    snapshots.save(1, state(1))
    snapshots.wait()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    snapshots.save(2, state(2))
    with pytest.raises(
        UserError, match=r"k: no snapshot could be written \(No space left on device\); free space"
    ):
        snapshots.wait()
    monkeypatch.undo()
    assert [path.name for path in snapshots.folder.iterdir()] == ["step-000000001.pt"]
