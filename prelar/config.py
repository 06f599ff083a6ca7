"""params.yaml as one frozen, typed value.

Every number of the project comes from here. A key that is missing, unknown or mistyped, and a value out of
range, is refused before anything expensive starts. Presets of the scales that are not chosen are checked too.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from ruamel.yaml import YAML

from prelar.utils.errors import UserError, one_line, printable, shown
from prelar.utils.files import read_bytes
from prelar.utils.urls import check_url

PARAMS = Path("params.yaml")
RENAMED = {"rlbench": "demos"}
"""Keys of params.yaml by the names that they had before."""
YAML_BYTES, YAML_DEPTH, YAML_NODES = 1 << 17, 64, 100_000
CLASSES = 8  # of a group of a discrete latent action, as in prelar.model.actions
MOST = 10**9  # of what a run counts
WIDEST = 2**16  # of what lies in memory at once: a layer's units, a batch, a segment
PARALLEL = 1024  # of processes and threads

Count = Annotated[int, Field(ge=1, le=MOST)]
Natural = Annotated[int, Field(ge=0, le=MOST)]
Width = Annotated[int, Field(ge=1, le=WIDEST)]
Workers = Annotated[int, Field(ge=1, le=PARALLEL)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Rate = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
Text = Annotated[str, Field(min_length=1, max_length=4096)]


def _found_anywhere(value: Any) -> Any:
    """A path, or a URL, that means the same wherever DVC runs a stage: in the workspace or beside it."""
    if isinstance(value, str) and os.path.normpath(value).split("/")[0] == "..":
        raise ValueError(f"{value} leads outside the project, which experiments leave; give an absolute path")
    return value


def _root(value: str) -> str:
    """`data`, an absolute folder, or a URL without anything secret in it."""
    if "://" not in value and value != "data" and not Path(value).is_absolute():
        raise ValueError(f"{value}: give data, an absolute folder or a URL such as s3://bucket/prefix")
    if value != "data":
        check_url(value)
    return value


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Sample(_Frozen):
    """Size of the embedded stand-in archive."""

    clips: Annotated[int, Field(ge=8, le=MOST)]
    parts: Annotated[int, Field(ge=1, le=99)]
    seed: Seed


class Ssv2(_Frozen):
    """Where the Something-Something V2 archive comes from, and how it is ingested."""

    source: Text | list[Text]
    labels: Text | None
    clip_seconds: Annotated[float, Field(ge=0.5, le=30)]
    min_frames: Annotated[int, Field(ge=2, le=WIDEST)]
    max_bad: Share
    batch: Width
    workers: Workers
    runner: Literal["local", "dask"]
    dask: Text | None
    ffmpeg: Text | None

    _places = field_validator("source", "labels", "ffmpeg")(_found_anywhere)


class Demos(_Frozen):
    """Which demonstrations are made or read."""

    source: Literal["metaworld", "rlbench", "apv_npz", "rlbench_folder"]
    path: Text | None
    tasks: Annotated[list[Text], Field(min_length=1)] | None
    episodes: Count
    variations: Count | None
    image_size: Annotated[int, Field(ge=16, le=2048)]
    renderer: Literal["opengl", "opengl3"]
    action_mode: Literal["joint_velocity", "joint_position", "gripper_pose"]
    timeout: Annotated[float, Field(gt=0, le=1e6)]
    cameras: Annotated[list[Text], Field(min_length=1)] | None
    noise: Weight
    keep_failures: bool
    seed: Seed
    max_bad: Share
    workers: Workers

    _places = field_validator("path")(_found_anywhere)

    @model_validator(mode="after")
    def _has_folder(self) -> Demos:
        if self.source in ("apv_npz", "rlbench_folder") and self.path is None:
            raise ValueError(f"path is null; name the folder that source {self.source} reads")
        return self


class Pretrain(_Frozen):
    """One scale's pre-training: the length of the run, the batch and the sizes of the world model."""

    steps: Natural
    batch: Width
    length: Annotated[int, Field(ge=3, le=WIDEST)]
    lr: Rate
    cnn_depth: Annotated[int, Field(ge=2, le=WIDEST, multiple_of=2)]
    hidden: Width
    deter: Width
    stoch: Width
    discrete: Annotated[int, Field(ge=2, le=WIDEST)]
    log_every: Count
    video_every: Count
    checkpoint_every: Count


class Finetune(_Frozen):
    """One scale's fine-tuning: reinforcement learning from pixels in imagination."""

    env_steps: Count
    prefill: Count
    pretrain_updates: Natural
    train_every: Count
    batch: Width
    length: Annotated[int, Field(ge=6, le=WIDEST)]
    lr: Rate
    actor_lr: Rate
    critic_lr: Rate
    hold: Natural
    beta: Weight
    horizon: Annotated[int, Field(ge=2, le=WIDEST)]
    discount: Rate
    lam: Share
    entropy: Weight
    units: Width
    layers: Annotated[int, Field(ge=1, le=64)]
    slow_every: Count
    replay: Count
    envs: Workers
    eval_every: Count
    eval_episodes: Count
    time_limit: Annotated[int, Field(ge=1, le=500)]
    log_every: Count
    checkpoint_every: Count

    @model_validator(mode="after")
    def _fits(self) -> Finetune:
        if self.time_limit + 1 < self.length:
            raise ValueError(
                f"time_limit is {self.time_limit}; make it at least length - 1 ({self.length - 1})"
            )
        if self.prefill < self.time_limit * self.envs:
            raise ValueError(
                f"prefill is {self.prefill}, which ends before an episode does; "
                f"make it at least time_limit * envs ({self.time_limit * self.envs})"
            )
        if self.train_every % self.envs:
            raise ValueError(f"envs is {self.envs}; choose a divisor of train_every ({self.train_every})")
        if self.replay <= self.time_limit:
            raise ValueError(f"replay is {self.replay}; make it larger than time_limit ({self.time_limit})")
        if self.env_steps <= self.prefill:
            raise ValueError(
                f"env_steps is {self.env_steps}, so that nothing is learnt; "
                f"make it larger than prefill ({self.prefill})"
            )
        return self


class Evaluate(_Frozen):
    """One scale's evaluation: the policy, clips to predict, the latent action's probe, fits to episodes."""

    episodes: Count
    time_limit: Annotated[int, Field(ge=1, le=500)]
    clips: Count
    observed: Width
    length: Width
    probe_episodes: Annotated[int, Field(ge=6, le=MOST)]
    probe_updates: Natural
    offline_episodes: Annotated[int, Field(ge=4, le=MOST)]
    offline_updates: Count
    offline_batch: Width
    offline_seeds: Count

    @model_validator(mode="after")
    def _fits(self) -> Evaluate:
        if self.observed >= self.length:
            raise ValueError(f"observed is {self.observed}; make it less than length ({self.length})")
        return self


class Scale(_Frozen):
    """The presets of one scale, a group per stage."""

    pretrain: Pretrain
    finetune: Finetune
    evaluate: Evaluate


class Scales(_Frozen):
    """All presets."""

    smoke: Scale
    lite: Scale
    paper: Scale


class Config(_Frozen):
    """The whole of params.yaml."""

    method: Literal["dreamerv2", "apv", "contextwm", "prelar"]
    dataset: Literal["ssv2", "demos"]
    task: Text
    seed: Seed
    scale: Literal["smoke", "lite", "paper"]
    beta: Weight
    beta_a: Weight
    beta_c: Weight
    consistency: Literal["order", "sign"]
    action_dim: Width
    action_kind: Literal["gaussian", "deterministic", "discrete"]
    action_window: Annotated[int, Field(ge=2, le=WIDEST)]
    naive: bool
    bonus: Weight
    dual_reward: bool
    context_frame: Literal["random", "first", "last"]
    context_augment: Literal["none", "erase"]
    device: Literal["auto", "cpu", "cuda"]
    devices: Workers
    precision: Literal["fp32", "bf16"]
    compile: Literal["auto", "always", "never"]
    deterministic: bool
    threads: Workers
    data_root: Text
    sample: Sample
    ssv2: Ssv2
    demos: Demos
    scales: Scales

    _place = field_validator("data_root")(_root)

    @field_validator("action_kind")
    @classmethod
    def _divides(cls, kind: str, given: ValidationInfo) -> str:
        size = given.data.get("action_dim", 0)
        if kind == "discrete" and size % CLASSES:
            raise ValueError(f"discrete needs an action_dim that is a multiple of {CLASSES}; it is {size}")
        return kind

    @field_validator("naive")
    @classmethod
    def _can_be_naive(cls, naive: bool, given: ValidationInfo) -> bool:
        if naive and given.data.get("method") == "dreamerv2":
            raise ValueError("true does not fit method dreamerv2, which is not pre-trained; set it to false")
        return naive

    @property
    def preset(self) -> Scale:
        """The presets of the chosen scale."""
        scale: Scale = getattr(self.scales, self.scale)
        return scale

    @property
    def pretrain(self) -> Pretrain:
        """The chosen scale's pre-training."""
        return self.preset.pretrain

    @property
    def finetune(self) -> Finetune:
        """The chosen scale's fine-tuning."""
        return self.preset.finetune

    @property
    def evaluate(self) -> Evaluate:
        """The chosen scale's evaluation."""
        return self.preset.evaluate

    @property
    def store(self) -> Path:
        """The store of the chosen data set."""
        return Path(f"data/{self.dataset}.zarr")


SIZES: dict[str, Any] = {
    name: Annotated[field.annotation, field]
    for group in (Finetune, Pretrain, Config)
    for name, field in group.model_fields.items()
} | {"robot_action_dim": Width, "actions": Width, "features": Annotated[int, Field(ge=1, le=WIDEST**2)]}
"""What builds a model, by name: types and bounds as params.yaml has them, and of what it leaves out."""


def misfits(values: Mapping[str, Any]) -> str | None:
    """The first of the keywords that build a model whose value params.yaml could not hold, and why."""
    for name, value in values.items():
        try:
            TypeAdapter(SIZES.get(name, Any), config=_Frozen.model_config).validate_python(value)
        except ValidationError as error:
            return f"{printable(name, 100)} = {shown(value)}: {_should(error.errors(include_url=False)[0])}"
    return None


def read_yaml(path: Path) -> Any:
    """Read a YAML file as `parse_yaml` does. Raises `UserError` where it cannot be read."""
    try:
        return parse_yaml(read_bytes(path, YAML_BYTES))
    except ValueError as error:
        if not path.exists():
            raise UserError(f"{path}: no such file; run from the top of the project") from None
        raise UserError(f"{path}: not YAML ({error}); mend what that names") from None


def parse_yaml(content: bytes | str) -> Any:
    """The value of a YAML 1.2 text, in which `1e-05` is a number. Raises `ValueError` with a short reason.

    Refused are more than `YAML_BYTES` bytes, text that is not UTF-8, and values of more than `YAML_DEPTH`
    levels or `YAML_NODES` nodes, where an alias counts as what it stands for.
    """
    if len(content) > YAML_BYTES:
        raise ValueError(f"more than {YAML_BYTES} bytes")
    yaml = YAML(typ="safe", pure=True)
    yaml.max_depth = YAML_DEPTH
    try:
        top = yaml.compose(content.decode("utf-8-sig") if isinstance(content, bytes) else content)
        _check_extent(top)
        return None if top is None else yaml.constructor.construct_document(top)
    except Exception as error:  # ruamel raises many kinds, for dates, numbers and keys too
        raise ValueError(one_line(error)[:300]) from None


def _check_extent(top: Any) -> None:
    """Raise `ValueError` where a graph of YAML's nodes, with aliases followed, is too deep or too large."""
    level, left = [] if top is None else [top], YAML_NODES
    for _ in range(YAML_DEPTH + 1):
        found = (inner for node in level if not isinstance(node.value, str) for inner in node.value)
        flat = (node for inner in found for node in (inner if isinstance(inner, tuple) else (inner,)))
        level = list(itertools.islice(flat, left + 1))
        left -= len(level)
        if left < 0:
            raise ValueError(f"more than {YAML_NODES} values, with aliases followed")
    if level:
        raise ValueError("nested too deeply")


def load_config(path: Path = PARAMS) -> Config:
    """Read and check params.yaml. Raises `UserError` with the key, the value and the remedy in one line."""
    return parse_config(read_yaml(path), path)


def parse_config(values: Any, origin: Path = PARAMS) -> Config:
    """Check the values of a params.yaml. Raises `UserError` as `load_config` does."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{origin}: {_explain(error)}") from None


def _explain(error: ValidationError) -> str:
    """The first failures of a validation, each as `key = value: what to do`."""
    problems: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        names = [str(part) for part in detail["loc"] if part not in ("str", "constrained-str", "none")]
        key = printable(
            ".".join(name for name in names if not name.startswith(("list[", "constrained"))), 100
        )
        if detail["type"] == "extra_forbidden":
            problems[key] = f"{key}: unknown key; {_suggest(key)}"
        elif detail["type"] == "missing":
            problems[key] = f"{key}: missing; add it"
        elif detail["type"] == "value_error":
            problems[key] = f"{key}: {printable(str(detail['msg']).removeprefix('Value error, '), 300)}"
        else:
            problems.setdefault(key, f"{key} = {shown(detail['input'])}: {_should(detail)}")
    return "; ".join(list(problems.values())[:3])


def _should(detail: Any) -> str:
    """What a failure of a validation says that the value should be."""
    return str(detail["msg"]).replace("Input should", "should")


def _suggest(key: str) -> str:
    """A known key of the same group that looks like `key`, as advice."""
    import difflib

    if key in RENAMED:
        return f"it is called {RENAMED[key]} now, rename it"
    *groups, name = key.split(".")
    model: Any = Config
    for group in groups:
        if group not in model.model_fields:
            return "remove it"
        model = model.model_fields[group].annotation
    close = difflib.get_close_matches(name, list(model.model_fields), n=1, cutoff=0.5)
    return f"did you mean {'.'.join([*groups, close[0]])}?" if close else "remove it"


def keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every dotted key of params.yaml, in the order of the fields."""
    found = []
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found += keys(annotation, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found
