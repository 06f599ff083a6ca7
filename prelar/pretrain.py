"""The stage `pretrain`: a method's world model learns from the videos of a store, without actions.

DreamerV2 does not pre-train: it takes zero steps and writes its untrained checkpoint the same way.
"""

from __future__ import annotations

import itertools
from dataclasses import fields
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from lightning_fabric import Fabric
from torch import Tensor

from prelar.config import Config
from prelar.methods import build_model, find_method
from prelar.model.images import denormalise, first_steps, normalise
from prelar.model.spec import ModelSpec
from prelar.model.world_model import WorldModel
from prelar.stages import stage_fingerprint
from prelar.store.store import Store
from prelar.train.checkpoint import Snapshots, resume_key, save_parts
from prelar.train.loop import Hook, Scalars, adam, compiles, descend, fabric_of, summary, train
from prelar.train.prefetch import BatchPrefetcher
from prelar.train.sampler import SegmentSampler
from prelar.utils.distributed import Processes
from prelar.utils.errors import UserError
from prelar.utils.video_file import side_by_side, write_mp4

OUTPUT = Path("data/pretrain")
REPORT = Path("reports/pretrain")
VIDEO = REPORT / "open_loop.mp4"

VIDEO_CLIPS = 4
VIDEO_OBSERVED = 5
VIDEO_FPS = 6.0


def run(cfg: Config) -> None:
    """Pre-train as `cfg` says, to `data/pretrain` and `reports/pretrain`.

    Goes on from the newest snapshot of the very same run where there is one. Raises `UserError` where the
    store is missing, its clips are too short or one tells no rate that `frame_gap` needs, and where a loss is
    not finite.
    """
    store = Store.open(cfg.store)
    fabric = fabric_of(cfg, cfg.devices)
    snapshots = Snapshots(run_key(cfg, store, fabric.world_size))
    model = _train(cfg, store, snapshots, fabric)
    if not fabric.is_global_zero:
        return
    save_parts(OUTPUT, model.state(), {"stage": "pretrain", "model": model.spec, "step": _steps(cfg)})
    snapshots.remove()
    print(summary(REPORT), end="")
    print(f"pretrain: {cfg.method}, {_steps(cfg)} steps on {store.path} -> {OUTPUT}, {REPORT}", flush=True)


def run_key(cfg: Config, store: Store, processes: int = 1) -> str:
    """The resume key: params, processes, code, and the store, known by its digest."""
    known = {"store": store.digest(), "processes": processes}
    fingerprint = stage_fingerprint("pretrain", cfg.model_dump(mode="json"))
    return resume_key("pretrain", fingerprint, known=known, inputs=[])


def _steps(cfg: Config) -> int:
    return cfg.pretrain.steps if find_method(cfg.method).pretrains else 0


def build(cfg: Config) -> WorldModel:
    """The untrained world model that the params ask for, its weights drawn from `seed`."""
    torch.manual_seed(cfg.seed)
    preset = cfg.pretrain.model_dump(include={field.name for field in fields(ModelSpec)})
    own = {"beta": cfg.beta, "beta_a": cfg.beta_a, "beta_c": cfg.beta_c, "action_dim": cfg.action_dim}
    preset |= {name: value for name, value in own.items() if value is not None}
    spec = ModelSpec(
        **preset,
        stage="pretrain",
        method=cfg.method,
        action_kind=cfg.action_kind,
        action_window=cfg.action_window,
        consistency=cfg.consistency,
        context_frame=cfg.context_frame,
        frame_gap=cfg.frame_gap,
    )
    return build_model(spec)


def _train(cfg: Config, store: Store, snapshots: Snapshots, fabric: Fabric) -> WorldModel:
    """Train the model, or finish its training, with log and videos."""
    preset = cfg.pretrain
    model = build(cfg).train()
    graphs = cfg.compile == "graphs"
    if compiles(cfg.compile, fabric):
        model.compile_training(dynamic=False, mode="reduce-overhead" if graphs else None)
    optimizer = adam(model.parameters(), preset.lr)
    module, wrapped = fabric.setup(model, optimizer)
    module.mark_forward_method("pretrain_losses")
    sampler = SegmentSampler(
        store,
        length=preset.length,
        batch=preset.batch,
        seed=cfg.seed,
        rank=fabric.global_rank,
        world=fabric.world_size,
        gap=cfg.frame_gap,
    )
    split, frames = watched_clips(store, preset.length, cfg.frame_gap)
    watched = frames.to(fabric.device)
    processes = Processes(fabric)

    with BatchPrefetcher(sampler.at, choose=int, device=fabric.device, depth=2) as batches:

        def step(index: int) -> Scalars:
            if graphs:
                torch.compiler.cudagraph_mark_step_begin()  # the last step is done with its outputs
            batch = batches.take(index)
            images = normalise(batch["image"].to(fabric.device, non_blocking=True))
            is_first = batch["is_first"].to(fabric.device, non_blocking=True)
            with fabric.autocast():
                losses, outputs = module.pretrain_losses(images, is_first)
            loss = model.total(losses)
            norm = descend(fabric, wrapped, loss)
            scalars = {f"loss/{name}": value.detach() for name, value in losses.items()}
            scalars |= {"loss/total": loss.detach(), "gradient_norm": norm} | outputs["metrics"]
            return processes.mean(scalars)

        def watch(done: int) -> Scalars:
            with torch.compiler.set_stance("force_eager"):
                return {f"{split}/prediction_error": show(model, watched, VIDEO)}

        train(
            step,
            name="pretrain",
            steps=_steps(cfg),
            seed=cfg.seed,
            state={"model": model, "optimizer": optimizer},
            snapshots=snapshots,
            snapshot_every=preset.checkpoint_every,
            log_folder=REPORT,
            log_every=preset.log_every,
            hooks=[Hook(preset.video_every, watch, video=(f"{split}/open_loop", VIDEO))],
            loggers=cfg.loggers,
            fabric=fabric,
        )
    return model


def watched_clips(store: Store, length: int, gap: float | None = None) -> tuple[str, Tensor]:
    """The clips of the video: their split and their first `length` frames, uint8 (N, length, 64, 64, 3).

    The frames are neighbours, or `gap` seconds apart. The clips are the first validation clips that are long
    enough, of a mixture from its sources in turn; where there is none, training clips.
    """
    for split in ("validation", "train"):
        long = store.clips(split=split, min_length=length, gap=gap)
        rounds = itertools.zip_longest(*store.split_parts(long))
        turns = (clip for turn in rounds for clip in turn if clip is not None)
        clips = np.fromiter(itertools.islice(turns, VIDEO_CLIPS), np.int64)
        if len(clips) > 0:
            strides = store.strides(gap)[clips]
            return split, torch.from_numpy(store.read_many(store.clip_start[clips], length, strides=strides))
    raise UserError(f"{store.path}: no clip has {length} frames; lower length to that of its clips")


def show(model: WorldModel, frames: Tensor, path: Path) -> Tensor:
    """Write the video that compares open-loop predictions with frames uint8 (N, T, 64, 64, 3).

    The model sees the first frames only. Returns the mean squared error of the frames that it does not see,
    of pixels in [0, 1], a 0-d tensor.
    """
    observed = min(VIDEO_OBSERVED, frames.shape[1] // 2)
    images = normalise(frames)
    is_first = first_steps(len(frames), frames.shape[1], frames.device)
    predicted = model.open_loop(images, is_first, observed)
    write_mp4(
        path, side_by_side(_numpy(frames), _numpy(denormalise(predicted)), observed=observed), VIDEO_FPS
    )
    return (predicted - images)[:, observed:].square().mean()


def _numpy(frames: Tensor) -> npt.NDArray[np.uint8]:
    array: npt.NDArray[np.uint8] = frames.cpu().numpy()
    return array
