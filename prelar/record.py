"""Record an agent, or random actions: episodes as a folder of videos, or straight into a store.

Both can be pre-trained on: the folder as videos of one's own (`ssv2.source`), the store in a union. Episodes
differ from those of fine-tuning and evaluation under the same seed.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from prelar.config import Config
from prelar.control.agent import load_agent
from prelar.control.rollout import Policy, RandomPolicy, play
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
    evaluation, and is written before the next begins; the store appears whole. Splits are as of
    demonstrations. Raises `UserError` where there is no agent, nowhere to write, or something there already.
    """
    if folder is None and store is None:
        raise UserError("nowhere to record to; name a folder for videos, or --store NAME")
    target = Path(f"data/{store}.zarr") if store else None
    for place in (folder, target):
        if place is not None and place.exists() and not (place.is_dir() and not any(place.iterdir())):
            raise UserError(f"{place}: holds something already; name another, or delete it")
    gl.ensure()
    fabric = fabric_of(config)
    agent, described = load_agent(checkpoint, device=fabric.device)
    task = described["task"]
    name = task.replace("/", "-").replace(":", "-")
    jobs = [Job(name, 0, number) for number in range(episodes)]
    splits = Splits(jobs, [])
    with contextlib.ExitStack() as contexts:
        simulator = contexts.enter_context(make_env_of(described, config))
        writer = None
        if target is not None:
            staged = target.with_name(f".{target.stem}.recording") / target.name
            files.remove(staged.parent)
            staged.parent.mkdir(parents=True)
            writer = contexts.enter_context(StoreWriter(staged, arrays={"actions": simulator.action_dim}))
        env = PixelEnv(simulator, seed=episode_seed(RngStream.RECORDED_EPISODES, config.seed))
        policy: Policy = RandomPolicy(simulator.action_dim) if random else agent
        fps = simulator.fps / simulator.action_repeat
        for job in tqdm(jobs, desc="record", unit="episode", disable=None):
            episode = play(env, policy, episode=job.episode, seed=config.seed, keep_frames=True)
            assert episode.frames is not None
            if folder is not None:
                write_mp4(folder / name / f"episode-{job.episode:04d}.mp4", episode.frames, fps)
            if writer is not None:
                row = {"id": job.clip_id("agent"), "split": splits.deal(name), "label": name, "label_id": 0}
                row |= {"width": SIZE, "height": SIZE, "fps": fps, "task": name, "variation": 0}
                row |= {"camera": "agent", "episode": job.episode, "success": episode.success}
                row["sha256"] = hashlib.sha256(episode.frames.tobytes()).hexdigest()
                no_action = np.zeros_like(episode.actions[:1])  # after the last frame
                writer.append(episode.frames, row, actions=np.concatenate([episode.actions, no_action]))
        if writer is not None:
            source = {"name": "random actions" if random else "agent", "task": task, "seed": config.seed}
            writer.finish({"source": source, "alignment": ALIGNMENT})
    if target is not None:
        files.publish(index_path(staged), index_path(target))
        files.publish(staged, target)
        files.remove(staged.parent)
    places = " and ".join(str(place) for place in (folder, target) if place is not None)
    print(f"record: {episodes} episodes of {task} -> {places}", flush=True)
