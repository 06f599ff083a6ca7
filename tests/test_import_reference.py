"""Published checkpoints: whole and by part, of foreign names and sizes, damaged and hostile."""

from __future__ import annotations

import io
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prelar import __main__ as entry
from prelar import finetune
from prelar.config import Config, load_config
from prelar.import_reference import convert, run
from prelar.methods import build_model
from prelar.model.spec import ModelSpec
from prelar.train.checkpoint import load_parts
from prelar.utils.errors import UserError, run_main
from tests.conftest import ROOT
from tests.model.golden import golden_model, read_golden, weights

OUTPUT = Path("data/pretrain")
PREFIXES = {
    "encoder": "encoder.",
    "decoder": "heads.decoder.",
    "rssm": "rssm.",
    "action_encoder": "va_encoder.",
}
NAMES = {"encoder": "encoder", "decoder": "decoder", "rssm": "dynamics", "action_encoder": "action"}
GOLDEN = {"cnn_depth": 8, "hidden": 64, "deter": 64, "stoch": 8, "discrete": 8}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A project folder as the working directory, and one thread."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(**sizes: Any) -> Config:
    """params.yaml, the sizes of the present scale replaced."""
    cfg = load_config()
    preset = cfg.pretrain.model_copy(update=sizes)
    scales = cfg.scales.model_copy(update={cfg.scale: cfg.preset.model_copy(update={"pretrain": preset})})
    return cfg.model_copy(update={"scales": scales, "device": "cpu", "threads": 1})


def other_sizes() -> Config:
    """Params of which no scale has the golden sizes."""
    return config(cnn_depth=4, hidden=16, deter=16, stoch=4, discrete=6)


def published(method: str, part: str | None = None) -> dict[str, Tensor]:
    """Golden weights as the published code saves them: whole with `wm.`, or one part without its name."""
    found = weights(read_golden(method))
    if part is None:
        return {f"wm.{name}": value for name, value in found.items()}
    prefix = PREFIXES[part]
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}


def saved(content: Any, name: str = "variables.pt") -> Path:
    torch.save(content, name)
    return Path(name)


def equal(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)


def golden_state(method: str) -> dict[str, dict[str, Tensor]]:
    """The state that the import should give, with the statistics as the golden file holds them."""
    return convert(weights(read_golden(method)))[0]


@pytest.mark.parametrize("method", ["prelar", "apv", "contextwm"])
def test_a_whole_checkpoint_is_taken_whole(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Into a project whose params have other sizes: they are read off the file."""
    run(other_sizes(), saved(published(method)), method=method, output=OUTPUT)
    parts, about = load_parts(OUTPUT)
    expected = golden_state(method)
    assert parts.keys() == expected.keys()
    assert all(equal(parts[name], expected[name]) for name in parts)
    golden = asdict(golden_model(method, read_golden(method)).spec)
    for size in (*GOLDEN, *(["action_dim", "action_kind", "action_window"] if method == "prelar" else [])):
        assert about["model"][size] == golden[size], size
    assert (about["stage"], about["step"]) == ("pretrain", 0)
    assert set(about["imported"]) == set(parts)
    told = capsys.readouterr().out
    assert "not found" not in told and "does not fit" not in told and "not used" not in told
    build_model(ModelSpec(**about["model"])).load_state(parts)


def test_finetuning_starts_from_it() -> None:
    run(other_sizes(), saved(published("prelar")), method="prelar", output=OUTPUT)
    model = finetune.load_model(other_sizes())
    expected = golden_state("prelar")
    for part in ("encoder", "decoder", "dynamics"):
        assert equal(model.state()[part], expected[part])


def test_a_model_is_put_together_from_its_parts(capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("rssm", "decoder", "encoder", "action_encoder"):
        file = saved(published("prelar", part), f"{part}_variables.pt")
        run(other_sizes(), file, method="prelar", part=part, output=OUTPUT)
    parts, about = load_parts(OUTPUT)
    expected = golden_state("prelar")
    assert all(equal(parts[name], expected[name]) for name in expected)
    assert about["imported"] == {NAMES[part]: f"{part}_variables.pt" for part in PREFIXES}
    assert {size: about["model"][size] for size in GOLDEN} == GOLDEN
    assert about["model"]["action_dim"] == 8
    told = capsys.readouterr().out
    assert "encoder: not found; initialised from seed 0" in told and "dynamics: kept as it was" in told


@pytest.mark.parametrize("part", PREFIXES)
def test_one_part_alone_leaves_the_rest_at_its_start(part: str) -> None:
    """In params whose scale has the sizes; the part may lie in a mapping, or in a file of the whole."""
    cfg = config(**GOLDEN).model_copy(update={"action_dim": 8})
    files = {
        "alone": saved({f"{part}_variables": published("prelar", part)}, "alone.pt"),
        "whole": saved(published("prelar"), "whole.pt"),
    }
    expected = golden_state("prelar")[NAMES[part]]
    for name, file in files.items():
        run(cfg, file, method="prelar", part=part, output=Path(name))
        parts, about = load_parts(Path(name))
        assert equal(parts[NAMES[part]], expected)
        assert list(about["imported"]) == [NAMES[part]]
        torch.manual_seed(cfg.seed)
        start = build_model(ModelSpec(**about["model"])).state()
        assert all(equal(parts[other], start[other]) for other in parts.keys() - {NAMES[part]})


def test_parts_of_another_method_or_size_are_not_kept(capsys: pytest.CaptureFixture[str]) -> None:
    run(other_sizes(), saved(published("apv")), method="apv", output=OUTPUT)
    file = saved(published("prelar", "rssm"), "rssm.pt")
    run(other_sizes(), file, method="prelar", part="rssm", output=OUTPUT)
    assert list(load_parts(OUTPUT)[1]["imported"]) == ["dynamics"]
    assert "kept" not in capsys.readouterr().out


def test_what_does_not_fit_is_named_and_keeps_its_start(capsys: pytest.CaptureFixture[str]) -> None:
    state = published("prelar")
    state["wm.rssm._cell._norm.bias"] = torch.zeros(7)
    del state["wm.heads.decoder.convout.bias"]
    state |= {"wm.intr_bonus.queue": torch.zeros(2), "wm.intr_bonus.size": torch.zeros(1)}
    state["wm.encoder._cnn_net.extra"] = torch.zeros(1)
    run(other_sizes(), saved(state), method="prelar", output=OUTPUT)
    told = capsys.readouterr().out
    assert "does not fit: cell.norm.bias is (7,), expected (192,)" in told
    assert "not found: out.bias" in told
    assert "not used: trunk.extra" in told
    assert "not used: wm.intr_bonus.queue, wm.intr_bonus.size" in told
    parts, _ = load_parts(OUTPUT)
    assert torch.equal(parts["dynamics"]["cell.norm.bias"], torch.zeros(192))
    assert torch.equal(
        parts["encoder"]["trunk.stem.weight"], golden_state("prelar")["encoder"]["trunk.stem.weight"]
    )


def test_of_a_finetuned_apv_the_action_free_dynamics_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    state = published("apv")
    both = {name.replace("wm.rssm.", "wm.af_rssm."): value for name, value in state.items()}
    both |= {name: torch.zeros(3) for name in state if name.startswith("wm.rssm.")}
    run(other_sizes(), saved(both), method="apv", output=OUTPUT)
    assert equal(load_parts(OUTPUT)[0]["dynamics"], golden_state("apv")["dynamics"])
    assert "not used: wm.rssm._" in capsys.readouterr().out


def test_a_method_without_an_action_part_leaves_it_out(capsys: pytest.CaptureFixture[str]) -> None:
    run(other_sizes(), saved(published("prelar")), method="apv", output=OUTPUT)
    told = capsys.readouterr().out
    assert "action: not used; the method has none" in told
    assert "does not fit: input.weight is (64, 72), expected (64, 114)" in told
    with pytest.raises(UserError, match="--part: apv has no such part"):
        run(other_sizes(), Path("variables.pt"), method="apv", part="action_encoder", output=OUTPUT)


def test_dreamerv2_gives_its_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    """Published names of plain vision, with the RSSM's of APV cut to a robot's action of 4."""
    model = build_model(ModelSpec(method="dreamerv2", **GOLDEN))
    state = {}
    for name, value in model.encoder.state_dict().items():
        state[f"encoder._cnn_nn.conv{name.removeprefix('convs.')}"] = value
    for name, value in model.decoder.state_dict().items():
        place = name.replace("stem.", "convin.0.").replace("convs.", "_cnn_nn.conv")
        state[f"heads.decoder.{place}"] = value
    rssm = {name: value for name, value in weights(read_golden("apv")).items() if name.startswith("rssm.")}
    rssm["rssm._img_in.0.weight"] = rssm["rssm._img_in.0.weight"][:, :68].clone()
    posterior = "rssm._obs_out.0.weight"
    rssm[posterior] = torch.zeros(64, 64 + model.embed_dim)
    run(other_sizes(), saved(state | rssm), method="dreamerv2", output=OUTPUT)
    parts, about = load_parts(OUTPUT)
    assert equal(parts["encoder"], model.encoder.state_dict())
    assert equal(parts["decoder"], model.decoder.state_dict())
    assert about["model"]["robot_action_dim"] == 4
    told = capsys.readouterr().out
    assert "does not fit" not in told and "loads of it: only the sizes" in told
    spec = ModelSpec.read(about["model"], stage="finetune", source="there")
    build_model(replace(spec, units=8, layers=1))


@pytest.mark.parametrize(
    ("rows", "asked", "kind"),
    [(16, "discrete", "gaussian"), (8, "gaussian", "deterministic"), (8, "discrete", "discrete")],
)
def test_the_action_encoder_tells_its_family(rows: int, asked: str, kind: str) -> None:
    state = published("prelar")
    for name in ("weight", "bias"):
        key = f"wm.va_encoder.action_in.2.{name}"
        state[key] = state[key][:rows].clone()
    cfg = other_sizes().model_copy(update={"action_kind": asked})
    run(cfg, saved(state), method="prelar", output=OUTPUT)
    _, about = load_parts(OUTPUT)
    assert (about["model"]["action_kind"], about["model"]["action_dim"]) == (kind, 8)


def test_a_longer_window_is_read_off_the_channels() -> None:
    state = published("prelar")
    key = "wm.va_encoder.va_encoder._cnn_net.convin.0.weight"
    key = key if key in state else key.replace("convin.0.", "convin.")
    state[key] = torch.cat([state[key], state[key][:, :3]], 1)
    run(other_sizes(), saved(state), method="prelar", output=OUTPUT)
    assert load_parts(OUTPUT)[1]["model"]["action_window"] == 3


def test_latents_whose_shape_cannot_be_told() -> None:
    """stoch · discrete = 64 is 8 · 8 unless a scale says 4 · 16; 60 needs a scale that says how."""
    file = saved(published("prelar", "rssm"))
    sizes = GOLDEN | {"stoch": 4, "discrete": 16}
    run(config(**sizes), file, method="prelar", part="rssm", output=Path("scale"))
    assert load_parts(Path("scale"))[1]["model"]["stoch"] == 4
    state = published("prelar", "rssm")
    for name in ("weight", "bias"):
        key = f"_ensemble_out_layers.0.img_out_head_0.{name}"
        state[key] = state[key][:60].clone()
    with pytest.raises(UserError, match=r"stoch · discrete = 60 in it, which no scale"):
        run(other_sizes(), saved(state), method="prelar", part="rssm", output=OUTPUT)
    assert not OUTPUT.exists()


class Hostile:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, ("owned",)


def stretched() -> Tensor:
    """A tensor of one number that says it has a thousand million."""
    return torch.zeros(1).expand(1_000_000_000)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"wm.encoder.x": Hostile()}, "not a file of tensors alone"),
        ({"wm.encoder.x": stretched()}, "claims more numbers than the file holds"),
        ({"wm.encoder.x": torch.tensor([1.0, float("nan")])}, "not finite"),
        ({"step": 3, "names": ["a"]}, "holds no state dict"),
        ([torch.zeros(2)], "holds no state dict"),
        ({"model": {"layer1.weight": torch.zeros(2)}}, "no weight in it fits prelar"),
    ],
)
def test_foreign_files_are_refused_in_one_line(content: Any, told: str) -> None:
    file = saved(content)
    with pytest.raises(UserError, match=told) as failure:
        run(config(), file, method="prelar", output=OUTPUT)
    assert "\n" not in str(failure.value) and str(failure.value).startswith("variables.pt: ")
    assert not OUTPUT.exists() and not Path("owned").exists()


def doubled() -> Any:
    """Mappings that each hold the one before twice: 2^60 ways to one state dict."""
    held: dict[str, Any] = {"w": torch.zeros(2)}
    for _ in range(60):
        held = {"a": held, "b": held}
    return held


def endless() -> Any:
    held: dict[str, Any] = {"w": torch.zeros(2)}
    held["self"] = held
    return held


def nested() -> Any:
    held: dict[str, Any] = {"w": torch.zeros(2)}
    for _ in range(400):
        held = {"a": held}
    return held


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (doubled(), "no weight in it fits"),
        (endless(), "no weight in it fits"),
        (nested(), "no weight in it fits"),
        ({"w": torch.zeros(2, device="meta")}, "holds no state dict"),
        ({f"x{number}": torch.zeros(1) for number in range(10_001)}, "10001 tensors in a state dict"),
        ({"w": torch.zeros(2, dtype=torch.complex64)}, "holds no state dict"),
        ({"rssm._img_in.0.weight": torch.zeros(10**9, 0)}, "no weight in it fits"),
        ({"rssm._cell._layer.weight": torch.zeros(3 * 10**5, 4)}, "deter = 100000: should be less than"),
        (
            {
                "rssm._cell._layer.weight": torch.zeros(60_000, 1),
                "rssm._img_in.0.weight": torch.zeros(20_000, 1),
                "rssm._obs_out.0.weight": torch.zeros(1, 20_000 + 64 * 512),
            },
            "whose shapes say a model of",
        ),
    ],
)
def test_files_that_claim_more_than_they_hold_end_in_one_line(content: Any, told: str) -> None:
    file = saved(content)
    with pytest.raises(UserError, match=told) as failure:
        run(config(), file, method="prelar", output=OUTPUT)
    assert "\n" not in str(failure.value) and not OUTPUT.exists()


def test_an_unpacked_record_may_not_be_larger_than_the_file() -> None:
    with (
        zipfile.ZipFile(saved({"w": torch.zeros(1 << 20)})) as good,
        zipfile.ZipFile("packed.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for one in good.infolist():
            packed.writestr(one.filename, good.read(one))
    assert Path("packed.pt").stat().st_size < 1 << 16
    with pytest.raises(UserError, match=r"packed\.pt: not a file of tensors alone, or damaged"):
        run(config(), Path("packed.pt"), method="prelar", output=OUTPUT)
    Path("folder.pt").mkdir()
    with pytest.raises(UserError, match=r"folder\.pt: not a file of tensors alone"):
        run(config(), Path("folder.pt"), method="prelar", output=OUTPUT)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_truncated_file_is_refused(keep: float, legacy: bool) -> None:
    buffer = io.BytesIO()
    torch.save(published("apv"), buffer, _use_new_zipfile_serialization=not legacy)
    whole = buffer.getvalue()
    Path("cut.pt").write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(UserError, match=r"cut\.pt: not a file of tensors alone, or damaged"):
        run(config(), Path("cut.pt"), method="apv", output=OUTPUT)


def test_a_refused_file_leaves_the_checkpoint_that_was_there() -> None:
    run(config(), saved(published("apv")), method="apv", output=OUTPUT)
    before = {path.name: path.read_bytes() for path in OUTPUT.iterdir()}
    Path("bad.pt").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError):
        run(config(), Path("bad.pt"), method="apv", output=OUTPUT)
    assert {path.name: path.read_bytes() for path in OUTPUT.iterdir()} == before


def test_what_is_no_checkpoint_is_not_replaced() -> None:
    good = saved(published("apv"))
    run(config(), good, method="apv", output=Path("mine/apv"))
    Path("notes.txt").write_text("mine")
    Path("empty").mkdir()
    for output in ("mine", "notes.txt", "."):
        with pytest.raises(UserError, match="holds something that is no checkpoint; name another folder"):
            run(config(), good, method="apv", output=Path(output))
    Path("mine/apv/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something that is no checkpoint"):
        run(config(), good, method="apv", output=Path("mine/apv"))
    assert Path("notes.txt").read_text() == Path("mine/apv/notes.txt").read_text() == "mine"
    run(config(), good, method="apv", output=Path("empty"))
    assert load_parts(Path("empty"))[1]["model"]["method"] == "apv"


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["prelar", "import-reference", *words])
    try:
        run_main(entry.main)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_command_imports_and_refuses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(published("contextwm"), "good.pt")
    assert command(monkeypatch, "good.pt", "--method", "contextwm") == 0
    assert load_parts(OUTPUT)[1]["model"]["method"] == "contextwm"
    assert "encoder: 144 of 144 tensors" in capsys.readouterr().out
    saved({"x": Hostile()}, "evil.pt")
    assert command(monkeypatch, "evil.pt", "--method", "prelar", "--output", "elsewhere") == 2
    told = capsys.readouterr().err
    assert told.startswith("error: evil.pt: ") and told.count("\n") == 1
    assert command(monkeypatch, "none.pt", "--method", "prelar") == 2
    assert "none.pt: no such file" in capsys.readouterr().err
    assert command(monkeypatch, "good.pt", "--method", "dreamerv3") == 2
    assert not Path("owned").exists() and not Path("elsewhere").exists()
