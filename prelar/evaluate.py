"""The evaluation: how often the agent succeeds, how well models foresee, what it helped, what actions mean.

Writes metrics.json (the `HEADLINE_METRICS`, for `dvc metrics` and `dvc exp show`) and reports/evaluate (all
numbers, tables for `dvc plots show`, videos, pictures, and what the report needs to know).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from prelar.config import PLAIN, Config
from prelar.control.agent import load_agent
from prelar.control.rollout import Episode, Policy, RandomPolicy, play, summarise
from prelar.envs import gl, make_env, settled
from prelar.envs.pixels import PixelEnv
from prelar.envs.simulator import Simulator
from prelar.evaluation import offline
from prelar.evaluation.controllability import Controllability, controllability, interval
from prelar.evaluation.panels import describe, overview, tile_horizontally, write_png, write_previews
from prelar.evaluation.prediction import Prediction, measure, write_prediction
from prelar.evaluation.probe import collect, demonstrations, run_probe, swap_actions, swap_directions
from prelar.methods import METHODS, build_model, load_pretrained, restore
from prelar.model.spec import ModelSpec
from prelar.model.world_model import WorldModel
from prelar.stages import stage_fingerprint
from prelar.store.store import Store
from prelar.train.checkpoint import load_config, load_parts
from prelar.train.loggers import open_loggers
from prelar.train.loop import fabric_of
from prelar.utils.errors import UserError, remake
from prelar.utils.files import publish, remove, write_text
from prelar.utils.frames import SIZE, Frames
from prelar.utils.processes import worker_pool
from prelar.utils.seeds import RngStream, episode_seed, generator
from prelar.utils.tables import evenly_spaced_indices, write_tsv
from prelar.utils.video_file import write_mp4

PRETRAIN = Path("data/pretrain")
FINETUNE = Path("data/finetune")
REPORT = Path("reports/evaluate")
METRICS = Path("metrics.json")
HEADLINE_METRICS = (
    "success_rate",
    "return",
    "return_low",
    "return_random_high",
    "prediction_error",
    "prediction_error_policy",
    "prediction_error_late",
    "prediction_error_late_copy",
    "prediction_error_late_median",
    "prediction_error_late_policy",
    "prediction_error_late_policy_copy",
    "controllability_db",
    "controllability_db_low",
)
SPLIT = "validation"
SHOWN_EPISODES = 3
KEPT_EPISODES = 10
MEDIAN_CLIPS, MEDIAN_MOMENTS = 128, 4
VIDEO_SIZE = 192
VIDEO_FRAMES = 250
VIDEO_FPS = 25


@dataclass(frozen=True)
class EvalResult:
    """What a part of the evaluation found: metrics by name, and what the page needs to know beside them."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)

    def __or__(self, other: EvalResult) -> EvalResult:
        """Both together."""
        return EvalResult({**self.metrics, **other.metrics}, {**self.summary, **other.summary})


def run(config: Config) -> None:
    """Evaluate the checkpoints in data/ and write metrics.json and reports/evaluate.

    Raises:
        UserError: a checkpoint or the store is missing, or was made with another method or task.
    """
    check_origin(PRETRAIN, load_config(PRETRAIN).get("model", {}), method=config.method)
    config = settled(config)
    repeat = config.finetune.action_repeat
    assert repeat is not None
    described = {"action_repeat": 1} | load_config(FINETUNE)  # not said by checkpoints of before
    described |= PLAIN._asdict() | described.get("view", {})
    check_origin(FINETUNE, described, method=config.method, task=config.task, action_repeat=repeat)
    check_origin(FINETUNE, described, **config.view._asdict())
    gl.ensure()
    fabric = fabric_of(config)
    store = Store.open(config.store)
    folder = REPORT.with_name(f".{REPORT.name}.partial")
    remove(folder)
    folder.mkdir(parents=True)

    agent, _ = load_agent(FINETUNE, device=fabric.device)
    with worker_pool(1) as pool:  # a process beside this one takes as long as all the rest
        start = pool.submit(evaluate_offline, config, repeat, folder)
        with fabric.autocast():
            found = evaluate_agent(config, agent, repeat, folder)
        if METHODS[config.method].pretrains:
            model = load_pretrained_model(fabric.device)
            with fabric.autocast():
                found |= evaluate_prediction(config, model, store, folder)
                found |= evaluate_actions(config, model, store, folder)
                found |= evaluate_sources(config, model, store)
        else:
            missing = f"{config.method} does not pre-train, so there is nothing to measure."
            found |= EvalResult(summary={"prediction_missing": missing, "probe_missing": missing})
        found |= start.result()
    _write_json(
        folder / "dataset.json", describe(store) | {"previews": write_previews(store, folder / "previews")}
    )
    write_png(folder / "contact_sheet.png", overview(store))

    _write_json(folder / "summary.json", found.summary)
    metrics = {name: float(f"{value:.9g}") for name, value in found.metrics.items()}
    _write_json(folder / METRICS.name, metrics)
    publish(folder, REPORT)
    log_results(config, metrics)
    _write_json(METRICS, {name: metrics[name] for name in HEADLINE_METRICS if name in metrics})
    print(f"evaluate: {headline(found.metrics)} -> {METRICS}, {REPORT}", flush=True)


def log_results(config: Config, metrics: Mapping[str, float], folder: Path = REPORT) -> None:
    """Hand metrics, videos and pictures to the loggers, under the step 0."""
    fingerprint = stage_fingerprint("evaluate", config.model_dump(mode="json")) if config.loggers else ""
    for logger in open_loggers(config.loggers, "evaluate", f"evaluate-{fingerprint[:16]}", 0):
        logger.log(0, metrics)
        for path in sorted(folder.glob("*.mp4")):
            logger.video(0, path.stem, path)
        for path in sorted(folder.glob("*.png")):
            logger.picture(0, path.stem, path)
        logger.close()


def headline(metrics: Mapping[str, float]) -> str:
    """The chief metrics in a line: success, return, and the error of the best model there is to predict."""
    words = [f"success {metrics['success_rate']:.0%}"] if "success_rate" in metrics else []
    words.append(f"return {metrics['return']:.4g}")
    error = next((key for key in ("prediction_error", "prediction_error_policy") if key in metrics), None)
    if error:
        words.append(
            f"prediction error {metrics[error]:.3g} (copying the last frame: {metrics[f'{error}_copy']:.3g})"
        )
    return ", ".join(words)


def check_origin(folder: Path, described: Mapping[str, Any], **expected: str | float | None) -> None:
    """Raise `UserError` where a checkpoint's description says something else than params.yaml."""
    for key, value in expected.items():
        if described.get(key) != value:
            raise UserError(
                f"{folder}: made with {key} = {described.get(key)}, params.yaml says {value}; "
                f"{remake(folder)}"
            )


def load_pretrained_model(device: torch.device) -> WorldModel:
    """The pre-trained model of data/pretrain."""
    parts, described = load_parts(PRETRAIN)
    spec = ModelSpec.read(described["model"], stage="pretrain", source=str(PRETRAIN))
    model = restore(lambda: build_model(spec), lambda made: made.load_state(parts))
    return model.to(device).eval()


# --- The agent --------------------------------------------------------------------------------------------


def evaluate_agent(config: Config, agent: Any, repeat: int, folder: Path) -> EvalResult:
    """Play the evaluation episodes; write their table and video, and how well the model foresees them.

    repeat: environment steps that an action is applied for.
    """
    settings, limit = config.evaluate, config.evaluate.time_limit
    seed = episode_seed(RngStream.EVALUATION_EPISODES, config.seed)
    make = functools.partial(make_env, config.task, time_limit=limit, view=config.view)
    with make(action_repeat=repeat) as simulator:
        limit = simulator.time_limit
        play_all = functools.partial(play_visibly, seed=config.seed)
        env, unseen = (PixelEnv(simulator, seed=seed, draws=draws) for draws in (True, False))
        count, chances = settings.episodes, RandomPolicy(simulator.action_dim)
        played = play_all(env, agent, episodes=count, name="the agent", keep_frames=KEPT_EPISODES)
        chance = play_all(unseen, chances, episodes=settings.random_episodes, name="random actions")
        shown = played[:SHOWN_EPISODES]
        views = [film(simulator, seed, number, episode.actions) for number, episode in enumerate(shown)]
    solved: list[Episode] = []
    if simulator.scripted:
        with make(action_repeat=None) as simulator:
            unseen = PixelEnv(simulator, seed=seed, draws=False)
            solved = play_all(unseen, Expert(simulator), episodes=count, name="the expert")
    video = tile_horizontally(views, [bool(episode.success) for episode in shown])
    write_mp4(folder / "policy.mp4", video, VIDEO_FPS / repeat)
    write_png(folder / "policy_poster.png", video[len(video) // 2])
    steps = [min(repeat * len(episode.actions), limit) for episode in played]
    write_episodes(folder / "episodes.tsv", played, steps)

    found = EvalResult(summary={"policy": {"shown": len(shown)}})
    found |= summarise_episodes(played, chance, solved, time_limit=limit)
    segments = cut_segments(played, settings.length, settings.clips)
    if segments is None:
        return found
    frames, actions = segments
    prediction = measure(
        agent.model.open_loop,
        frames,
        observed=settings.observed,
        device=agent.device,
        actions=actions,
        seed=config.seed,
    )
    write_prediction(folder, "prediction_policy", "open_loop_policy", prediction)
    found |= _record(prediction, "prediction_policy", "_policy")
    observed, device = settings.observed, agent.device
    picture = swap_directions(agent.model, frames, actions, observed=observed, device=device)
    write_png(folder / "action_directions.png", picture)
    if len(frames) > 1:
        decided = controllability(
            agent.model, frames, actions=actions, observed=observed, device=device, seed=config.seed
        )
        found |= _decided(decided, "controllability_policy")
    return found


def summarise_episodes(
    played: Sequence[Episode], chance: Sequence[Episode], solved: Sequence[Episode], *, time_limit: int
) -> EvalResult:
    """What the episodes of the agent, of random actions and of the expert, if there is one, come to.

    Intervals of mean returns are from the 95% percentile bootstrap over episodes; one episode has none.
    """
    result, returns = summarise(played), [episode.total for episode in played]
    metrics = {"success_rate": result["success"]} if "success" in result else {}
    metrics["return"] = result["return"]
    policies = []
    for name, episodes in {"agent": played, "random actions": chance, "scripted expert": solved}.items():
        if len(episodes) > 1:
            low, high = interval(np.array([episode.total for episode in episodes]))
            row = {"name": name, "episodes": len(episodes), "low": low, "high": high}
            policies.append(row | summarise(episodes))
            ends = {"agent": {"return_low": low}, "random actions": {"return_random_high": high}}
            metrics |= ends.get(name, {})
    summary = {
        "count": len(played),
        "successes": sum(bool(episode.success) for episode in played) if "success" in result else None,
        "time_limit": time_limit,
        "return_min": min(returns),
        "return_max": max(returns),
        "random": summarise(chance),
        "policies": policies,
    }
    return EvalResult(metrics, {"episodes": summary})


class Expert:
    """The scripted expert of a simulator as a `rollout.Policy`: it knows the state, and does not look."""

    def __init__(self, simulator: Simulator) -> None:
        self.simulator = simulator

    def act(
        self, memory: None, images: Frames, is_first: npt.NDArray[np.bool_]
    ) -> tuple[npt.NDArray[np.float32], None]:
        """The expert's action in the simulator's present state, (1, A)."""
        return self.simulator.expert()[None], None


def play_visibly(
    env: PixelEnv, policy: Policy, *, episodes: int, seed: int, name: str, keep_frames: int = 0
) -> list[Episode]:
    """`control.rollout.play_episodes` with a bar of progress, called by `name`."""
    numbers = tqdm(range(episodes), desc=f"evaluate: {name}", unit="episode", disable=None)
    return [play(env, policy, episode=n, seed=seed, keep_frames=n < keep_frames) for n in numbers]


def film(simulator: Simulator, seed: int, number: int, actions: npt.NDArray[np.float32]) -> Frames:
    """An episode once more, drawn larger, at most `VIDEO_FRAMES` frames spread evenly over it."""
    every = -(-(len(actions) + 1) // VIDEO_FRAMES)
    simulator.reset(seed, number)
    frames = [simulator.render(width=VIDEO_SIZE, height=VIDEO_SIZE)]
    for step, action in enumerate(actions, start=1):
        simulator.step(action)
        if step % every == 0:
            frames.append(simulator.render(width=VIDEO_SIZE, height=VIDEO_SIZE))
    return np.stack(frames)


def write_episodes(path: Path, played: Sequence[Episode], steps: Sequence[int]) -> None:
    """A row for each episode: its number, environment steps, return, and success where the task tells it."""
    table: dict[str, list[float]] = {
        "episode": list(range(len(played))),
        "steps": list(steps),
        "return": [episode.total for episode in played],
    }
    solved = [float(episode.success) for episode in played if episode.success is not None]
    write_tsv(path, table | ({"success": solved} if solved else {}))


def cut_segments(
    played: Sequence[Episode], length: int, count: int
) -> tuple[Frames, npt.NDArray[np.float32]] | None:
    """At most `count` segments of `length` frames, spread evenly over the episodes whose frames were kept.

    Returns frames (N, length, 64, 64, 3) and the action that led to each frame (N, length, A), zeros for the
    first of a segment; None where no episode is long enough.
    """
    starts = [
        (episode, start)
        for episode in played
        if episode.frames is not None
        for start in range(0, len(episode.frames) - length + 1, length)
    ]
    if not starts:
        return None
    picks = evenly_spaced_indices(len(starts), count)
    frames, actions = [], []
    for episode, start in (starts[pick] for pick in picks):
        assert episode.frames is not None
        frames.append(episode.frames[start : start + length])
        led = np.zeros((length, episode.actions.shape[1]), np.float32)
        led[1:] = episode.actions[start : start + length - 1]
        actions.append(led)
    return np.stack(frames), np.stack(actions)


# --- The pre-trained model --------------------------------------------------------------------------------


def evaluate_prediction(config: Config, model: WorldModel, store: Store, folder: Path) -> EvalResult:
    """Open-loop prediction of held-out clips; where the store has none, the summary says so."""
    gap, prediction = model.spec.frame_gap, predict_held_out(config, model, store)
    if prediction is None:
        apart = "or more" if gap is None else f"{gap:g} s apart"
        missing = f"Not measured: no clip of the {SPLIT} split has {config.evaluate.length} frames {apart}."
        return EvalResult(summary={"prediction_missing": missing})
    write_prediction(folder, "prediction", "open_loop", prediction)
    more: dict[str, Any] = {"split": SPLIT, "latent": infers_actions(model), "gap": gap}
    return _record(prediction, "prediction", **more)


def predict_held_out(config: Config, model: WorldModel, store: Store) -> Prediction | None:
    """Open-loop prediction of held-out clips of a store, beside the median pictures; None without any."""
    settings, gap = config.evaluate, model.spec.frame_gap
    shown = held_out(store, length=settings.length, count=settings.clips, seed=config.seed, gap=gap)
    if shown is None:
        return None
    truth, clips = shown
    return measure(
        model.open_loop,
        truth,
        observed=settings.observed,
        device=next(model.parameters()).device,
        medians=median_pictures(store, clips),
        seed=config.seed,
    )


def evaluate_actions(config: Config, model: WorldModel, store: Store, folder: Path) -> EvalResult:
    """Probe the latent action, measure what it decides, and draw the action swap.

    The summary says where a method has none.
    """
    if not infers_actions(model):
        return EvalResult(summary={"probe_missing": f"{config.method} infers no actions from video."})
    settings, gap = config.evaluate, model.spec.frame_gap
    device, seed = next(model.parameters()).device, episode_seed(RngStream.PROBE_EPISODES, config.seed)
    found, played = EvalResult(), None
    with make_env(config.task, view=config.view) as simulator:
        if simulator.scripted:
            stride = model.spec.stride(simulator.fps)
            played = collect(simulator, episodes=settings.probe_episodes, seed=seed, gap=stride)
    recorded = demonstrations(store, episodes=settings.probe_episodes, seed=seed, gap=gap)
    if played is None and recorded is None:
        missing = f"{config.task} has no gripper to read off the latent action."
        found |= EvalResult(summary={"probe_missing": missing})
    for name, episodes in (("probe", played), ("probe_demonstrations", recorded)):
        if episodes is not None:
            result = run_probe(
                model, episodes, updates=settings.probe_updates, seed=config.seed, device=device
            )
            write_tsv(folder / f"{name}_gaps.tsv", result.pop("gaps"))
            _write_json(folder / f"{name}.json", result)
            found |= EvalResult(_probed(result, name))
    shown = held_out(store, length=settings.length, count=settings.clips, seed=config.seed, gap=gap)
    if shown is None:
        return found
    clips, _ = shown
    picture = swap_actions(model, clips, observed=settings.observed, device=device)
    if picture is None:
        return found
    write_png(folder / "action_swap.png", picture)
    torch.manual_seed(config.seed)
    untrained = build_model(model.spec).to(device).eval()
    for name, measured in (("controllability", model), ("controllability_untrained", untrained)):
        decided = controllability(
            measured, clips, observed=settings.observed, device=device, seed=config.seed
        )
        found |= _decided(decided, name)
    return found


def evaluate_sources(config: Config, model: WorldModel, store: Store) -> EvalResult:
    """Prediction and probe on each source of a mixture alone; nothing of other stores.

    Metrics end in `@` and the source; the summary has them as rows, `sources`, without what was not measured.
    """
    settings, gap, device = config.evaluate, model.spec.frame_gap, next(model.parameters()).device
    found, rows = EvalResult(), []
    for member in (member for member in store.members if member.weight is not None):
        metrics: dict[str, float] = {}
        if (prediction := predict_held_out(config, model, member.store)) is not None:
            metrics |= _record(prediction, "prediction").metrics
        seed = episode_seed(RngStream.PROBE_EPISODES, config.seed)
        recorded = demonstrations(member.store, episodes=settings.probe_episodes, seed=seed, gap=gap)
        if recorded is not None and infers_actions(model):
            result = run_probe(
                model, recorded, updates=settings.probe_updates, seed=config.seed, device=device
            )
            metrics |= _probed(result, "probe")
        rows.append({"source": member.name, "weight": member.weight, **metrics})
        found |= EvalResult({f"{name}@{member.name}": value for name, value in metrics.items()})
    return found | EvalResult(summary={"sources": rows}) if rows else found


def _probed(result: Mapping[str, Any], name: str) -> dict[str, float]:
    """The metrics of a probe: mean R² of the latent action, of an untrained encoder's, of raw differences."""
    kinds = (f"{name}_r2", f"{name}_r2_untrained", f"{name}_r2_difference")
    return {kind: row["mean"] for kind, row in zip(kinds, result["rows"][:3], strict=True)}


def infers_actions(model: WorldModel) -> bool:
    """Whether the model infers latent actions from frames."""
    device = next(model.parameters()).device
    images = torch.zeros(1, 2, 3, SIZE, SIZE, device=device)
    return model.infer_actions(images, torch.tensor([[True, False]], device=device)) is not None


def held_out(
    store: Store, *, length: int, count: int, seed: int, gap: float | None = None
) -> tuple[Frames, npt.NDArray[np.int64]] | None:
    """Segments of at most `count` held-out clips, drawn by `seed`, and the clips' numbers; None without any.

    uint8 (N, length, 64, 64, 3) and int64 (N,). Their frames are neighbours, or `gap` seconds apart.
    """
    clips = store.clips(SPLIT, min_length=length, gap=gap)
    if not len(clips):
        return None
    random = np.random.default_rng(seed)
    chosen = np.sort(random.permutation(clips)[:count])
    strides = store.strides(gap)[chosen]
    offsets = random.integers(0, store.clip_length[chosen] - (length - 1) * strides)
    return store.read_many(store.clip_start[chosen] + offsets, length, strides=strides), chosen


def median_pictures(store: Store, clips: npt.NDArray[np.int64]) -> Frames | None:
    """The per-pixel median of training frames of each clip's camera and source: uint8 (N, 64, 64, 3).

    None where a camera has no training frame.
    """
    names = store.clip_index["camera"].to_pylist()
    cameras = np.array([f"{n} {names[c]}" for n, (part, _) in enumerate(store.parts) for c in part])
    training = store.clips("train")
    pictures = {}
    for camera in np.unique(cameras[clips]):
        own = training[cameras[training] == camera]
        if not len(own):
            return None
        picks = own[evenly_spaced_indices(len(own), MEDIAN_CLIPS)]
        moments = np.linspace(0, store.clip_length[picks] - 1, MEDIAN_MOMENTS).round().astype(np.int64)
        frames = store.read_many((store.clip_start[picks] + moments).ravel(), 1)[:, 0]
        pictures[camera] = np.median(frames, axis=0).round().astype(np.uint8)
    return np.stack([pictures[camera] for camera in cameras[clips]])


def _record(prediction: Prediction, name: str, of: str = "", **more: Any) -> EvalResult:
    """The errors of a prediction, of all frames ahead and of the late ones; `of` ends the metrics' names."""
    clips, length = prediction.truth.shape[:2]
    errors = {
        f"prediction_error{of}": float(prediction.model.mean()),
        f"prediction_error{of}_copy": float(prediction.copy.mean()),
    }
    for row, error in prediction.late().items():
        errors[f"prediction_error_late{of}" + ("" if row == "model" else f"_{row}")] = error
    return EvalResult(
        errors, {name: {"clips": clips, "observed": prediction.observed, "length": length, **more}}
    )


def _decided(found: Controllability, name: str) -> EvalResult:
    """What an action decides, as metrics and for the page."""
    mean = float(found.gain.mean())
    decibels = name.replace("controllability", "controllability_db")
    summary = {"mean": mean, "low": found.low, "high": found.high, "pairs": found.pairs}
    summary |= {"clips": len(found.gain), "changed": found.changed, "changed_swapped": found.changed_swapped}
    return EvalResult({decibels: mean, f"{decibels}_low": found.low}, {name: summary})


# --- The start of fine-tuning -----------------------------------------------------------------------------


def evaluate_offline(config: Config, repeat: int, folder: Path) -> EvalResult:
    """Fit the world model of fine-tuning to fixed episodes, from the checkpoint and from scratch.

    repeat: environment steps that an action is applied for. Runs in a process of its own.
    """
    settings, fabric = config.evaluate, fabric_of(config)
    seed = episode_seed(RngStream.OFFLINE_EPISODES, config.seed)
    with make_env(config.task, action_repeat=repeat, view=config.view) as simulator:
        learnt, episodes = offline.collect(
            simulator,
            episodes=settings.offline_episodes,
            seed=seed,
            steps=max(offline.STEPS, settings.length - 1),
        )
    cut = offline.segments(episodes, settings.length)
    parts, _ = load_parts(PRETRAIN)
    spec = ModelSpec.read(load_config(FINETUNE)["model"], stage="finetune", source=str(FINETUNE))
    plain = replace(spec, bonus=0.0, dual_reward=False)

    def start_model(pretrained: bool) -> WorldModel:
        model = build_model(plain)
        if pretrained:
            load_pretrained(model, parts)
        return model

    numbers = range(settings.offline_seeds)
    seeds = [int(generator(RngStream.OFFLINE, config.seed, number).integers(2**31)) for number in numbers]
    metrics: dict[str, float] = {}
    starts = {"scratch": False} | ({"pretrained": True} if METHODS[config.method].pretrains else {})
    for start, pretrained in starts.items():
        table = offline.compare(
            fabric,
            functools.partial(start_model, pretrained),
            learnt,
            cut,
            seeds=seeds,
            updates=settings.offline_updates,
            batch=settings.offline_batch,
            observed=settings.observed,
        )
        write_tsv(folder / f"offline_{start}.tsv", table)
        metrics |= {f"offline_{name}_{start}": table[name][-1] for name in ("error", "reward_error")}
    copied, mean = offline.baselines(learnt, cut, settings.observed)
    summary = {
        "seeds": settings.offline_seeds,
        "learnt": len(learnt.reward),
        "held_out": len(episodes.reward),
        "steps": learnt.reward.shape[1] - 1,
        "observed": settings.observed,
        "ahead": settings.length - settings.observed,
        "copy_error": copied,
        "mean_reward_error": mean,
    }
    return EvalResult(metrics, {"offline": summary})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(dict(content), indent=2, sort_keys=True) + "\n")
