"""params.yaml as one frozen, typed value.

What an experiment may change stands there; each key's description feeds docs/params.md and the forms of the
Prefect UI. A key that is missing, unknown or mistyped, and a value out of range, is refused before anything
expensive starts. Presets of the scales that are not chosen are checked too.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

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

from prelar.utils.errors import UserError, nearest, one_line, printable, shown
from prelar.utils.files import read_bytes
from prelar.utils.urls import check_url

PARAMS = Path("params.yaml")
RENAMED = {"rlbench": "demos"} | {
    f"scales.{scale}.finetune.hold": f"scales.{scale}.finetune.freeze_updates"
    for scale in ("smoke", "small", "lite", "paper")
}
"""Keys of params.yaml by the names that they had before."""
YAML_BYTES, YAML_DEPTH, YAML_NODES = 1 << 17, 64, 100_000
RECORDED = ("apv_npz", "rlbench_folder", "lerobot", "hdf5")
SOURCES = ("metaworld", "rlbench", *RECORDED)
"""Of demonstrations, as in prelar.demos.sources; others are entry points of the group `OWN_SOURCES`."""
OWN_SOURCES = "prelar.sources"
STORE_NAME = "[a-z][a-z0-9_]{0,63}"
OWN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # module:Class
EPISODE = 500  # steps of Meta-World's episodes
CLASSES = 8  # of a group of a discrete latent action, as in prelar.model.actions
MOST = 10**9  # of what a run counts
SSV2_CLIPS = 220_847  # of Something-Something V2
WIDEST = 2**16  # of what lies in memory at once: a layer's units, a batch, a segment
PARALLEL = 1024  # of processes and threads
KINDS = ("ssv2", "demos")
"""Stores that params.yaml has a group of their own for, which is also what further sources are kinds of."""
TAKEN = (*KINDS, "finetune", "members", "pretrain", "rlbench", "sample")
"""Names in data/ that no further store may have."""
LEAST_SHARE = 1e-5

Count = Annotated[int, Field(ge=1, le=MOST)]
Natural = Annotated[int, Field(ge=0, le=MOST)]
Width = Annotated[int, Field(ge=1, le=WIDEST)]
Workers = Annotated[int, Field(ge=1, le=PARALLEL)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Rate = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
Text = Annotated[str, Field(min_length=1, max_length=4096)]
Name = Annotated[str, Field(pattern=f"^{STORE_NAME}$")]
Distract = Literal["none", "camera", "colour", "background"]


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


def _has_background(store: str | None, given: ValidationInfo) -> str | None:
    """A store, or None where no background is taken from it."""
    if store is None and given.data.get("distract") == "background":
        raise ValueError(
            "null with distract background; name the store whose clips are the background, data/ssv2.zarr"
        )
    return store


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Sample(_Frozen):
    """Size and scenes of the rendered sample archive."""

    clips: int = Field(ge=8, le=SSV2_CLIPS, description="clips in the archive")
    longest: int = Field(ge=25, le=500, description="frames in the longest clip; the shortest has 8")
    tasks: Annotated[list[Text], Field(min_length=1)] | None = Field(
        description="Meta-World tasks shown, [reach, …]; null: all twenty-one"
    )
    cameras: Annotated[list[Text], Field(min_length=1)] | None = Field(
        description="Meta-World cameras used, [corner, …]; null: all five"
    )
    width: int | None = Field(
        ge=64,
        le=427,
        multiple_of=2,
        description="width of the clips in pixels; null: several widths, as in SSv2",
    )
    pace: Annotated[int, Field(ge=1, le=MOST)] | None = Field(
        description="simulator steps between frames; null: each expert clip spans a whole episode"
    )
    free: Share = Field(
        description="share of clips in which the arm moves at random; the others show experts"
    )
    parts: int = Field(ge=1, le=99, description="number of parts of the archive")
    seed: Seed = Field(description="seed of the scenes and labels")

    @model_validator(mode="after")
    def _fits(self) -> Sample:
        if self.pace is not None and self.pace * (self.longest - 1) > EPISODE:
            raise ValueError(
                f"pace is {self.pace}, at which {self.longest} frames outlast an episode of {EPISODE} steps; "
                "lower pace or longest"
            )
        return self


class Ssv2(_Frozen):
    """Where the Something-Something V2 archive comes from, and how it is ingested."""

    source: Text | list[Text] = Field(
        description="folder of the archive's parts, a list of their URLs, or a folder of your own videos; "
        "data/sample: the sample"
    )
    labels: Text | None = Field(
        description="zip or folder with the labels; null: those beside the parts; your own videos need none"
    )
    clip_seconds: float = Field(
        ge=0.5, le=30, description="seconds per clip, into which your own videos are cut"
    )
    min_frames: int = Field(
        ge=2, le=WIDEST, description="fewest frames of a clip; shorter clips are listed in the index as bad"
    )
    max_bad: Share = Field(description="share of bad clips above which validation fails")
    batch: Width = Field(description="clips per batch; a crash repeats up to one batch per worker")
    workers: Workers = Field(description="batches ingested at once")
    runner: Literal["local", "dask"] = Field(description="local (threads, with ffmpeg in processes) | dask")
    dask: Text | None = Field(
        description="runner dask: address of a scheduler, tcp://…; null: `workers` processes on this machine"
    )
    ffmpeg: Text | None = Field(description="path of an ffmpeg binary; null: imageio-ffmpeg's static one")

    _places = field_validator("source", "labels", "ffmpeg")(_found_anywhere)


class Demos(_Frozen):
    """Which demonstrations are made or read."""

    source: Text = Field(
        description="metaworld (scripted experts) | rlbench (live) | recorded: apv_npz | rlbench_folder | "
        "lerobot | hdf5 | your own, module:Class"
    )
    path: Text | None = Field(
        description="folder of recorded episodes, to which only tasks, cameras, action_mode, fps, max_bad "
        "and workers apply"
    )
    tasks: Annotated[list[Text], Field(min_length=1)] | None = Field(
        description="names, [push_button, …], or [all]; null: three of metaworld, all of any other source"
    )
    episodes: Count = Field(description="demonstrations per task and camera; rlbench: per variation too")
    variations: Count | None = Field(description="rlbench: variations per task; null: all")
    image_size: int = Field(
        ge=16,
        le=2048,
        description="rlbench: side of the rendered images in pixels; they are averaged down to 64",
    )
    renderer: Literal["opengl", "opengl3"] = Field(
        description="rlbench: opengl | opengl3 (shadows; several times slower)"
    )
    action_mode: Literal["joint_velocity", "joint_position", "gripper_pose"] = Field(
        description="rlbench, rlbench_folder: type of action, joint_velocity | joint_position | gripper_pose"
    )
    timeout: float = Field(
        gt=0, le=1e6, description="rlbench: seconds without an answer after which a simulator is killed"
    )
    cameras: Annotated[list[Text], Field(min_length=1)] | None = Field(
        description="names, [front, wrist], or [all]; null: corner of metaworld, all of any other source"
    )
    noise: Weight = Field(
        description="standard deviation of the noise on the expert's actions, which lie in [-1, 1]"
    )
    keep_failures: bool = Field(description="metaworld: true keeps episodes in which the expert fails")
    seed: Seed = Field(description="seed of the scenes and the noise")
    distract: Distract = Field(
        default="none",
        description="metaworld, distraction in the images: none | camera | colour | background",
    )
    distract_strength: Share = Field(
        default=0.5, description="strength of the distraction, from 0 (none) to 1 (strongest)"
    )
    distract_store: Text | None = Field(
        default=None,
        validate_default=True,
        description="distract background: store whose clips become the background, a folder ….zarr",
    )
    fps: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        description="frames per second, for frame_gap; null: the source's own rate; apv_npz has none"
    )
    max_bad: Share = Field(description="share of bad episodes above which validation fails")
    workers: Workers = Field(description="processes that collect or read episodes; rlbench: simulators")

    _places = field_validator("path", "distract_store")(_found_anywhere)
    _backed = field_validator("distract_store")(_has_background)

    @property
    def view(self) -> View:
        """How the pictures of source metaworld look."""
        return View("fast", self.distract, self.distract_strength, self.distract_store)

    @field_validator("source")
    @classmethod
    def _known(cls, source: str) -> str:
        if source in SOURCES or OWN.fullmatch(source):
            return source
        points = importlib.metadata.entry_points(group=OWN_SOURCES)
        if source not in points.names:
            close = nearest(source, (*SOURCES, *points.names)) or SOURCES
            raise ValueError(
                f"no source {shown(source)}; did you mean {', '.join(close)}? "
                "`python -m prelar sources` lists them; one of your own is named module:Class"
            )
        return source

    @model_validator(mode="after")
    def _has_folder(self) -> Demos:
        if self.source in RECORDED and self.path is None:
            raise ValueError(f"path is null; name the folder that source {self.source} reads")
        return self


class Further(BaseModel):
    """A further source: the group of its kind, with the keys that are given here in place of the group's."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)

    kind: Literal["ssv2", "demos"]


class Pretrain(_Frozen):
    """One scale's pre-training: the length of the run, the batch and the sizes of the world model."""

    steps: Natural = Field(description="updates of the world model")
    batch: Width = Field(description="segments per batch")
    length: int = Field(ge=3, le=WIDEST, description="frames per segment")
    lr: Rate = Field(description="Adam's learning rate")
    cnn_depth: int = Field(
        ge=2,
        le=WIDEST,
        multiple_of=2,
        description="channels of the encoder's first layer; deeper layers have multiples of it",
    )
    decoder_channels: int = Field(
        ge=0,
        le=WIDEST,
        description="fewest channels of the ResNet decoder's last feature maps; above 0, which a small "
        "cnn_depth needs, its first images are nearly grey; 0: as published",
    )
    decoded: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="share of a segment's frames that are decoded for the loss, drawn again at every "
        "update, in fine-tuning too; 1: all, as published",
    )
    hidden: Width = Field(description="units of the dense layers")
    deter: Width = Field(description="size of the deterministic state (GRU)")
    stoch: Width = Field(description="categorical variables of the stochastic state")
    discrete: int = Field(ge=2, le=WIDEST, description="classes per categorical variable")
    action_dim: Annotated[int, Field(ge=1, le=WIDEST, multiple_of=CLASSES)] = Field(
        description="size of the latent action"
    )
    beta: Weight = Field(description="weight of the dynamics KL in pre-training")
    beta_a: Weight = Field(description="weight of the action KL against N(0, I)")
    beta_c: Weight = Field(description="weight of the action-state consistency loss")
    log_every: Count = Field(description="updates between log lines")
    video_every: Count = Field(description="updates between videos of open-loop prediction")
    checkpoint_every: Count = Field(description="updates between snapshots for resuming")


class Finetune(_Frozen):
    """One scale's fine-tuning: reinforcement learning from pixels in imagination."""

    env_steps: Count = Field(description="environment steps in total, prefill included")
    prefill: Count = Field(description="environment steps of random actions before the first update")
    pretrain_updates: Natural = Field(description="updates right after the prefill")
    train_every: Count = Field(description="environment steps between updates")
    batch: Width = Field(description="segments per batch")
    length: int = Field(ge=6, le=WIDEST, description="frames per segment, with an action between each two")
    lr: Rate = Field(description="learning rate of the world model")
    actor_lr: Rate = Field(description="learning rate of the actor")
    critic_lr: Rate = Field(description="learning rate of the critic")
    freeze_updates: Natural = Field(
        description="number of first updates in which pre-trained parts are frozen"
    )
    actor_after: Natural = Field(
        description="number of first updates in which only the world model learns, not actor and critic"
    )
    beta: Weight = Field(description="weight of the dynamics KL in fine-tuning")
    bonus: Weight = Field(description="weight of the exploration bonus")
    horizon: int = Field(ge=2, le=WIDEST, description="actions imagined from each state")
    discount: Rate = Field(description="discount factor per action")
    lam: Share = Field(description="lambda of the lambda-returns; 0: one step, 1: the whole horizon")
    entropy: Weight = Field(description="weight of the policy's entropy")
    units: Width = Field(description="units per hidden layer of actor and critic")
    layers: int = Field(ge=1, le=64, description="hidden layers of actor and critic")
    slow_every: Count = Field(description="updates between copies of the critic to the target critic")
    replay: Count = Field(description="capacity of the replay buffer in environment steps")
    envs: Workers = Field(description="environments stepped at once; if several, each in its own process")
    eval_every: Count = Field(description="environment steps between evaluations")
    eval_episodes: Count = Field(description="episodes per evaluation")
    eval_action: Literal["mode", "mean", "sample"] = Field(
        description="action taken from the policy in evaluation: mode (as published) | mean | sample"
    )
    time_limit: Width | None = Field(
        description="environment steps after which an episode ends; null: the task's own, 500 or 1,000"
    )
    action_repeat: Width | None = Field(
        description="environment steps for which an action is applied; null: the task's own, 1 or 2"
    )
    log_every: Count = Field(description="environment steps between log lines")
    checkpoint_every: Count = Field(description="environment steps between snapshots for resuming")

    @model_validator(mode="after")
    def _fits(self) -> Finetune:
        if self.env_steps <= self.prefill:
            raise ValueError(
                f"env_steps is {self.env_steps}, so that nothing is learnt; "
                f"make it larger than prefill ({self.prefill})"
            )
        repeat = self.action_repeat or 1
        if self.train_every % (self.envs * repeat):
            raise ValueError(
                f"train_every is {self.train_every}; "
                f"make it a multiple of envs * action_repeat ({self.envs * repeat})"
            )
        if self.time_limit is None:
            return self
        actions = self.actions(repeat)
        if actions + 1 < self.length:
            raise ValueError(
                f"time_limit is {self.time_limit}, which leaves an episode {actions} actions; "
                f"make it at least {(self.length - 2) * repeat + 1}, for length {self.length}"
            )
        if self.prefill < self.time_limit * self.envs:
            raise ValueError(
                f"prefill is {self.prefill}, which ends before an episode does; "
                f"make it at least time_limit * envs ({self.time_limit * self.envs})"
            )
        if self.replay // repeat <= actions:
            raise ValueError(
                f"replay is {self.replay}, too small for an episode; "
                f"make it at least {(actions + 1) * repeat}"
            )
        return self

    @property
    def episode(self) -> int:
        """Environment steps of an episode, once they are known: `refilled` knows them."""
        assert self.time_limit is not None
        return self.time_limit

    def actions(self, action_repeat: int) -> int:
        """Actions of an episode; the last is applied for fewer steps where the time limit is no multiple."""
        return -(-self.episode // action_repeat)

    def acts(self, step: int, action_repeat: int) -> bool:
        """Whether the environments, which act together, choose their actions at `step`, counted over all."""
        return step % (self.episode * self.envs) % (action_repeat * self.envs) == 0


class Evaluate(_Frozen):
    """One scale's evaluation: the policy, clips to predict, the latent action's probe, fits to episodes."""

    episodes: Count = Field(description="episodes of the agent, and of the scripted expert")
    random_episodes: Count = Field(
        default=50, description="episodes of random actions; the first start like the agent's"
    )
    time_limit: Width | None = Field(
        description="environment steps after which an episode ends; null: the task's own, 500 or 1,000"
    )
    clips: Count = Field(description="segments to predict, from held-out clips and from the agent's episodes")
    observed: Width = Field(description="frames observed before open-loop prediction")
    length: Width = Field(description="frames per segment, the observed ones included")
    probe_episodes: int = Field(
        ge=6, le=MOST, description="episodes to fit and test the probe of the latent action"
    )
    probe_updates: Natural = Field(
        description="updates of the probe's ceiling, an encoder trained with labels"
    )
    offline_episodes: int = Field(
        ge=4, le=MOST, description="episodes for the offline fits of world models, a third of them held out"
    )
    offline_updates: Count = Field(description="updates per fit")
    offline_batch: Width = Field(description="segments per batch of a fit")
    offline_seeds: Count = Field(
        description="fits from each start (pre-trained, from scratch), each with its own seed"
    )

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

    @model_validator(mode="after")
    def _fits(self) -> Scale:
        limit = self.evaluate.time_limit
        frames = WIDEST if limit is None else -(-limit // (self.finetune.action_repeat or 1)) + 1
        if frames < self.evaluate.length:
            raise ValueError(
                f"evaluate.length is {self.evaluate.length}; make it at most {frames}, frames of an episode"
            )
        return self


class View(NamedTuple):
    """How an environment looks; what each says is described at its key of params.yaml."""

    renderer: str = "fast"
    distract: str = "none"
    distract_strength: float = 0.5
    distract_store: str | None = None


PLAIN = View()


class Scales(_Frozen):
    """All presets."""

    smoke: Scale
    small: Scale
    lite: Scale
    paper: Scale


class Config(_Frozen):
    """The whole of params.yaml."""

    method: Literal["dreamerv2", "apv", "contextwm", "prelar"] = Field(
        description="dreamerv2 (no pre-training) | apv | contextwm | prelar"
    )
    dataset: Text = Field(
        description="store for pre-training: ssv2 | demos | a name under sources, mixtures or unions"
    )
    task: Text = Field(
        description="task for fine-tuning: reach, … (Meta-World) | dmc/walker-walk, … | your own, "
        "module:Class"
    )
    seed: Seed = Field(description="seed of training, evaluation and the agent's episodes")
    scale: Literal["smoke", "small", "lite", "paper"] = Field(
        description="preset: smoke (minutes on 2 cores) | small (comparisons) | lite (a GPU-hour) | paper"
    )
    beta: Weight | None = Field(
        description="weight of the dynamics KL in pre-training; null: the scale's value"
    )
    beta_a: Weight | None = Field(
        description="weight of the action KL against N(0, I); null: the scale's value; see docs/methods.md"
    )
    beta_c: Weight | None = Field(
        description="weight of the action-state consistency loss; null: the scale's value; 0: without it"
    )
    consistency: Literal["order", "sign"] = Field(
        description="consistency loss: order (smooth, pairwise) | sign (as published: no gradient reaches "
        "the encoder)"
    )
    action_dim: Width | None = Field(description="size of the latent action; null: the scale's value")
    action_kind: Literal["gaussian", "deterministic", "discrete"] = Field(
        description="latent action: gaussian | deterministic (a point, no action KL) | discrete"
    )
    action_window: int = Field(
        ge=2, le=WIDEST, description="frames from which one latent action is inferred; 2: as in the paper"
    )
    renderer: Literal["fast", "faithful"] = Field(
        default="fast",
        description="renderer of environments: fast (no shadows) | faithful (the suite's own, far slower)",
    )
    distract: Distract = Field(
        default="none", description="distraction in the agent's images: none | camera | colour | background"
    )
    distract_strength: Share = Field(
        default=0.5, description="strength of the distraction, from 0 (none) to 1 (strongest)"
    )
    distract_store: Text | None = Field(
        default=None,
        validate_default=True,
        description="distract background: store whose clips become the background, a folder ….zarr",
    )
    naive: bool = Field(
        description="true: naive fine-tuning (no bonus, no dual reward; apv, contextwm: one RSSM)"
    )
    bonus: Weight | None = Field(
        description="weight of the exploration bonus; null: the scale's value; 0: without it; dreamerv2 has "
        "none"
    )
    dual_reward: bool = Field(
        description="true: a second reward head for the reward without bonus; false: one head for their sum"
    )
    frame_gap: Annotated[float, Field(gt=0, le=5)] | None = Field(
        description="seconds between the frames of a pre-training segment; null: neighbouring frames"
    )
    context_frame: Literal["random", "first", "last"] = Field(
        description="contextwm, context frame: random | first | last frame of the segment"
    )
    context_augment: Literal["none", "erase"] = Field(
        description="contextwm, fine-tuning: none | erase (random erasing of the context frame)"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(description="auto | cpu | cuda")
    devices: Workers = Field(
        description="pre-training: processes that share each batch, one per GPU; device cpu: on its cores"
    )
    precision: Literal["fp32", "bf16"] = Field(description="fp32 | bf16 (mixed)")
    compile: Literal["auto", "always", "graphs", "never"] = Field(
        description="torch.compile: auto (on a GPU) | always | graphs (CUDA graphs in pre-training) | never"
    )
    deterministic: bool = Field(
        description="true: the same params give the same bytes on a GPU too, more slowly; on a CPU they "
        "always do"
    )
    threads: Workers = Field(
        description="CPU threads of PyTorch; 1 is the fastest for small networks on a CPU"
    )
    loggers: list[Literal["tensorboard", "wandb"]] = Field(
        default_factory=list,
        description="loggers besides the project's own log: [tensorboard, wandb], each an extra of its "
        "name; []: none",
    )
    data_root: Text = Field(
        description="where stores are published: data | an absolute folder | a URL, s3://bucket/prefix or gs://…"
    )
    sample: Sample = Field(
        description="the rendered sample, an archive packed like Something-Something V2, of Meta-World's "
        "experts and random motion"
    )
    ssv2: Ssv2
    demos: Demos
    sources: dict[Name, Further] = Field(
        default={},
        description="further stores, NAME: {kind: ssv2 or demos, key: value, …}, with keys of that group",
    )
    mixtures: dict[Name, dict[Name, Weight]] = Field(
        default={}, description="weighted mixtures of stores, NAME: {source: weight, …}"
    )
    unions: dict[Name, Annotated[list[Text], Field(min_length=1)]] = Field(
        default={}, description="stores made in parts, NAME: [folder or URL of a store, …]"
    )
    scales: Scales

    _place = field_validator("data_root")(_root)
    _shelf = field_validator("distract_store")(_found_anywhere)
    _backed = field_validator("distract_store")(_has_background)

    @property
    def view(self) -> View:
        """How the environments of fine-tuning and evaluation look."""
        return View(self.renderer, self.distract, self.distract_strength, self.distract_store)

    @field_validator("action_kind")
    @classmethod
    def _divides(cls, kind: str, given: ValidationInfo) -> str:
        size = given.data.get("action_dim") or 0
        if kind == "discrete" and size % CLASSES:
            raise ValueError(f"discrete needs an action_dim that is a multiple of {CLASSES}; it is {size}")
        return kind

    @field_validator("demos")
    @classmethod
    def _has_rate(cls, demos: Demos, given: ValidationInfo) -> Demos:
        gap, silent = given.data.get("frame_gap"), demos.source == "apv_npz" and demos.fps is None
        if silent and gap is not None and given.data.get("dataset") == "demos":
            raise ValueError(
                f"fps is null; frame_gap {gap:g} needs the rate, which source apv_npz does not tell; "
                "set it, or frame_gap to null"
            )
        return demos

    @field_validator("naive")
    @classmethod
    def _can_be_naive(cls, naive: bool, given: ValidationInfo) -> bool:
        if naive and given.data.get("method") == "dreamerv2":
            raise ValueError("true does not fit method dreamerv2, which is not pre-trained; set it to false")
        return naive

    @field_validator("sources")
    @classmethod
    def _complete(cls, sources: dict[str, Further], given: ValidationInfo) -> dict[str, Further]:
        for name, further in sources.items():
            if further.kind in given.data:
                try:
                    _settings(given.data[further.kind], further)
                except ValidationError as error:
                    group = type(given.data[further.kind])
                    raise ValueError(f"{name}: {_explain(error, group)}") from None
        return sources

    @field_validator("mixtures")
    @classmethod
    def _weighted(cls, mixtures: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        for name, weights in mixtures.items():
            least = LEAST_SHARE * sum(weights.values())
            if not weights or not all(weight > 0 and weight >= least for weight in weights.values()):
                raise ValueError(
                    f"{name}: a mixture has at least one source, and each a weight above 0, and of their sum "
                    f"{LEAST_SHARE:g} or more; set the weights so"
                )
        return mixtures

    @field_validator("unions")
    @classmethod
    def _places(cls, unions: dict[str, list[str]]) -> dict[str, list[str]]:
        for name, places in unions.items():
            for place in places:
                if "://" in place:
                    check_url(place)
                elif not Path(place).is_absolute():
                    raise ValueError(
                        f"{name}: {place}: give an absolute folder ….zarr, or the URL of a store"
                    )
        return unions

    @field_validator("scales")
    @classmethod
    def _shared(cls, scales: Scales, given: ValidationInfo) -> Scales:
        scale, devices = given.data.get("scale"), given.data.get("devices", 1)
        batch = getattr(scales, scale).pretrain.batch if scale else 0
        if batch % devices:
            raise ValueError(
                f"{scale}.pretrain.batch is {batch}, which {devices} devices cannot share evenly; "
                "make it a multiple of devices"
            )
        return scales

    @model_validator(mode="after")
    def _named(self) -> Config:
        further = [*self.sources, *self.mixtures, *self.unions]
        if clash := [name for name in further if name in TAKEN or further.count(name) > 1]:
            raise ValueError(f"{clash[0]} names something else already; give that store another name")
        stores = (*KINDS, *self.sources, *self.unions)
        for name, weights in self.mixtures.items():
            for source in weights:
                _check_named(f"mixtures.{name}", source, stores)
        _check_named("dataset", self.dataset, (*stores, *self.mixtures))
        return self

    def source(self, name: str) -> Ssv2 | Demos:
        """The settings of a source: of the group of its name, or of its kind with its own keys."""
        if name in KINDS:
            group: Ssv2 | Demos = getattr(self, name)
            return group
        if name not in self.sources:
            close = ", ".join(nearest(name, (*KINDS, *self.sources)) or KINDS)
            raise UserError(f"{printable(name, 100)}: no source of params.yaml; did you mean {close}?")
        further = self.sources[name]
        return _settings(getattr(self, further.kind), further)

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


def _settings(group: Ssv2 | Demos, further: Further) -> Ssv2 | Demos:
    """A group with the keys of a further source in the place of its own."""
    return type(group).model_validate(group.model_dump() | (further.model_extra or {}))


def _check_named(key: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        close = ", ".join(nearest(name, known) or known)
        raise ValueError(f"{key} = {shown(name)}: no such store; did you mean {close}?")


SIZES: dict[str, Any] = {
    name: Annotated[field.annotation, field]
    for group in (Config, Finetune, Pretrain)  # a key of Config may be null, of a scale not
    for name, field in group.model_fields.items()
} | {"action_dim": Width, "robot_action_dim": Width}
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


def refilled(config: Config, *, time_limit: int, action_repeat: int) -> Config:
    """`config` with these where the chosen scale leaves them to the task.

    Raises `UserError` where the presets do not fit them, or ask for longer episodes.
    """
    preset = config.preset
    for stage in ("finetune", "evaluate"):
        asked = getattr(preset, stage).time_limit
        if asked is not None and asked > time_limit:
            raise UserError(
                f"scales.{config.scale}.{stage}.time_limit = {asked}: task {config.task} ends after "
                f"{time_limit} steps; choose 1 to {time_limit}, or null"
            )
    own = {"time_limit": time_limit, "action_repeat": action_repeat}
    filled = {
        name: {key: own[key] if value is None and key in own else value for key, value in group.items()}
        for name, group in preset.model_dump().items()
    }
    if filled == preset.model_dump():
        return config
    try:
        scale = Scale.model_validate(filled)
    except ValidationError as error:
        raise UserError(
            f"scales.{config.scale} with task {config.task}, of {time_limit} steps and an action repeat of "
            f"{action_repeat}: {_explain(error)}"
        ) from None
    return config.model_copy(update={"scales": config.scales.model_copy(update={config.scale: scale})})


def _explain(error: ValidationError, model: type[BaseModel] = Config) -> str:
    """The first failures of a validation, each as `key = value: what to do`."""
    problems: dict[str, str] = {}
    renamed = set()
    for detail in error.errors(include_url=False):
        names = [str(part) for part in detail["loc"] if part not in ("str", "constrained-str", "none")]
        key = printable(
            ".".join(name for name in names if not name.startswith(("list[", "constrained"))), 100
        )
        if detail["type"] == "extra_forbidden":
            problems[key] = f"{key}: unknown key; {_suggest(key, model)}"
            renamed.add(RENAMED.get(key))
        elif detail["type"] == "missing":
            problems[key] = f"{key}: missing; add it"
        elif detail["type"] == "value_error":
            where = f"{key}: " if key else ""
            problems[key] = where + printable(str(detail["msg"]).removeprefix("Value error, "), 300)
        else:
            problems.setdefault(key, f"{key} = {shown(detail['input'])}: {_should(detail)}")
    return "; ".join([text for key, text in problems.items() if key not in renamed][:3])


def _should(detail: Any) -> str:
    """What a failure of a validation says that the value should be."""
    return str(detail["msg"]).replace("Input should", "should")


def _suggest(key: str, model: Any) -> str:
    """A known key of the same group of a model that looks like `key`, as advice."""
    if key in RENAMED:
        return f"it is called {RENAMED[key]} now, rename it"
    *groups, name = key.split(".")
    for group in groups:
        if group not in model.model_fields:
            return "remove it"
        model = model.model_fields[group].annotation
    close = nearest(name, model.model_fields)
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
