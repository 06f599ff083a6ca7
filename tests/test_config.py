"""params.yaml, Config and dvc.yaml name the same keys, and bad values end in one line."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML

from prelar import config
from prelar.config import YAML_BYTES, YAML_NODES, Config, Finetune, keys, load_config, parse_yaml, read_yaml
from prelar.model import actions
from prelar.utils.errors import UserError, run_main

ROOT = Path(__file__).parents[1]
ENTRY_POINTS = [
    "prelar.__main__ check",
    "prelar.__main__ pretrain",
    "prelar.__main__ report",
    "flows.ssv2",
    "flows.demos",
    "flows.serve",
]
LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
MERGED = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12)
)


@pytest.fixture
def params() -> str:
    return (ROOT / "params.yaml").read_text(encoding="utf-8")


def flat(tree: dict[str, object], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key, value in tree.items():
        found += flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [prefix + key]
    return found


def field_of(key: str) -> FieldInfo:
    model: Any = Config
    *groups, name = key.split(".")
    for group in groups:
        model = model.model_fields[group].annotation
    return model.model_fields[name]


def refuse(tmp_path: Path, text: str) -> str:
    path = tmp_path / "params.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as failure:
        load_config(path)
    assert "\n" not in str(failure.value)
    return str(failure.value)


def test_the_keys_of_params_yaml_are_the_fields_of_config() -> None:
    assert sorted(flat(read_yaml(ROOT / "params.yaml"))) == sorted(keys())


def described(node: Any, prefix: str = "") -> dict[str, str]:
    """Dotted key → the comment behind it, of a YAML mapping that keeps its comments."""
    found = {prefix + key: marks[2].value.splitlines()[0].strip("# ") for key, marks in node.ca.items.items()}
    for key, value in node.items():
        if isinstance(value, dict) and key != "scales":
            found |= described(value, f"{prefix}{key}.")
    return found


def test_every_key_is_described_in_params_yaml_as_in_config() -> None:
    fields = {key: field_of(key).description for key in keys()}
    assert all(fields.values())
    params = YAML().load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    assert described(params) == {key: text for key, text in fields.items() if not key.startswith("scales")}


@pytest.mark.parametrize("scale", ["smoke", "small", "lite", "paper"])
def test_every_field_is_a_param_of_some_stage(scale: str) -> None:
    stages = [stage.get("do", stage) for stage in read_yaml(ROOT / "dvc.yaml")["stages"].values()]
    named = [name.replace("${scale}", scale) for stage in stages for name in stage.get("params", [])]
    tracked = [name.removesuffix(".${key}") for name in named if name != "${item.kind}"]
    shown = [key for key in keys() if not key.startswith("scales.") or key.startswith(f"scales.{scale}.")]
    untracked = [
        key for key in shown if not any(key == name or key.startswith(f"{name}.") for name in tracked)
    ]
    assert untracked == []
    assert [
        name for name in tracked if not any(key == name or key.startswith(f"{name}.") for key in keys())
    ] == []


BORROWED = {
    "evaluate": ["scales.${scale}.finetune.action_repeat"],
    "simulator": ["scales.${scale}.evaluate.length", "scales.${scale}.evaluate.time_limit"],
}


def test_a_preset_belongs_to_one_stage_and_one_scale() -> None:
    for name, stage in read_yaml(ROOT / "dvc.yaml")["stages"].items():
        presets = [param for param in stage.get("params", []) if param.startswith("scales")]
        others = [param for param in presets if not param.startswith(f"scales.${{scale}}.{name}")]
        assert others == BORROWED.get(name, [])
        assert len(presets) - len(others) == (name in ("pretrain", "finetune", "evaluate"))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("beta_a: null", "beta_aa: 1.0", ["beta_aa", "unknown", "did you mean beta_a?"]),
        ("\ndemos:", "\nrlbench:", ["rlbench", "unknown", "it is called demos now"]),
        (
            "freeze_updates: 0,",
            "hold: 10,",
            ["scales.smoke.finetune.hold", "it is called scales.smoke.finetune.freeze_updates now"],
        ),
        ("beta_a: null", "beta_a: -1", ["beta_a = -1", "greater than or equal to 0"]),
        ("beta_a: null", "beta_a: high", ["beta_a = 'high'", "number"]),
        ("beta_a: null", "beta_a: .nan", ["beta_a", "finite"]),
        ("method: prelar", "method: prlar", ["method = 'prlar'", "'contextwm' or 'prelar'"]),
        ("source: metaworld", "source: lerobt", ["demos.source: no source 'lerobt'", "did you mean lerobot"]),
        ("seed: 0", "seed: 1.5", ["seed = 1.5", "integer"]),
        ("frame_gap: 0.05", "frame_gap: 0", ["frame_gap = 0", "greater than 0"]),
        ("  fps: null", "  fps: -20", ["demos.fps = -20", "greater than 0"]),
        ("prefill: 1600", "prefill: 5", ["scales.smoke.finetune", "prefill is 5", "time_limit * envs (100)"]),
        (
            "replay: 10000",
            "replay: 103",
            ["smoke.finetune", "replay is 103", "make it at least 104"],
        ),
        (
            "env_steps: 9600",
            "env_steps: 1600",
            ["scales.smoke.finetune", "env_steps is 1600", "larger than prefill (1600)"],
        ),
        (
            "source: data/sample ",
            "source: ../ssv2 ",
            ["ssv2.source: ../ssv2 leads outside", "give an absolute path"],
        ),
        ("labels: null", "labels: data/../../labels.zip", ["ssv2.labels: data/../../", "absolute path"]),
        ("ffmpeg: null", "ffmpeg: ../bin/ffmpeg", ["ssv2.ffmpeg: ../bin/ffmpeg", "absolute path"]),
        ("path: null ", "path: .. ", ["demos.path: .. leads outside", "absolute path"]),
        (
            "{episodes: 10, random_episodes: 50, time_limit: null",
            "{episodes: 0, random_episodes: 50, time_limit: null",
            ["scales.lite.evaluate.episodes = 0"],
        ),
        ("data_root: data ", "data_root: stores ", ["data_root: stores: give data, an absolute folder or"]),
        (
            "data_root: data ",
            "data_root: s3://key:hush@shelf ",
            ["data_root: give the URL alone", "environment"],
        ),
        ("data_root: data ", "data_root: http://shelf/x ", ["data_root: http:// is no kind of storage"]),
        ("data_root: data ", "data_root: s3://a/b::http://h ", ["data_root: a chain of URLs"]),
        ("dataset: ssv2", "dataset: mix", ["dataset = 'mix': no such store", "did you mean"]),
        ("sources: {}", "sources: {a: {kind: demo}}", ["sources.a.kind = 'demo'", "'ssv2' or 'demos'"]),
        ("sources: {}", "sources: {a: {kind: demos, bach: 3}}", ["sources: a: bach: unknown key"]),
        ("sources: {}", "sources: {a: {kind: ssv2, bach: 3}}", ["sources: a: bach", "did you mean batch?"]),
        ("sources: {}", "sources: {a: {kind: demos, source: hdf5}}", ["sources: a: path is null"]),
        ("sources: {}", "sources: {pretrain: {kind: demos}}", ["pretrain names something else"]),
        ("sources: {}", "sources: {a-b: {kind: demos}}", ["a-b", "pattern"]),
        ("mixtures: {}", "mixtures: {a: {ssv2: 0, demos: 1}}", ["mixtures: a: ", "a weight above 0"]),
        ("mixtures: {}", "mixtures: {a: {}}", ["mixtures: a: ", "at least one source"]),
        ("mixtures: {}", "mixtures: {a: {demo: 1}}", ["mixtures.a = 'demo'", "did you mean demos"]),
        ("unions: {}", "unions: {a: [x.zarr]}", ["unions: a: x.zarr: give an absolute folder"]),
        ("unions: {}", "unions: {a: []}", ["unions.a", "at least 1 item"]),
        ("method: prelar", "method: [prelar", ["not YAML"]),
        ("steps: 320", f"steps: {'9' * 30}", ["scales.smoke.pretrain.steps = 99", "less than or equal to"]),
        ("clips: 200", "clips: 220848", ["sample.clips = 220848", "less than or equal to 220847"]),
        ("seed: 0", f"seed: {2**63}", ["seed = 9223372036854775808", "less than or equal to"]),
        ("beta: null", f"beta: 1{'0' * 400}", ["beta = 1000"]),
        ("deter: 128", "deter: 100000", ["scales.smoke.pretrain.deter = 100000", "65536"]),
        ("threads: 1", "threads: 0x" + "f" * 9000, ["threads = a huge int"]),
        ("task: reach", f"task: [{'x, ' * 2000}x]", ["task = ['x', 'x', 'x'", "...", "string"]),
        ("task: reach", "task: reach\nno.such: 1", ["no.such: unknown key; remove it"]),
        ("task: reach", f"task: reach\n{'x' * 500}: 1", ["xxx…: unknown key"]),
        ("task: reach", 'task: reach\n"a\\nb": 1', ["a\\nb: unknown key"]),
        ("task: reach", "task: reach\n1: 1", ["1 = 1: Keys should be strings"]),
        ("task: reach", "task: 2020-01-01", ["task = datetime.date(2020, 1, 1)"]),
    ],
)
def test_bad_values_are_named_with_a_remedy(
    tmp_path: Path, params: str, old: str, new: str, told: list[str]
) -> None:
    message = refuse(tmp_path, params.replace(old, new, 1))
    assert all(text in message for text in told), message
    assert len(message) < 1000


def test_a_key_by_its_former_name_is_not_missed_by_its_name_too(tmp_path: Path, params: str) -> None:
    message = refuse(tmp_path, params.replace("freeze_updates: ", "hold: "))
    assert message.count("it is called scales.") == 3 and "missing" not in message


def test_files_that_are_no_params_end_in_one_line(tmp_path: Path) -> None:
    for made, told in (
        (lambda path: path.mkdir(), "not a regular file"),
        (lambda path: path.write_bytes(b"method: \xff"), "utf-8"),
        (lambda path: path.write_text("[" * 20_000), "depth"),
        (lambda path: path.write_text("a: &a [*a]"), "nested too deeply"),
        (lambda path: path.write_text("[]"), "valid dictionary"),
    ):
        path = tmp_path / f"{told}.yaml"
        made(path)
        with pytest.raises(UserError, match=told) as failure:
            load_config(path)
        assert str(path) in str(failure.value) and "\n" not in str(failure.value)


@pytest.mark.parametrize(
    "source", ["data/..sample", "./data/../data/sample", "/data/../ssv2", "[http://h/..]"]
)
def test_places_that_stay_where_they_are_are_taken(tmp_path: Path, params: str, source: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(params.replace("source: data/sample ", f"source: {source} "), encoding="utf-8")
    assert str(load_config(path).ssv2.source).replace("'", "") == source


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"method: prelar": "method: dreamerv2", "naive: false": "naive: true"},
            "naive: true does not fit method dreamerv2, which is not pre-trained; set it to false",
        ),
        (
            {"devices: 1": "devices: 3"},
            "scales: smoke.pretrain.batch is 16, which 3 devices cannot share evenly; "
            "make it a multiple of devices",
        ),
        (
            {"action_dim: null": "action_dim: 60", "action_kind: gaussian": "action_kind: discrete"},
            "action_kind: discrete needs an action_dim that is a multiple of 8; it is 60",
        ),
        (
            {
                "dataset: ssv2": "dataset: demos",
                "source: metaworld": "source: apv_npz",
                "path: null": "path: episodes",
                "frame_gap: 0.05": "frame_gap: 0.25",
            },
            "demos: fps is null; frame_gap 0.25 needs the rate, which source apv_npz does not tell; "
            "set it, or frame_gap to null",
        ),
    ],
)
def test_values_that_do_not_fit_together_are_refused(
    tmp_path: Path, params: str, changes: dict[str, str], told: str
) -> None:
    assert config.CLASSES == actions.CLASSES
    for old, new in changes.items():
        params = params.replace(old, new, 1)
    assert refuse(tmp_path, params) == f"{tmp_path / 'params.yaml'}: {told}"


def test_environments_share_the_steps_between_updates() -> None:
    preset = load_config(ROOT / "params.yaml").finetune.model_dump()
    with pytest.raises(ValidationError, match=r"train_every is 5; make it a multiple of .* \(8\)"):
        Finetune(**(preset | {"envs": 2, "train_every": 5}))


@pytest.mark.parametrize("envs", [1, 3])
@pytest.mark.parametrize("repeat", [1, 2, 5, 12])
def test_actions_take_their_steps_and_the_last_of_an_episode_what_is_left(envs: int, repeat: int) -> None:
    preset = load_config(ROOT / "params.yaml").finetune.model_copy(update={"envs": envs, "time_limit": 11})
    starts, step = [], 0
    for _ in range(4):
        left = 11
        while left:
            starts.append(step)
            taken = min(repeat, left)
            step, left = step + taken * envs, left - taken
    assert [number for number in range(step) if preset.acts(number, repeat)] == starts
    assert preset.actions(repeat) == len(starts) / 4


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"train_every: 16": "train_every: 10"},
            "train_every is 10; make it a multiple of envs * action_repeat (4)",
        ),
        ({"train_every: 16": "train_every: 12"}, None),
        (
            {"eval_action: mean, time_limit: 100": "eval_action: mean, time_limit: 32"},
            "time_limit is 32, which leaves an episode 8 actions; make it at least 33, for length 10",
        ),
        ({"replay: 10000": "replay: 103"}, "replay is 103, too small for an episode; make it at least 104"),
        (
            {"{episodes: 10, random_episodes: 50, time_limit: 100": "{episodes: 10, time_limit: 72"},
            "evaluate.length is 20; make it at most 19, frames of an episode",
        ),
        (
            {"action_repeat: null": "action_repeat: 4"},
            "train_every is 5; make it a multiple of envs * action_repeat (20)",
        ),
    ],
)
def test_a_preset_has_to_fit_its_pace(
    tmp_path: Path, params: str, changes: dict[str, str], told: str | None
) -> None:
    for old, new in changes.items():
        assert old in params
        params = params.replace(old, new, 1)
    if told is None:
        (tmp_path / "params.yaml").write_text(params, encoding="utf-8")
        assert load_config(tmp_path / "params.yaml").finetune.action_repeat == 4
    else:
        assert told in refuse(tmp_path, params)


def test_a_missing_key_is_named(tmp_path: Path, params: str) -> None:
    assert "beta_c: missing" in refuse(tmp_path, re.sub(r"(?m)^beta_c:.*\n", "", params))


def test_small_numbers_written_by_dvc_are_numbers(tmp_path: Path, params: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(params.replace("beta_a: null", "beta_a: 1e-05"), encoding="utf-8")
    assert load_config(path).beta_a == 1e-5


def test_the_config_is_frozen() -> None:
    present = load_config(ROOT / "params.yaml")
    with pytest.raises(ValidationError):
        present.beta = 2.0  # type: ignore[misc]
    assert isinstance(present, Config)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("beta_a: null", "beta_a: -1", "beta_a = -1"),
        ("task: reach", "task: drawer-opn", "task = 'drawer-opn'"),
        ("tasks: null", "tasks: [drawer-opn]", "task = 'drawer-opn'"),
        ("cameras: null", "cameras: [korner]", "camera = 'korner'"),
    ],
)
@pytest.mark.parametrize("command", ENTRY_POINTS)
def test_entry_points_refuse_bad_params_at_once(
    tmp_path: Path,
    params: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    old: str,
    new: str,
    told: str,
) -> None:
    (tmp_path / "params.yaml").write_text(params.replace(old, new, 1), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    module, *words = command.split()
    monkeypatch.setattr(sys, "argv", [module, *words])
    with pytest.raises(SystemExit) as end:
        run_main(importlib.import_module(module).main)
    line = capsys.readouterr().err
    assert end.value.code == 2, line
    assert line.count("\n") == 1 and told in line, line
    assert not (tmp_path / ".prefect/server.log").exists(), "it started a server"


@pytest.mark.parametrize("command", ["prelar check", "flows.ssv2", "flows.demos", "flows.serve"])
def test_the_process_of_an_entry_point_ends_with_status_2(tmp_path: Path, params: str, command: str) -> None:
    (tmp_path / "params.yaml").write_text(params.replace("beta_a: null", "beta_a: -1", 1), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", *command.split()],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and "beta_a = -1" in done.stderr, done.stderr
    assert not (tmp_path / ".prefect/server.log").exists(), "it started a server"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (LAUGHS.encode(), f"more than {YAML_NODES} values"),
        (MERGED.encode(), f"more than {YAML_NODES} values"),
        (b"&a [*a]", "nested too deeply"),
        (b"&a {b: *a}", "nested too deeply"),
        (b"[" * 100_000, "depth"),
        (b"{" * 100_000, "depth"),
        (b"- " * 60_000, "depth"),
        (b"a: \xff", "utf-8"),
        (b"a: " + b"9" * 5000, "digits"),
        (b"a: 2020-99-99 99:99:99", "month"),
        (b"? {a: b}\n: c", "unhashable"),
        (b"a: 1\na: 2", "duplicate key"),
        (b"a: !!python/object/apply:os.system [ls]", "constructor"),
        (b"a: *b", "undefined alias"),
        (b"---\n---\n", "single document"),
        (b"a: \x07", "not allowed"),
        (b"#" * (YAML_BYTES + 1), f"more than {YAML_BYTES} bytes"),
    ],
)
def test_yaml_that_cannot_be_read_is_a_value_error(text: bytes, told: str) -> None:
    with pytest.raises(ValueError, match=told) as failure:
        parse_yaml(text)
    assert "\n" not in str(failure.value)


def test_good_yaml_is_read_with_its_aliases() -> None:
    text = b"\xef\xbb\xbfa: &a {x: 1e-05, y: [1, 2]}\nb: {<<: *a, x: 3}\nc: *a\n"
    one = {"x": 1e-5, "y": [1, 2]}
    assert parse_yaml(text) == {"a": one, "b": one | {"x": 3}, "c": one}
    assert parse_yaml("") is None
