"""Record an agent, or random actions: episodes as a folder of videos, or straight into a store.

Both can be pre-trained on: the folder as videos of one's own (`ssv2.source`), the store in a union. Episodes
differ from those of fine-tuning and evaluation under the same seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from prelar.config import Config
from prelar.control.agent import load_agent
from prelar.control.rollout import Episode, Policy, RandomPolicy, play
from prelar.demos.episodes import ALIGNMENT, Job, Splits
from prelar.envs import gl, make_env_of
from prelar.envs.pixels import PixelEnv
from prelar.store.schema import index_path
from prelar.store.writer import StoreWriter
from prelar.train.loop import fabric_of
from prelar.utils import files
from prelar.utils.errors import UserError
from prelar.utils.frames import SIZE
from prelar.utils.seeds import RngStream, episode_seed
from prelar.utils.video_file import write_mp4


def run(
    config: Config, checkpoint: Path, folder: Path | None, *, store: str | None, episodes: int, random: bool
) -> None:
    """Play episodes of a fine-tuning checkpoint and write them to `folder`, `data/<store>.zarr`, or both.

    random: random actions in the checkpoint's task instead of the agent's. An episode ends as in the
    evaluation. Raises `UserError` where there is no agent, nowhere to write, or something there already.
    """
    if folder is None and store is None:
        raise UserError("nowhere to record to; name a folder for videos, or --store NAME")
    target = Path(f"data/{store}.zarr") if store else None
    for place in (folder, target):
        if place is not None and place.exists() and any(place.iterdir()):
            raise UserError(f"{place}: holds something already; name another, or delete it")
    gl.ensure()
    fabric = fabric_of(config)
    agent, described = load_agent(checkpoint, device=fabric.device)
    task = described["task"]
    with make_env_of(described, time_limit=config.evaluate.time_limit) as simulator:
        env = PixelEnv(simulator, seed=episode_seed(RngStream.RECORDED_EPISODES, config.seed))
        policy: Policy = RandomPolicy(simulator.action_dim) if random else agent
        played = [
            play(env, policy, episode=number, seed=config.seed, keep_frames=True)
            for number in tqdm(range(episodes), desc="record", unit="episode", disable=None)
        ]
        fps = simulator.fps / simulator.action_repeat
    name = task.replace("/", "-").replace(":", "-")
    if folder is not None:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number, (frames, _) in enumerate(_arrays(played)):
            write_mp4(folder / name / f"episode-{number:04d}.mp4", frames, fps)
    if target is not None:
        source = {"name": "random actions" if random else "agent", "task": task, "seed": config.seed}
        write_store(target, name, played, fps, {"source": source, "alignment": ALIGNMENT})
    places = " and ".join(str(place) for place in (folder, target) if place is not None)
    print(f"record: {len(played)} episodes of {task} -> {places}", flush=True)


def write_store(
    path: Path, task: str, played: list[Episode], fps: float, attributes: dict[str, object]
) -> None:
    """Write episodes with their actions as a store; it appears whole. Splits are as of demonstrations."""
    staged = path.with_name(f".{path.stem}.recording")
    files.remove(staged)
    staged.mkdir(parents=True)
    jobs = [Job(task, 0, number) for number in range(len(played))]
    splits = Splits(jobs, [])
    with StoreWriter(staged / path.name, arrays={"actions": played[0].actions.shape[1]}) as writer:
        for job, episode, (frames, actions) in zip(jobs, played, _arrays(played), strict=True):
            row = {"id": job.clip_id("agent"), "split": splits.deal(task), "label": task, "label_id": 0}
            row |= {"width": SIZE, "height": SIZE, "fps": fps, "task": task, "variation": 0}
            row |= {"camera": "agent", "episode": job.episode, "success": episode.success}
            row["sha256"] = hashlib.sha256(frames.tobytes()).hexdigest()
            writer.append(frames, row, actions=actions)
        writer.finish(attributes)
    files.publish(index_path(staged / path.name), index_path(path))
    files.publish(staged / path.name, path)
    files.remove(staged)


def _arrays(played: list[Episode]) -> Iterator[tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]]:
    """Frames uint8 (T, 64, 64, 3) of each episode and the action after each, zero after the last (T, A)."""
    for episode in played:
        assert episode.frames is not None
        yield episode.frames, np.concatenate([episode.actions, np.zeros_like(episode.actions[:1])])
