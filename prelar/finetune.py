"""Stage `finetune`: learn a task from pixels in the imagination of a pre-trained world model.

One step of the loop is one environment step, whatever `action_repeat`, and logs have environment steps as
their axis. At which steps actions are chosen, which updates follow a step, which episodes are played and what
is drawn are functions of the step's number, the seed and the state that snapshots hold.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from prelar.config import PLAIN, Config, Finetune
from prelar.control.actor_critic import ActorCritic
from prelar.control.agent import Agent
from prelar.control.collector import Collector
from prelar.control.exploration import Bonus
from prelar.control.learner import Learner
from prelar.control.replay import Replay
from prelar.control.rollout import RandomPolicy, play_episodes, summarise
from prelar.envs import describe, gl, make_env, own, settled
from prelar.envs.names import suite_of
from prelar.envs.pixels import Envs, PixelEnv, Simulator
from prelar.methods import build_model, load_pretrained, loads, restore
from prelar.model.spec import ModelSpec
from prelar.model.world_model import WorldModel
from prelar.stages import stage_fingerprint
from prelar.store.store import Store
from prelar.train.checkpoint import Snapshots, load_parts, resume_key, save_parts
from prelar.train.loop import Hook, Scalars, compiles, fabric_of, summary, train
from prelar.train.prefetch import BatchPrefetcher
from prelar.utils.errors import UserError
from prelar.utils.seeds import RngStream, episode_seed

PRETRAINED = Path("data/pretrain")
OUTPUT = Path("data/finetune")
LOGS = Path("reports/finetune")


def run(cfg: Config) -> None:
    """Fine-tune as params.yaml says: `data/pretrain` to `data/finetune`, logs to `reports/finetune`."""
    preset = settled(cfg).finetune
    gl.ensure()
    fabric = fabric_of(cfg)
    torch.manual_seed(cfg.seed)
    model = load_model(cfg)
    if compiles(cfg.compile, fabric):
        model.compile_training(dynamic=False)
    snapshots = Snapshots(run_key(cfg))
    actor_critic = learn(
        fabric,
        model,
        functools.partial(
            make_env,
            cfg.task,
            time_limit=preset.time_limit,
            action_repeat=preset.action_repeat,
            view=cfg.view,
        ),
        preset,
        seed=cfg.seed,
        snapshots=snapshots,
        log_folder=LOGS,
        loggers=cfg.loggers,
    )
    agent = {name: getattr(actor_critic, name) for name in ("actor", "critic", "slow_critic")}
    config: dict[str, Any] = {
        "stage": "finetune",
        "method": cfg.method,
        "task": cfg.task,
        "action_repeat": preset.action_repeat,
        "eval_action": preset.eval_action,
        "model": model.spec,
        "env_steps": preset.env_steps,
        "updates": updates_after(preset.env_steps, preset),
    }
    if cfg.view != PLAIN:
        config["view"] = cfg.view._asdict()
    save_parts(OUTPUT, model.state() | {name: part.state_dict() for name, part in agent.items()}, config)
    snapshots.remove()
    print(summary(LOGS), end="")
    print(f"finetune: {cfg.method}, {preset.env_steps} steps of {cfg.task} -> {OUTPUT}, {LOGS}", flush=True)


def run_key(cfg: Config) -> str:
    """The resume key: params, code, the pre-trained model, a user's own environment, a background's clips."""
    known: dict[str, Any] = {}
    if suite_of(cfg.task) is None:
        known["env"] = own.code_digests(cfg.task)
    if cfg.view.distract == "background":
        known["clips"] = Store.open(Path(str(cfg.view.distract_store))).digest()
    fingerprint = stage_fingerprint("finetune", cfg.model_dump(mode="json"))
    return resume_key("finetune", fingerprint, known=known, inputs=[PRETRAINED])


def load_model(cfg: Config) -> WorldModel:
    """The world model to fine-tune, with what its method loads from the pre-training checkpoint."""
    preset = cfg.finetune
    parts, pretrained = load_parts(PRETRAINED, loads(cfg.method, cfg.naive))
    values = pretrained.get("model", {})
    if values.get("method") != cfg.method:
        raise UserError(
            f"{PRETRAINED}: of method {values.get('method')}, not {cfg.method}; run `dvc repro pretrain`"
        )
    spec = replace(
        ModelSpec.read(values, stage="finetune", source=str(PRETRAINED)),
        robot_action_dim=describe(cfg.task).action_dim,
        units=preset.units,
        layers=preset.layers,
        naive=cfg.naive,
        dual_reward=cfg.dual_reward,
        bonus=preset.bonus if cfg.bonus is None else cfg.bonus,
        context_augment=cfg.context_augment,
        beta=preset.beta,
    )
    return restore(lambda: build_model(spec), lambda made: load_pretrained(made, parts))


@dataclass(frozen=True)
class Speed:
    """How fast a run was: environment steps, seconds in all, and seconds by what they were spent on."""

    steps: int
    total: float
    spent: Mapping[str, float]

    @property
    def rate(self) -> float:
        """Environment steps a second."""
        return self.steps / self.total

    def __str__(self) -> str:
        shares = ", ".join(f"{name} {seconds / self.total:.0%}" for name, seconds in self.spent.items())
        return f"finetune: {self.rate:.1f} environment steps/s end to end; {shares}"


def learn(
    fabric: Fabric,
    model: WorldModel,
    make_simulator: Callable[[], Simulator],
    preset: Finetune,
    *,
    seed: int,
    snapshots: Snapshots,
    log_folder: Path,
    loggers: Sequence[str] = (),
    on_end: Callable[[Speed], object] = print,
) -> ActorCritic:
    """Fine-tune `model` in place in the simulators that `make_simulator` makes; returns actor and critic.

    on_end: takes what this process did.
    """
    learner = make_learner(fabric, model, preset, seed=seed)
    with contextlib.ExitStack() as stack:
        watched = PixelEnv(make_simulator(), seed=episode_seed(RngStream.CURVE_EPISODES, 0))
        stack.callback(watched.close)
        replay = Replay(
            snapshots.folder / "replay.bin",
            capacity=preset.replay // watched.action_repeat,
            margin=replay_margin(preset, watched.action_repeat),
            action_dim=model.spec.robot_action_dim,
        )
        stack.callback(replay.close)
        batches = BatchPrefetcher(
            lambda starts: replay.read(starts, preset.length),
            choose=lambda update: replay.choose(
                batch=preset.batch, length=preset.length, seed=seed, update=update
            ),
            device=fabric.device,
        )
        stack.callback(batches.close)
        envs = Envs(
            make_simulator,
            count=preset.envs,
            seed=episode_seed(RngStream.TRAINING_EPISODES, seed),
            processes=preset.envs > 1,
        )
        stack.callback(envs.close)
        collector = Collector(envs, replay)
        stepper = Stepper(preset, watched.action_repeat, learner, collector, batches)
        begin = time.perf_counter()
        train(
            stepper,
            name="finetune",
            steps=preset.env_steps,
            seed=seed,
            state=learner.stateful() | {"collector": collector, "replay": replay, "batches": batches},
            snapshots=snapshots,
            snapshot_every=preset.checkpoint_every,
            log_folder=log_folder,
            log_every=preset.log_every,
            hooks=[Hook(preset.eval_every, curve(watched, learner, preset, seed))],
            loggers=loggers,
            fabric=fabric,
        )
        on_end(Speed(stepper.steps, time.perf_counter() - begin, stepper.seconds | envs.seconds()))
    return learner.actor_critic


def make_learner(fabric: Fabric, model: WorldModel, preset: Finetune, *, seed: int) -> Learner:
    """What updates the model, with actor and critic as they are born."""
    actor_critic = ActorCritic(
        model.feature_dim,
        model.spec.robot_action_dim,
        units=preset.units,
        layers=preset.layers,
        horizon=preset.horizon,
        discount=preset.discount,
        lam=preset.lam,
        entropy=preset.entropy,
        slow_every=preset.slow_every,
    )
    return Learner(
        fabric,
        model,
        actor_critic,
        make_bonus(model, seed=seed, device=fabric.device),
        lr=preset.lr,
        actor_lr=preset.actor_lr,
        critic_lr=preset.critic_lr,
        freeze_updates=preset.freeze_updates,
        actor_after=preset.actor_after,
    )


def make_bonus(model: WorldModel, *, seed: int, device: torch.device) -> Bonus | None:
    """The exploration bonus of a model; None where its method, or a weight of 0, has none."""
    return (
        Bonus(model.bonus_dim, weight=model.spec.bonus, seed=seed, device=device) if model.bonus_dim else None
    )


def replay_margin(preset: Finetune, action_repeat: int) -> int:
    """Steps that the replay may gain before it overwrites one that a run can still resume to read.

    The snapshot may be three intervals old, and hold sequences that were chosen an update before it.
    """
    env_steps = 3 * preset.checkpoint_every + preset.train_every
    ended = env_steps // (preset.episode * preset.envs) + 2  # times that all environments' episodes end
    return ended * preset.envs * (preset.actions(action_repeat) + 1)


def updates_after(env_steps: int, preset: Finetune) -> int:
    """How many updates are done after `env_steps` environment steps."""
    if env_steps < preset.prefill:
        return 0
    return preset.pretrain_updates + (env_steps - preset.prefill) // preset.train_every


class Stepper:
    """Called with the number of an environment step: acts, then does the updates that follow it.

    While the updates run, environments in processes of their own get on with the actions that they were given
    before. `steps` and `seconds` tell what this process did so far, and what it spent its time on.
    """

    def __init__(
        self,
        preset: Finetune,
        action_repeat: int,
        learner: Learner,
        collector: Collector,
        batches: BatchPrefetcher[list[int]],
    ) -> None:
        self.preset, self.action_repeat = preset, action_repeat
        self.learner, self.collector, self.batches = learner, collector, batches
        self.steps = 0
        self.seconds = {"acting": 0.0, "learning": 0.0, "waiting for environments": 0.0}
        device = learner.fabric.device
        self._agent = Agent(learner.model, learner.actor_critic.actor, device=device, choose="sample")
        self._random = RandomPolicy(learner.actor_critic.actor.actions)

    def __call__(self, index: int) -> Scalars:
        """Do environment step `index`, counted over all environments, which act together."""
        metrics: dict[str, Any] = {}
        if index == self.preset.prefill:
            self.collector.forget()
        if self.preset.acts(index, self.action_repeat):
            with self._timed("waiting for environments"):
                metrics |= self.collector.settle()
            with self._timed("acting"):
                self.collector.step(self._random if index < self.preset.prefill else self._agent)
        if index + 1 in (self.preset.prefill, self.preset.env_steps):
            with self._timed("waiting for environments"):
                metrics |= self.collector.settle()
        with self._timed("learning"):
            for number in range(updates_after(index, self.preset), updates_after(index + 1, self.preset)):
                metrics |= self.learner.update(self.batches.take(number), number)
        self.steps += 1
        return metrics

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - begin


def curve(env: PixelEnv, learner: Learner, preset: Finetune, seed: int) -> Callable[[int], Scalars]:
    """A hook that adds a point to the learning curve: success and return of the agent.

    Each point has episodes of its own, the same in every run of a task, whatever its method and `seed`.
    """
    model, actor, episodes = learner.model, learner.actor_critic.actor, preset.eval_episodes
    agent = Agent(model, actor, device=learner.fabric.device, choose=preset.eval_action)

    def evaluate(done: int) -> Scalars:
        played = play_episodes(env, agent, episodes=episodes, seed=seed, first=done * episodes)
        return {f"eval/{name}": value for name, value in summarise(played).items()}

    return evaluate
