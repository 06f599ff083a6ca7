"""The evaluation: how often the agent succeeds, how well the models foresee, what the latent action means.

Writes metrics.json (few numbers, for `dvc metrics` and `dvc exp show`) and reports/evaluate (tables for
`dvc plots show`, videos, pictures, and what the report needs to know).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import torch
from tqdm import tqdm

from prelar.checkpoint import load_config, load_parts
from prelar.config import Config
from prelar.control.agent import load_agent
from prelar.control.envs import PixelEnv, Purpose, episode_seed
from prelar.control.rollout import Episode, Policy, RandomPolicy, play, summarise
from prelar.data.store import Store
from prelar.errors import UserError
from prelar.evaluation.panels import abreast, contact_sheet, write_png
from prelar.evaluation.prediction import Prediction, measure, write_prediction
from prelar.evaluation.probe import collect, run_probe, swap_actions
from prelar.files import publish, remove, write_text
from prelar.loop import set_up
from prelar.media import write_mp4
from prelar.methods import METHODS, build_pretrain
from prelar.model.world_model import WorldModel
from prelar.sim import ACTION_DIM, Simulator
from prelar.tables import write_tsv

PRETRAIN = Path("data/pretrain")
FINETUNE = Path("data/finetune")
REPORT = Path("reports/evaluate")
METRICS = Path("metrics.json")
SPLIT = "validation"
SHOWN_EPISODES = 3
KEPT_EPISODES = 10
VIDEO_SIZE = 192
VIDEO_FRAMES = 250
VIDEO_FPS = 25
SHEET = 32
EXAMPLES = 5

Frames = npt.NDArray[np.uint8]


def run(config: Config) -> None:
    """Evaluate the checkpoints in data/ and write metrics.json and reports/evaluate.

    Raises:
        UserError: a checkpoint or the store is missing, or was made with another method or task.
    """
    check_origin(PRETRAIN, load_config(PRETRAIN).get("model", {}), method=config.method)
    check_origin(FINETUNE, load_config(FINETUNE), method=config.method, task=config.task)
    fabric = set_up(device=config.device, precision=config.precision, threads=config.threads)
    store = Store.open(config.store)
    folder = REPORT.with_name(f".{REPORT.name}.partial")
    remove(folder)
    folder.mkdir(parents=True)

    metrics: dict[str, float] = {}
    summary: dict[str, Any] = {}
    agent, _ = load_agent(FINETUNE, device=fabric.device)
    with fabric.autocast():
        evaluate_agent(config, agent, folder, metrics, summary)
    if METHODS[config.method].pretrains:
        model = load_pretrained_model(fabric.device)
        with fabric.autocast():
            evaluate_prediction(config, model, store, folder, metrics, summary)
            evaluate_actions(config, model, store, folder, metrics, summary)
    else:
        for what in ("prediction", "probe"):
            summary[f"{what}_missing"] = (
                f"{config.method} does not pre-train, so there is nothing to measure."
            )
    describe_store(store, folder)

    _write_json(folder / "summary.json", summary)
    publish(folder, REPORT)
    _write_json(METRICS, {name: float(f"{value:.9g}") for name, value in metrics.items()})
    print(f"evaluate: {told(metrics)} -> {METRICS}, {REPORT}", flush=True)


def told(metrics: Mapping[str, float]) -> str:
    """The chief metrics in a line: success, return, and the error of the best model there is to predict."""
    words = [f"success {metrics['success_rate']:.0%}", f"return {metrics['return']:.4g}"]
    error = next((key for key in ("prediction_error", "prediction_error_policy") if key in metrics), None)
    if error:
        words.append(
            f"prediction error {metrics[error]:.3g} (copying the last frame: {metrics[f'{error}_copy']:.3g})"
        )
    return ", ".join(words)


def check_origin(folder: Path, described: Mapping[str, Any], **expected: str) -> None:
    """Raise `UserError` where a checkpoint's description says something else than params.yaml."""
    for key, value in expected.items():
        if described.get(key) != value:
            raise UserError(
                f"{folder}: made with {key} = {described.get(key)}, params.yaml says {value}; "
                f"run `dvc repro {folder.name}`"
            )


def load_pretrained_model(device: torch.device) -> WorldModel:
    """The pre-trained model of data/pretrain."""
    parts, described = load_parts(PRETRAIN)
    model = build_pretrain(**described["model"])
    model.load_state(parts)
    return model.to(device).eval()


# --- The agent --------------------------------------------------------------------------------------------


def evaluate_agent(
    config: Config, agent: Any, folder: Path, metrics: dict[str, float], summary: dict[str, Any]
) -> None:
    """Play the evaluation episodes; write their table and video, and how well the model foresees them."""
    settings = config.evaluate
    seed = episode_seed(config.seed, Purpose.EVALUATE)
    with Simulator(config.task, time_limit=settings.time_limit) as simulator:
        env = PixelEnv(simulator, seed=seed)
        count, chances = settings.episodes, RandomPolicy(ACTION_DIM)
        played = play_visibly(
            env, agent, episodes=count, seed=config.seed, name="the agent", keep_frames=KEPT_EPISODES
        )
        chance = play_visibly(env, chances, episodes=count, seed=config.seed, name="random actions")
        shown = played[:SHOWN_EPISODES]
        views = [film(simulator, seed, number, episode.actions) for number, episode in enumerate(shown)]
    video = abreast(views, [episode.success for episode in shown])
    write_mp4(folder / "policy.mp4", video, VIDEO_FPS)
    write_png(folder / "policy_poster.png", video[len(video) // 2])
    write_episodes(folder / "episodes.tsv", played)

    result = summarise(played)
    metrics |= {"success_rate": result["success"], "return": result["return"]}
    returns = [episode.total for episode in played]
    summary["policy"] = {"shown": len(shown)}
    summary["episodes"] = {
        "count": len(played),
        "successes": sum(episode.success for episode in played),
        "time_limit": settings.time_limit,
        "return_min": min(returns),
        "return_max": max(returns),
        "random": summarise(chance),
    }
    segments = cut_segments(played, settings.length, settings.clips)
    if segments is not None:
        frames, actions = segments
        device = agent.device
        found = measure(
            agent.model.open_loop,
            frames,
            observed=settings.observed,
            device=device,
            actions=actions,
            seed=config.seed,
        )
        write_prediction(folder, "prediction_policy", "open_loop_policy", found)
        _record(found, "prediction_policy", "prediction_error_policy", metrics, summary)


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


def write_episodes(path: Path, played: Sequence[Episode]) -> None:
    """A row for each episode: its number, steps, return and success."""
    write_tsv(
        path,
        {
            "episode": list(range(len(played))),
            "steps": [len(episode.rewards) for episode in played],
            "return": [episode.total for episode in played],
            "success": [float(episode.success) for episode in played],
        },
    )


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
    picks = np.unique(np.linspace(0, len(starts) - 1, min(count, len(starts))).round().astype(int))
    frames, actions = [], []
    for episode, start in (starts[pick] for pick in picks):
        assert episode.frames is not None
        frames.append(episode.frames[start : start + length])
        led = np.zeros((length, episode.actions.shape[1]), np.float32)
        led[1:] = episode.actions[start : start + length - 1]
        actions.append(led)
    return np.stack(frames), np.stack(actions)


# --- The pre-trained model --------------------------------------------------------------------------------


def evaluate_prediction(
    config: Config,
    model: WorldModel,
    store: Store,
    folder: Path,
    metrics: dict[str, float],
    summary: dict[str, Any],
) -> None:
    """Open-loop prediction of held-out clips; where the store has none, `summary` says so."""
    settings = config.evaluate
    truth = held_out(store, length=settings.length, count=settings.clips, seed=config.seed)
    if truth is None:
        summary["prediction_missing"] = (
            f"Not measured: no clip of the {SPLIT} split has {settings.length} frames or more."
        )
        return
    device = next(model.parameters()).device
    found = measure(model.open_loop, truth, observed=settings.observed, device=device, seed=config.seed)
    write_prediction(folder, "prediction", "open_loop", found)
    _record(found, "prediction", "prediction_error", metrics, summary)
    summary["prediction"] |= {"split": SPLIT, "latent": infers_actions(model)}


def evaluate_actions(
    config: Config,
    model: WorldModel,
    store: Store,
    folder: Path,
    metrics: dict[str, float],
    summary: dict[str, Any],
) -> None:
    """Probe the latent action and draw the action swap; `summary` says where a method has none."""
    if not infers_actions(model):
        summary["probe_missing"] = f"{config.method} infers no actions from video."
        return
    settings, device = config.evaluate, next(model.parameters()).device
    with Simulator(config.task) as simulator:
        seed = episode_seed(config.seed, Purpose.PROBE)
        episodes = collect(simulator, episodes=settings.probe_episodes, seed=seed)
    result = run_probe(model, episodes, updates=settings.probe_updates, seed=config.seed, device=device)
    _write_json(folder / "probe.json", result | {"task": config.task})
    metrics |= {"probe_r2": result["rows"][0]["mean"], "probe_r2_untrained": result["rows"][1]["mean"]}
    clips = held_out(store, length=settings.length, count=settings.clips, seed=config.seed)
    picture = None if clips is None else swap_actions(model, clips, observed=settings.observed, device=device)
    if picture is not None:
        write_png(folder / "action_swap.png", picture)


def infers_actions(model: WorldModel) -> bool:
    """Whether the model infers latent actions from frames."""
    device = next(model.parameters()).device
    images = torch.zeros(1, 2, 3, 64, 64, device=device)
    return model.infer_actions(images, torch.tensor([[True, False]], device=device)) is not None


def held_out(store: Store, *, length: int, count: int, seed: int) -> Frames | None:
    """Segments of at most `count` held-out clips, drawn by `seed`: uint8 (N, length, 64, 64, 3), or None."""
    clips = store.clips(SPLIT, min_length=length)
    if not len(clips):
        return None
    random = np.random.default_rng(seed)
    chosen = np.sort(random.permutation(clips)[:count])
    offsets = random.integers(0, store.clip_length[chosen] - length + 1)
    return store.read_many(store.clip_start[chosen] + offsets, length)


def _record(
    found: Prediction, name: str, metric: str, metrics: dict[str, float], summary: dict[str, Any]
) -> None:
    metrics[metric] = float(found.model.mean())
    metrics[f"{metric}_copy"] = float(found.copy.mean())
    clips, length = found.truth.shape[:2]
    summary[name] = {"clips": clips, "observed": found.observed, "length": length}


# --- The data ---------------------------------------------------------------------------------------------


def describe_store(store: Store, folder: Path) -> None:
    """Write what the page says of the store (dataset.json), and a contact sheet of its clips."""
    bad = store.index.filter(pc.equal(store.index["status"], "bad"))
    reasons: dict[str, list[str]] = {}
    for row in bad.select(["id", "reason"]).to_pylist():
        reasons.setdefault(row["reason"], []).append(row["id"])
    counts = pc.value_counts(store.clip_index["split"]).to_pylist()
    picks = np.unique(np.linspace(0, store.num_clips - 1, min(SHEET, store.num_clips)).round().astype(int))
    middles = store.clip_start[picks] + store.clip_length[picks] // 2
    write_png(folder / "contact_sheet.png", contact_sheet(store.read_many(middles, 1)[:, 0]))
    description = {
        "frames": store.num_frames,
        "clips": store.num_clips,
        "pairs": int((store.clip_length - 1).sum()),
        "labels": len(pc.unique(store.clip_index["label"])),
        "splits": {item["values"]: item["counts"] for item in sorted(counts, key=lambda i: str(i["values"]))},
        "bad": len(bad),
        "shortest": int(store.clip_length.min()),
        "longest": int(store.clip_length.max()),
        "median": float(np.median(store.clip_length)),
        "sheet": len(picks),
        "reasons": [
            {"reason": reason, "count": len(ids), "examples": ids[:EXAMPLES]}
            for reason, ids in sorted(reasons.items())
        ],
        "attributes": {
            key: value if isinstance(value, str) else json.dumps(value) for key, value in store.attrs.items()
        },
    }
    _write_json(folder / "dataset.json", description)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")
